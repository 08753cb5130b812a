"""Trains a model, as a configuration says.

python train_vision.py --config configs/ssv2.yaml [--set solver.lr=5e-4 ...]
bash scripts/run_train_vision.sh configs/ssv2.yaml          the same on all GPUs, through torchrun

Rerunning a command resumes its unfinished run; once that is finished, it starts another.
"""

from __future__ import annotations

import argparse

from common.console import Parser, expanded


def parse_arguments() -> argparse.Namespace:
    """The command line; `--log_time` and `--precision` are the published script's."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", "-cfg", required=True, type=expanded, help="a YAML file, see configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. solver.lr=5e-4"
    )
    parser.add_argument(
        "--output", type=expanded, help="run folder (default: the unfinished run of this configuration, else a new one)"
    )
    parser.add_argument(
        "--log_time", type=expanded, help="name of the run in OUTPUT_DIR/DATASET/ARCH (default: the time)"
    )
    parser.add_argument("--fresh", action="store_true", help="start a new run even if one can be resumed")
    parser.add_argument("--dry-run", action="store_true", help="one batch of each kind, to see time and memory")
    parser.add_argument("--precision", choices=["amp", "fp16", "bf16", "fp32"], help="instead of solver.precision")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: CUDA if there is a GPU")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports below, which take seconds, so that --help answers at once

import dataclasses
import functools
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from torch import nn

from configs.compare import fill_from_checkpoint, override_keys
from configs.schema import Config, ConfigError, load_config, require_data_paths
from datasets.build import (
    Sources,
    check_paths,
    class_names,
    listed_loader,
    log_doubts,
    read_sources,
    train_loader,
    val_loader,
)
from engine.build import build_training_state, clips_per_step
from engine.checkpoint_file import Checkpoint
from engine.checkpointer import Progress
from engine.compiler import check_compiler
from engine.distributed import Process, move_to_device, start, wrap
from engine.dry_run import dry_run
from engine.entry import run
from engine.errors import EngineError
from engine.evaluation import evaluate, log_accuracy
from engine.feature_cache import FeatureCache
from engine.log import setup_logging
from engine.normalize import Normalizer
from engine.optim import Precision, resolve_precision
from engine.resume import RunPlan, plan_run
from engine.rng import seed_everything
from engine.run_dir import RunDir
from engine.run_info import run_info
from engine.trainer import Trainer, TrainerSettings, steps_per_epoch
from models.function import check_class_names, check_function
from models.loading import load_run_weights, load_weights
from models.parameters import ParameterReport, check_trainable, frozen_identity, parameter_groups, parameter_report
from models.registry import build_model, run_home, with_pixel_statistics

logger = logging.getLogger("td4v")


def main(arguments: argparse.Namespace) -> None:
    """Configuration, run, model, loaders, trainer."""
    process = start(arguments.device)
    setup_logging(process)
    config = read_config(arguments)
    check_compiler(config.solver.compile, process.device)
    sources, names = read_lists(config, process)
    precision = resolve_precision(config.solver.precision, process.device, config.solver.tf32)
    trains = not (config.solver.evaluate or arguments.dry_run)
    meta = run_info({key: getattr(config.data, key) for key in ("train_list", "val_list", "label_list")}, config.seed)
    where = {"home": run_home(config), "output": arguments.output, "name": arguments.log_time, "fresh": arguments.fresh}
    plan = plan_run(config, meta, process, writes=trains, **where)
    meta["class_names"] = recorded_names(names, plan)
    # A resumed run gets its weights with the rest of its state, unless features are computed with them before.
    restores = plan.resumes and trains and config.network.cache_features == "off"
    model, config = build_start(config, plan, names, loads=not restores, explicit=override_keys(arguments.set))
    report = parameter_report(model)
    meta["parameters"] = dataclasses.asdict(report)
    loaders = build_loaders(config, model, sources, meta["lists"], process, precision, dry=arguments.dry_run)
    if not trains:
        logger.info("%s", report)
    if config.solver.evaluate:
        evaluate_only(config, model, loaders, process, precision)
        return
    backbone = plan.checkpoint.backbone if plan.resumes else frozen_identity(model)
    model = wrap(model, process, config.network.sync_bn, config.solver.compile)
    seed_everything(config.seed, process)  # after all that may draw, such as computing cached features
    steps = steps_per_epoch(len(loaders["train_loader"]), config.solver.grad_accumulation_steps)
    state = build_training_state(config, model, parameter_groups, precision, process, steps, backbone)
    settings = TrainerSettings.from_config(config, full=plan.brings_backbone)
    if arguments.dry_run:
        dry_run(state, **loaders, process=process, settings=settings)
        return
    run_dir = build_run_dir(config, plan, meta, process, state.normalizer)
    trainer = Trainer(state, **loaders, process=process, settings=settings, run=run_dir)
    if plan.resumes:
        trainer.restore(plan.checkpoint, load_run_weights)  # may refuse, so it comes before anything is written
    with run_dir:
        log_start(config, report, loaders, process, run_dir.path)
        progress = trainer.fit()
        log_end(progress, run_dir.path)


def read_config(arguments: argparse.Namespace) -> Config:
    """The configuration, after the checks that take no time."""
    precision = [f"solver.precision={arguments.precision}"] if arguments.precision else []
    config = load_config(arguments.config, [*arguments.set, *precision])
    splits = used_splits(config)
    require_data_paths(config, splits, arguments.config)
    for split in splits:
        check_paths(config.data, split)
    return config


def used_splits(config: Config) -> tuple[str, ...]:
    """The splits whose videos are read."""
    return ("val",) if config.solver.evaluate else ("train", "val")


def read_lists(config: Config, process: Process) -> tuple[Sources, tuple[str, ...] | None]:
    """The rows of the lists, with a warning where they probably mean something else, and the names of the classes."""
    sources, names = read_sources(config.data, used_splits(config)), class_names(config.data)
    if process.is_main:
        log_doubts(config.data, sources, names)
    return sources, names


def recorded_names(names: tuple[str, ...] | None, plan: RunPlan) -> list[str] | None:
    """The names of the classes for checkpoints: a resumed run keeps those it has if data.label_list is not given now."""
    if names is None and plan.resumes:
        names = plan.checkpoint.class_names
    return None if names is None else list(names)


def build_start(
    config: Config, plan: RunPlan, names: tuple[str, ...] | None, loads: bool, explicit: list[str]
) -> tuple[nn.Module, Config]:
    """The model that the run starts with, and the configuration with what follows from the model.

    Args:
        names: of the classes, in data.label_list.
        loads: load the weights of the checkpoint, if there is one.
        explicit: the dotted keys that were named on the command line.
    """
    checkpoint = plan.checkpoint
    drops_head = config.pretrain is not None and config.pretrain_head == "drop" and not plan.resumes
    needs_clip = not plan.brings_backbone or (drops_head and config.network.head == "text")  # made of CLIP's text tower
    if checkpoint is not None and not config.network.init and config.network.head == "linear":
        needs_clip = False  # what is frozen follows from the seed, and the checkpoint brings the rest
    model = build_model(config, pretrained=needs_clip, class_names=None if plan.resumes else names)
    if checkpoint is not None and not plan.resumes:
        keeps_head = config.pretrain is None or not drops_head
        compare_with_start(config, checkpoint, names if keeps_head else None, explicit)
    if checkpoint is not None and loads:
        load_weights(
            model,
            checkpoint.weights,
            str(checkpoint.path),
            drop_head=drops_head,
            backbone=checkpoint.missing_backbone,
        )
    if not plan.resumes and not config.solver.evaluate:
        check_trainable(model)
    saved_config = checkpoint.config if checkpoint is not None else None
    return model, with_pixel_statistics(fill_from_checkpoint(config, saved_config), model)


def compare_with_start(
    config: Config, checkpoint: Checkpoint, names: tuple[str, ...] | None, explicit: list[str]
) -> None:
    """Compare the run with what its first weights were trained with. Training may differ, with a warning.

    Args:
        names: of the classes, where the checkpoint's classifier is kept.
        explicit: the dotted keys that were named on the command line.

    Raises:
        ConfigError: solver.evaluate would test another function or other classes, as in test_vision.py.
    """
    trains = not config.solver.evaluate
    check_function(checkpoint.config, config, checkpoint.path, explicit=explicit, warn_only=trains)
    try:
        check_class_names(checkpoint.class_names, names, checkpoint.path, explicit="data.label_list" in explicit)
    except ConfigError as error:
        if not trains:
            raise
        logger.warning("%s; pretrain_head: drop starts a new classifier", error)


def build_loaders(
    config: Config,
    model: nn.Module,
    sources: Sources,
    lists: dict[str, Any],
    process: Process,
    precision: Precision,
    dry: bool,
) -> dict[str, Any]:
    """Loaders of videos, or of cached features: the Trainer's arguments train_loader, val_loader and val_videos.

    Args:
        sources: the videos of each split. lists: of run_info, for the hashes of the data lists.
        dry: only log what a cache would take.
    """
    data, cached = config.data, config.network.cache_features
    shard = {"seed": config.seed, "rank": process.rank, "world_size": process.world_size}
    shard["frames_per_segment"] = model.frames_per_segment
    val = val_loader(data, **shard, source=sources["val"])
    train = None if config.solver.evaluate else train_loader(data, **shard, source=sources["train"])
    if cached != "off":
        normalizer, sha256 = Normalizer(data.mean, data.std), frozen_identity(model)["sha256"]
        cache = FeatureCache(config, lists, model, sha256, process, precision, normalizer)
        if dry:
            cost = cache.cost(len(val.dataset) + (len(train.dataset) if cached == "all" else 0))
            logger.info("network.cache_features %s would keep %s; the estimate below is without it", cached, cost)
        else:
            val = cache.loader("val", val, val)
        if cached == "all" and not dry and train is not None:
            train = cache.loader("train", listed_loader(data, **shard, source=sources["train"]), train)
    return {"train_loader": train, "val_loader": val, "val_videos": len(val.dataset)}


def evaluate_only(
    config: Config, model: nn.Module, loaders: dict[str, Any], process: Process, precision: Precision
) -> None:
    """solver.evaluate: the accuracy on the validation videos, and nothing else."""
    move_to_device(model, process, config.solver.compile)
    accuracy = evaluate(
        model,
        loaders["val_loader"],
        process,
        precision,
        loaders["val_videos"],
        print_freq=config.logging.print_freq,
        normalizer=Normalizer(config.data.mean, config.data.std),
    )
    log_accuracy("validation", accuracy)


def build_run_dir(
    config: Config, plan: RunPlan, meta: dict[str, Any], process: Process, normalizer: Normalizer
) -> RunDir:
    """The run folder, which is not written before it is opened."""
    return RunDir(
        plan.folder,
        config.to_dict(),
        meta,
        process,
        resume=plan.in_place,
        state=plan.state,
        auto_named=plan.auto_named,
        normalizer=normalizer,
        clips=config.logging.clips if config.network.cache_features != "all" else 0,
    )


def log_start(config: Config, report: ParameterReport, loaders: dict[str, Any], process: Process, folder: Path) -> None:
    """What is trained, on what, and where it goes."""
    data, videos = config.data, len(loaders["train_loader"].dataset)
    logger.info("%s", report)
    logger.info(
        f"{config.network.model_name} on {data.dataset}: {videos} training and {loaders['val_videos']} validation "
        f"videos, {data.num_classes} classes, T = {data.num_segments}, {clips_per_step(config, process)} clips a step "
        f"on {process.world_size} x {process.device.type}, {folder}"
    )


def log_end(progress: Progress, folder: Path) -> None:
    """The result, and as the last line the command that tests it."""
    script = Path(sys.argv[0]).with_name("test_vision.py")
    logger.info("finished: best top-1 %.2f, checkpoints and curves in %s", progress.best, folder)
    logger.info("test it with: python %s", shlex.join([str(script), "--weights", str(folder)]))


if __name__ == "__main__":
    run(functools.partial(main, ARGUMENTS), errors=(EngineError, ValueError, OSError))
