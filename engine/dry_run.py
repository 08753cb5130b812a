"""One training step and one validation batch through everything, to see what a whole run would take.

Lives here: what `train_vision.py --dry-run` does, in a folder that is gone afterwards.
Does not live here: any other way of training, evaluating or saving (loop.py, evaluation.py).
"""

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
from engine.evaluation import PASS_CLIPS, evaluate
from engine.log import setup_logging
from engine.run_dir import RunDir
from engine.signals import ending_in_order
from engine.train_step import TrainingState
from engine.trainer import Trainer, TrainerSettings

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Estimate:
    """Seconds of a training step, a pass of validation, a save and the whole run, each as long as the slowest process
    takes; the peak of memory in GiB, a GPU's or the process's; bytes of last_model.pt; clips a second that data must
    come at."""

    step: float
    validation: float
    save: float
    whole: float
    memory: float
    size: int
    clips_per_s: float

    def __str__(self) -> str:
        whole = timedelta(seconds=round(self.whole))
        return (
            f"dry run: {self.step:.3f} s a step, {self.validation:.3f} s for {PASS_CLIPS} clips of validation, {self.save:.2f} s and "
            f"{self.size / 1e6:.1f} MB a checkpoint, peak memory {self.memory:.2f} GiB; the whole run takes {whole} if "
            f"the loader gives {self.clips_per_s:.1f} clips/s; nothing was kept"
        )


def dry_run(
    trainee: TrainingState,
    train_loader: DataLoader,
    val_loader: DataLoader,
    expected: int,
    process: Process,
    settings: TrainerSettings,
) -> Estimate:
    """Rehearse, make one step, validate one batch, save; say and return what that took. Arguments as Trainer's.

    The model is not the same afterwards. Errors are those of a run.
    """
    with (
        tempfile.TemporaryDirectory(prefix="td4v_dry_run_") as place,
        ending_in_order(),
        RunDir(place, {}, {}, process) as record,
    ):
        trainer = Trainer(trainee, train_loader, val_loader, expected, process, settings, record)
        trainee.model.train()
        groups = trainer.groups(0)
        group = next(groups)
        trainer.rehearse(group[0]["video"])  # which also warms up
        barrier()
        since = _now(process)
        trainer.step(group)
        trainer.settle()
        step = _now(process) - since
        clips = sum(gather(sum(len(batch["label"]) for batch in group)))
        groups.close()
        sync_buffers(trainee.model)
        batch = next(iter(val_loader))
        videos = sum(gather(len(batch["index"]) + len(batch["skipped"])))
        for _ in range(2):  # the first warms up
            since = _now(process)
            accuracy = evaluate(trainee.model, [batch], process, trainee.precision, videos, None, trainee.normalizer)
        validated = max(gather(batch["video"].shape[0] * batch["video"].shape[1] if batch["video"] is not None else 1))
        seconds = (_now(process) - since) / math.ceil(validated / PASS_CLIPS)
        since = _now(process)
        trainer.keeper.save(trainer.state, trainer.meter)
        save = _now(process) - since
        size = (record.path / checkpoint_file.LAST).stat().st_size if process.is_main else 0
        setup_logging(process)  # the log in the folder goes with it
    step, seconds, save, memory = (
        max(values) for values in zip(*gather((step, seconds, save, _memory(process))), strict=True)
    )
    evaluations = sum(settings.evaluates(epoch) for epoch in range(settings.epochs))
    saves = settings.epochs + evaluations
    passes = math.ceil(len(val_loader) * validated / PASS_CLIPS)
    whole = step * trainer.steps * settings.epochs + seconds * passes * evaluations + save * saves
    estimate = Estimate(step, seconds, save, whole, memory, size, clips / step)
    logger.info("%d videos validated, loss finite: %s", accuracy.videos, not trainer.state.loss_monitor.skipped_steps)
    logger.info("%s", estimate)
    return estimate


def _now(process: Process) -> float:
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    return time.perf_counter()


def _memory(process: Process) -> float:
    """GiB at most so far: allocated on the GPU, or resident on the CPU."""
    if process.device.type == "cuda":
        return torch.cuda.max_memory_allocated(process.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
