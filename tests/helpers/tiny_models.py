"""Each model of the registry as small as its kind can be, for tests that run over all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.schema import Config
from models.registry import MODELS, uses_tower

TOWER_MODELS = [name for name in MODELS if uses_tower(name) and name != "tadaformer"]  # on any kind of tower
WHOLLY_TRAINED = ("full_finetune", "tdn", "tada2d", "tadaformer", "tadaconvnextv2")
OPTIONS = {
    "tdn": {"depths": [1, 1, 1, 1], "width": 16},
    "tada2d": {"depths": [1, 1, 1, 1], "width": 8},
    "tadaformer": {"head_width": 8},
    "tadaconvnextv2": {"depths": [1, 1, 1, 1], "widths": [16, 16, 32, 32], "head_width": 8},
}
LEAST_FRAMES = {"tada2d": 3, "tadaformer": 5, "tadaconvnextv2": 5}
LEAST_SIZE = {"tdn": 40, "tadaconvnextv2": 32}
OF_TOWERS = ("arch", "vision", "pyramid")


def adapted(model_name: str, data: dict, network: dict) -> dict:
    """The sections of a small configuration, changed as little as this model needs."""
    data = {
        **data,
        "num_segments": max(data["num_segments"], LEAST_FRAMES.get(model_name, 2)),
        "input_size": max(data["input_size"], LEAST_SIZE.get(model_name, 1)),
    }
    if model_name in MODELS and not uses_tower(model_name):
        network = {key: value for key, value in network.items() if key not in OF_TOWERS}
    options = OPTIONS.get(model_name, {}) | network.get("options", {})
    return {"data": data, "network": {**network, "model": model_name, "options": options}}


def random_clips(model: nn.Module, config: Config, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers in the shape of `count` clips (B, T*f, 3, height, width)."""
    size = config.data.input_size
    return torch.randn(count, config.data.num_segments * model.frames_per_segment, 3, size, size, dtype=dtype)
