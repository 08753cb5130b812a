"""Saves a run and restores it: when, which files, what is in them, and that all processes do it together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from common.text import plural
from engine import checkpoint_file
from engine.best_model import BestModel, find_best
from engine.checkpoint_file import Checkpoint, CheckpointError
from engine.distributed import Process, barrier, gather, unwrap
from engine.ema import EmaError
from engine.meter import LossMonitor, Meter
from engine.rng import rng_state, set_rng_state
from engine.run_dir import RunDir
from engine.train_step import TrainingState

logger = logging.getLogger("td4v")

INSTEAD_OF_BEST = f"test {checkpoint_file.LAST} instead, or train on with a higher solver.epochs"

# (model, state dict, name of the file, identity of the frozen weights that it does not hold or None): loads the state
# dict into the model, or raises a ValueError of one sentence and leaves the model as it was.
LoadWeights = Callable[[nn.Module, dict[str, Tensor], str, dict[str, str] | None], None]


@dataclass
class Progress:
    """How far training is; the names are keys of a checkpoint. `best` is -1 before the first validation."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best: float = -1.0
    evaluations_since_best: int = 0
    unevaluated_epoch: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    loss_monitor: LossMonitor = field(default_factory=LossMonitor)

    @classmethod
    def from_checkpoint(cls, content: dict[str, Any]) -> Progress:
        values = {name: content[name] for name in cls.__dataclass_fields__}
        monitor = LossMonitor(**values["loss_monitor"])
        return cls(**{**values, "history": list(values["history"]), "loss_monitor": monitor})


class Checkpointer:
    """Saves into the folder of a run.

    Args:
        every_steps, every_minutes: how often a checkpoint is due, minutes by the main process's clock; None: never.
        keep: how many checkpoints of the run stay, see checkpoint_file.save_last.
        full: save the frozen weights too.
    """

    def __init__(
        self,
        state: TrainingState,
        process: Process,
        run: RunDir,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int = 2,
        full: bool = False,
    ) -> None:
        self.state, self.process, self.run = state, process, run
        self.every_steps, self.every_minutes, self.keep, self.full = every_steps, every_minutes, keep, full
        self.saved_step: int | None = None
        self.saved_at = time.monotonic()
        self.best = BestModel()  # of a restored run, on the main process

    def is_due_after(self, step: int) -> bool:
        """Whether a checkpoint is due after this step (counted from 1), the same on all processes."""
        return self.every_steps is not None and step % self.every_steps == 0

    def is_due_by_clock(self) -> bool:
        """Whether a checkpoint is due now; only the main process knows."""
        if self.every_minutes is None or not self.process.is_main:
            return False
        return time.monotonic() - self.saved_at > 60 * self.every_minutes

    def save(self, progress: Progress, meter: Meter, evaluated: bool = False) -> None:
        """Write last_model.pt; every process must call it.

        While steps are being skipped the previous file is worth more: a run that resumes from it makes the same steps
        again. So nothing is written then, unless the model was just `evaluated`.
        """
        if progress.loss_monitor.skipped_in_a_row and not evaluated:
            return
        content = self._content(progress, meter)
        if self.process.is_main:
            self.run.flush()  # curves up to here must not be lost with the process
            checkpoint_file.save_last(self.run.path, content, self.keep, self.saved_step)
        self.saved_step, self.saved_at = progress.step, time.monotonic()

    def save_best(self, progress: Progress) -> None:
        """Write model_best.pt, the weights that were validated, on the main process."""
        if self.process.is_main:
            content = {"epoch": progress.epoch, "step": progress.step, "best": progress.best}
            content |= weights_content(self.state, self.full) | self._origin()
            checkpoint_file.save(self.run.path / checkpoint_file.BEST, content)

    def save_failed(self, progress: Progress, meter: Meter, failed: dict[str, Any]) -> Path:
        """Write failed_model.pt with what is known of the failure; every process must call it."""
        content, path = self._content(progress, meter) | {"failed": failed}, self.run.path / checkpoint_file.FAILED
        if self.process.is_main:
            checkpoint_file.save(path, content)
        barrier()
        return path

    def restore(
        self, checkpoint: Checkpoint, load_weights: LoadWeights, steps_per_epoch: int, epochs: int
    ) -> tuple[Progress, Meter]:
        """Restore the training state from a checkpoint, whose content is emptied. Nothing is written.

        Args:
            load_weights: see LoadWeights.
            steps_per_epoch, epochs: of this run.

        Raises:
            CheckpointError: it does not fit this run.
        """
        path = checkpoint.path
        progress, meter = restore_run(checkpoint, load_weights, self.state, self.process)
        if progress.step != progress.epoch * steps_per_epoch + progress.step_in_epoch:
            raise CheckpointError(
                f"{path}: made {plural(progress.step, 'step')} in {plural(progress.epoch, 'epoch')} and "
                f"{plural(progress.step_in_epoch, 'step')}, "
                f"but an epoch now has {steps_per_epoch}: resume with the same list, batch size and accumulation"
            )
        if progress.epoch > epochs:
            raise CheckpointError(f"{path}: {progress.epoch} epochs were trained already, solver.epochs is {epochs}")
        if path.parent.resolve() == self.run.path.resolve():
            self.saved_step = progress.step if path.name == checkpoint_file.LAST else None
        if progress.best >= 0 and self.process.is_main:
            in_place = path.parent.resolve() == self.run.path.resolve()
            self.best = find_best(path.parent, checkpoint, in_place)
        checkpoint.content.clear()  # the tensors were copied
        return progress, Meter.from_state(meter)

    def lost_best(self) -> str | None:
        """Why the best model of the restored run is lost, on every process; None if it is not."""
        return gather(self.best.problem if self.best.is_lost else None)[0]

    def write_best(self, source: Path) -> None:
        """Bring the best model of a restored run into the run folder, on the main process.

        Args:
            source: the folder that it was restored from.
        """
        content, problem = self.best.content, self.best.problem
        if problem is not None:
            another = "; the next evaluation makes another" if self.best.is_lost else ""
            logger.warning("%s%s", problem, another)
        if content is not None and (problem is not None or source.resolve() != self.run.path.resolve()):
            checkpoint_file.save(self.run.path / checkpoint_file.BEST, content)
        self.best = BestModel()

    def check_best(self, best: float) -> None:
        """Make sure, at the end of a run, that model_best.pt is there and valid; every process must call it.

        Raises:
            CheckpointError: it is not, and cannot be made again.
        """
        if self.process.is_main and best >= 0:
            last = checkpoint_file.load(self.run.path / checkpoint_file.LAST)
            self.best = find_best(self.run.path, last, in_place=True)
        if (lost := self.lost_best()) is not None:
            raise CheckpointError(f"{lost}: {INSTEAD_OF_BEST}")
        self.write_best(self.run.path)

    def _origin(self) -> dict[str, Any]:
        return {"config": self.run.config, "meta": self.run.meta}

    def _content(self, progress: Progress, meter: Meter) -> dict[str, Any]:
        return run_content(self.state, progress, meter.state(), self.process, self.full) | self._origin()


def weights_to_save(model: nn.Module, full: bool) -> dict[str, Tensor]:
    """The state dict of a model, without its frozen parameters unless `full`."""
    model = unwrap(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if full or name not in frozen}


def weights_content(state: TrainingState, full: bool) -> dict[str, Any]:
    """The content of a checkpoint for testing: the weights that are validated, and their frozen weights' identity."""
    values = weights_to_save(state.model, full) | (state.ema.state_dict() if state.ema is not None else {})
    return {"model_state_dict": values, "backbone": state.backbone, "full": full}


def run_content(
    state: TrainingState, progress: Progress, meter: dict[str, Any], process: Process, full: bool
) -> dict[str, Any]:
    """The content of a checkpoint of a run but for config and meta; every process must call it."""
    of_processes = gather((rng_state(process.device), meter))
    return {
        **asdict(progress),
        **weights_content(state, full),
        "model_state_dict": weights_to_save(state.model, full),
        "ema_state_dict": state.ema.state_dict() if state.ema is not None else None,
        "optimizer_state_dict": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "rng": [rng for rng, _ in of_processes],
        "meters": [meter for _, meter in of_processes],
    }


def restore_run(
    checkpoint: Checkpoint, load_weights: LoadWeights, state: TrainingState, process: Process
) -> tuple[Progress, dict[str, Any]]:
    """Restore `state` and this process's random generators as `run_content` found them.

    Returns:
        how far training was, and the state of this process's Meter.

    Raises:
        CheckpointError: weights only, another optimizer, or another number of processes.
        ValueError: of `load_weights`.
    """
    path, content = checkpoint.path, checkpoint.content
    if not checkpoint.is_run:
        raise CheckpointError(f"{path}: holds no run to resume: {', '.join(checkpoint.missing_run_keys)} missing")
    if len(content["rng"]) != process.world_size:
        written_by = plural(len(content["rng"]), "process", "processes")
        raise CheckpointError(f"{path}: was written by {written_by} and cannot be resumed with {process.world_size}")
    if bool(content["scaler"]) != state.scaler.is_enabled():
        raise CheckpointError(f"{path}: was written with another precision, and cannot be resumed with this one")
    if (content["ema_state_dict"] is None) != (state.ema is None):
        raise CheckpointError(f"{path}: was written with another solver.ema_decay, and cannot be resumed with this one")
    backbone = None if checkpoint.has_backbone else checkpoint.backbone
    load_weights(unwrap(state.model), content["model_state_dict"], str(path), backbone)
    part = "optimizer"
    try:
        state.optimizer.load_state_dict(_with_kernels_of(state.optimizer, content["optimizer_state_dict"]))
        part = "run"
        state.scheduler.load_state_dict(content["scheduler"])
        state.scaler.load_state_dict(content["scaler"])
        if state.ema is not None:
            state.ema.load_state_dict(content["ema_state_dict"])
        set_rng_state(content["rng"][process.rank], process.device)
        progress = Progress.from_checkpoint(content)
    except EmaError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {(str(error) or 'nothing').splitlines()[0]}"
        raise CheckpointError(f"{path}: does not fit this {part} ({reason})") from None
    if isinstance(state.scheduler, LambdaLR):
        # The learning rate follows from the step alone: the schedule may reach over more epochs now.
        state.scheduler.last_epoch = progress.step
        rates = zip(state.optimizer.param_groups, state.scheduler.base_lrs, state.scheduler.lr_lambdas, strict=True)
        for group, base_lr, factor in rates:
            group["lr"] = base_lr * factor(progress.step)
    return progress, content["meters"][process.rank]


def _with_kernels_of(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved state with the kernels (fused, foreach) of this optimizer, which load_state_dict would replace."""
    kernels = {key: optimizer.param_groups[0].get(key) for key in ("fused", "foreach")}
    return {**saved, "param_groups": [{**group, **kernels} for group in saved["param_groups"]]}
