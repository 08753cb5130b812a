"""Files that are written all or nothing: under their name stands the old one until the new one is on the disk.

Lives here: nothing but that. Does not live here: what is in a file, and the sentence where it cannot be written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let `fill` write a file under a temporary name, and give it its name when it is on the disk.

    Raises what `fill` and the system raise; then nothing has changed and nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.partial")  # left behind by a kill, it is written over by the next
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
    """Make a rename last, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
