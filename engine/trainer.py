"""The training loop, readable in one go; for any model, any loader.

Lives here: epochs, steps, accumulation, what is checked, measured, saved and when, and where a run can be interrupted:
between any two steps, and anywhere in an evaluation.
Does not live here: what a step does on the device (step.py), how a checkpoint (keeper.py), an accuracy or a log line is
made; any model or dataset.

The host issues a step before it knows what came of the one before, so that the device never waits for it; `settle` does
know, and goes before everything that is saved or ends.

Batches are dicts with `video`, `label` (B,) and `index` (B,) int64, `path` (names of the B videos), `skipped`
(sentences on videos that could not be read) and `error` (a sentence that stops the run, or None). `video` is
(B, T, C, H, W) in training and (B, V, T, C, H, W), V views a video, in evaluation, or None where all of the batch was
skipped: pixels as uint8, which are normalised here on the model's device, or float32, which are so already. Epochs
count from 0.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from engine import checkpoint_file
from engine.checkpointer import Checkpointer, Progress
from engine.distributed import Process, all_reduce_max, barrier, cpu_group, gather, sync_buffers, unwrap
from engine.errors import EngineError, RunContext, explain_errors
from engine.evaluation import DataError, check_batch, evaluate, log_accuracy
from engine.log import Eta, progress_line
from engine.meter import Meter, StepSums
from engine.metrics import DivergedError
from engine.optim import learning_rate
from engine.rng import rng_state, set_rng_state
from engine.run_dir import RunDir
from engine.signals import Stopped, StopSignals
from engine.train_step import PendingStep, StepResult, TrainingState, TrainStep, clips_of

logger = logging.getLogger("td4v")


class TrainingError(EngineError):
    """Training cannot go on: gradients are not finite time and again, or a parameter gets none."""


@dataclass(frozen=True)
class Awaited:
    """The last step issued, whose outcome the host does not know yet. `epoch` counts from 0, `place` in the epoch and
    `step` in the run from 1; `names` are those of its videos here."""

    epoch: int
    place: int
    step: int
    lr: float
    clips: int
    names: list[str]
    issued: PendingStep


@dataclass(frozen=True)
class TrainerSettings:
    """How long, how often. `accumulation` batches make one optimizer step; `clip_grad` is the largest gradient norm.

    `early_stop` validations without a better top-1 end the run, `max_bad_steps` steps in a row that are not finite
    too. Checkpoints are written after each epoch and each `save_steps` steps or `save_minutes` minutes; `keep` and
    `full`: see checkpoint_file.save_last and state.weights.
    """

    epochs: int
    print_freq: int = 20
    eval_freq: int = 1
    skip_epoch: tuple[int, ...] = ()
    accumulation: int = 1
    clip_grad: float | None = None
    early_stop: int | None = None
    max_bad_steps: int = 10
    save_steps: int | None = None
    save_minutes: float | None = None
    keep: int = 2
    full: bool = False

    def evaluates(self, epoch: int) -> bool:
        """Whether the model is evaluated after this epoch: after the last even if it is one of `skip_epoch`."""
        due = (epoch + 1) % self.eval_freq == 0 and epoch not in self.skip_epoch
        return due or epoch == self.epochs - 1


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimizer steps in an epoch; the last may be of fewer batches. Raises DataError for a loader without batches."""
    if batches == 0:
        raise DataError("the training list gives no full batch: it is shorter than one batch over all processes")
    return -(-batches // accumulation)


class Trainer:
    """Trains, evaluates and saves, from the start or from a checkpoint, which is continued exactly.

    Args:
        expected: videos that `val_loader` gives on all processes together, each once.
        run: takes the logs, last_model.pt, and model_best.pt whenever top-1 is the best so far.
    """

    def __init__(
        self,
        trainee: TrainingState,
        train_loader: DataLoader,
        val_loader: DataLoader,
        expected: int,
        process: Process,
        settings: TrainerSettings,
        run: RunDir,
    ) -> None:
        self.trainee, self.process, self.settings, self.run = trainee, process, settings, run
        self.train_loader, self.val_loader, self.expected = train_loader, val_loader, expected
        self.steps = steps_per_epoch(len(train_loader), settings.accumulation)
        self.state, self.meter = Progress(), Meter()
        self.cpu_group, self.signals = cpu_group(), StopSignals()
        self.stepper, self.awaited = TrainStep(trainee, process, settings.clip_grad), None
        saving = (settings.save_steps, settings.save_minutes, settings.keep, settings.full)
        self.keeper = Checkpointer(trainee, process, run, *saving)
        self.rehearsed = False
        self.situation = RunContext(
            batch_size=getattr(getattr(train_loader, "batch_sampler", None), "batch_size", None),
            accumulation=settings.accumulation,
            tuned=sum(p.numel() for p in trainee.model.parameters() if p.requires_grad),
            precision=trainee.precision.name,
            workers=getattr(train_loader, "num_workers", None),
            world_size=process.world_size,
        )
        self.eta = Eta(done=0, total=self.steps * settings.epochs)

    def fit(self, resume: str | Path | None = None, content: dict[str, Any] | None = None) -> Progress:
        """Train to the end.

        Args:
            resume: a checkpoint of this function, made with the same settings and number of processes.
            content: what is in it, where it was read already; it is emptied.

        Raises:
            DataError, TrainingError, CheckpointError, MetricsError: one sentence on what is wrong.
            Stopped: after SIGTERM, SIGUSR1 or Ctrl-C, when everything is saved.
        """
        if resume is not None:
            content = content or checkpoint_file.load(resume)
            self.state, self.meter = self.keeper.restore(Path(resume), content, self.steps, self.settings.epochs)
        self.run.rewind(self.state.history, self.state.step if resume is not None else -1)
        self.eta = Eta(self.state.step, self.eta.total)
        if self.process.is_main and self.trainee.ema is not None and 2 / (1 - self.trainee.ema.decay) > self.eta.total:
            reach = round(1 / (1 - self.trainee.ema.decay))
            logger.warning("solver.ema_decay averages over %d steps, much for a run of %d", reach, self.eta.total)
        with self.signals, explain_errors(lambda: self.situation):
            if self.state.unevaluated_epoch is not None:
                self._finish_epoch()
            while self.state.epoch < self.settings.epochs and not self._stale():
                self.train_epoch()
                self._finish_epoch()
            self.run.finish()
        barrier()
        return self.state

    def _stale(self) -> bool:
        """Whether validation has not improved for so long that the run ends early."""
        limit = self.settings.early_stop
        if limit is None or self.state.evaluations_since_best < limit:
            return False
        logger.info(
            "stopping early: no better top-1 than %.2f in %d validations",
            self.state.best,
            self.state.evaluations_since_best,
        )
        return True

    def train_epoch(self) -> None:
        """What is left of an epoch, which may have been begun before the run was resumed."""
        state, settings, trainee = self.state, self.settings, self.trainee
        skip = _place(self.train_loader, state.epoch, state.step_in_epoch * settings.accumulation)
        if self.process.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.process.device)
        trainee.model.train()
        lr, asked = learning_rate(trainee.optimizer), 0  # where a run failed at an epoch's last step, none is left
        with self._settled():
            for group in self.groups(skip):
                if not self.rehearsed:
                    self.rehearse(group[0]["video"])
                if state.step == 0:
                    self.run.show_clips(group[0]["video"])
                lr = learning_rate(trainee.optimizer)
                asked, due = self.step(group)
                if state.step_in_epoch < self.steps and (asked or due):
                    self.settle()
                    self.keeper.save(state, self.meter)
                    self._stop_if(asked)
        sync_buffers(trainee.model)
        row = {"epoch": state.epoch, "step": state.step, "lr": lr, **self.meter.summary(self.process.device)}
        state.epoch, state.step_in_epoch, state.unevaluated_epoch = state.epoch + 1, 0, row
        self.meter = Meter()
        if asked or settings.evaluates(row["epoch"]):
            self.keeper.save(state, self.meter)  # an evaluation that fails or is interrupted must not cost the epoch
            self._stop_if(asked)

    def _stop_if(self, asked: int) -> None:
        if asked:
            barrier()  # whoever exits first has the others ended
            place = f" and {self.state.step_in_epoch} steps of {self.steps}" if self.state.step_in_epoch else ""
            saved = "saved" if self.keeper.saved_step == self.state.step else "steps are being left out, so not saved"
            raise Stopped(asked, f"after {self.state.epoch} epochs{place}, {saved}")

    def groups(self, skip: int) -> Iterator[list[dict[str, Any]]]:
        """The checked batches of one optimizer step at a time, with the time spent waiting for them."""
        size = self.settings.accumulation
        batches = itertools.islice(self.train_loader, skip, None)
        for place in range(self.state.step_in_epoch, self.steps):
            group = []
            asked = time.perf_counter()
            for batch in itertools.islice(batches, size):
                self.meter.skipped_videos += check_batch(batch)
                if batch["video"] is None:
                    raise DataError(
                        f"none of the videos of training batch {place * size + len(group) + 1} could be read"
                    )
                group.append(batch)
            self.meter.data_wait += time.perf_counter() - asked
            if not group:
                raise DataError(f"the training loader ended before step {place + 1} of {self.steps}")
            yield group

    def step(self, group: list[dict[str, Any]]) -> tuple[int, int]:
        """One optimizer step (see step.py), of which the host learns when it has issued the next one, or by `settle`.

        Only while steps are being left out it waits for each, so that the run ends with the last that it allows.
        Returns the signal by which any process was asked to stop (0: none), and whether a checkpoint is due.
        """
        trainee, state = self.trainee, self.state
        lr, clips = learning_rate(trainee.optimizer), clips_of(group, trainee)
        names = [name for batch in group for name in dict.fromkeys(batch.get("path", ()))]
        issued = self.stepper(group)
        self.settle()  # which cannot end the run here: while steps are left out, none is open
        self.awaited = Awaited(state.epoch, state.step_in_epoch + 1, state.step + 1, lr, clips, names, issued)
        asked, due = all_reduce_max([self.signals.asked, self.keeper.is_due(state.step + 1)], self.cpu_group)
        state.step += 1  # as the scheduler has: they agree in every file, failed_model.pt too
        state.step_in_epoch += 1
        if state.loss_monitor.skipped_in_a_row or self.settings.max_bad_steps == 1:
            self.settle()
        return asked, due

    def settle(self) -> None:
        """Take down what came of the last step issued, if that has not been done. All processes must call it."""
        awaited, self.awaited = self.awaited, None
        if awaited is None:
            return
        figures, monitor = awaited.issued.read(), self.state.loss_monitor
        if figures.left_out:
            self._leave_out(awaited, figures)
        else:
            self.meter.add(figures.loss, figures.norm, awaited.clips)
            monitor.skipped_in_a_row = 0
            if self.process.is_main and monitor.add(figures.loss):  # of its own clips, as the curves
                where = f"epoch {awaited.epoch}, step {awaited.place}"
                usual = f"usual are {monitor.mean:.4g} +- {monitor.variance**0.5:.2g}"
                logger.warning("loss spike at %s: %.4g (%s)", where, figures.loss, usual)
        self._progress(awaited)

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """What came of the last step inside is known when this is left, by an error too."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # a device in an error state has no more to tell
                self.settle()
            raise
        self.settle()

    def _leave_out(self, awaited: Awaited, figures: StepResult) -> None:
        """Count a step that was not finite; TrainingError, with the state saved, if that does not end."""
        monitor = self.state.loss_monitor
        monitor.skipped_steps += 1
        monitor.skipped_in_a_row += 1
        self.meter.skipped_steps += 1
        what = f"the loss is {figures.loss:g}, the norm of the gradients {figures.norm:g}"
        where = f"epoch {awaited.epoch}, step {awaited.place} of {self.steps}"
        hint = f"; the loss scale is now {figures.scale:g}" if self.trainee.scaler.is_enabled() else ""
        logger.warning(
            "%s: %s: step left out (%d in a row, %d in all%s)",
            where,
            what,
            monitor.skipped_in_a_row,
            monitor.skipped_steps,
            hint,
        )
        if monitor.skipped_in_a_row < self.settings.max_bad_steps:
            return
        # gradients are not finite on any process, losses where it began
        parts = gather((math.isfinite(figures.loss), awaited.names))
        found = [name for finite, part in parts if not finite for name in part] or [
            n for _, part in parts for n in part
        ]
        in_a_row, monitor.skipped_in_a_row = monitor.skipped_in_a_row, 0  # who goes on from there may try again
        failed = {"epoch": awaited.epoch, "step": awaited.place, "videos": found}
        path = self.keeper.save_failed(self.state, self.meter, failed)
        shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise TrainingError(
            f"{what} at {where}, {in_a_row} steps in a row: {self._advice()}; videos of the last one: "
            f"{shown or 'not known'}; the state at these steps is in {path}"
        )

    def _advice(self) -> str:
        start = f"from a checkpoint in {self.run.path} that was saved earlier (pretrain)"
        return f"begin another run, {start} or anew, with a lower learning rate or precision bf16 or fp32"

    def _progress(self, awaited: Awaited) -> None:
        """A line and TensorBoard's points, each print_freq steps and after the last of an epoch."""
        settings, place, step = self.settings, awaited.place, awaited.step
        if place % settings.print_freq and place != self.steps:
            return
        curves, self.meter.since_log = self.meter.since_log.curves(), StepSums()
        rate = self.meter.clips_per_second() * self.process.world_size
        left = self.eta.seconds(step)
        shown = curves.get("train/loss", math.nan)
        logger.info(progress_line(awaited.epoch, settings.epochs, place, self.steps, shown, awaited.lr, rate, left))
        health = {
            "health/left_out": self.state.loss_monitor.skipped_steps,
            "health/loss_spikes": self.state.loss_monitor.spikes,
        }
        self.run.scalars({**curves, "train/lr": awaited.lr, "train/clips_per_s": rate, **health}, step)

    def rehearse(self, video: Tensor) -> None:
        """One forward and backward pass that changes nothing, before the first step of this process.

        Finds tuned parameters that get no gradient. And DistributedDataParallel orders its buckets anew after the
        first pass: sums over three or more processes depend on that order, and a resumed run would have another one
        in its first step than the run that went on.
        """
        self.rehearsed = True
        self.situation = replace(self.situation, clips=len(video), frames=video.shape[1])
        trainee, process = self.trainee, self.process
        buffers = list(unwrap(trainee.model).buffers())
        generators, former = rng_state(process.device), [buffer.clone() for buffer in buffers]
        with trainee.precision.autocast(process.device):
            logits = trainee.model(trainee.normalizer(video, process.device))  # (B, K)
        logits.float().square().mean().backward()
        without = [n for n, p in unwrap(trainee.model).named_parameters() if p.requires_grad and p.grad is None]
        trainee.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(buffers, former, strict=True):
                buffer.copy_(value)
        set_rng_state(generators, process.device)
        if without:
            what = f"{len(without)} tuned parameters get no gradient: {', '.join(without[:5])}{', ...' if without[5:] else ''}"
            if process.world_size > 1:
                raise TrainingError(f"{what}; with several processes every tuned parameter must take part")
            logger.warning("%s", what)

    def _finish_epoch(self) -> None:
        """Evaluate the epoch in `state.unevaluated_epoch` if it is due, save, and write the epoch down."""
        state = self.state
        row, accuracy = state.unevaluated_epoch, None
        if self.settings.evaluates(row["epoch"]):
            try:
                accuracy = self.evaluate()
            except DivergedError as error:
                raise TrainingError(f"{error} after epoch {row['epoch']}: {self._advice()}") from error
            log_accuracy(f"epoch {row['epoch']}", accuracy)
            improved = accuracy.top1 > state.best
            state.best, state.evaluations_since_best = (
                (accuracy.top1, 0) if improved else (state.best, state.evaluations_since_best + 1)
            )
            if improved:
                self.keeper.save_best(state)
        row = row | {name: getattr(accuracy, name, None) for name in ("top1", "top5", "mean_class")}
        state.history, state.unevaluated_epoch = [*state.history, row], None
        self.keeper.save(state, self.meter, evaluated=accuracy is not None)
        self.run.record_epoch(row)

    def evaluate(self) -> Any:
        """The accuracy of the model on the validation videos; of its averaged weights, where they are kept."""
        trainee = self.trainee
        try:
            if trainee.ema is not None:
                trainee.ema.broadcast()
            with trainee.ema.applied(trainee.model) if trainee.ema is not None else contextlib.nullcontext():
                return evaluate(
                    trainee.model, self.val_loader, self.process, trainee.precision, self.expected,
                    self.settings.print_freq, trainee.normalizer, signals=self.signals,
                )  # fmt: skip
        except RuntimeError as error:
            if self.signals.asked and not isinstance(error, EngineError):  # the others, asked too, have left already
                raise Stopped(self.signals.asked, "in an evaluation, saved before it") from error
            raise


def _place(loader: DataLoader, epoch: int, first_batch: int) -> int:
    """Have `loader` begin with a batch of an epoch; returns how many batches are left to pass over.

    A loader without `set_epoch` must draw its order and its items from (epoch, place) alone, or an epoch that is taken
    up in the middle goes on with other batches than it would have had.
    """
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch, first_batch)
        return 0
    sampler = getattr(loader, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return first_batch
