"""Tests a checkpoint, or CLIP itself, with crops x clips, each video exactly once on any number of processes.

python test_vision.py --weights RUN --test_crops 3 --test_clips 4             the best model of a run, as it was trained
python test_vision.py --config configs/ssv2.yaml --weights theirs.pt          a checkpoint of the authors
python test_vision.py --config configs/ucf101/zero_shot.yaml                  CLIP's weights and text head, untrained
bash scripts/run_test_vision.sh RUN --test_crops 3 --test_clips 4             on all GPUs, through torchrun
"""

from __future__ import annotations

import argparse

from common.console import Parser, expanded


def parse_arguments() -> argparse.Namespace:
    """The command line of the published script; --weights may be a run folder."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--weights", type=expanded, help="a run folder, for its model_best.pt, or a checkpoint, ours or the authors'"
    )
    parser.add_argument("--config", type=expanded, help="a YAML file (default: the configuration in the checkpoint)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. data.workers=8"
    )
    parser.add_argument(
        "--test_crops",
        type=int,
        default=1,
        choices=[1, 3, 5, 10],
        help="centre; 3 along the long side; corners and centre; those and mirrored",
    )
    parser.add_argument("--test_clips", type=int, default=1, help="clips along a video")
    parser.add_argument(
        "--dense",
        action=argparse.BooleanOptionalAction,
        help="dense sampling, a span of 128 frames a clip (default: data.dense)",
    )
    parser.add_argument(
        "--json", type=expanded, help="where the results go (default: beside the weights, or OUTPUT_DIR/DATASET/ARCH)"
    )
    parser.add_argument("--precision", choices=["amp", "fp16", "bf16", "fp32"], help="instead of solver.precision")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: CUDA if there is a GPU")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports below, which take seconds, so that --help answers at once

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

from torch import nn

from configs.compare import fill_from_checkpoint, override_keys
from configs.schema import Config, ConfigError, load_config, require_data_paths
from datasets.build import check_paths, class_names, log_doubts, read_sources, test_loader, warn_of_training_list
from engine import checkpoint_file, results
from engine.checkpoint_file import Checkpoint
from engine.compiler import check_compiler
from engine.distributed import move_to_device, start
from engine.entry import run
from engine.errors import EngineError
from engine.evaluation import evaluate, log_accuracy
from engine.log import setup_logging
from engine.normalize import Normalizer
from engine.optim import resolve_precision
from engine.run_info import describe_list, run_info
from models.function import check_class_names, check_function
from models.loading import WeightsError, check_untrained, load_weights
from models.parameters import parameter_report
from models.registry import build_model, run_home, uses_tower, with_pixel_statistics

logger = logging.getLogger("td4v")


def main(arguments: argparse.Namespace) -> None:
    """Checkpoint, configuration, model, loader, evaluation, results."""
    process = start(arguments.device)
    setup_logging(process)
    checkpoint = checkpoint_file.load_weights_file(arguments.weights) if arguments.weights else None
    config = read_config(arguments, checkpoint)
    names = compare(arguments, config, checkpoint)
    check_compiler(config.solver.compile, process.device)
    sources = read_sources(config.data, ("test",))
    if process.is_main:
        log_doubts(config.data, sources, names)
        if checkpoint is not None:
            warn_of_trained(checkpoint, config, sources["test"])
    precision = resolve_precision(config.solver.precision, process.device, config.solver.tf32)
    target = results_path(arguments, config, checkpoint)
    results.check_target(target, makes_folder=checkpoint is None)
    model = build_tested(config, checkpoint, names)
    saved_config = checkpoint.config if checkpoint is not None else None
    config = with_pixel_statistics(fill_from_checkpoint(config, saved_config), model)
    move_to_device(model, process, config.solver.compile).eval()
    views = {"crops": arguments.test_crops, "clips": arguments.test_clips, "dense": uses_dense(arguments, config)}
    shard = {"seed": config.seed, "rank": process.rank, "world_size": process.world_size}
    frames_per_segment = model.frames_per_segment
    loader = test_loader(config.data, **shard, **views, frames_per_segment=frames_per_segment, source=sources["test"])
    report, videos = parameter_report(model), len(loader.dataset)
    number = views["crops"] * views["clips"]
    logger.info("%s; testing %d videos, %d %s each", report, videos, number, "view" if number == 1 else "views")
    normalizer, print_freq = Normalizer(config.data.mean, config.data.std), config.logging.print_freq
    accuracy = evaluate(model, loader, process, precision, videos, print_freq=print_freq, normalizer=normalizer)
    log_accuracy(f"{arguments.test_crops} crops x {arguments.test_clips} clips", accuracy)
    if process.is_main:
        about = {**views, "parameters": dataclasses.asdict(report), **origin(config, checkpoint, model)}
        target.parent.mkdir(parents=True, exist_ok=True)
        results.write(target, accuracy, names, about)


def origin(config: Config, checkpoint: Checkpoint | None, model: nn.Module) -> dict[str, Any]:
    """Where the numbers of a test come from, for its results."""
    return {
        "weights": str(checkpoint.path) if checkpoint is not None else ", ".join(model.origin),
        "epoch": checkpoint.epoch if checkpoint is not None else None,
        "config": config.to_dict(),
        "meta": run_info({"test_list": test_list(config)}, config.seed),
    }


def read_config(arguments: argparse.Namespace, checkpoint: Checkpoint | None) -> Config:
    """The configuration of --config, else of the checkpoint, after the checks that take no time."""
    if arguments.test_clips < 1:
        raise ConfigError(f"--test_clips must be above 0, not {arguments.test_clips}")
    source = arguments.config
    if source is None:
        if checkpoint is None:
            raise ConfigError("--weights: name a run folder or a checkpoint, or give --config to test CLIP itself")
        if checkpoint.config is None:
            raise ConfigError(
                f"{checkpoint.path}: holds no configuration: name the one it was trained with by --config"
            )
        source = checkpoint.path
    overrides = [*arguments.set, *([f"solver.precision={arguments.precision}"] if arguments.precision else [])]
    try:
        config = load_config(arguments.config or checkpoint.config, overrides)
    except ConfigError as error:
        raise ConfigError(str(error) if arguments.config else f"{source}: {error}") from None
    if checkpoint is None and config.network.head == "linear":
        raise ConfigError("--weights: is needed, for network.head linear starts with a random classifier")
    if uses_dense(arguments, config):
        dataclasses.replace(config.data, dense=True).check()
    require_data_paths(config, ("test",), source)
    check_paths(config.data, "test")
    return config


def compare(arguments: argparse.Namespace, config: Config, checkpoint: Checkpoint | None) -> tuple[str, ...] | None:
    """The names of the classes, after the configuration was compared with that of the checkpoint.

    Raises:
        ConfigError: the weights were trained for another function or other classes.
    """
    if checkpoint is None:
        return class_names(config.data)
    named = override_keys(arguments.set)
    explicit = [*named, *([] if arguments.dense is None else ["data.dense"])]
    sampled = dataclasses.replace(config, data=dataclasses.replace(config.data, dense=uses_dense(arguments, config)))
    check_function(checkpoint.config, sampled, checkpoint.path, explicit=explicit)
    saved, label_list = checkpoint.class_names, config.data.label_list
    is_named = "data.label_list" in named
    is_given = arguments.config is not None or is_named
    if saved is not None and not is_given and label_list is not None and not Path(label_list).is_file():
        logger.info(
            "data.label_list: there is no file %s; the class names are those in %s", label_list, checkpoint.path
        )
        return saved
    return check_class_names(saved, class_names(config.data), checkpoint.path, explicit=is_named)


def uses_dense(arguments: argparse.Namespace, config: Config) -> bool:
    """Whether clips are dense: as --dense or --no-dense says, else as data.dense does."""
    return config.data.dense if arguments.dense is None else arguments.dense


def test_list(config: Config) -> str:
    """The list that is tested on."""
    return config.data.test_list or config.data.val_list


def warn_of_trained(checkpoint: Checkpoint, config: Config, tested: Any) -> None:
    """Log a warning if the tested list has videos that the checkpoint was trained on, where its training list is there."""
    recorded = checkpoint.lists.get("train_list")
    if not recorded or checkpoint.config is None:
        return
    now = describe_list(test_list(config))
    if now is not None and now["sha256"] == recorded["sha256"]:
        logger.warning("%s: is the list that %s was trained on: the accuracy says nothing about new videos",
                       tested.list_file, checkpoint.path)  # fmt: skip
        return
    try:
        trained = load_config(checkpoint.config).data
    except ConfigError:  # of another version
        return
    for list_file, data in ((recorded["path"], trained), (config.data.train_list, config.data)):  # there, or moved
        found = describe_list(list_file)
        same = found is not None and found["sha256"] == recorded["sha256"]
        if same and warn_of_training_list(tested, data, list_file):
            return


def build_tested(config: Config, checkpoint: Checkpoint | None, names: tuple[str, ...] | None) -> nn.Module:
    """The model with the weights of the checkpoint, or CLIP's alone."""
    trained_size, tested = config.data.input_size, config.data.for_testing()
    config = dataclasses.replace(config, data=tested)  # networks may depend on the size
    if checkpoint is None:
        model = build_model(config, class_names=names)
        check_untrained(model)
        return model
    model = build_model(config, pretrained=config.network.init and not checkpoint.has_backbone)
    try:
        load_weights(model, checkpoint.weights, str(checkpoint.path), backbone=checkpoint.missing_backbone)
    except WeightsError as error:
        if tested.input_size == trained_size or not uses_tower(config.network.model_name):
            raise
        sizes = f"data.test_size {tested.input_size} is not data.input_size {trained_size}"
        raise WeightsError(f"{error} ({sizes}, and a network with a position for each patch has one size)") from None
    return model


def results_path(arguments: argparse.Namespace, config: Config, checkpoint: Checkpoint | None) -> Path:
    """A name from weights and views, so that several tests stand beside each other."""
    if arguments.json:
        return Path(arguments.json)
    dense = "_dense" if uses_dense(arguments, config) else ""
    views = f"{arguments.test_crops}crops_{arguments.test_clips}clips{dense}.json"
    if checkpoint is not None:
        return checkpoint.path.with_name(f"{checkpoint.path.stem}_{views}")
    weights = Path(config.network.weights or "default")  # a file, or a tag
    return run_home(config) / f"zero_shot_{weights.stem if weights.is_file() else weights.name}_{views}"


if __name__ == "__main__":
    run(functools.partial(main, ARGUMENTS), errors=(EngineError, ValueError, OSError))
