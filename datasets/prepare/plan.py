"""What a dataset's annotations come to: which videos, in which split, of which class. All formats return a `Plan`.

Does not live here: reading annotation files (owners.py, formats/) and looking at the videos (catalogue.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets.prepare.lists import PrepareError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Entry:
    """One video that the annotations name."""

    names: tuple[str, ...]  # file names without suffix that the video may have on disk, the owners' first
    split: str  # one of SPLITS
    label: int
    where: str  # file and line that say so, for messages
    path: str | None = None  # relative to the videos' folder, for a dataset whose list is the folder itself


@dataclass(frozen=True)
class Plan:
    """A dataset's videos and class names; `config_name` is what `data.dataset` of a configuration calls it."""

    title: str
    config_name: str
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    style: str | None = None  # data.style, for a name that the configuration does not know
    published_frames: bool = False  # the videos are folders of 00001.jpg ... already

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have an entry, in the order of SPLITS."""
        present = {entry.split for entry in self.entries}
        return tuple(split for split in SPLITS if split in present)

    def check(self) -> None:
        """Raises PrepareError where a video is named twice, in one split or in two, or nothing is named at all."""
        if not self.entries:
            raise PrepareError(f"the annotations of {self.title} name no video")
        first: dict[str, Entry] = {}
        for entry in self.entries:
            other = first.setdefault(entry.names[0], entry)
            if other is not entry:
                how = "twice" if other.split == entry.split else f"in {other.split} and in {entry.split}"
                raise PrepareError(f"{entry.names[0]} is named {how}: {other.where} and {entry.where}")


def choose_splits(title: str, known: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The splits to prepare: `wanted` (--splits), or all of `known`; raises PrepareError for one that is not known."""
    for split in wanted or ():
        if split not in known:
            raise PrepareError(f"--splits {split}: {title} has {', '.join(known)}")
    return tuple(split for split in known if wanted is None or split in wanted)
