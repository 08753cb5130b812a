"""What is measured while training: sums over an epoch and since the last log line, and losses that stand out."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from engine.distributed import gather


@dataclass
class StepSums:
    """Sums of losses and gradient norms over some steps, and the largest of each."""

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
        """The points for TensorBoard; none if every step was skipped."""
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
    """One epoch on this process. A checkpoint in the middle of an epoch carries it on.

    `seconds` in all, `data_wait` seconds spent waiting for batches, `videos` of the steps so far, of which
    `skipped_videos` could not be read, `clips` trained on, `skipped_steps` that were not finite, `skipped_batches` that
    held too few readable videos on one of the processes, and the sums over the `epoch` and `since_log`, the last log
    line.
    """

    seconds: float = 0.0
    data_wait: float = 0.0
    videos: int = 0
    skipped_videos: int = 0
    clips: int = 0
    skipped_steps: int = 0
    skipped_batches: int = 0
    epoch: StepSums = field(default_factory=StepSums)
    since_log: StepSums = field(default_factory=StepSums)

    def __post_init__(self) -> None:
        self._seconds_before, self._clips_before, self._started = self.seconds, self.clips, time.perf_counter()

    @classmethod
    def from_state(cls, values: dict[str, Any]) -> Meter:
        """From what `state` returned; the clock continues."""
        sums = {name: StepSums(**values[name]) for name in ("epoch", "since_log")}
        return cls(**{**values, **sums})

    def state(self) -> dict[str, Any]:
        """All sums as plain values."""
        self._update_seconds()
        return asdict(self)

    def add(self, loss: float, norm: float, clips: int) -> None:
        """Add a step that was applied."""
        self.clips += clips
        for sums in (self.epoch, self.since_log):
            sums.add(loss, norm, clips)

    def clips_per_second(self) -> float:
        """On this process, since the epoch began or was resumed."""
        return (self.clips - self._clips_before) / (time.perf_counter() - self._started)

    def summary(self, device: torch.device) -> dict[str, Any]:
        """The epoch over all processes; every process must call it."""
        self._update_seconds()
        cuda = device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None
        values = (
            self.epoch.loss, self.epoch.clips, self.clips, self.seconds, self.data_wait, self.videos,
            self.skipped_videos, memory,
        )  # fmt: skip
        loss, counted, clips, seconds, data_wait, videos, skipped, memories = zip(*gather(values), strict=True)
        return {
            "train_loss": sum(loss) / sum(counted) if sum(counted) else None,
            "clips_per_s": sum(clips) / max(seconds),
            "data_wait": sum(data_wait) / sum(seconds),  # share of the time
            "memory_gib": max(memories) if cuda else None,
            "videos": sum(videos),
            "skipped_videos": sum(skipped),
            "skipped_steps": self.skipped_steps,
            "skipped_batches": self.skipped_batches,
            "grad_norm": self.epoch.norm / self.epoch.steps if self.epoch.steps else None,
        }

    def _update_seconds(self) -> None:
        self.seconds = self._seconds_before + time.perf_counter() - self._started


@dataclass
class LossMonitor:
    """Counts steps that were skipped because they were not finite, batches that were left out because too few of their
    videos could be read, and steps whose loss stands out.

    `mean` and `variance` of the main process's loss are exponential averages over about 50 steps; `seen` counts steps.
    """

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    skipped_batches: int = 0
    spikes: int = 0
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0

    def add(self, loss: float) -> bool:
        """Add the loss of a step; True if it lies more than five standard deviations above the mean."""
        spike = self.seen >= 50 and loss > self.mean + 5 * self.variance**0.5 + 1e-3 * abs(self.mean)
        self.spikes += spike
        rate = max(0.02, 1 / (self.seen + 1))
        difference = loss - self.mean
        self.mean += rate * difference
        self.variance = (1 - rate) * (self.variance + rate * difference**2)
        self.seen += 1
        return spike
