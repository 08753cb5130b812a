"""The training loop, readable in one go, and evaluation; for any model, any loader.

Lives here: epochs, steps, accumulation, what is checked, measured, saved and when.
Does not live here: how a step, a checkpoint, an accuracy or a log line is made; any model or dataset.

Batches are dicts with `video`, `label` (B,) and `index` (B,) int64, `skipped` (names of videos that could not be read)
and `error` (a sentence that stops the run, or None). `video` is (B, T, C, H, W) in training and (B, V, T, C, H, W), V
views a video, in evaluation, or None where all of the batch was skipped: pixels as uint8, which are normalised here on
the model's device, or float32, which are so already. Epochs count from 0.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine import checkpoint
from engine.distributed import EngineError, Process, barrier, gather, gradient_sync, sync_buffers, unwrap
from engine.log import Eta, RunFolder, progress_line
from engine.metrics import Accuracy, Scores
from engine.optim import Precision
from engine.pixels import Normalizer

logger = logging.getLogger("td4v")


class DataError(EngineError):
    """The loader reports data that cannot be used, or gives none."""


class TrainingError(EngineError):
    """Training cannot go on: the loss is not finite."""


@dataclass
class TrainState:
    """How far training is: finished epochs, optimizer steps (those left out included), best top-1 in percent (-1: none yet).

    `pending` is the record of an epoch that was trained, but not evaluated and written down yet.
    """

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    pending: dict[str, Any] | None = None


@dataclass(frozen=True)
class Trainee:
    """A model (as wrapped for the processes), all that changes it, and what its input goes through on the device.

    `mixup` maps (video, label) to (video, target).
    """

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    precision: Precision
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    normalizer: Normalizer = field(default_factory=Normalizer)


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often. `accumulation` batches make one optimizer step; `clip_grad` is the largest gradient norm."""

    epochs: int
    print_freq: int = 20
    eval_freq: int = 1
    skip_epoch: tuple[int, ...] = ()
    accumulation: int = 1
    clip_grad: float | None = None

    def evaluates(self, epoch: int) -> bool:
        """Whether the model is evaluated after this epoch: after the last even if it is one of `skip_epoch`."""
        due = (epoch + 1) % self.eval_freq == 0 and epoch not in self.skip_epoch
        return due or epoch == self.epochs - 1


def steps_per_epoch(loader: DataLoader, accumulation: int) -> int:
    """Optimizer steps in an epoch; the last may be of fewer batches. Raises DataError for a loader without batches."""
    if len(loader) == 0:
        raise DataError("the training list gives no full batch: it is shorter than one batch over all processes")
    return -(-len(loader) // accumulation)


def fit(
    trainee: Trainee,
    train_loader: DataLoader,
    val_loader: DataLoader,
    expected: int,
    process: Process,
    settings: LoopSettings,
    run: RunFolder,
    resume: str | Path | None = None,
) -> TrainState:
    """Train, evaluate and save, from the start or from a checkpoint, which is continued exactly.

    Args:
        expected: videos that `val_loader` gives on all processes together, each once.
        run: takes the logs, last_model.pt after each epoch, and model_best.pt whenever top-1 is the best so far.
        resume: a checkpoint of this function, made with the same settings and number of processes.

    Raises:
        DataError, TrainingError, CheckpointError, MetricsError: one sentence on what is wrong.
    """
    state = TrainState()
    steps = steps_per_epoch(train_loader, settings.accumulation)
    if resume is not None:
        parts = (trainee.model, trainee.optimizer, trainee.scheduler, trainee.scaler)
        content = checkpoint.restore(resume, *parts, process)
        state = TrainState(content["epoch"], content["step"], content["best"], content["pending"])
        if state.step != state.epoch * steps:
            raise checkpoint.CheckpointError(
                f"{resume}: made {state.step} steps in {state.epoch} epochs, where an epoch now has {steps}: "
                "resume with the same list, batch size and accumulation"
            )
        run.rewind(state.epoch, state.step)
    eta = Eta(done=state.step, total=steps * settings.epochs)
    if state.pending is not None:
        _finish_epoch(trainee, val_loader, expected, process, state, settings, run)
    for epoch in range(state.epoch, settings.epochs):
        row = train_one_epoch(trainee, train_loader, process, state, settings, run, eta)
        sync_buffers(trainee.model)
        state.epoch, state.pending = epoch + 1, row
        if settings.evaluates(epoch):
            _save(trainee, process, state, run, improved=False)  # a failing evaluation must not cost the epoch
        _finish_epoch(trainee, val_loader, expected, process, state, settings, run)
    barrier()
    return state


def _finish_epoch(
    trainee: Trainee,
    val_loader: DataLoader,
    expected: int,
    process: Process,
    state: TrainState,
    settings: LoopSettings,
    run: RunFolder,
) -> None:
    """Evaluate the epoch in `state.pending` if it is due, save, and write the epoch down."""
    row, accuracy = state.pending, None
    if settings.evaluates(row["epoch"]):
        accuracy = evaluate(
            trainee.model, val_loader, process, trainee.precision, expected, settings.print_freq, trainee.normalizer
        )
        log_accuracy(f"epoch {row['epoch']}", accuracy)
    improved = accuracy is not None and accuracy.top1 > state.best
    state.best = accuracy.top1 if improved else state.best
    state.pending = None
    _save(trainee, process, state, run, improved)
    run.record_epoch(row | {name: getattr(accuracy, name, None) for name in ("top1", "top5", "mean_class")}, state.step)


def train_one_epoch(
    trainee: Trainee,
    loader: DataLoader,
    process: Process,
    state: TrainState,
    settings: LoopSettings,
    run: RunFolder,
    eta: Eta,
) -> dict[str, Any]:
    """One pass over the loader, counting `state.step` up.

    A step averages over the clips of its `accumulation` batches, however many there are in the last one.

    Returns:
        What metrics.jsonl tells of an epoch: loss, learning rate, clips a second, share of time spent waiting for
        data, GPU memory in GiB (None on a CPU), skipped videos and steps left out for overflowing gradients.
    """
    for part in (loader, loader.sampler):  # the first of them that knows of epochs
        if hasattr(part, "set_epoch"):
            part.set_epoch(state.epoch)
            break
    trainee.model.train()
    steps = steps_per_epoch(loader, settings.accumulation)
    meter = _Meter(process.device)
    for number, group in enumerate(_groups(loader, settings.accumulation, meter), start=1):
        if state.step == 0:
            run.show_clips(group[0]["video"])
        clips = sum(len(batch["label"]) for batch in group)
        loss = torch.zeros((), device=process.device)
        for place, batch in enumerate(group, start=1):
            video = trainee.normalizer(batch["video"], process.device)  # (B, T, C, H, W)
            target = batch["label"].to(process.device, non_blocking=True)  # (B,)
            if trainee.mixup is not None:
                video, target = trainee.mixup(video, target)  # (B, T, C, H, W), (B, K)
            with gradient_sync(trainee.model, enabled=place == len(group)):
                with trainee.precision.autocast(process.device):
                    logits = trainee.model(video)  # (B, K)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                part = trainee.criterion(logits, target) * (len(video) / clips)
                trainee.scaler.scale(part).backward()
            loss = loss + part.detach()
        lr = max(group["lr"] for group in trainee.optimizer.param_groups)
        stepped = _optimizer_step(trainee, settings.clip_grad)
        state.step += 1
        meter.add(number, loss, clips, stepped)
        if number % settings.print_freq == 0 or number == steps:
            shown = meter.check(state.epoch, steps)
            rate = meter.rate() * process.world_size
            left = eta.seconds(state.step)
            logger.info(progress_line(state.epoch, settings.epochs, number, steps, shown, lr, rate, left))
            run.scalars({"train/loss": shown, "train/lr": lr, "train/clips_per_s": rate}, state.step)
    return {"epoch": state.epoch, "step": state.step, "lr": lr, **meter.summary()}


def _optimizer_step(trainee: Trainee, clip_grad: float | None) -> bool:
    """Apply and drop the gradients. False where the scaler found them overflowing and left the step out."""
    trainee.scaler.unscale_(trainee.optimizer)
    if clip_grad is not None:
        parameters = [p for group in trainee.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip_grad)
    scale = trainee.scaler.get_scale()  # 1 where nothing is scaled, without a look at the device
    trainee.scaler.step(trainee.optimizer)
    trainee.scaler.update()
    trainee.optimizer.zero_grad(set_to_none=True)
    stepped = trainee.scaler.get_scale() >= scale
    if stepped:
        trainee.scheduler.step()
    else:
        logger.info("gradients overflowed in fp16: step left out, loss scale now %g", trainee.scaler.get_scale())
    return stepped


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    process: Process,
    precision: Precision,
    expected: int,
    print_freq: int | None = None,
    normalizer: Normalizer | None = None,
    max_clips: int = 32,
) -> Accuracy:
    """Accuracy over the videos of all processes, each of which gives its own part; the same result on each.

    Args:
        expected: videos in the list (see metrics.Scores.accuracy).
        print_freq: batches between lines of progress; None for none.
        normalizer: of uint8 pixels; None scales them to 0..1.
        max_clips: clips in one forward pass at most; views beyond that wait on the CPU.

    Raises:
        DataError: the loader reports an error. MetricsError: not every video has one finite score.
    """
    model = unwrap(model)  # processes may have different numbers of batches, so nothing may wait for the others
    was_training = model.training
    model.eval()
    normalizer = normalizer or Normalizer()
    scores = Scores()
    eta = Eta(done=0, total=len(loader))
    try:
        for number, batch in enumerate(loader, start=1):
            if print_freq is not None and number % print_freq == 0 and number < len(loader):
                left = timedelta(seconds=round(eta.seconds(number)))
                logger.info("evaluating: batch %d/%d eta %s", number, len(loader), left)
            scores.skipped += _check(batch)
            if batch["video"] is None:
                continue
            views = batch["video"].shape[1]
            clips = batch["video"].flatten(0, 1)  # (B*V, T, C, H, W)
            with precision.autocast(process.device):
                parts = [model(normalizer(part, process.device)) for part in clips.split(max_clips)]
            logits = torch.cat(parts).unflatten(0, (-1, views))  # (B, V, K)
            scores.add(batch["index"], logits, batch["label"])
    finally:
        model.train(was_training)
    return scores.accuracy(expected)


def log_accuracy(what: str, accuracy: Accuracy) -> None:
    """One line with the three percentages."""
    skipped = f", {accuracy.skipped} more skipped" if accuracy.skipped else ""
    logger.info(
        "%s: top-1 %.2f top-5 %.2f mean class %.2f over %d videos%s",
        *(what, accuracy.top1, accuracy.top5, accuracy.mean_class, accuracy.videos, skipped),
    )


def _save(trainee: Trainee, process: Process, state: TrainState, run: RunFolder, improved: bool) -> None:
    parts = (trainee.model, trainee.optimizer, trainee.scheduler, trainee.scaler)
    content = checkpoint.collect(*parts, process, **vars(state), config=run.config, meta=run.meta)
    if process.is_main:
        if improved:
            checkpoint.save(run.path / "model_best.pt", content)
        checkpoint.save(run.path / "last_model.pt", content)


def _check(batch: dict[str, Any]) -> int:
    """Stop on an error of the loader, warn of each skipped video, and return how many there are."""
    if batch["error"] is not None:
        raise DataError(batch["error"])
    for name in batch["skipped"]:
        logger.warning("skipped: %s", name)
    return len(batch["skipped"])


def _groups(loader: DataLoader, size: int, meter: _Meter) -> Iterator[list[dict[str, Any]]]:
    """The checked batches of one optimizer step at a time, with the time spent waiting for them."""
    group: list[dict[str, Any]] = []
    asked = time.perf_counter()
    for number, batch in enumerate(loader, start=1):
        meter.waited += time.perf_counter() - asked
        meter.skipped += _check(batch)
        if batch["video"] is None:
            raise DataError(f"none of the videos of training batch {number} could be read")
        group.append(batch)
        if len(group) == size or number == len(loader):
            yield group
            group = []
        asked = time.perf_counter()


@dataclass
class _Meter:
    """Sums over an epoch on this process. The loss stays on the device until `check` reads it."""

    device: torch.device
    waited: float = 0.0
    skipped: int = 0
    clips: int = 0
    overflows: int = 0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.bad = torch.zeros((), dtype=torch.int64, device=self.device)  # the first step without a finite loss
        self._read = (0.0, 0)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def add(self, step: int, loss: Tensor, clips: int, stepped: bool) -> None:
        self.loss += loss.double() * clips
        self.bad = torch.where((self.bad == 0) & ~loss.isfinite(), step, self.bad)
        self.clips += clips
        self.overflows += not stepped

    def check(self, epoch: int, steps: int) -> float:
        """The mean loss since the last call; TrainingError where it was not finite."""
        bad, total = int(self.bad), float(self.loss)
        if bad:
            raise TrainingError(
                f"the loss is not finite at epoch {epoch}, step {bad} of {steps}: "
                "lower the learning rate, or use precision bf16 or fp32"
            )
        before, clips = self._read
        self._read = (total, self.clips)
        return (total - before) / (self.clips - clips)

    def rate(self) -> float:
        """Clips a second on this process since the epoch began."""
        return self.clips / (time.perf_counter() - self.started)

    def summary(self) -> dict[str, Any]:
        """The epoch over all processes."""
        cuda = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if cuda else None
        seconds = time.perf_counter() - self.started
        own = (float(self.loss), self.clips, seconds, self.waited, self.skipped, memory)
        loss, clips, seconds_all, waited, skipped, memories = zip(*gather(own), strict=True)
        return {
            "train_loss": sum(loss) / sum(clips),
            "clips_per_s": sum(clips) / max(seconds_all),
            "data_wait": sum(waited) / sum(seconds_all),
            "memory_gib": max(memories) if cuda else None,
            "skipped": sum(skipped),
            "overflows": self.overflows,
        }
