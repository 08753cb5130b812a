"""Trains one configuration: wires configuration, data, model and engine, whose logic does not live here.

python train_vision.py --config configs/ssv2.yaml [--set solver.lr=5e-4 ...]
bash scripts/run_train_vision.sh configs/ssv2.yaml          the same on all GPUs, through torchrun

The same command goes on with the run that it began, until that is finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging

from configs.schema import fill_from_checkpoint, load_config, require_data_paths
from datasets.build import class_names, listed_loader, train_loader, val_loader
from engine import checkpoint_file, optim
from engine.build import base_lr, build_training_state, clips_per_step
from engine.distributed import move_to_device, start, unwrap, wrap
from engine.dry_run import dry_run
from engine.entry import run
from engine.errors import EngineError
from engine.evaluation import evaluate, log_accuracy
from engine.feature_cache import FeatureCache
from engine.log import setup_logging
from engine.normalize import Normalizer
from engine.resume import find_run, restarted, starting_point
from engine.rng import seed_everything
from engine.run_dir import RunDir
from engine.run_info import run_info
from engine.trainer import Trainer, TrainerSettings, steps_per_epoch
from models.loading import load_weights
from models.parameters import check_trainable, frozen_identity, parameter_groups, parameter_report
from models.registry import build_model, with_pixel_statistics

logger = logging.getLogger("td4v")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--log_time` and `--precision` are the published script's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", "-cfg", required=True, help="a YAML file, see configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. solver.lr=5e-4"
    )
    parser.add_argument(
        "--output", help="run folder (default: the unfinished run of this configuration, else a new one)"
    )
    parser.add_argument("--log_time", help="name of the run in OUTPUT_DIR/DATASET/ARCH (default: the time)")
    parser.add_argument("--fresh", action="store_true", help="begin another run, do not go on with an unfinished one")
    parser.add_argument("--dry-run", action="store_true", help="one batch of each kind through everything, then tell")
    parser.add_argument("--precision", choices=["amp", "fp16", "bf16", "fp32"], help="instead of solver.precision")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: CUDA where there is a GPU")
    return parser.parse_args()


def main() -> None:
    """Configuration, data, model, engine."""
    arguments = parse_arguments()
    process = start(arguments.device)
    setup_logging(process)
    overrides = [*arguments.set, *([f"solver.precision={arguments.precision}"] if arguments.precision else [])]
    config = load_config(arguments.config, overrides)
    require_data_paths(config, ("val",) if config.solver.evaluate else ("train", "val"), arguments.config)
    data, solver, saving = config.data, config.solver, config.checkpoint
    precision = optim.resolve_precision(solver.precision, process.device, solver.tf32)
    names = class_names(data)  # a label list that does not fit should not be found out at the end
    ours = (process.rank, process.world_size)
    validation = val_loader(data, config.seed, *ours)
    meta = run_info({key: getattr(data, key) for key in ("train_list", "val_list", "label_list")}, config.seed)
    trains = not solver.evaluate and not arguments.dry_run
    wishes = {"output": arguments.output, "name": arguments.log_time, "fresh": arguments.fresh and not restarted()}
    folder, going_on = find_run(config, meta, process, **wishes) if trains else (None, False)
    path, content, whole = starting_point(config, meta, folder if going_on else None, process)
    config = fill_from_checkpoint(config, content.get("config"))

    lean = checkpoint_file.lacks_backbone(content)
    brings_backbone = bool(content) and not lean  # as our checkpoints then must, for nothing else has those weights
    drop_head = config.pretrain_head == "drop" and path == config.pretrain
    needs_clip = not brings_backbone or (drop_head and config.network.head == "text")  # a text head is made of CLIP
    caches = config.network.cache_features if not arguments.dry_run else "off"
    model = build_model(config, needs_clip, None if whole else names)
    config = with_pixel_statistics(config, model)
    data = config.data
    normalizer = Normalizer(data.mean, data.std)
    # A run that goes on takes its weights with the rest of its state, unless features are computed before.
    if content and not (whole and trains and caches == "off"):
        identity = content["backbone"] if lean else None
        load_weights(model, checkpoint_file.weights_of(content, path), path, drop_head, identity)
    if not whole and not solver.evaluate:
        check_trainable(model)
    report = parameter_report(model)
    meta["parameters"] = dataclasses.asdict(report)
    if caches != "off":
        frozen = frozen_identity(model)["sha256"]
        cache = FeatureCache(config, meta["lists"], model, frozen, process, precision, normalizer)
        validation = cache.loader("val", validation, validation)
    if solver.evaluate:
        logger.info("%s", report)
        move_to_device(model, process, solver.compile)
        expected, every = len(validation.dataset), config.logging.print_freq
        log_accuracy("validation", evaluate(model, validation, process, precision, expected, every, normalizer))
        return
    backbone = frozen_identity(model) if lean or not whole else content["backbone"]
    training = train_loader(data, config.seed, *ours, model.frames_per_segment)
    if caches == "all":
        training = cache.loader("train", listed_loader(data, config.seed, *ours), training)
    model = wrap(model, process, config.network.sync_bn, solver.compile)
    seed_everything(config.seed, process)
    clips, lr = clips_per_step(config, process), base_lr(config, process)
    groups = parameter_groups(
        unwrap(model),
        lr=lr,
        weight_decay=solver.weight_decay,
        clip_ratio=solver.clip_ratio,
        layer_decay=solver.layer_decay,
        decay_norms=solver.decay_norms,
    )
    steps = steps_per_epoch(len(training), solver.grad_accumulation_steps)
    trainee = build_training_state(config, model, groups, lr, precision, process, steps, backbone)
    settings = TrainerSettings(
        solver.epochs, config.logging.print_freq, config.logging.eval_freq, config.logging.skip_epoch,
        solver.grad_accumulation_steps, solver.clip_grad, solver.early_stop, solver.max_bad_steps,
        saving.every_steps, saving.every_minutes, saving.keep, saving.full or brings_backbone,
    )  # fmt: skip
    loaders = (training, validation, len(validation.dataset))
    if arguments.dry_run:
        logger.info("%s", report)
        if (kept := config.network.cache_features) != "off":
            cache = FeatureCache(config, meta["lists"], unwrap(model), "", process, precision, normalizer)
            cost = cache.cost(len(validation.dataset) + (len(training.dataset) if kept == "all" else 0))
            logger.info("network.cache_features %s would keep %s; the estimate below is without it", kept, cost)
        dry_run(trainee, *loaders, process, settings)
        return
    shown = {"mean": data.mean, "std": data.std, "clips": config.logging.clips if caches != "all" else 0}
    with RunDir(folder, config.to_dict(), meta, process, resume=going_on, **shown) as record:
        logger.info("%s", report)
        logger.info(
            "%s on %s: %d training and %d validation videos, %d classes, T = %d, %d clips a step on %d x %s, %s",
            *(config.network.model_name, data.dataset, len(training.dataset), len(validation.dataset)),
            *(data.num_classes, data.num_segments, clips, process.world_size, process.device.type, folder),
        )
        state = Trainer(trainee, *loaders, process, settings, record).fit(path if whole else None, content)
        logger.info("finished: best top-1 %.2f, checkpoints and curves in %s", state.best, folder)


if __name__ == "__main__":
    run(main, (EngineError, ValueError, OSError))
