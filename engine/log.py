"""What a run leaves behind: the logger "td4v", the run folder and the lines written into it.

Lives here: console and log.txt, config.yaml, run.json (revision, versions, command; one entry a start),
metrics.jsonl (one line an epoch), TensorBoard.
Does not live here: what is measured (loop.py, metrics.py) and the checkpoints, which the loop saves into the folder.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from torchvision.utils import make_grid

from engine.distributed import EngineError, Process, gather
from engine.pixels import Normalizer
from engine.record import run_meta

logger = logging.getLogger("td4v")

_RUN_FILES = ("last_model.pt", "config.yaml", "log.txt")


class RunFolderError(EngineError):
    """A run folder that is taken or cannot be written."""


def setup_logging(process: Process, folder: Path | None = None) -> None:
    """Send the logger "td4v" to the console and, given a folder, to its log.txt; calling it again replaces both.

    Rank 0 shows everything, the others warnings and errors.
    """
    logger.setLevel(logging.INFO)
    close_logging()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if folder is not None:
        handlers.append(logging.FileHandler(folder / "log.txt", encoding="utf-8"))
    rank = f" [rank {process.rank}]" if process.world_size > 1 else ""
    for handler in handlers:
        handler.set_name("td4v")
        handler.setLevel(logging.INFO if process.is_main else logging.WARNING)
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{rank} %(message)s"))
        logger.addHandler(handler)
    warnings.showwarning = _log_warning


def _log_warning(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
    """Python's warnings as one line of the log each, without the source lines that a user can do nothing with."""
    logger.log(logging.WARNING if issubclass(category, UserWarning) else logging.DEBUG, "%s", message)


def close_logging() -> None:
    """Remove the console and the file that `setup_logging` gave the logger."""
    for handler in [handler for handler in logger.handlers if handler.get_name() == "td4v"]:
        logger.removeHandler(handler)
        handler.close()


class Eta:
    """Seconds that a run still needs, from the pace since this object was made."""

    def __init__(self, done: int, total: int) -> None:
        self.first, self.total, self.started = done, total, time.perf_counter()

    def seconds(self, done: int) -> float:
        """After `done` of all steps; needs at least one since the start."""
        return (time.perf_counter() - self.started) / (done - self.first) * (self.total - done)


def progress_line(
    epoch: int, epochs: int, step: int, steps: int, loss: float, lr: float, rate: float, seconds_left: float
) -> str:
    """One line of progress; `epoch` counts from 0, `step` from 1, `rate` in clips a second over all processes."""
    eta = timedelta(seconds=round(seconds_left))
    width = len(str(steps))
    return (
        f"epoch {epoch}/{epochs} step {step:{width}d}/{steps} loss {loss:.4f} lr {lr:.3e} {rate:.1f} clips/s eta {eta}"
    )


class RunFolder:
    """A folder that holds one run. Rank 0 writes; on other ranks the methods do nothing.

    Args:
        path: made if it is not there.
        config: the resolved configuration as plain values, written to config.yaml.
        resume: go on in a folder that holds a run.
        mean, std: three numbers each, with which input clips are normalised.
        clips: how many input clips to show in TensorBoard.

    Raises:
        RunFolderError: on every process, where the folder already holds a run or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        process: Process,
        *,
        resume: bool = False,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        clips: int = 2,
    ) -> None:
        self.path, self.config, self.process, self.clips = Path(path), config, process, clips
        self.normalizer = Normalizer(mean, std)
        self.meta = run_meta()
        self._writer: Any = None
        self._purge_step: int | None = None
        self._described = False
        problem = gather(self._prepare(resume) if process.is_main else None)[0]
        if problem is not None:
            raise RunFolderError(problem)
        setup_logging(process, self.path if self.path.is_dir() else None)

    def _prepare(self, resume: bool) -> str | None:
        """Make the folder and its first files, or say why not."""
        try:
            taken = [name for name in _RUN_FILES if (self.path / name).exists()]
            if taken and not resume:
                way = "resume it" if taken[0] == "last_model.pt" else "it made no checkpoint: delete it"
                return f"{self.path}: already holds a run ({taken[0]}); {way} or choose another folder"
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume:
                self._describe()
        except (OSError, ValueError) as error:
            return f"{self.path}: cannot be used as a run folder ({error})"
        return None

    def _describe(self) -> None:
        """Write config.yaml, and add this start to run.json; once."""
        if self.process.is_main and not self._described:
            self._described = True
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            (self.path / "config.yaml").write_text(text, encoding="utf-8")
            record = self.path / "run.json"
            starts = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
            record.write_text(json.dumps([*starts, self.meta], indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Write out what TensorBoard holds back. The log goes on, for errors."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def writer(self) -> Any:
        """TensorBoard's writer on rank 0, made when first needed, else None."""
        if self._writer is None and self.process.is_main:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, which evaluation need not wait for

            self._writer = SummaryWriter(str(self.path), purge_step=self._purge_step)
        return self._writer

    def rewind(self, epoch: int, step: int) -> None:
        """Go on from a checkpoint that fits: note this start, drop lines from `epoch` on and points from `step` on."""
        self._describe()
        self._purge_step = step + 1
        lines = self.path / "metrics.jsonl"
        if self.process.is_main and lines.exists():
            kept = [line for line in lines.read_text(encoding="utf-8").splitlines() if _epoch_of(line) < epoch]
            lines.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def record_epoch(self, row: dict[str, Any], step: int) -> None:
        """Add a line to metrics.jsonl, and its numbers to TensorBoard under `epoch/` at optimizer step `step`."""
        if self.process.is_main:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.scalars({f"epoch/{name}": value for name, value in row.items() if value is not None}, step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add one point each to TensorBoard's curves."""
        for name, value in values.items() if self.writer is not None else ():
            self.writer.add_scalar(name, value, step)

    def show_clips(self, video: Tensor) -> None:
        """Show the first clips of a batch (B, T, C, H, W) in TensorBoard, one row of frames each."""
        if self.writer is not None:
            for number, frames in enumerate(self.normalizer.undo(video[: self.clips])):  # (T, C, H, W)
                self.writer.add_image(f"input/{number}", make_grid(frames, nrow=len(frames)), 0)


def _epoch_of(line: str) -> float:
    """The epoch of a line of metrics.jsonl; infinity for one that was cut off."""
    try:
        return json.loads(line)["epoch"]
    except json.JSONDecodeError:
        return float("inf")
