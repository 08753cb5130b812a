"""The logger "td4v": console and log.txt, and the line of training progress."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from common.console import LineFormatter
from engine.distributed import Process

logger = logging.getLogger("td4v")


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
        handler.setFormatter(LineFormatter(f"%(asctime)s %(levelname)s{rank} %(message)s"))
        logger.addHandler(handler)
    warnings.showwarning = _log_warning


def _log_warning(message: Warning | str, category: type[Warning], *source: Any, **options: Any) -> None:
    """Log each of Python's warnings as one line, without its source line."""
    logger.log(logging.WARNING if issubclass(category, UserWarning) else logging.DEBUG, "%s", message)


def close_logging() -> None:
    """Remove the console and the file that `setup_logging` gave the logger."""
    for handler in [handler for handler in logger.handlers if handler.get_name() == "td4v"]:
        logger.removeHandler(handler)
        handler.close()


class Eta:
    """Estimates how long the rest of a run takes, from the pace since this object was made after `done` of `total`."""

    def __init__(self, done: int, total: int) -> None:
        self.done_before, self.total, self.started = done, total, time.perf_counter()

    def seconds(self, done: int) -> float:
        """Seconds left after `done` of all steps; needs at least one since the start."""
        return (time.perf_counter() - self.started) / (done - self.done_before) * (self.total - done)


def progress_line(
    epoch: int,
    epochs: int,
    step: int,
    steps: int,
    *,
    loss: float,
    lr: float,
    clips_per_second: float,
    seconds_left: float,
) -> str:
    """One line of progress; `epoch` counts from 0, `step` from 1 in the epoch; the speed is over all processes."""
    position = f"epoch {epoch}/{epochs} step {step:{len(str(steps))}d}/{steps}"
    eta = timedelta(seconds=round(seconds_left))
    return f"{position} loss {loss:.4f} lr {lr:.3e} {clips_per_second:.1f} clips/s eta {eta}"
