"""Folders of frames that are used as they are: which files are frames, how they are named, and whether all are there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from datasets.frame_names import FrameNames
from datasets.prepare.decode import Outcome
from datasets.prepare.plan import PrepareError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png"))
FLOW = "flow_"  # prefix of optical flow, which some tools write beside the frames
NUMBERED = re.compile(r"(?P<before>.*?)(?P<number>\d+)(?P<after>\D*)")


def is_frame(name: str) -> bool:
    """Whether a file of this name is a frame."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(FLOW)


def find_names(root: Path, first_frames: Mapping[str, str]) -> FrameNames:
    """How the frames of all folders are named.

    Args:
        first_frames: the first frame, in the order of names, of each folder below `root`.

    Raises:
        PrepareError: no folder starts with a frame 0 or 1, or two folders name their frames differently.
    """
    folder_of: dict[FrameNames, str] = {}
    for folder, name in first_frames.items():
        match = NUMBERED.fullmatch(name)
        if match and int(match["number"]) in (0, 1):
            before, after = (match[part].replace("{", "{{").replace("}", "}}") for part in ("before", "after"))
            width = len(match["number"])
            names = FrameNames(f"{before}{{:{f'0{width}' if width > 1 else ''}d}}{after}", int(match["number"]))
            folder_of.setdefault(names, folder)
    if not folder_of:
        folder, name = next(iter(first_frames.items()))
        raise PrepareError(f"{root / folder}: its first frame is {name}; frames must be numbered from 0 or 1")
    if len(folder_of) > 1:
        (one, first), (other, second) = list(folder_of.items())[:2]
        raise PrepareError(
            f"{root}: the frames of {first} start with {one.name(0)}, those of {second} with {other.name(0)}; name them alike"
        )
    return next(iter(folder_of))


def count_frames(folder: Path, names: FrameNames) -> Outcome:
    """Look at a folder of frames, which must hold all from the first on, without a gap and without other images."""
    entries = [entry for entry in os.scandir(folder) if is_frame(entry.name)]
    sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    expected = map(names.name, range(len(entries)))
    missing = next((name for name in expected if not sizes.get(name)), None)
    if missing or not sizes:
        return Outcome(error=f"{missing or names.name(0)} is missing or empty, the folder holds {len(entries)} images")
    return Outcome(len(sizes), len(sizes), sum(sizes.values()))
