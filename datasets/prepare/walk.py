"""One way through a folder for everything here: hidden entries are passed over, links followed, each folder seen once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def walk(root: Path, skip: Path | None = None) -> Iterator[tuple[Path, list[str]]]:
    """(folder, its files) for `root` and all below but `skip`, sorted. Raises OSError where one cannot be listed."""
    seen = {_identity(skip)} if skip is not None and skip.is_dir() else set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_fail):
        identity = _identity(Path(folder))
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def _fail(error: OSError) -> None:
    raise error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
