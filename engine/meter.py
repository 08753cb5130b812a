"""Sums over an epoch and over the steps since the last line of progress, which a checkpoint in mid-epoch carries on.

Does not live here: where the numbers are written (run_folder.py).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from engine.distributed import gather


@dataclass
class Window:
    """The steps since the last line of progress: sums of losses and gradient norms, and the largest of each."""

    clips: int = 0
    loss: float = 0.0
    loss_max: float = float("-inf")
    steps: int = 0
    norm: float = 0.0
    norm_max: float = 0.0

    def add(self, loss: float, norm: float, clips: int) -> None:
        self.clips += clips
        self.loss += loss * clips
        self.loss_max = max(self.loss_max, loss)
        self.steps += 1
        self.norm += norm
        self.norm_max = max(self.norm_max, norm)

    def curves(self) -> dict[str, float]:
        """What TensorBoard shows; nothing where every step was left out."""
        if not self.steps:
            return {}
        return {
            "train/loss": self.loss / self.clips,
            "train/loss_max": self.loss_max,
            "train/grad_norm": self.norm / self.steps,
            "train/grad_norm_max": self.norm_max,
        }


@dataclass
class Meter:
    """An epoch on this process: seconds in all and spent waiting for data, videos skipped, clips, steps left out."""

    seconds: float = 0.0
    waited: float = 0.0
    skipped: int = 0
    clips: int = 0
    left_out: int = 0
    epoch: Window = field(default_factory=Window)
    window: Window = field(default_factory=Window)

    def __post_init__(self) -> None:
        self._before, self._started, self._counted = self.seconds, time.perf_counter(), self.clips

    @classmethod
    def of(cls, values: dict[str, Any]) -> Meter:
        """From what `state` gave; the clock runs on from there."""
        return cls(**{**values, "epoch": Window(**values["epoch"]), "window": Window(**values["window"])})

    def state(self) -> dict[str, Any]:
        """All sums as plain values."""
        self._tick()
        return asdict(self)

    def add(self, loss: float, norm: float, clips: int) -> None:
        """Take in a step that was applied."""
        self.clips += clips
        for sums in (self.epoch, self.window):
            sums.add(loss, norm, clips)

    def rate(self) -> float:
        """Clips a second on this process since it began or was resumed."""
        return (self.clips - self._counted) / (time.perf_counter() - self._started)

    def summary(self, device: torch.device) -> dict[str, Any]:
        """The epoch over all processes; every process must call it."""
        self._tick()
        cuda = device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None
        own = (self.epoch.loss, self.epoch.clips, self.clips, self.seconds, self.waited, self.skipped, memory)
        loss, counted, clips, seconds, waited, skipped, memories = zip(*gather(own), strict=True)
        return {
            "train_loss": sum(loss) / sum(counted) if sum(counted) else None,
            "clips_per_s": sum(clips) / max(seconds),
            "data_wait": sum(waited) / sum(seconds),
            "memory_gib": max(memories) if cuda else None,
            "skipped": sum(skipped),
            "left_out": self.left_out,
            "grad_norm": self.epoch.norm / self.epoch.steps if self.epoch.steps else None,
        }

    def _tick(self) -> None:
        self.seconds = self._before + time.perf_counter() - self._started
