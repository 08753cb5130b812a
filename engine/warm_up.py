"""What comes before the first training step of a process."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.distributed import Process, unwrap
from engine.rng import rng_state, set_rng_state
from engine.train_step import TrainingState


def warm_up(state: TrainingState, process: Process, video: Tensor) -> list[str]:
    """One forward and backward pass that changes nothing.

    It finds trainable parameters that get no gradient. And DistributedDataParallel reorders its buckets after the first
    pass: sums over three or more processes depend on that order, so without this pass the first step of a resumed run
    would differ from the same step of a run that was not interrupted.

    Args:
        video: of a training batch, (B, T, C, H, W).

    Returns:
        The names of the trainable parameters that get no gradient.
    """
    buffers = list(unwrap(state.model).buffers())
    generators, buffers_before = rng_state(process.device), [buffer.clone() for buffer in buffers]
    with state.precision.autocast(process.device):
        logits = state.model(state.normalizer(video, process.device))  # (B, K)
    logits.float().square().mean().backward()
    named = unwrap(state.model).named_parameters()
    without = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(buffers, buffers_before, strict=True):
            buffer.copy_(before)
    set_rng_state(generators, process.device)
    return without
