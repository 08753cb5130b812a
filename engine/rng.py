"""The random generators of a process: seeds and states of Python's, NumPy's and torch's."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from engine.distributed import Process


def seed_everything(seed: int, process: Process) -> None:
    """Seed all generators with seed + rank, so that processes draw differently."""
    random.seed(seed + process.rank)
    numpy.random.seed(seed + process.rank)
    torch.manual_seed(seed + process.rank)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators of this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(numpy.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
