"""Tests one checkpoint, or CLIP itself, with crops x clips, each video exactly once on any number of processes.

python test_vision.py --config configs/ssv2.yaml --weights RUN/model_best.pt --test_crops 3 --test_clips 4
python test_vision.py --config configs/ucf101/zero_shot.yaml          CLIP's own weights, its text head, nothing trained
bash scripts/run_test_vision.sh configs/ssv2.yaml RUN/model_best.pt --test_crops 3 --test_clips 4
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

from clip.towers.weights import OPENAI, find_weights
from configs.schema import Config, ConfigError, fill_from_checkpoint, load_config, require_data_paths
from datasets.build import class_names, test_loader
from engine import checkpoint_file, results
from engine.distributed import move_to_device, start
from engine.entry import run
from engine.errors import EngineError
from engine.evaluation import evaluate, log_accuracy
from engine.log import setup_logging
from engine.normalize import Normalizer
from engine.optim import resolve_precision
from engine.run_info import run_info
from models.loading import check_untrained, load_weights
from models.parameters import parameter_report
from models.registry import build_model, with_pixel_statistics

logger = logging.getLogger("td4v")


def parse_arguments() -> argparse.Namespace:
    """The command line of the published script, and --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the YAML file that the checkpoint was trained with")
    parser.add_argument("--weights", help="a checkpoint, ours or the authors' (default: CLIP with network.head: text)")
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
    parser.add_argument("--dense", action="store_true", help="dense sampling, a span of 128 frames a clip")
    parser.add_argument("--json", help="where the results go (default: beside the weights, or OUTPUT_DIR/DATASET/ARCH)")
    parser.add_argument("--precision", choices=["amp", "fp16", "bf16", "fp32"], help="instead of solver.precision")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: CUDA where there is a GPU")
    return parser.parse_args()


def main() -> None:
    """Configuration, weights, data, evaluation, results."""
    arguments = parse_arguments()
    process = start(arguments.device)
    setup_logging(process)
    overrides = [*arguments.set, *([f"solver.precision={arguments.precision}"] if arguments.precision else [])]
    config = load_config(arguments.config, overrides)
    require_data_paths(config, ("test",), arguments.config)
    if arguments.test_clips < 1:
        raise ConfigError(f"--test_clips must be above 0, not {arguments.test_clips}")
    if not arguments.weights and config.network.head == "linear":
        raise ConfigError("--weights: is needed, for network.head linear starts with a random classifier")
    names = class_names(config.data)
    path = Path(arguments.json) if arguments.json else results_path(arguments, config)
    content = checkpoint_file.load(arguments.weights) if arguments.weights else {}
    ours = not (arguments.json or arguments.weights)  # a folder that may not be there yet
    results.check_target(path, makes_folder=ours)
    backbone = content["backbone"] if checkpoint_file.lacks_backbone(content) else None
    if arguments.weights:
        model = build_model(config, pretrained=backbone is not None)  # else the checkpoint brings all weights
        load_weights(
            model, checkpoint_file.weights_of(content, arguments.weights), arguments.weights, backbone=backbone
        )
    else:
        model = build_model(config, class_names=names)
        check_untrained(model)
    config = with_pixel_statistics(fill_from_checkpoint(config, content.get("config")), model)
    move_to_device(model, process, config.solver.compile).eval()
    precision = resolve_precision(config.solver.precision, process.device, config.solver.tf32)
    views = {"crops": arguments.test_crops, "clips": arguments.test_clips, "dense": arguments.dense}
    loader = test_loader(config.data, config.seed, process.rank, process.world_size, **views)
    logger.info(
        "%s; testing %d videos, %d views each",
        parameter_report(model),
        len(loader.dataset),
        arguments.test_crops * arguments.test_clips,
    )
    expected, every = len(loader.dataset), config.logging.print_freq
    normalizer = Normalizer(config.data.mean, config.data.std)
    accuracy = evaluate(model, loader, process, precision, expected, every, normalizer)
    log_accuracy(f"{arguments.test_crops} crops x {arguments.test_clips} clips", accuracy)
    if process.is_main:
        epoch = content.get("epoch")
        about = {
            **views,
            "weights": arguments.weights or ", ".join(model.origin),
            "epoch": epoch if isinstance(epoch, int) else None,
            "parameters": dataclasses.asdict(parameter_report(model)),
            "config": config.to_dict(),
            "meta": run_info({"test_list": config.data.test_list or config.data.val_list}, config.seed),
        }
        if ours:
            path.parent.mkdir(parents=True, exist_ok=True)
        results.write(path, accuracy, names, about)


def results_path(arguments: argparse.Namespace, config: Config) -> Path:
    """A name that tells weights and views, so that several tests stand beside each other."""
    views = f"{arguments.test_crops}crops_{arguments.test_clips}clips{'_dense' if arguments.dense else ''}.json"
    if arguments.weights:
        return Path(arguments.weights).with_name(f"{Path(arguments.weights).stem}_{views}")
    network = config.network
    source = network.weights or (find_weights(network.arch, None) if network.arch in OPENAI else "default")
    weights = Path(source).stem if Path(source).is_file() else Path(source).name  # of a file, or a tag
    folder = Path(config.logging.output_dir, config.data.dataset, network.arch.replace("/", "-"))
    return folder / f"zero_shot_{weights}_{views}"


if __name__ == "__main__":
    run(main, (EngineError, ValueError, OSError))
