"""Writes the weights of a checkpoint into a small file, for testing, pretraining and other programs.

    python -m scripts.export RUN/model_best.pt --out td4v.safetensors           the trainable weights: 9 MB for fine-tuning
    python -m scripts.export RUN/model_best.pt --out td4v.safetensors --full    CLIP's frozen weights too
    python -m scripts.export theirs.pt --config configs/ssv2.yaml --out ours.safetensors --full

Without --full the file names the frozen weights and their hash, and loading it needs the same ones: CLIP's file, or the
same seed if they are random. If a run averaged its weights, the averages are written. Both formats work wherever a
checkpoint does: test_vision.py --weights, `pretrain`, engine.checkpoint_file.load.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import Parser, log_to_console, show
from common.tables import markdown_table
from common.text import plural
from configs.compare import fill_from_checkpoint, override_keys
from configs.schema import Config, ConfigError, load_config
from scripts.cli import run

if TYPE_CHECKING:
    from torch import Tensor

    from engine.checkpoint_file import Checkpoint


class ExportError(ValueError):
    """Weights that cannot be exported; the message is one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(prog="python -m scripts.export", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="last_model.pt, model_best.pt, or a file of the authors' code")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="ends with .safetensors or .pt")
    parser.add_argument("--full", action="store_true", help="include the frozen weights")
    parser.add_argument("--config", type=Path, help="the configuration, if the checkpoint has none")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="overrides of --config")  # fmt: skip
    options = parser.parse_args(argv)
    log_to_console(logging.WARNING)
    return run(lambda: write_export(options))


def write_export(options: argparse.Namespace) -> None:
    """Read, check, write, and print what was read and written."""
    from engine import checkpoint_file  # here, as all that imports torch, so that --help is quick
    from models.function import check_function

    check_target(options.checkpoint, options.out)
    if options.set and options.config is None:
        raise ExportError("--set changes the file given by --config; without it the checkpoint's configuration is used")
    source = checkpoint_file.load(options.checkpoint)
    config = load_config(options.config, options.set) if options.config is not None else None
    if config is not None:
        check_function(source.config, config, source.path, explicit=override_keys(options.set))
    exported = checkpoint_file.Checkpoint(options.out, export(source, options.full, config))
    write = checkpoint_file.save if options.out.suffix == ".pt" else checkpoint_file.save_safetensors
    write(options.out, exported.content)
    show(table([source, exported]))


def check_target(source: Path, target: Path) -> None:
    """Make sure that `target` can be written and that no checkpoint is overwritten. Raises ExportError."""
    from engine.checkpoint_file import BEST, FAILED, LAST
    from engine.run_record import file_of_run

    if target.suffix not in (".safetensors", ".pt"):
        raise ExportError(f"--out {target}: must end with .safetensors or .pt")
    if target.exists() and source.exists() and target.samefile(source):
        raise ExportError(f"--out {target}: is the checkpoint itself and would be overwritten")
    is_checkpoint_name = target.name in (LAST, BEST, FAILED) or target.match("step_*.pt")
    if is_checkpoint_name and target.parent.is_dir() and file_of_run(target.parent) is not None:
        raise ExportError(f"--out {target}: is the name of a checkpoint of the run in this folder; choose another")
    if not target.parent.is_dir():
        raise ExportError(f"--out {target}: there is no folder {target.parent}")


def export(source: Checkpoint, full: bool, config: Config | None = None) -> dict[str, Any]:
    """The content of an exported file.

    Args:
        source: a checkpoint in this project's or the authors' layout.
        full: include the frozen weights.
        config: used in place of the checkpoint's.

    Returns:
        epoch, best (None if unknown), config, meta, backbone (see Checkpoint.backbone), full and model_state_dict.

    Raises:
        ExportError: there is no configuration, or the file needs --full because its frozen weights are not the usual.
        CheckpointError, WeightsError, ConfigError, TowerError: there are no weights, or they do not fit.
    """
    values, backbone, plain_config = source.weights, source.content.get("backbone"), source.config
    if full or config is not None or source.has_backbone:
        config = fill_from_checkpoint(config or _config_of(source), source.config)
        plain_config = config.to_dict()
        values, backbone = refit(source, config, full)
    best = source.content.get("best")
    return {
        "epoch": source.epoch,
        "best": best if isinstance(best, (int, float)) else None,
        "config": plain_config,
        "meta": source.content.get("meta"),
        "backbone": backbone,
        "full": full,
        "model_state_dict": values,
    }


def _config_of(source: Checkpoint) -> Config:
    path = source.path
    if source.config is None:
        raise ExportError(f"{path}: holds no configuration: give the one it was trained with by --config")
    try:
        return load_config(source.config)
    except ConfigError as error:
        raise ExportError(f"{path}: its configuration is not of this version ({error}): give one by --config") from None


def refit(source: Checkpoint, config: Config, full: bool) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Load the weights of a checkpoint strictly into the model of `config`, and take from it what is written.

    Returns:
        the weights to write, and the identity of the frozen weights that belong to them.
    """
    from engine.checkpointer import weights_to_save
    from models.loading import load_weights
    from models.parameters import frozen_identity
    from models.registry import build_model

    path, backbone = source.path, source.backbone
    model = build_model(config, pretrained=not source.has_backbone or not full)
    usual = frozen_identity(model)
    load_weights(model, source.weights, str(path), backbone=source.missing_backbone)
    found = frozen_identity(model)
    if found is not None and found["sha256"] == usual["sha256"]:
        found = usual
    elif found is not None:
        if not full:
            raise ExportError(
                f"{path}: its frozen weights ({found['sha256'][:12]}) are not those that a file without them is loaded "
                f"with, {usual['weights']} ({usual['sha256'][:12]}): export it with --full"
            )
        is_known = backbone is not None and backbone["sha256"] == found["sha256"]
        found["weights"] = backbone["weights"] if is_known else path.name
    return weights_to_save(model, full), found


def table(checkpoints: Sequence[Checkpoint]) -> str:
    """Markdown: the files, their sizes and content."""
    rows = []
    for checkpoint in checkpoints:
        count, size = sum(value.numel() for value in checkpoint.weights.values()), checkpoint.path.stat().st_size
        rows.append([checkpoint.path, f"{size / 1e6:.2f} MB", f"{count:,}", _description(checkpoint)])
    return markdown_table(["file", "size", "values", "content"], rows, align="lrrl")


def _description(checkpoint: Checkpoint) -> str:
    best, backbone = checkpoint.content.get("best"), checkpoint.backbone
    text = "a complete run: " if checkpoint.is_run else ""
    text += "all weights" if checkpoint.has_backbone else "trainable weights"
    text += " and their averages" if checkpoint.content.get("ema_state_dict") else ""
    text += f" after {plural(checkpoint.epoch, 'epoch')}" if checkpoint.epoch is not None else ""
    text += f", best top-1 {best:.2f}" if isinstance(best, (int, float)) and best >= 0 else ""
    on = f", on {backbone['name']}, {backbone['weights']} ({backbone['sha256'][:12]})" if backbone else ""
    return text + on


if __name__ == "__main__":
    sys.exit(main())
