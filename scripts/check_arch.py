"""Tries models on image towers: python -m scripts.check_arch ARCH [ARCH ...] prints a Markdown row for each tower.

Each model is built on the tower with random weights and trains one step on random clips; its cell shows its trainable
parameters. Nothing is downloaded. The last column says what to set in a configuration, or the error that it would get;
after an error the exit status is 1. The side network needs one level a block, so network.pyramid.n_embs must be set for
towers with another number of blocks; here the published widths are spread over them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.console import Parser, show
from common.tables import markdown_table
from scripts.cli import positive_int

if TYPE_CHECKING:
    from configs.schema import Config

CLASSES = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(
        prog="python -m scripts.check_arch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arch", nargs="+", help="as network.arch: a name of OpenAI's, open_clip's or timm's")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="default: all that stand on a tower")
    parser.add_argument("--size", type=positive_int, default=224, help="data.input_size in pixels (default: 224)")
    parser.add_argument("--frames", type=positive_int, default=5, help="data.num_segments (default: 5)")
    parser.add_argument("--clips", type=positive_int, default=2, help="of the step (default: 2; side-tuning needs two)")
    parser.add_argument("--forward", action="store_true", help="no backward pass")
    options = parser.parse_args(argv)
    from models.registry import MODELS, uses_tower  # here, so that --help is quick

    known = [model for model in MODELS if uses_tower(model)]
    models = options.models or known
    if unknown := [model for model in models if model not in known]:
        problem = "stands on no tower" if unknown[0] in MODELS else "is unknown"
        parser.error(f"--models: {unknown[0]} {problem}; choose from {', '.join(known)}")
    rows, works = [], True
    for arch in options.arch:
        cells, complete = check(arch, models, options)
        rows.append(cells)
        works = works and complete
    show(markdown_table(["arch", "tower", *models, "to do"], rows))
    return 0 if works else 1


def check(arch: str, models: Sequence[str], options: argparse.Namespace) -> tuple[list[str], bool]:
    """The cells of a tower's row, and whether all models work on it."""
    from clip.towers.build import build_tower

    try:
        tower = build_tower(configure(arch, "linear_probe", options.size, options.frames))
    except ValueError as error:
        return [arch, "no", *["no"] * len(models), str(error)], False
    (H, W), registers = tower.grid, tower.prefix - tower.has_class_token
    kind = f"{len(tower.blocks)} blocks of {tower.width}, {H} x {W} patches of {tower.patch_size} px"
    kind += f", {registers} more tokens (registers)" if registers else ""
    to_do = [] if tower.has_class_token else [f"no class token: set {token_keys(models)} to mean_tokens"]
    cells, complete = [], True
    for model in models:
        config = configure(
            arch, model, options.size, options.frames, blocks=len(tower.blocks), class_token=tower.has_class_token
        )
        try:
            cells.append(f"{train_step(config, options.clips, options.forward):,}")
        except (ValueError, RuntimeError) as error:
            complete = False
            cells.append("no")
            to_do.append(f"{model}: {error}")
    return [arch, kind, *cells, "; ".join(to_do) or "nothing"], complete


def token_keys(models: Sequence[str]) -> str:
    """The keys to set for a tower without class token, each with its models."""
    keys: dict[str, list[str]] = {}
    for model in models:
        if option := token_option(model):
            keys.setdefault(f"network.options.{option}", []).append(model)
    return " and ".join(f"{key} ({', '.join(users)})" for key, users in keys.items())


def token_option(model: str) -> str | None:
    """The option of a model that chooses between class token and mean: `feature` or `token`."""
    from models.registry import MODELS

    return next((name for name in ("feature", "token") if name in MODELS[model].Options.__dataclass_fields__), None)


def configure(arch: str, model: str, size: int, frames: int, blocks: int = 12, class_token: bool = True) -> Config:
    """A configuration with random weights and one side width a block. Raises ConfigError."""
    from configs.schema import PyramidConfig, load_config

    widths = PyramidConfig().n_embs
    network = {
        "arch": arch,
        "init": False,
        "model": model,
        "pyramid": {"n_embs": [widths[level * len(widths) // blocks] for level in range(blocks)]},
        "options": {} if class_token or not token_option(model) else {token_option(model): "mean_tokens"},
    }
    data = {"dataset": "kinetics400", "num_classes": CLASSES, "num_segments": frames, "input_size": size}
    return load_config({"data": data, "network": network})


def train_step(config: Config, clips: int, forward: bool) -> int:
    """Build a model, run one forward and backward pass, and return its number of trainable parameters.

    Raises ValueError, RuntimeError: what the configuration would raise; a result or gradient that is not finite.
    """
    import torch

    from models.parameters import parameter_report
    from models.registry import build_model

    model = build_model(config).train()
    data = config.data
    frames = data.num_segments * getattr(model, "frames_per_segment", 1)
    video = torch.randn(clips, frames, 3, data.input_size, data.input_size)
    with torch.set_grad_enabled(not forward):
        logits = model(video)
    if not forward:
        logits.square().mean().backward()
    values = [logits, *(p.grad for p in model.parameters() if p.grad is not None)]
    if not all(bool(value.isfinite().all()) for value in values):
        raise RuntimeError("results or gradients are not finite")
    return parameter_report(model).trainable


if __name__ == "__main__":
    logging.getLogger("td4v").setLevel(logging.ERROR)  # no warning that the weights are random
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(str(error))
