"""Small files in the layouts that the authors of TDN and of TAdaConv publish, from the names and shapes of real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from tests.helpers.golden import GOLDEN

CLASSES = 4


class Published(NamedTuple):
    """A published file, and how its small copy is made: the first block of each stage, widths divided by `divisor`."""

    keys: str  # in tests/golden/tadn/keys
    divisor: int
    classes: int
    options: dict[str, Any]  # network.options of the small network
    frames: int
    size: int


ONE = [1, 1, 1, 1]
FAMILY = {
    "tdn": Published("tdn_r50_8f", 4, 174, {"depths": ONE, "width": 16}, 8, 40),
    "tada2d": Published("tada2d_r50_ssv2", 4, 174, {"depths": ONE, "width": 16}, 4, 32),
    "tadaformer": Published(
        "tadaformer_b16_ssv2",
        12,
        174,
        {"temporal_projection": True, "two_convolutions": True, "head_width": 8},
        6,
        32,
    ),
    "tadaconvnextv2": Published(
        "tadaconvnextv2_t_k400", 6, 400, {"depths": ONE, "widths": [16, 32, 64, 128], "head_width": 8}, 6, 32
    ),
}
VISION = {"width": 64, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32}  # of the small tadaformer
_HEAD = r"(new_fc|head\.out)\."
_LATER_BLOCKS = re.compile(r"(layer\d(_bak)?|stages\.\d|backbone\.layers)\.[1-9]|\.res_([2-9]|\d\d)\.")


def published_weights(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of the published file of a model, for CLASSES classes."""
    file = FAMILY[name]
    table = json.loads((GOLDEN / f"tadn/keys/{file.keys}_published.json").read_text())
    shapes = table.get("state_dict") or table["model_state"]
    generator = torch.Generator().manual_seed(seed)
    return {
        key: _value(key, _small(key, shape, file), generator)
        for key, shape in shapes.items()
        if not _LATER_BLOCKS.search(key)
    }


def published_file(name: str, path: Path, weights: dict[str, Tensor] | None = None) -> Path:
    """Write a file as the authors' training does, with the states of its optimizer and of its scheduler."""
    weights = published_weights(name) if weights is None else weights
    parameters = [torch.nn.Parameter(value.clone()) for value in weights.values() if value.is_floating_point()]
    adam = name in ("tadaformer", "tadaconvnextv2")
    groups = [{"params": [parameter], "lr_mult": 1, "decay_mult": 1, "name": "all"} for parameter in parameters]
    optimizer = torch.optim.AdamW(groups, 1e-3) if adam else torch.optim.SGD(groups, 0.01, momentum=0.9)
    for parameter in parameters[1:]:  # the first has no gradient, as the stem that TDN never runs
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    if name != "tdn":
        configuration = json.dumps({"TRAIN": {"ENABLE": True}, "DATA": {"NUM_INPUT_FRAMES": FAMILY[name].frames}})
        state = {"epoch": 63, "model_state": weights, "optimizer_state": optimizer.state_dict(), "cfg": configuration}
    else:
        after = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 45, 55])
        scheduler = {key: value for key, value in vars(after).items() if key != "optimizer"}  # with a Counter
        state = {
            "epoch": 63,
            "arch": "resnet50",
            "state_dict": weights,
            "optimizer": optimizer.state_dict(),
            "scheduler": {"multiplier": 10, "finished": False, "after_scheduler": scheduler},
            "prec1": numpy.float64(52.3),
            "best_prec1": torch.tensor(52.3),
        }
    torch.save(state, path)
    return path


def _small(key: str, shape: list[int], file: Published) -> list[int]:
    if ".positional_embedding" in key:
        return [(VISION["image_size"] // VISION["patch_size"]) ** 2 + 1, shape[1] // file.divisor]
    if key == "backbone.conv1.weight" and file.keys.startswith("tadaformer"):
        return [shape[0] // file.divisor, 3, 3, VISION["patch_size"], VISION["patch_size"]]
    if re.search(_HEAD, key):
        return [CLASSES, *(size // file.divisor for size in shape[1:])]
    kept = (1, 2, 3, 4, 7, 12)  # kernels, colours and differences of colours
    return [size if size in kept else size // file.divisor for size in shape]


def _value(key: str, shape: list[int], generator: torch.Generator) -> Tensor:
    if not shape:
        return torch.tensor(1000)  # num_batches_tracked
    if key.endswith("running_var"):
        return 0.5 + torch.rand(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.1 * values if key.endswith("weight") else 0.1 * values
    scale = 0.1 if re.search(_HEAD, key) else 1  # scores far from 0 and 1
    return scale * values * (values.numel() / max(shape[:3])) ** -0.5  # by the inputs of an output
