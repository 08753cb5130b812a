"""Atomic writes, file locks and walking through folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from itertools import filterfalse
from pathlib import Path
from typing import IO, BinaryIO

CLUTTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}

logger = logging.getLogger("td4v")


def write_atomic(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let `fill` write a file under a temporary name, and give it its name when it is on the disk.

    Raises what `fill` and the system raise; then `path` is as it was and nothing else is left behind.
    """
    partial = path.with_name(f".{path.name}.partial")  # a killed process leaves it behind; the next one overwrites it
    try:
        with open(partial, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves an empty file under the new name
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def try_lock(file: IO[str]) -> bool:
    """Lock a file for as long as it is open in this process; False where another process holds the lock.

    Copies of the process, such as workers that outlive a killed run for some seconds, do not hold it. Where the file
    system has no locks, this warns and returns True.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("%s: this file system has no locks: another process that uses it goes unnoticed", file.name)
    return True


def walk(root: Path, skip: Path | None = None, repeated: list[Path] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """(folder, its files) for `root` and all below but `skip`, sorted, each once, without hidden ones.

    Links are followed; folders that a link names once more go to `repeated`. What starts with a dot and what systems put
    into folders by themselves (CLUTTER) counts as hidden. Raises OSError where a folder cannot be listed.
    """
    skipped = _identity(skip) if skip is not None and skip.is_dir() else None
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_fail):
        identity = _identity(Path(folder))
        if identity in seen and repeated is not None:
            repeated.append(Path(folder))
        if identity in seen or identity == skipped:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(filterfalse(_is_hidden, folders))
        yield Path(folder), sorted(filterfalse(_is_hidden, names))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in CLUTTER


def _fail(error: OSError) -> None:
    raise error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
