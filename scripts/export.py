"""Writes the weights of a checkpoint into a small file for use elsewhere: testing, pretraining, other programs.

    python -m scripts.export RUN/model_best.pt --out td4v.safetensors           the tuned weights: 9 MB for fine-tuning
    python -m scripts.export RUN/model_best.pt --out td4v.safetensors --full    CLIP's frozen weights too
    python -m scripts.export theirs.pt --config configs/ssv2.yaml --out ours.safetensors --full

Without --full the file names the frozen weights and their hash, and whoever loads it needs the same ones: CLIP's file, or
the same seed where they are random. With --full it needs nothing else. Where a run averaged its weights, these are
written. Both formats go where a checkpoint goes: test_vision.py --weights, `pretrain`, engine.checkpoint_file.load.
Lives here: what such a file holds. Does not live here: the formats (engine/checkpoint.py), the model (clip/build.py).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.schema import Config, ConfigError, load_config
from engine import checkpoint_file, checkpointer
from engine.errors import EngineError
from models.loading import load_weights
from models.parameters import frozen_identity
from models.registry import build_model

logger = logging.getLogger("td4v")

WRITERS = {".safetensors": checkpoint_file.save_safetensors, ".pt": checkpoint_file.save}


class ExportError(EngineError):
    """Weights that cannot be exported as asked; the message is one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, check, write, tell. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="last_model.pt, model_best.pt, or a file of the authors' code")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="ends with .safetensors or .pt")
    parser.add_argument("--full", action="store_true", help="the frozen weights too")
    parser.add_argument("--config", type=Path, help="its configuration, where the checkpoint holds none")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, with --config"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        check_target(options.checkpoint, options.out)
        if options.set and options.config is None:
            raise ExportError("--set changes a file given by --config: without one, the checkpoint's own is taken")
        former = checkpoint_file.load(options.checkpoint)
        config = load_config(options.config, options.set) if options.config is not None else None
        content = export(former, options.checkpoint, options.full, config)
        WRITERS[options.out.suffix](options.out, content)
        print(table({options.checkpoint: former, options.out: content}), flush=True)
    except (EngineError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    return 0


def check_target(source: Path, target: Path) -> None:
    """Make sure that `target` can be written, and that this costs no checkpoint. Raises ExportError."""
    if target.suffix not in WRITERS:
        raise ExportError(f"--out {target}: must end with .safetensors or .pt")
    if target.exists() and source.exists() and target.samefile(source):
        raise ExportError(f"--out {target}: is the checkpoint itself, and would be overwritten")
    own = target.name in (checkpoint_file.LAST, checkpoint_file.BEST, checkpoint_file.FAILED) or target.match(
        "step_*.pt"
    )
    if own and (target.parent / "run.json").exists():
        raise ExportError(f"--out {target}: is the name of a checkpoint of the run in this folder: choose another")
    if not target.parent.is_dir():
        raise ExportError(f"--out {target}: there is no folder {target.parent}")


def export(former: dict[str, Any], path: Path, full: bool, config: Config | None = None) -> dict[str, Any]:
    """What an exported file holds.

    Args:
        former: the content of the checkpoint `path`, ours or in the authors' layout.
        full: with the frozen weights.
        config: instead of the checkpoint's own.

    Returns:
        epoch, best (None where not known), config, meta, backbone (see engine/checkpointer.py), full and model_state_dict.

    Raises:
        ExportError: no configuration, or the frozen weights are not those that a file without them would be given.
        CheckpointError, WeightsError, ConfigError, TowerError: no weights, or they do not fit the configuration.
    """
    values, backbone = checkpoint_file.weights_of(former, path), former.get("backbone")
    plain = former.get("config")
    if full or config is not None or not checkpoint_file.lacks_backbone(former):
        config = config or _own_config(plain, path)
        plain = config.to_dict()
        values, backbone = fit(values, path, config, backbone, checkpoint_file.lacks_backbone(former), full)
    return {
        "epoch": _number(former.get("epoch")),
        "best": _number(former.get("best")),
        "config": plain,
        "meta": former.get("meta"),
        "backbone": backbone,
        "full": full,
        "model_state_dict": values,
    }


def _own_config(values: Any, path: Path) -> Config:
    if not isinstance(values, dict):
        raise ExportError(f"{path}: holds no configuration: name the one that it was trained with by --config")
    try:
        return load_config(values)
    except ConfigError as error:
        raise ExportError(f"{path}: its configuration is not of this code ({error}): give one by --config") from None


def fit(
    values: dict[str, Tensor], path: Path, config: Config, backbone: dict[str, str] | None, lean: bool, full: bool
) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Load weights into the model of `config`, strictly.

    Args:
        backbone: which frozen weights belong to `values`, where that is known. lean: they are not among them.

    Returns:
        the weights to write, by our names, and which frozen weights belong to them.
    """
    model = build_model(config, pretrained=lean or not full)
    own = frozen_identity(model)
    load_weights(model, values, str(path), backbone=backbone if lean else None)
    found = frozen_identity(model)
    other = found is not None and found["sha256"] != own["sha256"]
    if other and not full:
        raise ExportError(
            f"{path}: its frozen weights ({found['sha256'][:12]}) are not those that a file without them would be "
            f"given, {own['weights']} ({own['sha256'][:12]}): export it with --full"
        )
    if found is not None and not other:
        found = own
    if other:
        known = backbone is not None and backbone["sha256"] == found["sha256"]
        found["weights"] = backbone["weights"] if known else path.name
    return checkpointer.weights_to_save(model, full), found


def table(files: dict[Path, dict[str, Any]]) -> str:
    """The files, their sizes and what is in them."""
    rows = [("file", "size", "values", "holds")]
    for path, content in files.items():
        values = checkpoint_file.weights_of(content, path)
        count = sum(value.numel() for value in values.values())
        rows.append((str(path), f"{path.stat().st_size / 1e6:.2f} MB", f"{count:,}", _holds(content)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in rows)


def _holds(content: dict[str, Any]) -> str:
    epoch, best, backbone = content.get("epoch"), content.get("best"), content.get("backbone")
    text = "a whole run: " if checkpointer.is_resumable(content) else ""
    text += "the tuned weights" if checkpoint_file.lacks_backbone(content) else "all weights"
    text += " and their averages" if content.get("ema_state_dict") else ""
    text += f" after {epoch} epochs" if isinstance(epoch, int) else ""
    text += f", best top-1 {best:.2f}" if isinstance(best, (int, float)) and best >= 0 else ""
    on = f", on {backbone['name']}, {backbone['weights']} ({backbone['sha256'][:12]})" if backbone else ""
    return text + on


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, (int, float)) else None


if __name__ == "__main__":
    sys.exit(main())
