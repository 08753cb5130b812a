"""Room on a disk: refusing to start what cannot end, and saying so when a disk is full in the middle.

Does not live here: estimating what extracted frames need (extract.py).
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from datasets.prepare.lists import PrepareError

MARGIN = 1.25  # below so many times an estimate, a warning
FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger("td4v")


def require_space(folder: Path, needed: int, purpose: str, files: int = 0) -> None:
    """Raises PrepareError where the disk of `folder` has less than `needed` bytes (or inodes for `files`) free."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise PrepareError(
            f"{folder}: {purpose} needs about {in_bytes(needed)}, {in_bytes(free)} are free on that disk"
        )
    if needed * MARGIN > free:
        logger.warning("%s: %s needs about %s of %s free", folder, purpose, in_bytes(needed), in_bytes(free))
    if disk.f_files and files > disk.f_favail:
        raise PrepareError(f"{folder}: {purpose} makes about {files} files, that disk has room for {disk.f_favail}")


def explain(error: OSError, folder: Path) -> str:
    """One sentence for an OSError, a full disk's in plain words."""
    if error.errno in FULL:
        return f"{folder}: the disk is full; what is finished is kept, free some space and run the same command again"
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


def in_bytes(count: float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
