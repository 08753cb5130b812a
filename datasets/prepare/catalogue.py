"""Which videos (or published frame folders) lie below --videos, and which of them a plan names."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from common.files import walk
from datasets.prepare.plan import Entry, Plan, PrepareError

VIDEO_SUFFIXES = frozenset(
    (".avi", ".mp4", ".webm", ".mkv", ".mov", ".mpg", ".mpeg", ".m4v", ".flv", ".wmv", ".3gp", ".ts")
)
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg"))


@dataclass
class Catalogue:
    """The videos below `root`; paths are relative to it and have `/`."""

    root: Path
    by_name: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # file (no suffix) or folder name
    suffixes: Counter[str] = field(default_factory=Counter)  # of all files
    example: str = ""  # one of all files

    def paths(self) -> list[str]:
        """All videos, sorted."""
        return sorted(path for paths in self.by_name.values() for path in paths)

    def find(self, entry: Entry) -> str | None:
        """The path of the entry's video, or None. Raises PrepareError if two files could be it."""
        if entry.path is not None:
            return entry.path
        for name in entry.names:
            paths = self.by_name.get(name, ())
            if len(paths) > 1:
                raise PrepareError(f"{self.root}: {paths[0]} and {paths[1]} could both be {name}; keep one of them")
            if paths:
                return paths[0]
        return None

    def describe(self) -> str:
        """What there is, for a message that says what is missing."""
        if not self.suffixes:
            return "there is no file at all"
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in self.suffixes.most_common(4))
        return f"there are {sum(self.suffixes.values())} files ({kinds}), such as {self.example}"


def scan(root: Path, frame_folders: bool = False, skip: Path | None = None) -> Catalogue:
    """List the videos below `root`, or with `frame_folders` the folders that hold JPEGs.

    Hidden entries and the folder `skip` are ignored; links are followed.

    Raises:
        PrepareError: `root` is not a folder.
        OSError: a folder cannot be listed.
    """
    if not root.is_dir():
        raise PrepareError(f"--videos {root}: is not a folder")
    catalogue = Catalogue(root)
    for absolute, names in walk(root, skip):
        folder = PurePosixPath(absolute.relative_to(root).as_posix())
        suffixes = Counter(os.path.splitext(name)[1].lower() for name in names)
        catalogue.suffixes.update(suffixes)
        if names and not catalogue.example:
            catalogue.example = (folder / names[0]).as_posix()
        if frame_folders:
            if IMAGE_SUFFIXES & suffixes.keys():
                catalogue.by_name[folder.name].append(folder.as_posix())
            continue
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in VIDEO_SUFFIXES:
                catalogue.by_name[stem].append((folder / name).as_posix())
    return catalogue


def match(plan: Plan, catalogue: Catalogue) -> tuple[dict[Entry, str], list[Entry]]:
    """Find the plan's videos: entry -> path below the catalogue's root, and the entries without a video.

    Raises:
        PrepareError: no video is found, an entry has two, two entries have the same, or a list cannot hold a path.
    """
    found: dict[Entry, str] = {}
    missing: list[Entry] = []
    entry_of: dict[str, Entry] = {}
    for entry in plan.entries:
        path = catalogue.find(entry)
        if path is None:
            missing.append(entry)
            continue
        other = entry_of.setdefault(path, entry)
        if other is not entry:
            raise PrepareError(f"{catalogue.root / path} is the video of two rows: {other.where} and {entry.where}")
        _check_listable(catalogue.root, path)
        found[entry] = path
    if not found:
        kind = "frame folder" if plan.published_frames else "video file"
        raise PrepareError(
            f"--videos {catalogue.root}: holds none of the {len(plan.entries)} videos of {plan.title}, such as a {kind} "
            f"named {plan.entries[0].names[0]}; {catalogue.describe()}"
        )
    return found, missing


def _check_listable(root: Path, path: str) -> None:
    """A list file is UTF-8 with one row a line, whose fields are split at white space from the right."""
    stem = os.path.splitext(path)[0]
    try:
        path.encode()
    except UnicodeEncodeError:
        raise PrepareError(f"{root / path!r}: its name is not UTF-8, which a list file needs; rename it") from None
    if any(name != name.strip() for name in (path, stem)) or len(path.splitlines()) > 1:
        raise PrepareError(
            f"{root / path!r}: a list file cannot hold a name with line breaks, or with white space at an end; rename it"
        )
