"""The output folder: one run at a time, one dataset, one way to extract frames, complete lists, and enough free space.

OUT/prepare.json   {"dataset", "split": how videos were divided, "decoder", "frames": how frames were extracted}; the split is
                   null before there are lists, frames are null where none were extracted
"""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.files import try_lock, write_atomic
from common.tables import format_bytes
from datasets.prepare.plan import SPLITS, PrepareError

SETTINGS = "prepare.json"
LISTS = (*(f"{split}.txt" for split in SPLITS), "labels.csv", "config_snippet.yaml")
FRAMES, UNPACKED = "frames", "unpacked"  # folders
SPACE_MARGIN = 1.25  # warn if the free space is less than this many times the estimate
NEW_SPLIT = "--new-split replaces the lists (frames stay), or choose another --out"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Settings:
    """What an output folder holds."""

    dataset: str
    decoder: str
    frames: dict[str, Any] | None  # how frames are extracted; None: the videos are used as they are


class OutputDir:
    """An output folder. It is not touched before `lock`, which a folder of an earlier run gets at once.

    Args:
        path: the folder; it need not exist.
        settings: of this run.

    Raises:
        PrepareError: the folder is in use, or holds another dataset, other frames or other files.
    """

    def __init__(self, path: Path, settings: Settings):
        self.path, self.settings = path, settings
        self.previous = _read_previous(path, settings)  # what prepare.json says of the run before; {} if there was none
        self._lock: IO[str] | None = None
        if self.previous:
            self.lock()

    def __enter__(self) -> OutputDir:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def lock(self) -> None:
        """Create the folder and hold its lock. Raises PrepareError if it cannot be written or another run holds it."""
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise PrepareError(f"--out {self.path}: cannot be written ({error.strerror})") from None
        if not try_lock(self._lock):
            raise PrepareError(f"--out {self.path}: another run is writing there")
        if not self.previous:
            if (self.path / SETTINGS).exists():
                raise PrepareError(f"--out {self.path}: another run has written there; run the same command again")
            self._write_settings(split=None, frames=None)

    def has_lists(self) -> bool:
        """Whether an earlier run finished."""
        return any((self.path / name).exists() for name in LISTS)

    def check_split(self, split: dict[str, object], labels: Mapping[str, tuple[str, int]]) -> None:
        """Make sure that an earlier run divided the videos as this one.

        Args:
            split: the settings of this run's split.
            labels: video, as a list may name it -> (split, label).

        Raises:
            PrepareError: the settings differ, a video would go to another split or class, or a list would go.
        """
        before = self.previous.get("split")
        if isinstance(before, dict) and before != split:
            changes = [
                f"{key} {_text(before.get(key))}, now {_text(split.get(key))}"
                for key in dict.fromkeys((*before, *split))
                if before.get(key) != split.get(key)
            ]
            raise PrepareError(f"--out {self.path}: was prepared with {'; '.join(changes)}; {NEW_SPLIT}")
        for name in SPLITS:
            file = self.path / f"{name}.txt"
            if not file.exists():
                continue
            if name not in {split for split, _ in labels.values()}:
                raise PrepareError(f"{file}: this run has no video for this list; {NEW_SPLIT}")
            gone = _check_rows(file, name, labels)
            if gone:
                logger.warning("%s: the videos of %d rows are not there any more, such as %s", file, len(gone), gone[0])

    def replace_lists(self, split: dict[str, object]) -> None:
        """Remove an earlier run's lists and record this run's settings. Call it once all options are checked."""
        for name in LISTS:
            (self.path / name).unlink(missing_ok=True)
        self._write_settings(split, self.settings.frames or self.previous.get("frames"))

    def _write_settings(self, split: dict[str, object] | None, frames: dict[str, Any] | None) -> None:
        settings = {"dataset": self.settings.dataset, "split": split, "decoder": self.settings.decoder}
        write_text(self.path / SETTINGS, json.dumps(settings | {"frames": frames}) + "\n")


def _check_rows(file: Path, split: str, labels: Mapping[str, tuple[str, int]]) -> list[str]:
    """Rows of a list whose videos `labels` does not know. Raises PrepareError for one with another split or label there."""
    gone = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        video, _, label = line.rpartition(" ")
        now = labels.get(video) or labels.get(video.rpartition(" ")[0])
        if now is None:
            gone.append(line)
        elif (now[0], str(now[1])) != (split, label):
            raise PrepareError(
                f"{file}, line {number}: its video would now be in {now[0]} with label {now[1]}, not in {split} with label "
                f"{label}, as videos or classes have changed; {NEW_SPLIT}"
            )
    return gone


def _text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def describe_split(split: Mapping[str, object]) -> str:
    """The settings of a split in a line, e.g. `seed 0, classes 10`."""
    return ", ".join(
        f"{key} {_text(value)}" for key, value in split.items() if value is not None and value is not False
    )


def ignores_case(folder: Path) -> bool:
    """Whether the file system of `folder`, which need not exist, takes `a` and `A` for one name."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    other = existing.with_name(existing.name.swapcase()) if existing.name else existing
    return other.name != existing.name and other.exists() and other.samefile(existing)


def _read_previous(path: Path, settings: Settings) -> dict[str, Any]:
    """What prepare.json says, {} if there is none. Raises PrepareError if the folder holds something else."""
    file = path / SETTINGS
    if not file.exists():
        if foreign := [name for name in (FRAMES, UNPACKED, *LISTS) if (path / name).exists()]:
            raise PrepareError(f"{path / foreign[0]}: is not an output of this command; choose another --out")
        return {}
    try:
        previous = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # not JSON or not UTF-8
        previous = None
    if not isinstance(previous, dict) or not isinstance(previous.get("dataset"), str):
        raise PrepareError(f"{file}: does not say which dataset {path} holds; choose another --out")
    if previous["dataset"] != settings.dataset:
        raise PrepareError(f"--out {path}: holds {previous['dataset']}, not {settings.dataset}; choose another --out")
    if not (path / FRAMES).exists():
        return {**previous, "frames": None}
    frames = previous.get("frames")
    if not isinstance(frames, dict) or not frames:
        raise PrepareError(f"{file}: does not say how {path / FRAMES} was made; choose another --out")
    if settings.frames and frames != settings.frames:
        made, requested = (
            ", ".join(f"{key} {value}" for key, value in each.items()) for each in (frames, settings.frames)
        )
        raise PrepareError(f"{path / FRAMES}: was made with {made}, not {requested}; choose another --out")
    return previous


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, names in other encodings escaped; the file is complete or absent. Raises OSError."""
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a list file: one row a line, fields separated by one space."""
    write_text(path, "".join(" ".join(map(str, row)) + "\n" for row in rows))


def write_labels(path: Path, names: Sequence[str]) -> None:
    """Write the labels csv with the header `id,name`; ids count from 0."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("id", "name"))
    writer.writerows(enumerate(names))
    write_text(path, buffer.getvalue())


def require_space(folder: Path, needed: int, purpose: str, files: int = 0) -> None:
    """Raises PrepareError if the disk of `folder` has less than `needed` bytes, or inodes for `files`, free."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise PrepareError(
            f"{folder}: {purpose} needs about {format_bytes(needed)}, the disk has {format_bytes(free)} free"
        )
    if needed * SPACE_MARGIN > free:
        logger.warning("%s: %s needs about %s of %s free", folder, purpose, format_bytes(needed), format_bytes(free))
    if disk.f_files and files > disk.f_favail:
        raise PrepareError(f"{folder}: {purpose} creates about {files} files, the disk has room for {disk.f_favail}")


def describe_os_error(error: OSError, folder: Path) -> str:
    """One sentence for an OSError; a full disk gets advice."""
    if error.errno in DISK_FULL:
        return f"{folder}: the disk is full; finished videos are kept, free some space and run the same command again"
    return f"{error.filename}: {error.strerror or error}" if error.filename else str(error.strerror or error)
