"""One optimizer step, decided on the device: the host hands it over and learns later what came of it.

Lives here: the passes over the batches of a step, whether the step counts, and everything that it changes.
Does not live here: which batches, what is measured, told and saved, and when a run ends (loop.py).

Nothing in `TrainStep` waits for the device, so a GPU never runs out of work. Whether loss and gradients are finite is a
tensor there, the same on all processes, which a fused optimizer heeds by itself (`found_inf`), as buffers and averaged
weights do here. The learning rate goes by the position in the run, whether or not a step was left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.distributed import Process, gradient_sync, unwrap
from engine.ema import ModelEma
from engine.errors import EngineError
from engine.normalize import Normalizer, to_device
from engine.optim import Precision


@dataclass(frozen=True)
class TrainingState:
    """A model (as wrapped for the processes), all that changes it, and what its input goes through on the device.

    `mixup` maps (video, label) to (video, target). The optimizer is a fused one (optim.build_optimizer).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ema: ModelEma | None = None
    backbone: dict[str, str] | None = None

    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    precision: Precision = field(default_factory=lambda: Precision("fp32", None, scaled=False))
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    normalizer: Normalizer = field(default_factory=Normalizer)


class StepResult(NamedTuple):
    """What came of a step: this process's loss, the norm of the gradients before clipping, whether the step was left
    out on all processes, and the loss scale after it (1 without scaling)."""

    loss: float
    norm: float
    left_out: bool
    scale: float


@dataclass(frozen=True)
class PendingStep:
    """A step in the device's hands; `figures` (4,) float64 are on their way to the CPU until `arrived`."""

    figures: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, *figures: Tensor) -> PendingStep:
        """Send 0-dimensional tensors on their way, without waiting."""
        values = torch.stack([figure.detach().double() for figure in figures])
        if values.device.type != "cuda":
            return cls(values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(host, arrived)

    def read(self) -> StepResult:
        """Wait until the step is done; the only place where the host waits for a step."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, left_out, scale = self.figures.tolist()
        return StepResult(loss, norm, bool(left_out), scale)


class TrainStep:
    """Makes optimizer steps; `clip_grad` is the largest norm of the gradients, None for any.

    Raises:
        EngineError: the optimizer is not fused, so that it cannot leave out a step by itself.
    """

    def __init__(self, trainee: TrainingState, process: Process, clip_grad: float | None = None) -> None:
        groups = trainee.optimizer.param_groups
        if not all(group.get("fused") for group in groups):
            raise EngineError(
                "the optimizer must be a fused one (fused=True), which can leave out a step on the device"
            )
        self.trainee, self.device, self.clip_grad = trainee, process.device, clip_grad
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.buffers = list(unwrap(trainee.model).buffers())

    def __call__(self, group: list[dict[str, Any]]) -> PendingStep:
        """Issue one step, which averages over the clips of its batches (see loop.py), however many are in each.

        A step whose loss or gradients are not finite on any process leaves no trace in weights, optimizer, buffers and
        averaged weights.
        """
        trainee = self.trainee
        former = [buffer.clone() for buffer in self.buffers]
        loss = self._gradients(group)
        trainee.scaler.unscale_(trainee.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        left_out = self._verdict(loss, norm)
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        trainee.optimizer.found_inf = left_out  # the protocol of torch.amp.GradScaler and torch's fused optimizers
        trainee.optimizer.step()
        del trainee.optimizer.found_inf
        trainee.optimizer.zero_grad(set_to_none=True)
        bad = left_out.bool()
        for buffer, value in zip(self.buffers, former, strict=True):
            torch.where(bad, value, buffer, out=buffer)
        if trainee.ema is not None:
            trainee.ema.update(left_out)
        trainee.scheduler.step()
        trainee.scaler.update()
        return PendingStep.of(loss, norm, left_out, trainee.scaler.scale(torch.ones_like(left_out)))

    def _gradients(self, group: list[dict[str, Any]]) -> Tensor:
        """Forward and backward over all batches; returns the mean loss of this process's clips, ()."""
        trainee = self.trainee
        clips = clips_of(group, trainee)
        loss = torch.zeros((), device=self.device)
        for place, batch in enumerate(group, start=1):
            video = trainee.normalizer(batch["video"], self.device)  # (B, T, C, H, W)
            target = to_device(batch["label"], self.device)  # (B,)
            if trainee.mixup is not None:
                video, target = trainee.mixup(video, target)  # (B, T, C, H, W), (B, K)
            with gradient_sync(trainee.model, enabled=place == len(group)):
                with trainee.precision.autocast(self.device):
                    logits = trainee.model(video)  # (B, K)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                part = trainee.criterion(logits, target) * (len(video) / clips)
                trainee.scaler.scale(part).backward()
            loss = loss + part.detach()
        return loss

    def _verdict(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 where the step is to be left out, on all processes alike, else 0.0; () float32 on the device.

        After DistributedDataParallel gradients are the same everywhere, losses are not.
        """
        finite = loss.isfinite() & norm.isfinite()
        left_out = finite.logical_not().float()
        if dist.is_initialized():
            dist.all_reduce(left_out, dist.ReduceOp.MAX)  # on a GPU the stream waits for it, the host does not
        return left_out


def clips_of(group: list[dict[str, Any]], trainee: TrainingState) -> int:
    """Clips that a step averages over on this process; mixup takes pairs."""
    return sum(len(batch["label"]) // 2 * 2 if trainee.mixup else len(batch["label"]) for batch in group)
