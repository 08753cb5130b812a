"""One training step and one validation batch through everything, to see what a whole run would take."""

from __future__ import annotations

import logging
import math
import resource
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.utils.data import DataLoader

from engine import checkpoint_file
from engine.distributed import Process, barrier, gather, sync_buffers
from engine.evaluation import PASS_CLIPS, DataError, evaluate
from engine.log import setup_logging
from engine.run_dir import RunDir
from engine.signals import ending_in_order
from engine.train_step import TrainingState
from engine.trainer import Trainer, TrainerSettings

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Estimate:
    """What a run takes, by the slowest process.

    Args:
        step, validation, save: seconds of a training step, of PASS_CLIPS clips of validation, and of a checkpoint.
        run: seconds of the whole run.
        memory: peak in GiB, of the GPU or of the process.
        checkpoint_bytes: size of last_model.pt.
        clips_per_s: the speed that the loader must have.
        finite: whether the loss of the step was finite.
    """

    step: float
    validation: float
    save: float
    run: float
    memory: float
    checkpoint_bytes: int
    clips_per_s: float
    finite: bool

    def __str__(self) -> str:
        return (
            f"dry run: {self.step:.3f} s a step, {self.validation:.3f} s for {PASS_CLIPS} clips of validation, "
            f"{self.save:.2f} s and {self.checkpoint_bytes / 1e6:.1f} MB a checkpoint, "
            f"peak memory {self.memory:.2f} GiB; the whole run takes {timedelta(seconds=round(self.run))} if the "
            f"loader gives {self.clips_per_s:.1f} clips/s; nothing was kept"
        )


def dry_run(
    state: TrainingState,
    train_loader: DataLoader,
    val_loader: DataLoader,
    val_videos: int,
    process: Process,
    settings: TrainerSettings,
) -> Estimate:
    """Make one step, evaluate one batch and save, in a folder that is removed; log and return what that takes.

    Arguments are the Trainer's. The model is not the same afterwards. Errors are those of a run.
    """
    with (
        tempfile.TemporaryDirectory(prefix="td4v_dry_run_") as folder,
        ending_in_order(),
        RunDir(folder, {}, {}, process) as run,
    ):
        trainer = Trainer(state, train_loader, val_loader, val_videos, process, settings, run)
        step, clips = _time_step(trainer)
        validation, clips_a_batch, videos = _time_validation(trainer)
        since = _now(process)
        trainer.checkpointer.save(trainer.progress, trainer.meter)
        save = _now(process) - since
        size = (run.path / checkpoint_file.LAST).stat().st_size if process.is_main else 0
        setup_logging(process)  # closes the log in the folder, which is removed
    measured = gather((step, validation, save, _memory(process)))
    step, validation, save, memory = (max(values) for values in zip(*measured, strict=True))
    evaluations = sum(settings.evaluates(epoch) for epoch in range(settings.epochs))
    passes = math.ceil(len(val_loader) * clips_a_batch / PASS_CLIPS)
    seconds = step * trainer.steps * settings.epochs + validation * passes * evaluations
    seconds += save * (settings.epochs + evaluations)
    estimate = Estimate(
        step=step,
        validation=validation,
        save=save,
        run=seconds,
        memory=memory,
        checkpoint_bytes=size,
        clips_per_s=clips / step,
        finite=not trainer.progress.loss_monitor.skipped_steps,
    )
    logger.info("%d videos validated, loss finite: %s", videos, estimate.finite)
    logger.info("%s", estimate)
    return estimate


def _time_step(trainer: Trainer) -> tuple[float, int]:
    """Seconds of a training step, and its clips on all processes."""
    process = trainer.process
    trainer.state.model.train()
    steps = trainer.step_batches(0)
    batches = next((kept for read in steps if (kept := trainer.agree(read).batches)), None)
    if batches is None:
        raise DataError("no training batch can be used: too few of its videos can be read; the log says why")
    trainer.warm_up(batches[0]["video"])
    barrier()
    since = _now(process)
    trainer.step(batches)
    trainer.finish_pending_step()
    seconds = _now(process) - since
    steps.close()
    return seconds, sum(gather(sum(len(batch["label"]) for batch in batches)))


def _time_validation(trainer: Trainer) -> tuple[float, int, int]:
    """Seconds of PASS_CLIPS clips; the most clips in a batch of any process, and the videos validated."""
    process, state = trainer.process, trainer.state
    sync_buffers(state.model)
    batch = next(iter(trainer.val_loader))
    videos = sum(gather(len(batch["index"]) + len(batch["skipped"])))
    for _ in range(2):  # the first warms up
        since = _now(process)
        accuracy = evaluate(state.model, [batch], process, state.precision, videos, normalizer=state.normalizer)
        seconds = _now(process) - since
    video = batch["video"]  # (B, V, T, C, H, W), or None
    clips = max(gather(video.shape[0] * video.shape[1] if video is not None else 1))
    return seconds / math.ceil(clips / PASS_CLIPS), clips, accuracy.videos


def _now(process: Process) -> float:
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    return time.perf_counter()


def _memory(process: Process) -> float:
    """The peak so far in GiB: allocated on the GPU, or resident on the CPU."""
    if process.device.type == "cuda":
        return torch.cuda.max_memory_allocated(process.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
