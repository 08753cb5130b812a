"""The folder of a run: which one it is, that no other process uses it, and the lines written into it.

Lives here: finding the run that a command goes on with, the lock, config.yaml, run.json (one entry a start),
metrics.jsonl (one line an epoch), TensorBoard, and taking back what a killed run wrote after its last checkpoint.
Does not live here: what is measured (loop.py, metrics.py), what is known of a start (record.py), and the checkpoints,
which the loop saves into the folder.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from torchvision.utils import make_grid

from common.files import try_lock, write_atomic
from engine.checkpoint_file import CheckpointError, load, newest
from engine.distributed import Process, gather
from engine.errors import EngineError
from engine.log import setup_logging
from engine.normalize import Normalizer

logger = logging.getLogger("td4v")

PATIENCE_S = 15  # for another process that uses the folder
_RUN_FILES = ("last_model.pt", "config.yaml", "run.json", "log.txt")
_BEGINNING = ("resume", "pretrain")  # settings that tell how a run began, and stay when it is gone on with


class RunDirError(EngineError):
    """A run folder that is taken, in use or cannot be written."""


def choose_folder(
    process: Process,
    explicit: Path | None,
    home: Path,
    name: str,
    differs: Callable[[dict[str, Any], dict[str, Any]], str | None],
    fresh: bool = False,
) -> tuple[Path, bool]:
    """Where a run goes, the same on every process, and whether it goes on with what is there.

    Args:
        explicit: the folder that the user named; None takes the newest unfinished run of the same kind below `home`
            that no process is using, and without one home / name.
        differs: from config.yaml and the newest entry of run.json why that is another run, or None.
        fresh: never go on.

    Raises:
        RunDirError: on every process, where the named folder holds another run, or one although `fresh` is asked.
    """
    found: tuple[Path, bool] | str | None = None
    if process.is_main:
        try:
            found = _choose(explicit, home, name, differs, fresh)
        except (OSError, ValueError) as error:
            found = f"{explicit or home}: cannot be looked through for a run to go on with ({error})"
    found = gather(found)[0]
    if isinstance(found, str):
        raise RunDirError(found)
    return found


def _choose(explicit: Path | None, home: Path, name: str, differs: Callable, fresh: bool) -> tuple[Path, bool] | str:
    if explicit is None:
        runs = [] if fresh or not home.is_dir() else [path.parent for path in home.glob("*/run.json")]
        passed: list[str] = []
        for folder in sorted(runs, key=_changed_at, reverse=True):
            try:
                config, start = _described(folder)
                reason = None if start.get("finished") else differs(config, start)
                user = None if start.get("finished") or reason else _user(folder)
            except (OSError, ValueError) as error:
                logger.warning("%s: passed over (%s)", folder, error)
                continue
            if start.get("finished"):
                continue
            if reason is None and user is None:
                logger.info("going on with %s, which is not finished (--fresh starts another run)", folder)
                return folder, True
            passed.append(f"not finished, but another run: {reason}" if reason else f"going on, by {user}")
            passed[-1] = f"{folder}: {passed[-1]}"
        if passed:
            logger.warning("%s; so a new one begins (--output names the one to go on with)", passed[0])
        return _new_folder(home, name), False
    taken = _taken(explicit)
    if taken is None:
        return explicit, False
    if fresh:
        return f"{explicit}: already holds a run ({taken}), and --fresh was asked: choose another folder"
    if not is_run(explicit):
        return f"{explicit}: holds {taken}, but no run of ours to go on with: choose another folder"
    if (reason := differs(*_described(explicit))) is not None:
        return f"{explicit}: already holds another run: {reason}"
    if (user := _user(explicit)) is not None:  # what it still saves must be there before a checkpoint is chosen
        return f"{explicit}: another process is using this run folder ({user})"
    return explicit, True


def _changed_at(folder: Path) -> float:
    try:
        return (folder / "run.json").stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0


def _new_folder(home: Path, name: str) -> Path:
    """Make a folder that nobody else has, also of commands given in the same second."""
    for number in itertools.count():
        folder = home / (f"{name}_{number}" if number else name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        atexit.register(_forget, folder)
        return folder


def _forget(folder: Path) -> None:
    """Remove a new folder into which nothing came, because the run could not begin."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of ours, and not just weights."""
    return all((folder / file).exists() for file in ("config.yaml", "run.json"))


def _taken(folder: Path) -> str | None:
    """A file that makes a folder another's or a run's, None where there is none.

    What is left of a start that was killed before it had described itself is none: our lock and no checkpoint.
    """
    killed = (folder / ".lock").exists() and not is_run(folder) and not any(folder.glob("*.pt"))
    return None if killed else next((name for name in _RUN_FILES if (folder / name).exists()), None)


def _described(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a run and its newest start, from its newest checkpoint where the files are damaged.

    Raises ValueError where that is damaged, too.
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
            path = newest(folder)
        except CheckpointError:
            path = None
        content = {} if path is None else load(path)
        if not all(isinstance(content.get(key), dict) for key in ("config", "meta")):
            raise ValueError(f"{folder}: its config.yaml or run.json cannot be read ({reason})") from None
        logger.warning("%s: its config.yaml or run.json is damaged (%s), %s tells the same", folder, reason, path.name)
        return content["config"], content["meta"]


def _read_starts(folder: Path) -> list[dict[str, Any]]:
    """All entries of run.json; ValueError where it is something else."""
    starts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise ValueError("run.json holds no starts of a run")
    return starts


def _user(folder: Path) -> str | None:
    """Who is using a run folder, None where nobody does.

    With patience: the processes of a launcher that was just killed still finish a step and save.
    """
    until, told = time.monotonic() + PATIENCE_S, False
    with open(folder / ".lock", "a+", encoding="utf-8") as lock:
        while not try_lock(lock):
            lock.seek(0)
            user = lock.read().strip() or "unknown"
            if time.monotonic() > until:
                return user
            if not told:
                logger.info("%s is used by %s: waiting %d s for its end", folder, user, PATIENCE_S)
            told = True
            time.sleep(0.5)
    return None


class RunDir:
    """A folder that holds one run. Rank 0 writes; on other ranks the methods do nothing.

    Args:
        path: made if it is not there.
        config: the resolved configuration as plain values, written to config.yaml.
        meta: of record.run_info, an entry of run.json.
        resume: go on in a folder that holds this run.
        mean, std: three numbers each, with which input clips are normalised.
        clips: how many input clips to show in TensorBoard.

    Raises:
        RunDirError: on every process, where the folder holds a run that is not gone on with, another process uses
            it, or it cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        meta: dict[str, Any],
        process: Process,
        *,
        resume: bool = False,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        clips: int = 2,
    ) -> None:
        self.path, self.config, self.meta, self.process, self.clips = Path(path), config, meta, process, clips
        self.normalizer = Normalizer(mean, std)
        self._writer: Any = None
        self._lock: Any = None
        problem = gather(self._prepare(resume) if process.is_main else None)[0]
        if problem is not None:
            raise RunDirError(problem)
        setup_logging(process, self.path if self.path.is_dir() else None)

    def _prepare(self, resume: bool) -> str | None:
        """Make the folder, lock it and write its first files, or say why not."""
        try:
            if not resume and (taken := _taken(self.path)) is not None:
                return f"{self.path}: already holds a run ({taken}): choose another folder"
            self.path.mkdir(parents=True, exist_ok=True)
            if (user := self._take()) is not None:
                return f"{self.path}: another process is using this run folder ({user})"
            former = _described(self.path)[0] if is_run(self.path) else {}
            config = self.config | {key: former[key] for key in _BEGINNING if key in former}
            _write(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            self._write_starts([*self._starts(), self.meta])
        except (OSError, ValueError) as error:
            return f"{self.path}: cannot be used as a run folder ({error})"
        return None

    def _take(self) -> str | None:
        """Lock the folder until this process ends, however it ends; or who has it."""
        self._lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115, held for as long as the run
        if not try_lock(self._lock):
            self._lock.seek(0)
            return self._lock.read().strip() or "unknown"
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        return None

    def _starts(self) -> list[dict[str, Any]]:
        try:
            return _read_starts(self.path)
        except (OSError, ValueError):  # not there, or damaged, which `_described` has told
            return []

    def _write_starts(self, starts: list[dict[str, Any]]) -> None:
        _write(self.path / "run.json", json.dumps(starts, indent=2) + "\n")

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Write out what TensorBoard holds back and give the folder free. The log goes on, for errors."""
        for part in (self._writer, self._lock):
            if part is not None:
                part.close()
        self._writer = self._lock = None

    @property
    def writer(self) -> Any:
        """TensorBoard's writer on rank 0, made when first needed, else None."""
        if self._writer is None and self.process.is_main:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, which evaluation need not wait for

            self._writer = SummaryWriter(str(self.path))
        return self._writer

    def rewind(self, history: Sequence[dict[str, Any]], step: int) -> None:
        """Make metrics.jsonl and the curves what they were at a checkpoint: `history` rows, points up to `step`."""
        if self.process.is_main:
            _write(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
            there = _rewrite_events(self.path, history, step)
            for row in history:
                for name, value in _points(row).items():
                    if (name, row["step"]) not in there:
                        self.scalars({name: value}, row["step"])

    def record_epoch(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and its numbers to TensorBoard under `epoch/` at optimizer step row["step"]."""
        if self.process.is_main:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.scalars(_points(row), row["step"])
            self.flush()

    def finish(self) -> None:
        """Note in run.json that there is nothing left to do."""
        if self.process.is_main:
            *former, last = self._starts() or [self.meta]
            self._write_starts(
                [*former, {**last, "finished": datetime.now().astimezone().isoformat(timespec="seconds")}]
            )

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add one point each to TensorBoard's curves."""
        for name, value in values.items() if self.writer is not None else ():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write out what TensorBoard holds back."""
        if self._writer is not None:
            self._writer.flush()

    def show_clips(self, video: Tensor) -> None:
        """Show the first clips of a batch (B, T, C, H, W) in TensorBoard, one row of frames each."""
        if self.clips and self.writer is not None:
            for number, frames in enumerate(self.normalizer.undo(video[: self.clips])):  # (T, C, H, W)
                self.writer.add_image(f"input/{number}", make_grid(frames, nrow=len(frames)), 0)


def _points(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row, by the names of their curves."""
    return {f"epoch/{name}": value for name, value in row.items() if value is not None}


def _write(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def _written(file: Path) -> tuple[float, float]:
    """When one of TensorBoard's files was begun, as its name tells, and written."""
    begun = file.name.split(".")[3]
    return (float(begun) if begun.isdigit() else 0.0, file.stat().st_mtime)


def _rewrite_events(folder: Path, history: Sequence[dict[str, Any]], step: int) -> set[tuple[str, int]]:
    """Join TensorBoard's files in one, without points behind `step`, of epochs outside `history`, or given twice.

    Returns the (name, step) of the points that are left. Whenever this is interrupted, no point before is lost.
    """
    files = sorted(folder.glob("events.out.tfevents.*"), key=_written)
    if not files:
        return set()
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    epochs = {(name, row["step"]) for row in history for name in _points(row)}
    kept: dict[tuple[str, int], bytes] = {}
    head = b""
    for file in files:
        for record in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(record)
            head = head or (record if event.file_version else b"")
            for value in event.summary.value:
                point = (value.tag, event.step)
                if event.step <= step and (not value.tag.startswith("epoch/") or point in epochs):
                    kept[point] = record
    partial = folder / ".events.partial"
    with open(partial, "wb") as file:
        writer = RecordWriter(file)
        points = sorted(kept.items(), key=lambda point: point[0][1])
        for record in ([head] if head else []) + [record for _, record in points]:
            writer.write(record)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, files[-1])
    for file in files[:-1]:
        file.unlink()
    return set(kept)
