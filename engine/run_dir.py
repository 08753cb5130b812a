"""The folder of a run: one process at a time uses it, and what is written into it besides checkpoints.

config.yaml, run.json (one entry a start), metrics.jsonl (one line an epoch), log.txt and TensorBoard's event files.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from torchvision.utils import make_grid

from common.files import try_lock, write_atomic
from engine import checkpoint_file
from engine.distributed import Process, gather
from engine.errors import EngineError
from engine.event_log import EventLog
from engine.log import setup_logging
from engine.normalize import Normalizer

logger = logging.getLogger("td4v")

_RUN_FILES = (checkpoint_file.LAST, "config.yaml", "run.json", "log.txt")
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
        auto_named: bool = False,
        normalizer: Normalizer | None = None,
        clips: int = 2,
    ) -> None:
        self.path, self.config, self.meta, self.process = Path(path), config, meta, process
        self.resume, self.auto_named, self.clips = resume, auto_named, clips
        self.normalizer = normalizer or Normalizer()
        self._events: EventLog | None = None  # on rank 0, while open
        self._lock: Any = None

    def open(self) -> RunDir:
        """Make and lock the folder, write its first files, and send the log there too; every process must call it.

        Raises:
            RunDirError: on every process, if the folder holds a run that is not resumed, another process uses it, or
                it cannot be written.
        """
        prepared = gather(self._prepare() if self.process.is_main else None)[0]
        self.path, problem = prepared or (self.path, None)
        if problem is not None:
            raise RunDirError(problem)
        setup_logging(self.process, self.path if self.path.is_dir() else None)
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
            _write(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
            self._events.rewind(history, step)

    def record_epoch(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and a point to each of its curves."""
        if self._events is not None:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
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
            *previous, last = self._starts() or [self.meta]
            last = {**last, "finished": datetime.now().astimezone().isoformat(timespec="seconds")}
            self._write_starts([*previous, last])

    def _prepare(self) -> tuple[Path, str | None]:
        """Make the folder, lock it and write its first files; returns it, and what is wrong with it."""
        path = self.path
        try:
            if not self.resume and not self.auto_named and (file := file_of_run(path)) is not None:
                return path, f"{path}: already holds a run ({file}): choose another folder"
            self.path = path = _make_new_folder(path) if self.auto_named else path
            path.mkdir(parents=True, exist_ok=True)
            if (user := self._take_lock()) is not None:
                return path, f"{path}: another process is using this run folder ({user})"
            previous = read_description(path)[0] if is_run_folder(path) else {}
            config = self.config | {key: previous[key] for key in _FIRST_START if key in previous}
            _write(path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            self._write_starts([*self._starts(), self.meta])
        except (OSError, ValueError) as error:
            return path, f"{path}: cannot be used as a run folder ({error})"
        return path, None

    def _take_lock(self) -> str | None:
        """Lock the folder until this process ends, however it ends; or return who uses it."""
        self._lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115, held for as long as the run
        if not try_lock(self._lock):
            return lock_holder(self._lock)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        return None

    def _starts(self) -> list[dict[str, Any]]:
        try:
            return _read_starts(self.path)
        except (OSError, ValueError):  # missing, or damaged, which read_description has logged
            return []

    def _write_starts(self, starts: list[dict[str, Any]]) -> None:
        _write(self.path / "run.json", json.dumps(starts, indent=2) + "\n")


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds a run of ours, and not just weights."""
    return all((folder / file).exists() for file in ("config.yaml", "run.json"))


def file_of_run(folder: Path) -> str | None:
    """A file that tells that a folder is used for something; None if there is none.

    The remains of a start that was killed before it wrote config.yaml, our lock without a checkpoint, do not count.
    """
    killed_early = (folder / ".lock").exists() and not is_run_folder(folder) and not any(folder.glob("*.pt"))
    return None if killed_early else next((name for name in _RUN_FILES if (folder / name).exists()), None)


def read_description(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a run and its newest start, from its newest checkpoint if the files are damaged.

    Raises:
        ValueError: that is damaged, too.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        start = _read_starts(folder)[-1]
        if not isinstance(config, dict):
            raise ValueError("config.yaml holds no settings")
        return config, start
    except (OSError, yaml.YAMLError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        try:
            checkpoint = checkpoint_file.newest(folder)
        except checkpoint_file.CheckpointError:
            checkpoint = None
        content = {} if checkpoint is None else checkpoint.content
        if not all(isinstance(content.get(key), dict) for key in ("config", "meta")):
            raise ValueError(f"{folder}: its config.yaml or run.json cannot be read ({reason})") from None
        logger.warning(
            "%s: its config.yaml or run.json is damaged (%s); %s is read instead", folder, reason, checkpoint.path.name
        )
        return content["config"], content["meta"]


def lock_holder(lock: Any) -> str:
    """Who has locked a folder, from its open lock file."""
    lock.seek(0)
    return lock.read().strip() or "unknown"


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


def _read_starts(folder: Path) -> list[dict[str, Any]]:
    """All entries of run.json; ValueError if it holds something else."""
    starts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise ValueError("run.json holds no starts of a run")
    return starts


def _write(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))
