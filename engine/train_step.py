"""One optimizer step, decided on the device: the host issues it and reads its result later.

Nothing in TrainStep waits for the device, so a GPU never runs out of work. Whether loss and gradients are finite is a
tensor on the device, the same on all processes. Fused optimizers obey it (`found_inf`), and so do the buffers and the
averaged weights here: a step that is not finite is skipped. The learning rate follows the position in the run, skipped
steps included.
"""

from __future__ import annotations

import warnings
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
from engine.optim import Precision, learning_rate


@dataclass(frozen=True)
class TrainingState:
    """A model, as wrapped for the processes, and everything that changes it in training.

    Args:
        optimizer: a fused one, see optim.build_optimizer.
        backbone: identity of the frozen weights, kept in checkpoints.
        mixup: maps (video, label) to (video, target shares).
        normalizer: of the loader's pixels.
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
    """The result of a step: this process's loss, the norm of the gradients before clipping, whether all processes
    skipped the step, and the loss scale after it (1 without scaling)."""

    loss: float
    norm: float
    skipped: bool
    loss_scale: float


@dataclass(frozen=True)
class PendingStep:
    """A step that was issued; its result is on its way from the device.

    Args:
        epoch: counts from 0. step_in_epoch, step: count from 1, in the epoch and in the run.
        lr, clips, videos: the learning rate, and the clips and the names of the videos on this process.
        result: (4,) float64 on the CPU, valid once `arrived`.
    """

    epoch: int
    step_in_epoch: int
    step: int
    lr: float
    clips: int
    videos: list[str]
    result: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> StepResult:
        """Wait until the step is done. Nothing else makes the host wait for a step."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, skipped, loss_scale = self.result.tolist()
        return StepResult(loss, norm, bool(skipped), loss_scale)


class TrainStep:
    """Issues optimizer steps; `clip_grad` is the largest norm of the gradients, None for any.

    Raises:
        EngineError: the optimizer is not fused, so it cannot skip a step by itself.
    """

    def __init__(self, state: TrainingState, process: Process, clip_grad: float | None = None) -> None:
        groups = state.optimizer.param_groups
        if not all(group.get("fused") for group in groups):
            raise EngineError("the optimizer must be a fused one (fused=True), which can skip a step on the device")
        self.state, self.device, self.clip_grad = state, process.device, clip_grad
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.buffers = list(unwrap(state.model).buffers())

    def __call__(
        self, batches: list[dict[str, Any]], epoch: int = 0, step_in_epoch: int = 1, step: int = 1
    ) -> PendingStep:
        """Issue one step, which averages over the clips of `batches` (see trainer.py), however many are in each.

        A step whose loss or gradients are not finite on any process leaves no trace in weights, optimizer, buffers and
        averaged weights.
        """
        state = self.state
        lr, clips = learning_rate(state.optimizer), self._count_clips(batches)
        buffers_before = [buffer.clone() for buffer in self.buffers]
        loss = self._forward_backward(batches, clips)
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        skipped = self._is_skipped(loss, norm)
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        state.optimizer.found_inf = skipped  # the protocol of torch.amp.GradScaler and torch's fused optimizers
        state.optimizer.step()
        del state.optimizer.found_inf
        state.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.buffers, buffers_before, strict=True):
            torch.where(skipped.bool(), before, buffer, out=buffer)
        if state.ema is not None:
            state.ema.update(skipped)
        state.scheduler.step()
        state.scaler.update()
        result, arrived = _send_to_host(loss, norm, skipped, state.scaler.scale(torch.ones_like(skipped)))
        videos = [name for batch in batches for name in dict.fromkeys(batch.get("path", ()))]
        return PendingStep(
            epoch=epoch,
            step_in_epoch=step_in_epoch,
            step=step,
            lr=lr,
            clips=clips,
            videos=videos,
            result=result,
            arrived=arrived,
        )

    def leave_out(self) -> None:
        """Pass over a step that has no clips: only the learning rate moves on."""
        with warnings.catch_warnings():  # torch expects that an optimizer's step comes first
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.state.scheduler.step()

    def _forward_backward(self, batches: list[dict[str, Any]], clips: int) -> Tensor:
        """Gradients of the mean loss over all batches; returns it, ()."""
        state = self.state
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            video = state.normalizer(batch["video"], self.device)  # (B, T, C, H, W)
            target = to_device(batch["label"], self.device)  # (B,)
            if state.mixup is not None:
                video, target = state.mixup(video, target)  # (B, T, C, H, W), (B, K)
            with gradient_sync(state.model, enabled=number == len(batches)):
                with state.precision.autocast(self.device):
                    logits = state.model(video)  # (B, K)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                batch_loss = state.criterion(logits, target) * (len(video) / clips)
                state.scaler.scale(batch_loss).backward()
            loss = loss + batch_loss.detach()
        return loss

    def _is_skipped(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 if loss or gradients are not finite on any process, else 0.0; () float32 on the device.

        After DistributedDataParallel gradients are the same everywhere, losses are not.
        """
        finite = loss.isfinite() & norm.isfinite()
        skipped = finite.logical_not().float()
        if dist.is_initialized():
            dist.all_reduce(skipped, dist.ReduceOp.MAX)  # on a GPU the stream waits for it, the host does not
        return skipped

    def _count_clips(self, batches: list[dict[str, Any]]) -> int:
        """Clips that a step averages over on this process; mixup drops one without a partner."""
        counts = [len(batch["label"]) for batch in batches]
        return sum(count // 2 * 2 if self.state.mixup else count for count in counts)


def _send_to_host(*values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Copy 0-dimensional tensors to the CPU without waiting: (n,) float64, and the event after which it is valid."""
    stacked = torch.stack([value.detach().double() for value in values])
    if stacked.device.type != "cuda":
        return stacked, None
    host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
    host.copy_(stacked, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
