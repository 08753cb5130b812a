"""Which videos, or folders of frames, lie below --videos, and which of them a plan names."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from common.files import walk
from common.text import printable
from datasets.annotation import path_fault
from datasets.prepare.frame_folders import FLOW, IMAGE_SUFFIXES, is_frame
from datasets.prepare.plan import Entry, Plan, PrepareError

# Suffixes in use for what FFmpeg reads as video; it goes by the content itself, and knows no suffix of some formats.
VIDEO_SUFFIXES = frozenset((
    ".264", ".265", ".3g2", ".3gp", ".3gpp", ".amv", ".asf", ".av1", ".avi", ".bik", ".dav", ".dif", ".divx", ".dv", ".dvd",
    ".f4v", ".flv", ".gif", ".gxf", ".h261", ".h263", ".h264", ".h265", ".h266", ".hevc", ".insv", ".ismv", ".ivf", ".kux",
    ".lrv", ".m1v", ".m2p", ".m2t", ".m2ts", ".m2v", ".m4v", ".mj2", ".mjpeg", ".mjpg", ".mk3d", ".mkv", ".mod", ".mov",
    ".mp2v", ".mp4", ".mp4v", ".mpe", ".mpeg", ".mpg", ".mpv", ".mts", ".mxf", ".nsv", ".nut", ".obu", ".ogg", ".ogm", ".ogv",
    ".ogx", ".qt", ".rm", ".rmvb", ".roq", ".swf", ".tod", ".trp", ".ts", ".tts", ".vc1", ".vob", ".vro", ".webm", ".wm",
    ".wmv", ".wtv", ".xvid", ".y4m",
))  # fmt: skip
SHOWN_SUFFIXES = 8  # in a message


@dataclass
class Catalogue:
    """What lies below `root`; paths are relative to it and have `/`."""

    root: Path
    takes_frames: bool = False  # the videos are folders of frames
    videos: list[str] = field(default_factory=list)
    first_frames: dict[str, str] = field(default_factory=dict)  # folder of frames -> its first frame in order of names
    folders: list[PurePosixPath] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # videos that are no files, such as links to nothing
    others: list[str] = field(default_factory=list)  # files that are neither videos nor images
    images: Counter[tuple[str, str]] = field(
        default_factory=Counter
    )  # (folder, suffix or, of optical flow, flow_*suffix)
    repeated: list[Path] = field(default_factory=list)  # folders that a link names once more

    def paths(self) -> list[str]:
        """All videos, sorted."""
        return sorted(self.first_frames if self.takes_frames else self.videos)

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """File name without suffix, or name of a folder of frames -> its paths."""
        by_name: dict[str, list[str]] = defaultdict(list)
        for path in self.paths():
            name = PurePosixPath(path).name
            by_name[name if self.takes_frames else os.path.splitext(name)[0]].append(path)
        return dict(by_name)

    def find(self, entry: Entry) -> str | None:
        """The path of the entry's video, or None. Raises PrepareError if two files could be it."""
        if entry.path is not None:
            return None if entry.path in self.broken else entry.path
        for name in entry.names:
            paths = [path for path in self.by_name.get(name, ()) if path not in self.broken]
            if len(paths) > 1:
                raise PrepareError(f"{self.root}: {paths[0]} and {paths[1]} could both be {name}; keep one of them")
            if paths:
                return paths[0]
        return None

    def describe(self) -> str:
        """What there is, for a message that says what is missing."""
        files = self.others + self.videos
        suffixes = _suffixes(files)
        for (folder, suffix), count in self.images.items():
            suffixes[suffix] += count
            files.append(f"{folder}/*{suffix}")
        if not suffixes:
            return "there is no file at all"
        return f"there are {sum(suffixes.values())} files ({_list_suffixes(suffixes)}), such as {min(files, key=lambda path: (path.count('/'), path))}"

    def passed_over(self) -> tuple[str, list[str]]:
        """Files that are not taken: `3 .txt, 1 .jpg` (empty if there is none), and the files; images by their folder."""
        suffixes, listed = _suffixes(self.others), list(self.others)
        for (folder, suffix), count in self.images.items():
            if not self.takes_frames or folder not in self.first_frames or suffix.startswith(FLOW):
                suffixes[suffix] += count
                listed.append(f"{folder}: {count} {suffix}")
        if self.takes_frames:
            suffixes.update(_suffixes(self.videos))
            listed += self.videos
        return _list_suffixes(suffixes), sorted(listed)


def _suffixes(paths: list[str]) -> Counter[str]:
    return Counter(os.path.splitext(path)[1].lower() for path in paths)


def _list_suffixes(suffixes: Counter[str]) -> str:
    counted = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {suffix or 'without suffix'}" for suffix, count in counted[:SHOWN_SUFFIXES]]
    rest = sum(count for _, count in counted[SHOWN_SUFFIXES:])
    return ", ".join([*shown, f"{rest} others"] if rest else shown)


def scan(root: Path, takes_frames: bool | None = None, skip: Path | None = None) -> Catalogue:
    """List what lies below `root`: videos, folders that hold images, and other files.

    Hidden entries and the folder `skip` are ignored; links are followed.

    Args:
        takes_frames: the videos are the folders of frames; None: if there is no video file.

    Raises:
        PrepareError: `root` is not a folder.
        OSError: a folder cannot be listed.
    """
    if not root.is_dir():
        raise PrepareError(f"--videos {root}: is not a folder")
    catalogue = Catalogue(root)
    for absolute, names in walk(root, skip, catalogue.repeated):
        folder = PurePosixPath(absolute.relative_to(root).as_posix())
        catalogue.folders.append(folder)
        for name in names:
            suffix, path = os.path.splitext(name)[1].lower(), (folder / name).as_posix()
            if suffix in VIDEO_SUFFIXES:
                catalogue.videos.append(path)
                if not os.path.isfile(absolute / name):
                    catalogue.broken.add(path)
            elif suffix in IMAGE_SUFFIXES:
                if is_frame(name):
                    catalogue.first_frames.setdefault(folder.as_posix(), name)
                catalogue.images[folder.as_posix(), suffix if is_frame(name) else f"{FLOW}*{suffix}"] += 1
            else:
                catalogue.others.append(path)
    around = {parent.as_posix() for folder in catalogue.first_frames for parent in PurePosixPath(folder).parents}
    for folder in around & catalogue.first_frames.keys():  # covers and the like
        del catalogue.first_frames[folder]
    catalogue.takes_frames = not catalogue.videos if takes_frames is None else takes_frames
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
        check_listable(catalogue.root, path)
        found[entry] = path
    if not found:
        kind = "frame folder" if plan.frame_names else "video file"
        raise PrepareError(
            f"--videos {catalogue.root}: holds none of the {len(plan.entries)} videos of {plan.title}, such as a {kind} "
            f"named {plan.entries[0].names[0]}; {catalogue.describe()}"
        )
    return found, missing


def check_listable(root: Path, path: str) -> None:
    """Raises PrepareError for a path that a list file cannot hold, or a class name that labels.csv cannot.

    Both are UTF-8 with one row a line; the fields of a list are split at white space from the right.
    """
    stem, shown = os.path.splitext(path)[0], printable(str(root / path))
    try:
        path.encode()
    except UnicodeEncodeError:
        raise PrepareError(f"{shown}: its name is not UTF-8, which a list file needs; rename it") from None
    if (fault := path_fault(path) or path_fault(stem)) is not None:
        raise PrepareError(f"{shown}: in a list file, {fault}; rename it")
    if any(name != name.strip() for name in (path, stem)) or len(path.splitlines()) > 1:
        raise PrepareError(
            f"{shown}: a list file cannot hold a name with line breaks, or with white space at an end; rename it"
        )
