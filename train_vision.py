"""Trains one configuration: wires configuration, data, model and engine, whose logic does not live here.

python train_vision.py --config configs/ssv2.yaml [--set solver.lr=5e-4 ...]
bash scripts/run_train_vision.sh configs/ssv2.yaml          the same on all GPUs, through torchrun
"""

from __future__ import annotations

import argparse
import logging
from datetime import datetime
from pathlib import Path

import torch

from clip.build import build_model, load_weights, parameter_report
from clip.groups import parameter_groups
from configs.schema import Config, check_same_run, load_config
from datasets.build import class_names, train_loader, val_loader
from engine import checkpoint
from engine.distributed import EngineError, Process, gather, run, seed_everything, start, unwrap, wrap
from engine.log import RunFolder, setup_logging
from engine.loop import LoopSettings, Trainee, evaluate, fit, log_accuracy, steps_per_epoch
from engine.optim import (
    ClipMixup,
    build_criterion,
    build_optimizer,
    check_groups,
    resolve_precision,
    warmup_cosine,
)
from engine.pixels import Normalizer

logger = logging.getLogger("td4v")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--log_time` and `--precision` are the published script's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", "-cfg", required=True, help="a YAML file, see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. solver.lr=5e-4")
    parser.add_argument("--output", help="run folder (default: OUTPUT_DIR/DATASET/ARCH/LOG_TIME, or that of resume)")
    parser.add_argument("--log_time", help="name of the run (default: the time)")
    parser.add_argument("--precision", choices=["amp", "fp16", "bf16", "fp32"], help="instead of solver.precision")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: CUDA where there is a GPU")
    return parser.parse_args()


def run_folder(config: Config, arguments: argparse.Namespace, resumable: bool) -> tuple[Path, bool]:
    """Where the run goes, the same on every process, and whether it goes on with what is there.

    Only last_model.pt goes on in its own folder: an older checkpoint would overwrite what came after it.
    """
    home = Path(config.resume).parent if resumable and Path(config.resume).name == "last_model.pt" else None
    name = arguments.log_time or gather(datetime.now().strftime("%Y%m%d_%H%M%S"))[0]
    default = home or Path(config.logging.output_dir, config.data.dataset, config.network.arch.replace("/", "-"), name)
    folder = Path(arguments.output) if arguments.output else default
    return folder, home is not None and folder.resolve() == home.resolve()


def initial_weights(model: torch.nn.Module, config: Config) -> bool:
    """Load `pretrain` or `resume`; True if the latter holds a whole run to go on with, not weights alone."""
    path = config.resume or config.pretrain
    if path is None:
        return False
    content = checkpoint.load(path)
    drop_head = config.pretrain_head == "drop" and path == config.pretrain
    load_weights(model, checkpoint.weights_of(content, path), path, drop_head)
    resumable = config.resume is not None and checkpoint.is_resumable(content)
    if resumable:
        check_same_run(content["config"], config, path)
    elif config.resume:
        logger.warning("%s: holds weights but no run of ours to go on with: training starts at epoch 0 with them", path)
    return resumable


def main() -> None:
    """Configuration, data, model, engine."""
    arguments = parse_arguments()
    process = start(arguments.device)
    setup_logging(process)
    overrides = [*arguments.set, *([f"solver.precision={arguments.precision}"] if arguments.precision else [])]
    config = load_config(arguments.config, overrides)
    data, solver = config.data, config.solver
    precision = resolve_precision(solver.precision, process.device)
    normalizer = Normalizer(data.mean, data.std)

    torch.manual_seed(config.seed)  # the same start on every process
    model = build_model(config, pretrained=not (config.resume or config.pretrain))
    ours = (process.rank, process.world_size)
    class_names(data)  # a label list that does not fit should not be found out at the end
    validation = val_loader(data, config.seed, *ours)
    resumable = initial_weights(model, config)
    report = parameter_report(model)
    if solver.evaluate:
        logger.info("%s", report)
        model.to(process.device)
        expected, every = len(validation.dataset), config.logging.print_freq
        log_accuracy("validation", evaluate(model, validation, process, precision, expected, every, normalizer))
        return
    training = train_loader(data, config.seed, *ours, model.frames_per_segment)
    model = wrap(model, process, config.network.sync_bn)
    seed_everything(config.seed, process)
    groups = parameter_groups(unwrap(model), solver.lr, solver.clip_ratio)
    check_groups(unwrap(model), groups)
    optimizer = build_optimizer(groups, solver.optim, solver.weight_decay, solver.betas, solver.eps, solver.momentum)
    steps = steps_per_epoch(training, solver.grad_accumulation_steps)
    mixing = (solver.mixup_alpha, solver.cutmix_alpha, solver.smoothing, data.num_classes)
    trainee = Trainee(
        model=model,
        criterion=build_criterion(solver.smoothing, solver.mixup),
        optimizer=optimizer,
        scheduler=warmup_cosine(optimizer, steps, solver.epochs, solver.lr_warmup_step),
        scaler=precision.scaler(process.device),
        precision=precision,
        mixup=ClipMixup(*mixing) if solver.mixup else None,
        normalizer=normalizer,
    )
    settings = LoopSettings(
        solver.epochs, config.logging.print_freq, config.logging.eval_freq, config.logging.skip_epoch,
        solver.grad_accumulation_steps, solver.clip_grad,
    )  # fmt: skip
    folder, resume = run_folder(config, arguments, resumable)
    shown = {"mean": data.mean, "std": data.std, "clips": config.logging.clips}
    with RunFolder(folder, config.to_dict(), process, resume=resume, **shown) as record:
        logger.info("%s", report)
        describe(config, process, len(training.dataset), len(validation.dataset), folder)
        from_run = config.resume if resumable else None
        state = fit(trainee, training, validation, len(validation.dataset), process, settings, record, from_run)
        logger.info("finished: best top-1 %.2f, checkpoints and curves in %s", state.best, folder)


def describe(config: Config, process: Process, train: int, val: int, folder: Path) -> None:
    """Say what is about to happen."""
    data, solver = config.data, config.solver
    batch = data.batch_size * data.num_sample * process.world_size * solver.grad_accumulation_steps
    logger.info(
        "%s on %s: %d training and %d validation videos, %d classes, T = %d, %d clips a step on %d x %s, %s",
        *(config.network.method_name, data.dataset, train, val, data.num_classes, data.num_segments, batch),
        *(process.world_size, process.device.type, folder),
    )


if __name__ == "__main__":
    run(main, (EngineError, ValueError, OSError))
