"""Saves a run while it is made, and takes it up again: which files, when, and that all processes do it together.

Lives here: when a checkpoint is due, last_model.pt, model_best.pt and failed_model.pt, and what must fit for a run to go
on. Does not live here: what a run consists of (state.py), how a file is written (checkpoint.py), when an epoch ends
(loop.py).
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from engine import checkpoint_file
from engine.distributed import Process, barrier
from engine.meter import Meter
from engine.run_dir import RunDir
from engine.state import Parts, Progress, bare, collect, restore

logger = logging.getLogger("td4v")


class Checkpointer:
    """Saves into the folder of a run.

    Args:
        steps, minutes: a checkpoint is due each so many steps, or minutes by the main process's clock; None: never.
        keep, full: see checkpoint_file.save_last and state.weights.
    """

    def __init__(
        self,
        parts: Parts,
        process: Process,
        run: RunDir,
        steps: int | None = None,
        minutes: float | None = None,
        keep: int = 2,
        full: bool = False,
    ) -> None:
        self.parts, self.process, self.run = parts, process, run
        self.steps, self.minutes, self.keep, self.full = steps, minutes, keep, full
        self.saved_step: int | None = None
        self.saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save after this step (counted from 1), as this process sees it."""
        if self.steps is not None and step % self.steps == 0:
            return True
        if self.minutes is None or not self.process.is_main:
            return False
        return time.monotonic() - self.saved_at > 60 * self.minutes

    def save(self, state: Progress, meter: Meter, sound: bool = False) -> None:
        """Write last_model.pt; every process must call it.

        Not while steps are being left out, unless the model is known to be `sound`: what was saved before then is worth
        more, and a run that goes on from it makes the same steps again.
        """
        if state.health.in_a_row and not sound:
            return
        content = self._content(state, meter)
        if self.process.is_main:
            self.run.flush()  # curves up to here must not be lost with the process
            checkpoint_file.save_last(self.run.path, content, self.keep, self.saved_step)
        self.saved_step, self.saved_at = state.step, time.monotonic()

    def save_best(self, state: Progress) -> None:
        """Write model_best.pt, the weights that were validated, on the main process."""
        if self.process.is_main:
            content = {"epoch": state.epoch, "step": state.step, "best": state.best, **bare(self.parts, self.full)}
            checkpoint_file.save(self.run.path / checkpoint_file.BEST, content | self._origin())

    def save_failed(self, state: Progress, meter: Meter, failed: dict[str, Any]) -> Path:
        """Write failed_model.pt with what is known of the failure; every process must call it."""
        content, path = self._content(state, meter) | {"failed": failed}, self.run.path / checkpoint_file.FAILED
        if self.process.is_main:
            checkpoint_file.save(path, content)
        barrier()
        return path

    def restore(self, path: Path, content: dict[str, Any], steps: int, epochs: int) -> tuple[Progress, Meter]:
        """Put everything back as it was, and empty `content`.

        Args:
            path: the checkpoint. content: what is in it. steps: in an epoch, now. epochs: that the run shall have.

        Raises:
            CheckpointError: it does not fit this run.
        """
        state, meter = restore(content, path, self.parts, self.process)
        content.clear()  # the tensors were copied
        if state.step != state.epoch * steps + state.place:
            raise checkpoint_file.CheckpointError(
                f"{path}: made {state.step} steps in {state.epoch} epochs and {state.place} steps, where an epoch now has "
                f"{steps}: resume with the same list, batch size and accumulation"
            )
        if state.epoch > epochs:
            raise checkpoint_file.CheckpointError(
                f"{path}: {state.epoch} epochs were trained already, solver.epochs is {epochs}"
            )
        if path.parent.resolve() == self.run.path.resolve():
            self.saved_step = state.step if path.name == checkpoint_file.LAST else None
        if state.best >= 0 and self.process.is_main:
            self._check_best(path.parent / checkpoint_file.BEST, state.best)
        return state, Meter.of(meter)

    def _check_best(self, source: Path, top1: float) -> None:
        """Take the best model so far along into another folder; warn where it is not whole, or not there."""
        try:
            best = checkpoint_file.load(source)
            if best.get("best") != top1:
                raise checkpoint_file.CheckpointError(f"{source}: is not the best model up to this checkpoint")
            if source.parent.resolve() != self.run.path.resolve():
                checkpoint_file.save(self.run.path / checkpoint_file.BEST, best)
        except checkpoint_file.CheckpointError as error:
            logger.warning("%s; it had top-1 %.2f, and only a better one takes its place", error, top1)

    def _origin(self) -> dict[str, Any]:
        return {"config": self.run.config, "meta": self.run.meta}

    def _content(self, state: Progress, meter: Meter) -> dict[str, Any]:
        return collect(self.parts, state, meter.state(), self.process, self.full) | self._origin()
