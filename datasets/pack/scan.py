"""Frame folders -> what a pack will hold: which folders, the size of every frame, and what is wrong with them.

All folders are looked at before anything is written. Names that start with a dot are left out.

Does not live here: sharing the videos out and writing them (writer.py).
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.annotation import read_list
from datasets.pack.format import PackError, Settings
from datasets.pack.workers import Work, progress_bar, raise_problems, run_tasks

CHUNK = 2000  # folders that one process scans at most
ANY_LABEL = 1 << 62
MAX_BYTES = 1 << 30  # far from where zip needs a longer header for a member
Declared = tuple[int, str]  # number of frames, and the row that says so; 0 and "" without a list


@dataclass(frozen=True, eq=False)
class Video:
    """A frame folder as scanned: path below the root, bytes of each frame, digest of sizes and times."""

    name: str
    sizes: np.ndarray
    stamp: str


def scan(frames: Path, lists: Sequence[str], settings: Settings, jobs: int) -> list[Video]:
    """All frame folders below `frames`, or those that the list files name, sorted by their path.

    Raises:
        PackError: no folders; one that is missing, empty, has a gap, another file or fewer frames than declared.
        AnnotationError: a bad list.
    """
    declared = _listed(frames, lists) if lists else dict.fromkeys(_folders(frames), (0, ""))
    names = sorted(declared)
    if not names:
        raise PackError(f"{frames}: holds no frame folders")
    size = min(CHUNK, -(-len(names) // jobs))
    chunks = [names[start : start + size] for start in range(0, len(names), size)]
    tasks = {f"{frames}: {chunk[0]} to {chunk[-1]}": (frames, chunk, settings) for chunk in chunks}
    with progress_bar("scan", " videos", len(names)) as bar:
        found = run_tasks(_scan_chunk, tasks, jobs, bar)
    videos, problems = [], []
    for name, video in zip(names, (video for chunk in found for video in chunk), strict=True):
        count, where = declared[name]
        if isinstance(video, str):
            problems.append(f"{where}: {video}" if where else video)
        elif len(video.sizes) < count:
            problems.append(f"{where}: declares {count} frames, {frames / name} holds {len(video.sizes)}")
        else:
            videos.append(video)
    raise_problems(problems, f"{frames}: {len(problems)} of {len(names)} videos cannot be packed")
    return videos


def _listed(frames: Path, lists: Sequence[str]) -> dict[str, Declared]:
    """By path, the largest number where several rows name a video."""
    declared: dict[str, Declared] = {}
    for file in lists:
        for record in read_list(file, "RGB", num_classes=ANY_LABEL, key="--list"):
            name, where = posixpath.normpath(record.path), f"{file}, line {record.line}"
            if name.startswith(("/", "../")) or name in (".", ".."):
                raise PackError(f"{where}: {record.path} is not below {frames}")
            declared[name] = max(declared.get(name, (0, "")), (record.num_frames or 0, where), key=lambda x: x[0])
    return declared


def _folders(frames: Path) -> Iterator[str]:
    """The folders below `frames` that hold files, and the empty ones, for the scan to complain about."""
    pending = [""]
    while pending:
        name = pending.pop()
        folder, inner, is_video = frames / name, [], False
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        is_video = not entry.is_dir()
                        if is_video:
                            break  # what else a video's folder holds is the scan's matter
                        inner.append(posixpath.join(name, entry.name))
                        if entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve()):
                            raise PackError(f"{entry.path}: is a link to a folder that holds it")
        except OSError as error:
            raise PackError(f"{folder}: cannot be read ({error.strerror})") from None
        if is_video and not name:
            raise PackError(f"{entry.path}: lies outside the videos' folders; --frames names the folder of these")
        if is_video or (not inner and name):
            yield name
        else:
            pending += inner


def _scan_chunk(frames: Path, names: list[str], settings: Settings) -> Work:
    """Returns a Video or a complaint for each name."""
    found: list[Video | str] = []
    for name in names:
        try:
            found.append(_look_at(frames, name, settings))
        except (PackError, OSError) as error:
            is_ours = isinstance(error, PackError)
            found.append(str(error) if is_ours else f"{frames / name}: cannot be read ({error.strerror})")
        yield 1
    return found


def _look_at(frames: Path, name: str, settings: Settings) -> Video:
    folder = frames / name
    try:
        name.encode()
    except UnicodeEncodeError:
        raise PackError(f"{str(folder)!r}: the name is not UTF-8") from None
    if "\n" in name:
        raise PackError(f"{str(folder)!r}: the name holds a line break")
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat() for entry in entries if not entry.name.startswith(".")}
    if not found:
        raise PackError(f"{folder}: holds no frames")
    wanted = [settings.frame_name(index) for index in range(len(found))]
    other = sorted(found.keys() - set(wanted))
    for file in other:
        if _frame_index(file, settings) is None:
            raise PackError(f"{folder / file}: does not fit {settings.image_tmpl!r} from {settings.index_base} on")
    if other:
        gap = next(file for file in wanted if file not in found)
        raise PackError(f"{folder}: {gap} is missing, though {other[-1]} is there")
    stats = [found[name] for name in wanted]
    for file, status in zip(wanted, stats, strict=True):
        if not stat.S_ISREG(status.st_mode) or status.st_size >= MAX_BYTES:
            raise PackError(f"{folder / file}: is no file of less than 1 GiB")
    sizes = np.array([status.st_size for status in stats], dtype="<u4")
    times = np.array([status.st_mtime_ns for status in stats], dtype="<i8")
    return Video(name, sizes, hashlib.sha256(sizes.tobytes() + times.tobytes()).hexdigest())


def _frame_index(file: str, settings: Settings) -> int | None:
    """The frame, from 0, that a file of this name is; None if there is none."""
    numbers = (int(digits) - settings.index_base for digits in re.findall(r"[0-9]+", file))
    return next((number for number in numbers if number >= 0 and settings.frame_name(number) == file), None)
