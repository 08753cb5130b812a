"""The output folder: one run at a time, one dataset, one way to extract frames, complete lists, and enough free space.

OUT/prepare.json   {"dataset", "split", "decoder", "frames": how frames were extracted, null: not at all}
"""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import try_lock, write_atomic
from common.tables import format_bytes
from datasets.prepare.plan import SPLITS, PrepareError

SETTINGS = "prepare.json"
LISTS = (*(f"{split}.txt" for split in SPLITS), "labels.csv", "config_snippet.yaml")
FRAMES, UNPACKED = "frames", "unpacked"  # folders
SPACE_MARGIN = 1.25  # warn if the free space is less than this many times the estimate
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Settings:
    """What an output folder holds."""

    dataset: str
    split: int | None  # number of the published split; None if there is only one
    decoder: str
    frames: dict[str, Any] | None  # how frames are extracted; None: the videos are used as they are


@dataclass(frozen=True)
class OutputDir:
    """An output folder that this run has locked."""

    path: Path
    settings: Settings
    previous: dict[str, Any]  # what prepare.json says of the run before; {} if there was none

    def remove_lists(self) -> None:
        """Remove an earlier run's lists and record this run's settings. Call it once all options are checked."""
        split = self.previous.get("split")
        if split not in (None, self.settings.split) and any((self.path / name).exists() for name in LISTS):
            logger.warning(
                "--out %s: the lists of split %s are replaced by those of split %s",
                self.path,
                split,
                self.settings.split,
            )
        for name in LISTS:
            (self.path / name).unlink(missing_ok=True)
        self.write_settings(self.settings.split, self.settings.frames or self.previous.get("frames"))

    def write_settings(self, split: int | None, frames: dict[str, Any] | None) -> None:
        """Write prepare.json."""
        settings = {"dataset": self.settings.dataset, "split": split, "decoder": self.settings.decoder}
        write_text(self.path / SETTINGS, json.dumps(settings | {"frames": frames}) + "\n")


@contextmanager
def lock_output_dir(path: Path, settings: Settings) -> Iterator[OutputDir]:
    """Create the folder `path` and hold its lock.

    Raises:
        PrepareError: the folder cannot be written, is in use, or holds another dataset, other frames or other files.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise PrepareError(f"--out {path}: cannot be written ({error.strerror})") from None
    with lock:
        if not try_lock(lock):
            raise PrepareError(f"--out {path}: another run is writing there")
        output_dir = OutputDir(path, settings, _read_previous(path, settings))
        if not output_dir.previous:
            output_dir.write_settings(split=None, frames=None)
        yield output_dir


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
    """Write `text` as UTF-8; the file is complete or absent. Raises OSError."""
    write_atomic(path, lambda file: file.write(text.encode()))


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
