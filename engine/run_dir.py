"""The folder of a run: one process at a time uses it, and what is written into it besides checkpoints.

config.yaml, run.json (one entry a start), metrics.jsonl (one line an epoch), log.txt and TensorBoard's event files.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import socket
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from torchvision.utils import make_grid

from common.files import try_lock, write_atomic
from common.text import plural
from engine import checkpoint_file
from engine.distributed import Process, barrier, gather
from engine.errors import EngineError
from engine.event_log import EventLog
from engine.log import setup_logging
from engine.normalize import Normalizer
from engine.run_record import (
    CONFIG,
    LOCK,
    LOG,
    METRICS,
    STARTS,
    RunRecord,
    file_of_run,
    is_run_folder,
    read_record,
)

logger = logging.getLogger("td4v")

_FIRST_START = ("resume", "pretrain")  # settings that say how a run began, and stay when it is resumed


class RunDirError(EngineError):
    """A run folder that holds something else, is in use, or cannot be written."""


class RunDir:
    """A folder that holds one run. Rank 0 writes; on other ranks the methods do nothing.

    Nothing is written before `open`, or `with`.

    Args:
        path: made if it does not exist.
        config: the resolved configuration as plain values, for config.yaml.
        meta: of run_info.run_info, an entry of run.json.
        resume: the folder holds this run already.
        state: see `state_of`, from when the checkpoint to resume from was chosen; None: not compared.
        auto_named: if the folder exists by now, take another one, with a number after its name.
        normalizer: of input clips, to show them.
        clips: how many input clips to show in TensorBoard.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        meta: dict[str, Any],
        process: Process,
        *,
        resume: bool = False,
        state: tuple[int, ...] | None = None,
        auto_named: bool = False,
        normalizer: Normalizer | None = None,
        clips: int = 2,
    ) -> None:
        self.path, self.config, self.meta, self.process = Path(path), config, meta, process
        self.resume, self.auto_named, self.clips = resume, auto_named, clips
        self.state = state
        self.starts: list[dict[str, Any]] = []  # on rank 0, once open: the entries of run.json
        self.mended: list[str] = []  # sentences on files that were damaged
        self.normalizer = normalizer or Normalizer()
        self._events: EventLog | None = None  # on rank 0, while open
        self._lock: Any = None

    def open(self) -> RunDir:
        """Make and lock the folder, write its first files, and send the log there too; every process must call it.

        Raises:
            RunDirError: on every process, if the folder holds a run that is not resumed, another process uses it, or
                it cannot be written.
        """
        barrier()  # no process has refused to go on, so this is the first write
        prepared = gather(self._prepare() if self.process.is_main else None)[0]
        self.path, problem = prepared or (self.path, None)
        if problem is not None:
            raise RunDirError(problem)
        setup_logging(self.process, self.path if self.path.is_dir() else None)
        for sentence in self.mended:
            logger.warning("%s", sentence)
        self._events = EventLog(self.path) if self.process.is_main else None
        return self

    def close(self) -> None:
        """Write what is buffered and unlock the folder. log.txt stays open, for errors."""
        for part in (self._events, self._lock):
            if part is not None:
                part.close()
        self._events = self._lock = None

    def __enter__(self) -> RunDir:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def rewind(self, history: Sequence[dict[str, Any]], step: int) -> None:
        """Make metrics.jsonl and the curves what they were at a checkpoint: `history` rows, points up to `step`."""
        if self._events is not None:
            lines = [json.dumps(row) for row in history]
            # A process that is killed between saving and writing leaves the row of that step to its successor.
            due = {line for line, row in zip(lines, history, strict=True) if row["step"] < step}
            if self.resume and (missing := due - _lines(self.path / METRICS)):
                logger.warning(
                    "%s: %s missing or damaged; all are written again from the checkpoint",
                    *(self.path / METRICS, plural(len(missing), "row")),
                )
            _write(self.path / METRICS, "".join(line + "\n" for line in lines))
            self._events.rewind(history, step, complete=self.resume)

    def record_epoch(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and a point to each of its curves."""
        if self._events is not None:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self._events.add_row(row)
            self.flush()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add one point to each of some curves."""
        if self._events is not None:
            self._events.add_scalars(values, step)

    def show_clips(self, video: Tensor) -> None:
        """Show the first clips of a batch (B, T, C, H, W) in TensorBoard, one row of frames each."""
        if self._events is not None and self.clips:
            for number, frames in enumerate(self.normalizer.undo(video[: self.clips])):  # (T, C, H, W)
                self._events.add_image(f"input/{number}", make_grid(frames, nrow=len(frames)), 0)

    def flush(self) -> None:
        """Write what TensorBoard's writer has buffered."""
        if self._events is not None:
            self._events.flush()

    def finish(self) -> None:
        """Note in run.json that the run is complete."""
        if self.process.is_main:
            finished = datetime.now().astimezone().isoformat(timespec="seconds")
            self.starts = [*self.starts[:-1], {**self.meta, "finished": finished}]
            self._write_starts()

    def _prepare(self) -> tuple[Path, str | None]:
        """Make the folder, lock it and write its first files; returns it, and what is wrong with it."""
        path = self.path
        try:
            if (problem := self._problem()) is not None:
                return path, problem
            self.path = path = _make_new_folder(path) if self.auto_named else path
            path.mkdir(parents=True, exist_ok=True)
            if (user := self._take_lock()) is not None:
                return path, in_use(path, user)
            if self.state is not None and self.state != state_of(path):
                return path, f"{path}: another process has trained this run meanwhile: rerun the command to resume it"
            if is_run_folder(path):
                self._mend(read_record(path))
            self.starts = [*self.starts, self.meta]
            _write(path / CONFIG, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
            self._write_starts()
        except (OSError, ValueError) as error:
            return path, f"{path}: cannot be used as a run folder ({error})"
        return path, None

    def _problem(self) -> str | None:
        """Why the folder cannot be used, as far as can be known before anything is written."""
        path = self.path
        if self.auto_named:
            return None
        if (user := lock_user(path)) is not None:
            return in_use(path, user)
        if not self.resume and (file := file_of_run(path)) is not None:
            return f"{path}: already holds a run ({file}), which began after this command: rerun it to resume that run"
        names = (LOCK, CONFIG, STARTS, METRICS, LOG, checkpoint_file.LAST, checkpoint_file.BEST)
        kept = (file for pattern in ("step_*.pt", "events.out.tfevents.*") for file in path.glob(pattern))
        files = [*(path / name for name in names), *kept]
        if folder := next((file for file in files if file.is_dir()), None):
            return f"{folder}: is a folder, and the run needs that name for a file: move it away"
        return None

    def _mend(self, record: RunRecord) -> None:
        """Take over what the folder says of the run; a damaged run.json stays beside the new one."""
        self.config = self.config | {key: record.config[key] for key in _FIRST_START if key in record.config}
        self.starts = record.starts
        for name, fault in record.mended.items():
            self.mended.append(f"{self.path / name}: {fault}; it is written again from {record.source}")
        if STARTS in record.mended and (self.path / STARTS).exists():
            os.replace(self.path / STARTS, self.path / f"{STARTS}.damaged")

    def _take_lock(self) -> str | None:
        """Lock the folder until this process ends, however it ends; or return who uses it."""
        self._lock = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115, held for as long as the run
        if not try_lock(self._lock):
            return _lock_holder(self._lock)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        return None

    def _write_starts(self) -> None:
        _write(self.path / STARTS, json.dumps(self.starts, indent=2) + "\n")


def in_use(folder: Path, user: str) -> str:
    """The sentence for a folder that another process uses."""
    return f"{folder}: another process is using this run folder ({user})"


def lock_user(folder: Path) -> str | None:
    """Who uses a run folder now, None if nobody does. Nothing is written."""
    try:
        with open(folder / LOCK, "r+", encoding="utf-8") as lock:
            return None if try_lock(lock) else _lock_holder(lock)
    except (FileNotFoundError, IsADirectoryError):
        return None


def _lock_holder(lock: Any) -> str:
    """Who has locked a folder, from its open lock file.

    A process writes its name right after it has taken the lock; until then the file is empty or names the one before.
    """
    here = socket.gethostname()
    for _ in range(20):
        lock.seek(0)
        text = lock.read().strip()
        found = re.fullmatch(r"process (\d+) on (.+)", text)
        if found and (found[2] != here or _is_alive(int(found[1]))):
            break
        time.sleep(0.05)
    return text or "unknown"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True


def state_of(folder: Path) -> tuple[int, ...]:
    """What tells one version of a run's last_model.pt from another; () where there is none."""
    try:
        found = (folder / checkpoint_file.LAST).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _make_new_folder(path: Path) -> Path:
    """A folder that no other process gets, even if started in the same second."""
    for number in itertools.count():
        folder = path.with_name(f"{path.name}_{number}") if number else path
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError  # the count is endless


def _lines(path: Path) -> set[str]:
    try:
        return set(path.read_text(encoding="utf-8", errors="replace").splitlines())
    except FileNotFoundError:
        return set()


def _write(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))
