"""The training loop, for any model and any loader.

The host issues a step before it knows the result of the previous one, so that the device never waits for the host.
`finish_pending_step` reads that result; it comes before everything that is saved or ends.

Batches are dicts with `video`, `label` (B,) and `index` (B,) int64, `path` (names of the B videos), `skipped`
(sentences on videos that could not be read) and `error` (a sentence that ends the run, or None). `video` is
(B, T, C, H, W) in training and (B, V, T, C, H, W), V views a video, in evaluation, or None if the whole batch was
skipped. A training batch that skipping leaves too small on one process is left out on all of them. Pixels are uint8,
normalised here on the model's device, or float32, normalised already. Epochs count from 0.
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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.text import plural
from configs.schema import Config
from engine.checkpoint_file import Checkpoint, CheckpointError
from engine.checkpointer import INSTEAD_OF_BEST, Checkpointer, LoadWeights, Progress
from engine.distributed import Process, all_reduce_max, barrier, cpu_group, gather, sync_buffers, unwrap
from engine.errors import EngineError, RunContext, explain_errors
from engine.evaluation import DataError, check_batch, evaluate, log_accuracy
from engine.log import Eta, progress_line
from engine.meter import Meter, StepSums
from engine.metrics import Accuracy, DivergedError
from engine.optim import learning_rate
from engine.run_dir import RunDir
from engine.signals import Stopped, StopSignals, WaitInterrupted
from engine.train_step import PendingStep, StepResult, TrainingState, TrainStep
from engine.warm_up import warm_up

logger = logging.getLogger("td4v")

Batch = dict[str, Any]


class TrainingError(EngineError):
    """Training cannot continue: too many steps in a row are not finite, or a trainable parameter gets no gradient."""


@dataclass(frozen=True)
class TrainerSettings:
    """How long, and how often.

    Args:
        print_freq: steps between log lines.
        eval_freq, skip_epoch: evaluate each so many epochs, but not after these; always after the last.
        accumulation: batches of one optimizer step.
        clip_grad: the largest gradient norm.
        early_stop: end after so many evaluations without a better top-1.
        max_bad_steps: end after so many skipped steps in a row.
        save_steps, save_minutes, keep, full: see Checkpointer; a checkpoint is also written after each epoch.
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

    @classmethod
    def from_config(cls, config: Config, full: bool = False) -> TrainerSettings:
        """The settings of a configuration; `full` saves the frozen weights even if it does not ask for them."""
        solver, logging_, checkpoint = config.solver, config.logging, config.checkpoint
        return cls(
            epochs=solver.epochs,
            print_freq=logging_.print_freq,
            eval_freq=logging_.eval_freq,
            skip_epoch=logging_.skip_epoch,
            accumulation=solver.grad_accumulation_steps,
            clip_grad=solver.clip_grad,
            early_stop=solver.early_stop,
            max_bad_steps=solver.max_bad_steps,
            save_steps=checkpoint.every_steps,
            save_minutes=checkpoint.every_minutes,
            keep=checkpoint.keep,
            full=checkpoint.full or full,
        )

    def evaluates(self, epoch: int) -> bool:
        """Whether the model is evaluated after this epoch."""
        due = (epoch + 1) % self.eval_freq == 0 and epoch not in self.skip_epoch
        return due or epoch == self.epochs - 1


class Agreement(NamedTuple):
    """What all processes do next: stop because of this signal (0: none), save, and make a step of these own batches."""

    stop_signal: int
    save_is_due: bool
    batches: list[Batch]


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimizer steps in an epoch; the last may have fewer batches. Raises DataError for a loader without batches."""
    if batches == 0:
        raise DataError("the training list gives no full batch: it is shorter than one batch over all processes")
    return -(-batches // accumulation)


class Trainer:
    """Trains, evaluates and saves, from the start or from a checkpoint, bit for bit as if never interrupted.

    Args:
        val_videos: videos that `val_loader` gives on all processes together, each once.
        run: must be open in `fit`; takes the logs, last_model.pt, and model_best.pt whenever top-1 is the best so far.
    """

    def __init__(
        self,
        state: TrainingState,
        train_loader: DataLoader,
        val_loader: DataLoader,
        val_videos: int,
        process: Process,
        settings: TrainerSettings,
        run: RunDir,
    ) -> None:
        self.state, self.process, self.settings, self.run = state, process, settings, run
        self.train_loader, self.val_loader, self.val_videos = train_loader, val_loader, val_videos
        self.batches = len(train_loader)  # in an epoch
        self.steps = steps_per_epoch(self.batches, settings.accumulation)  # in an epoch
        self.least_clips = max(getattr(unwrap(state.model), "least_clips", 1), 1 if state.mixup is None else 2)
        self.train_step = TrainStep(state, process, settings.clip_grad)
        self.pending: PendingStep | None = None  # the last step issued, until its result is read
        self.progress, self.meter = Progress(), Meter()
        self.resumed_from: Path | None = None
        self.warmed_up = False
        self.signals, self.cpu_group = StopSignals(), cpu_group()
        self.eta = Eta(done=0, total=self.steps * settings.epochs)
        self.checkpointer = Checkpointer(
            state,
            process,
            run,
            every_steps=settings.save_steps,
            every_minutes=settings.save_minutes,
            keep=settings.keep,
            full=settings.full,
        )
        self.context = RunContext(
            batch_size=getattr(getattr(train_loader, "batch_sampler", None), "batch_size", None),
            accumulation=settings.accumulation,
            trainable=sum(p.numel() for p in state.model.parameters() if p.requires_grad),
            precision=state.precision.name,
            workers=getattr(train_loader, "num_workers", None),
            world_size=process.world_size,
            read_by=getattr(train_loader, "read_by", None),
        )

    def restore(self, checkpoint: Checkpoint, load_weights: LoadWeights) -> None:
        """Continue from a checkpoint of a run with the same settings and number of processes; its content is emptied.

        Nothing is written, so a refusal leaves the run folder as it was.

        Args:
            load_weights: see checkpointer.LoadWeights.

        Raises:
            CheckpointError: it does not fit, or nothing is left to train and the best model is lost.
        """
        self.progress, self.meter = self.checkpointer.restore(
            checkpoint, load_weights, self.steps, self.settings.epochs
        )
        self.resumed_from = checkpoint.path
        if (lost := self.checkpointer.lost_best()) is not None:
            if self._is_over():
                raise CheckpointError(f"{lost}: {INSTEAD_OF_BEST}")
            self.progress.best = -1.0

    def fit(self) -> Progress:
        """Train to the end.

        Raises:
            DataError, TrainingError, CheckpointError, MetricsError: one sentence on what is wrong.
            Stopped: after SIGTERM, SIGUSR1 or Ctrl-C, when everything is saved.
        """
        progress = self.progress
        self._begin()
        with self.signals, explain_errors(lambda: self.context):
            if progress.unevaluated_epoch is not None:
                self.finish_epoch()
            while not self._is_over():
                self.train_epoch()
                self.finish_epoch()
            if self._stops_early():
                logger.info(
                    "stopping early: no better top-1 than %.2f in %s",
                    *(progress.best, plural(progress.evaluations_since_best, "evaluation")),
                )
            self.checkpointer.check_best(progress.best)
            self.run.finish()
        barrier()
        return progress

    def train_epoch(self) -> None:
        """Train an epoch, or the rest of one that was begun before the run was resumed."""
        progress, state = self.progress, self.state
        batches_to_skip = _start_epoch(
            self.train_loader, progress.epoch, progress.step_in_epoch * self.settings.accumulation
        )
        if self.process.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.process.device)
        state.model.train()
        lr = learning_rate(state.optimizer)  # of an epoch whose last step failed, no step is left
        with self._finishing_pending_step():
            for read in self.step_batches(batches_to_skip):
                stop_signal, save_is_due, batches = self.agree(read)
                if stop_signal or save_is_due:
                    self._save_between_steps()
                    self._stop_if_requested(stop_signal)
                self._count_videos(read, len(read) - len(batches))
                if batches and not self.warmed_up:
                    self._show_first(batches[0]["video"])
                lr = learning_rate(state.optimizer)
                self.step(batches)
                if progress.step_in_epoch < self.steps and self.checkpointer.is_due_after(progress.step):
                    self._save_between_steps()
        stop_signal = self.agree([]).stop_signal
        sync_buffers(state.model)
        row = {"epoch": progress.epoch, "step": progress.step, "lr": lr, **self.meter.summary(self.process.device)}
        self._report_skipped(row)
        progress.epoch, progress.step_in_epoch, progress.unevaluated_epoch = progress.epoch + 1, 0, row
        self.meter = Meter()
        if stop_signal or self.settings.evaluates(row["epoch"]):
            self.checkpointer.save(progress, self.meter)  # an evaluation that fails must not cost the epoch
            self._stop_if_requested(stop_signal)

    def finish_epoch(self) -> None:
        """Evaluate the epoch that was trained if that is due, save, and write its row."""
        progress = self.progress
        row, accuracy = progress.unevaluated_epoch, None
        if self.settings.evaluates(row["epoch"]):
            try:
                accuracy = self.evaluate()
            except DivergedError as error:
                raise TrainingError(f"{error} after epoch {row['epoch']}: {self._advice()}") from error
            log_accuracy(f"epoch {row['epoch']}", accuracy)
            if accuracy.top1 > progress.best:
                progress.best, progress.evaluations_since_best = accuracy.top1, 0
                self.checkpointer.save_best(progress)
            else:
                progress.evaluations_since_best += 1
        row = row | {name: getattr(accuracy, name, None) for name in ("top1", "top5", "mean_class")}
        progress.history, progress.unevaluated_epoch = [*progress.history, row], None
        self.checkpointer.save(progress, self.meter, evaluated=accuracy is not None)
        self.run.record_epoch(row)

    def agree(self, batches: list[Batch]) -> Agreement:
        """Exchange with all processes, on the CPU, what comes next; each has read its batches of a step, or none.

        It comes before the step, so that a process whose data does not come can still stop together with the others:
        they wait for it here and not inside the step.
        """
        too_small = [
            batch["video"] is None or (len(batch["skipped"]) > 0 and len(batch["label"]) < self.least_clips)
            for batch in batches
        ]
        too_small += [False] * (self.settings.accumulation - len(batches))
        requests = [self.signals.requested, self.checkpointer.is_due_by_clock(), *too_small]
        stop_signal, save_is_due, *left_out = all_reduce_max(requests, self.cpu_group)
        kept = [batch for batch, out in zip(batches, left_out, strict=False) if not out]
        return Agreement(stop_signal, bool(save_is_due), kept)

    def step(self, batches: list[Batch]) -> None:
        """Issue one optimizer step, and read the result of the one before; without batches, the step is left out.

        While steps are skipped it waits for each of them, so that the run ends with the last one allowed.
        """
        progress, lr = self.progress, learning_rate(self.state.optimizer)
        position = {"epoch": progress.epoch, "step_in_epoch": progress.step_in_epoch + 1, "step": progress.step + 1}
        issued = self.train_step(batches, **position) if batches else None
        self.finish_pending_step()  # cannot end the run here: while steps are skipped, none is pending
        self.pending = issued
        progress.step += 1  # as the scheduler does: they agree in every file, failed_model.pt too
        progress.step_in_epoch += 1
        if issued is None:
            self.train_step.leave_out()
            self._log_progress(**position, lr=lr)
        elif progress.loss_monitor.skipped_in_a_row or self.settings.max_bad_steps == 1:
            self.finish_pending_step()

    def step_batches(self, batches_to_skip: int) -> Iterator[list[Batch]]:
        """The checked batches of each optimizer step that is left in the epoch; waiting for them is measured.

        A requested stop ends the wait, and gives fewer batches.
        """
        loader = self.signals.interruptible(itertools.islice(self.train_loader, batches_to_skip, None))
        for step in range(self.progress.step_in_epoch, self.steps):
            batches: list[Batch] = []
            since = time.perf_counter()
            with contextlib.suppress(WaitInterrupted):
                for batch in itertools.islice(loader, self.settings.accumulation):
                    check_batch(batch)
                    batches.append(batch)
            self.meter.data_wait += time.perf_counter() - since
            if not batches and not self.signals.requested:
                raise DataError(f"the training loader ended before step {step + 1} of {self.steps}")
            yield batches

    def finish_pending_step(self) -> None:
        """Read the result of the last step issued, unless that was done; all processes must call it."""
        step, self.pending = self.pending, None
        if step is None:
            return
        result, monitor = step.read(), self.progress.loss_monitor
        if result.skipped:
            self._count_skipped(step, result)
        else:
            self.meter.add(result.loss, result.norm, step.clips)
            monitor.skipped_in_a_row = 0
            if self.process.is_main and monitor.add(result.loss):  # the loss of its own clips, as in the curves
                usual = f"usual are {monitor.mean:.4g} +- {monitor.variance**0.5:.2g}"
                position = f"epoch {step.epoch}, step {step.step_in_epoch}"
                logger.warning("loss spike at %s: %.4g (%s)", position, result.loss, usual)
        self._log_progress(step.epoch, step.step_in_epoch, step.step, step.lr)

    def warm_up(self, video: Tensor) -> None:
        """The pass before the first step of this process; TrainingError or a warning for parameters without a gradient."""
        self.warmed_up = True
        self.context = replace(self.context, clips=len(video), frames=video.shape[1])
        if without := warm_up(self.state, self.process, video):
            names = ", ".join(without[:5]) + (", ..." if without[5:] else "")
            fault = f"{len(without)} trainable parameters get no gradient: {names}"
            if self.process.world_size > 1:
                raise TrainingError(f"{fault}; with several processes every trainable parameter must take part")
            logger.warning("%s", fault)

    def evaluate(self) -> Accuracy:
        """The accuracy on the validation videos, of the averaged weights if there are any."""
        state = self.state
        try:
            if state.ema is not None:
                state.ema.broadcast()
            with state.ema.applied(state.model) if state.ema is not None else contextlib.nullcontext():
                return evaluate(
                    state.model,
                    self.val_loader,
                    self.process,
                    state.precision,
                    self.val_videos,
                    print_freq=self.settings.print_freq,
                    normalizer=state.normalizer,
                    signals=self.signals,
                )
        except RuntimeError as error:
            # The other processes got the signal too and may have left already, which is an error here.
            if self.signals.requested and not isinstance(error, EngineError):
                raise Stopped(self.signals.requested, "in an evaluation, saved before it") from error
            raise

    def _begin(self) -> None:
        """Make the run folder what it was at the restored checkpoint, or empty its curves for a new run."""
        progress = self.progress
        if self.resumed_from is not None:
            best = f", best top-1 {progress.best:.2f}" if progress.best >= 0 else ""
            logger.info("resumed from %s after %s%s", self.resumed_from, _position(progress, self.steps), best)
            self.checkpointer.write_best(self.resumed_from.parent)
        self.run.rewind(progress.history, progress.step if self.resumed_from is not None else -1)
        self.eta = Eta(progress.step, self.eta.total)
        ema = self.state.ema
        if self.process.is_main and ema is not None and 2 / (1 - ema.decay) > self.eta.total:
            steps = round(1 / (1 - ema.decay))
            logger.warning("solver.ema_decay averages over %d steps, many for a run of %d", steps, self.eta.total)

    def _stops_early(self) -> bool:
        limit, progress = self.settings.early_stop, self.progress
        ended = progress.epoch < self.settings.epochs and progress.unevaluated_epoch is None
        return ended and limit is not None and progress.evaluations_since_best >= limit

    def _is_over(self) -> bool:
        """Whether nothing is left to train or evaluate."""
        progress = self.progress
        all_trained = progress.epoch >= self.settings.epochs and progress.unevaluated_epoch is None
        return all_trained or self._stops_early()

    def _show_first(self, video: Tensor) -> None:
        """What comes before the first step of this process."""
        self.warm_up(video)
        if self.resumed_from is None:
            self.run.show_clips(video)

    def _save_between_steps(self) -> None:
        """Write last_model.pt unless it is there already; before the first step there is nothing to save."""
        self.finish_pending_step()
        if self.progress.step not in (0, self.checkpointer.saved_step):
            self.checkpointer.save(self.progress, self.meter)

    def _count_videos(self, batches: list[Batch], left_out: int) -> None:
        """Count the videos of a step's batches, of which `left_out` are left out."""
        meter, monitor, progress = self.meter, self.progress.loss_monitor, self.progress
        skipped = sum(len(batch["skipped"]) for batch in batches)
        meter.videos += skipped + sum(len(set(batch["index"].tolist())) for batch in batches)
        meter.skipped_videos += skipped
        if not left_out:
            return
        meter.skipped_batches += left_out
        monitor.skipped_batches += left_out
        if self.process.is_main:
            position = f"epoch {progress.epoch}, step {progress.step_in_epoch + 1} of {self.steps}"
            logger.warning(
                "%s: %s left out, of which a process could not read %s (%d left out so far)",
                *(position, plural(left_out, "batch", "batches")),
                *(plural(self.least_clips, "clip"), monitor.skipped_batches),
            )

    def _report_skipped(self, row: dict[str, Any]) -> None:
        """Log the share of an epoch's videos that could not be read. Raises DataError if no batch was left."""
        skipped, videos, batches = row["skipped_videos"], row["videos"], row["skipped_batches"]
        if not skipped:
            return
        share = f"{skipped} of {videos} videos ({100 * skipped / videos:.1f}%)"
        if batches == self.batches:
            raise DataError(
                f"epoch {row['epoch']}: no batch could be trained on, because {share} could not be read; the log says why"
            )
        logger.warning(
            "epoch %d: %s could not be read, %d of %d batches left out", *(row["epoch"], share, batches, self.batches)
        )

    def _stop_if_requested(self, signal: int) -> None:
        if signal:
            barrier()  # the first process that exits ends the others
            progress = self.progress
            is_saved = self.checkpointer.saved_step == progress.step
            saved = "saved" if is_saved else "not saved, because steps are being skipped"
            where = f"after {_position(progress, self.steps)}, {saved}"
            raise Stopped(signal, where if progress.step else "before the first step")

    @contextlib.contextmanager
    def _finishing_pending_step(self) -> Iterator[None]:
        """The result of the last step is read when this context is left, after an error too."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # a device in an error state has no result
                self.finish_pending_step()
            raise
        self.finish_pending_step()

    def _count_skipped(self, step: PendingStep, result: StepResult) -> None:
        """Count a step that was not finite; TrainingError, with the state saved, after max_bad_steps in a row."""
        monitor = self.progress.loss_monitor
        monitor.skipped_steps += 1
        monitor.skipped_in_a_row += 1
        self.meter.skipped_steps += 1
        numbers = f"the loss is {result.loss:g}, the norm of the gradients {result.norm:g}"
        position = f"epoch {step.epoch}, step {step.step_in_epoch} of {self.steps}"
        scale = f"; the loss scale is now {result.loss_scale:g}" if self.state.scaler.is_enabled() else ""
        counts = f"{monitor.skipped_in_a_row} in a row, {monitor.skipped_steps} in all{scale}"
        logger.warning("%s: %s: step skipped (%s)", position, numbers, counts)
        if monitor.skipped_in_a_row < self.settings.max_bad_steps:
            return
        # Gradients are not finite on any process, losses only where it began.
        of_processes = gather((math.isfinite(result.loss), step.videos))
        videos = [name for finite, names in of_processes if not finite for name in names]
        videos = videos or [name for _, names in of_processes for name in names]
        in_a_row, monitor.skipped_in_a_row = monitor.skipped_in_a_row, 0  # a run that resumes from here may try again
        failed = {"epoch": step.epoch, "step": step.step_in_epoch, "videos": videos}
        path = self.checkpointer.save_failed(self.progress, self.meter, failed)
        shown = ", ".join(videos[:8]) + (f" and {len(videos) - 8} more" if len(videos) > 8 else "")
        raise TrainingError(
            f"{numbers} at {position}, {in_a_row} steps in a row: {self._advice()}; videos of the last one: "
            f"{shown or 'not known'}; the state at these steps is in {path}"
        )

    def _advice(self) -> str:
        return (
            f"start a new run, from an earlier checkpoint in {self.run.path} (pretrain) or from the beginning, with a "
            "lower learning rate or precision bf16 or fp32"
        )

    def _log_progress(self, epoch: int, step_in_epoch: int, step: int, lr: float) -> None:
        """A log line and TensorBoard's points, each print_freq steps and after the last of an epoch."""
        if step_in_epoch % self.settings.print_freq and step_in_epoch != self.steps:
            return
        curves, self.meter.since_log = self.meter.since_log.curves(), StepSums()
        rate = self.meter.clips_per_second() * self.process.world_size
        line = progress_line(
            epoch,
            self.settings.epochs,
            step_in_epoch,
            self.steps,
            loss=curves.get("train/loss", math.nan),
            lr=lr,
            clips_per_second=rate,
            seconds_left=self.eta.seconds(step),
        )
        logger.info(line)
        monitor = self.progress.loss_monitor
        curves |= {"train/lr": lr, "train/clips_per_s": rate, "train/loss_spikes": monitor.spikes}
        curves |= {"train/skipped_steps": monitor.skipped_steps, "train/skipped_batches": monitor.skipped_batches}
        self.run.scalars(curves, step)


def _position(progress: Progress, steps: int) -> str:
    """Such as `1 epoch and 3 steps of 8`."""
    within = f" and {plural(progress.step_in_epoch, 'step')} of {steps}" if progress.step_in_epoch else ""
    return plural(progress.epoch, "epoch") + within


def _start_epoch(loader: DataLoader, epoch: int, first_batch: int) -> int:
    """Make `loader` begin with a batch of an epoch; returns how many batches are left to skip.

    A loader without `set_epoch` must draw its order and its items from (epoch, index) alone; else an epoch that is
    resumed in the middle gets other batches than it would have had.
    """
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch, first_batch)
        return 0
    sampler = getattr(loader, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return first_batch
