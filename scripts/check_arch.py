"""Try trunks with every method: `python -m scripts.check_arch ARCH [ARCH ...]` prints a row of a Markdown table for each.

Each method is built on the trunk with random weights and trains for one step on random clips; its cell says how many
parameters it tunes. Nothing is downloaded. What a trunk lacks stands in the last column: what to set in a configuration,
or the error that the configuration would meet; in that case the exit status is 1. The side network has as many levels as
the trunk has blocks, the published widths spread over them: network.pyramid.n_embs must be set to that.
Does not live here: what a trunk must have (clip/tower.py), the models themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence

import torch

from clip.towers.build import build_tower
from configs.schema import Config, ConfigError, PyramidConfig, load_config
from models.parameters import parameter_report
from models.registry import MODELS, build_model

CLASSES = 10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="+", help="as network.arch: a name of OpenAI's, open_clip's or timm's")
    parser.add_argument("--methods", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--size", type=int, default=224, help="data.input_size, pixels a side (default: 224)")
    parser.add_argument("--frames", type=int, default=2, help="data.num_segments (default: 2)")
    parser.add_argument("--clips", type=int, default=2, help="in the step (default: 2, the fewest for side-tuning)")
    parser.add_argument("--forward", action="store_true", help="no backward pass, no gradients")
    asked = parser.parse_args(arguments)
    head = ["trunk", "tower", *asked.methods, "what it lacks"]
    print(_line(head), _line(["---"] * len(head)), sep="\n")
    whole = True
    for arch in asked.arch:
        cells, complete = row(arch, asked.methods, asked.size, asked.frames, asked.clips, asked.forward)
        print(_line(cells), flush=True)
        whole = whole and complete
    return 0 if whole else 1


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def row(
    arch: str, methods: Sequence[str], size: int, frames: int, clips: int, forward: bool = False
) -> tuple[list[str], bool]:
    """The cells of a trunk's row, and whether all methods work on it."""
    try:
        tower = build_tower(configure(arch, "linear_probe", size, frames))
    except ValueError as error:
        return [arch, "no", *["no"] * len(methods), str(error)], False
    (H, W), extra = tower.grid, tower.prefix - tower.has_class_token
    kind = f"{len(tower.blocks)} blocks of {tower.width}, {H} x {W} patches of {tower.patch_size} px"
    kind += f", {extra} more tokens (registers)" if extra else ""
    lacks = [] if tower.has_class_token else [f"a class token: set {token_keys(methods)} to mean_tokens"]
    cells, complete = [], True
    for method in methods:
        config = configure(arch, method, size, frames, len(tower.blocks), tower.has_class_token)
        try:
            cells.append(f"{train_step(config, clips, forward):,}")
        except (ValueError, RuntimeError) as error:
            complete = False
            cells.append("no")
            lacks.append(f"{method}: {error}")
    return [arch, kind, *cells, "; ".join(lacks) or "nothing"], complete


def token_keys(methods: Sequence[str]) -> str:
    """What must be set for a trunk without class token, and for which methods."""
    keys: dict[str, list[str]] = {}
    for method in methods:
        if token_option(method):
            keys.setdefault(f"network.options.{token_option(method)}", []).append(method)
    return " and ".join(f"{key} ({', '.join(users)})" for key, users in keys.items())


def token_option(method: str) -> str | None:
    """The option of a method that asks for a class token, `feature` or `token`."""
    names = {field.name for field in dataclasses.fields(MODELS[method].Options)}
    return next((name for name in ("feature", "token") if name in names), None)


def configure(arch: str, method: str, size: int, frames: int, blocks: int = 12, has_class_token: bool = True) -> Config:
    """A configuration with random weights and side widths for so many blocks. Raises ConfigError."""
    widths = PyramidConfig().n_embs
    network = {
        "arch": arch,
        "init": False,
        "model": method,
        "pyramid": {"n_embs": [widths[level * len(widths) // blocks] for level in range(blocks)]},
        "options": {} if has_class_token or not token_option(method) else {token_option(method): "mean_tokens"},
    }
    data = {"dataset": "kinetics400", "num_classes": CLASSES, "num_segments": frames, "input_size": size}
    return load_config({"data": data, "network": network})


def train_step(config: Config, clips: int, forward: bool) -> int:
    """Build, one forward and one backward pass; returns how many parameters are tuned.

    Raises ValueError, RuntimeError: what the configuration would meet; a result or gradient that is not finite.
    """
    model = build_model(config).train()
    data = config.data
    video = torch.randn(clips, data.num_segments, 3, data.input_size, data.input_size)
    with torch.set_grad_enabled(not forward):
        logits = model(video)
    if not forward:
        logits.square().mean().backward()
    values = [logits, *(p.grad for p in model.parameters() if p.grad is not None)]
    if not all(bool(value.isfinite().all()) for value in values):
        raise RuntimeError("results or gradients are not finite")
    return parameter_report(model).trainable


if __name__ == "__main__":
    logging.getLogger("td4v").setLevel(logging.ERROR)  # that the weights are random is known here
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(str(error))
