"""A dataset's annotations in one form: which videos, in which split, of which class. All formats return a `Plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets.frame_names import FrameNames

SPLITS = ("train", "val", "test")


class PrepareError(ValueError):
    """A dataset that cannot be prepared; the message is one sentence that names the file, folder or option."""


@dataclass(frozen=True)
class Entry:
    """One video that the annotations name."""

    names: tuple[str, ...]  # file names without suffix that the video may have on disk, the published one first
    split: str  # one of SPLITS
    label: int
    where: str  # file and line that name the video, for messages
    path: str | None = None  # below the videos' folder, if that folder itself is the annotation

    @property
    def name(self) -> str:
        """For messages."""
        return self.path or self.names[0]


@dataclass(frozen=True)
class Plan:
    """A dataset's videos, and its class names in the order of their labels."""

    title: str
    config_name: str  # its name in a configuration, `data.dataset`
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    style: str | None = None  # `data.style`, for a dataset that the configuration does not know
    frame_names: FrameNames | None = None  # the videos are already folders of frames with these names
    split_folders: tuple[str, ...] = ()  # folders of the videos that give the split
    notes: tuple[str, ...] = ()  # sentences on how classes, labels or splits were chosen

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have an entry, in the order of SPLITS."""
        present = {entry.split for entry in self.entries}
        return tuple(split for split in SPLITS if split in present)

    def check(self) -> None:
        """Raises PrepareError if there is no video, or one is named twice."""
        if not self.entries:
            raise PrepareError(f"the annotations of {self.title} name no video")
        first: dict[str, Entry] = {}
        for entry in self.entries:
            other = first.setdefault(entry.names[0], entry)
            if other is not entry:
                how = "twice" if other.split == entry.split else f"in {other.split} and in {entry.split}"
                raise PrepareError(f"{entry.names[0]} is named {how}: {other.where} and {entry.where}")


def choose_splits(title: str, known: Sequence[str], requested: Sequence[str] | None) -> tuple[str, ...]:
    """The `requested` splits (--splits) in the order of `known`; None: all. Raises PrepareError for an unknown one."""
    for split in requested or ():
        if split not in known:
            raise PrepareError(f"--splits {split}: {title} has {', '.join(known)}")
    return tuple(split for split in known if requested is None or split in requested)
