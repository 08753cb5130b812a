"""Any videos in class folders, without annotations: `<Class>/.../<video>`, where a video is a file or a folder of frames.

Folders named train, val and test around or right below the class folders are the split. Otherwise it is drawn by groups:
clips cut from one recording look alike, so they must not be divided between training and validation. A pattern finds
each video's group in its file name, for UCF101 `_g(\\d+)_`, and all videos of a group go to the same split. Labels follow
the sorted names of the class folders, ignoring case, which is the published order of UCF101.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePosixPath

from datasets.frame_names import FrameNames
from datasets.prepare.catalogue import Catalogue, check_listable
from datasets.prepare.frame_folders import find_names
from datasets.prepare.plan import SPLITS, Entry, Plan, PrepareError

SPLIT_OF = {name: split for split, names in {
    "train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing"),
}.items() for name in names}  # fmt: skip
EXAMPLES = 5  # names in a message


@dataclass(frozen=True)
class Grouping:
    """How videos in class folders are split.

    Args:
        pattern: regular expression searched in a file name without suffix; its first bracket, or all of it, is the group.
            None: every video is a group.
        across_classes: the same group in two classes is one group; otherwise a group belongs to one class.
        val_groups: numbers of the validation groups; None: they are drawn.
        val_share: share of the videos (of each class, or of all with `across_classes`) drawn for validation.
        seed: of the draw.
    """

    pattern: str | None = None
    across_classes: bool = False
    val_groups: frozenset[int] | None = None
    val_share: float = 0.2
    seed: int = 0

    def check(self) -> None:
        """Raises PrepareError for values that are wrong or do not go together."""
        if not 0 < self.val_share < 1:
            raise PrepareError(f"--val-share must be between 0 and 1, not {self.val_share}")
        if self.pattern is None and (self.val_groups is not None or self.across_classes):
            raise PrepareError("--val-groups and --groups-across-classes need --group-pattern")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise PrepareError(f"--group-pattern {self.pattern!r} is not a regular expression ({error})") from None

    def settings(self) -> dict[str, object]:
        """For prepare.json and the report, named as the options."""
        settings = {"group_pattern": self.pattern, "groups_across_classes": self.across_classes}
        if self.val_groups is not None:
            return settings | {"val_groups": sorted(self.val_groups)}
        return settings | {"val_share": self.val_share, "seed": self.seed}


@dataclass(frozen=True)
class Layout:
    """Which part of a path is the class, and which the split."""

    class_part: int
    split_part: int | None  # None: the split is drawn

    def class_of(self, path: PurePosixPath) -> str:
        return path.parts[self.class_part]

    def given_split(self, path: PurePosixPath) -> str | None:
        return None if self.split_part is None else SPLIT_OF[path.parts[self.split_part].lower()]


def read(catalogue: Catalogue, grouping: Grouping, name: str) -> Plan:
    """Classes, labels and splits of the videos in class folders; `name` becomes the dataset's name.

    Raises:
        PrepareError: the folders are not laid out in one of the known ways, a video has no group, two differ only in
            suffix, or frames are named in several ways.
    """
    grouping.check()
    root, paths = catalogue.root, [PurePosixPath(path) for path in catalogue.paths()]
    if not paths:
        raise PrepareError(f"--videos {root}: holds no video; {catalogue.describe()}")
    if catalogue.repeated:
        raise PrepareError(f"{catalogue.repeated[0]}: a link shows its videos under two names; remove the link")
    layout = _layout(catalogue, paths)
    classes = _classes(catalogue, paths, layout)
    label_of = {folder: label for label, folder in enumerate(classes)}
    paths.sort(key=lambda path: (label_of[layout.class_of(path)], path))
    split_of = {path: layout.given_split(path) for path in paths}
    if layout.split_part is None:
        split_of = _draw(catalogue, paths, layout, grouping)
    elif grouping != Grouping():
        raise PrepareError(
            f"{root}: its folders give the split; leave out the options that draw one, such as --val-share"
        )
    entries: dict[str, Entry] = {}
    for path in paths:
        stem = path.as_posix() if catalogue.takes_frames else path.with_suffix("").as_posix()
        if stem in entries:
            raise PrepareError(f"{root}: {entries[stem].path} and {path} differ only in suffix; keep one")
        where, label = str(root / path), label_of[layout.class_of(path)]
        entries[stem] = Entry((stem,), split_of[path], label, where, path=path.as_posix())
    frame_names = find_names(root, catalogue.first_frames) if catalogue.takes_frames else None
    folders = () if layout.split_part is None else tuple(sorted({path.parts[layout.split_part] for path in paths}))
    return Plan(
        title=name,
        config_name=name,
        classes=tuple(classes),
        entries=tuple(entries.values()),
        style="kinetics",
        frame_names=frame_names,
        split_folders=folders,
        notes=tuple(_notes(folders, set(split_of.values()), frame_names)),
    )


def _notes(split_folders: Sequence[str], splits: set[str], frame_names: FrameNames | None) -> Iterator[str]:
    """What is not as usual: a split that was given, a list that will not be there, frames that are used as they are."""
    if split_folders:
        yield f"the split is that of the folders {', '.join(split_folders)}"
    for split in (name for name in ("train", "val") if name not in splits):
        if not split_folders:
            yield f"no {split}.txt: no class has videos for both lists"
        elif "test" in splits:
            yield f"no {split}.txt: there is no such folder; set data.{split}_list to test.txt to use that"
        else:
            yield f"no {split}.txt: there is no such folder; with that folder as --videos, the split is drawn"
    if frame_names:
        yield f"frames are used as they are: image_tmpl '{frame_names.image_tmpl}', index_base {frame_names.index_base}"


def _layout(catalogue: Catalogue, paths: Sequence[PurePosixPath]) -> Layout:
    """Find the class folders: below folders that are around everything, as in archives, and below those of a split."""
    part = 0
    while True:
        parent = PurePosixPath(*paths[0].parts[:part])
        where = catalogue.root / parent
        _check_depth(catalogue.root, paths, class_part=part)
        heads = {path.parts[part] for path in paths}
        names = heads | {folder.name for folder in catalogue.folders if folder.parent == parent and folder.name}
        if all(head.lower() in SPLIT_OF for head in heads):
            _check_splits(where, heads)
            _check_depth(catalogue.root, paths, class_part=part + 1)
            return Layout(part + 1, split_part=part)
        if len(heads) > 1:
            _check_no_split(where, names)
            return _split_below(catalogue, paths, part)
        if len(names) > 1:
            raise PrepareError(
                f"{where}: of its folders {_some(names)} only {paths[0].parts[part]} holds videos; give that folder as "
                "--videos if the class folders lie in it"
            )
        part += 1


def _split_below(catalogue: Catalogue, paths: Sequence[PurePosixPath], class_part: int) -> Layout:
    """The layout of class folders, which may have folders of the split right below: CLASS/train/VIDEO."""
    below = [path.parts[class_part + 1] if len(path.parts) > class_part + 2 else "" for path in paths]
    if not any(name.lower() in SPLIT_OF for name in below):
        return Layout(class_part, split_part=None)
    if outside := [path for path, name in zip(paths, below, strict=True) if name.lower() not in SPLIT_OF]:
        raise PrepareError(
            f"{catalogue.root / outside[0]}: is not in a folder train, val or test of its class, as others are; "
            "move it, or rename folders that are no splits"
        )
    _check_splits(catalogue.root, set(below))
    return Layout(class_part, split_part=class_part + 1)


def _check_depth(root: Path, paths: Sequence[PurePosixPath], class_part: int) -> None:
    if stray := [path for path in paths if len(path.parts) < class_part + 2]:
        raise PrepareError(
            f"{root / stray[0]}: is not in a class folder, or there is only one class folder; videos lie in CLASS/VIDEO, "
            "frames in CLASS/VIDEO/000001.jpg, and none beside the class folders"
        )


def _check_splits(where: Path, names: set[str]) -> None:
    for one, other in combinations(sorted(names), 2):
        if SPLIT_OF[one.lower()] == SPLIT_OF[other.lower()]:
            raise PrepareError(f"{where}: its folders {one} and {other} are the same split; keep one of them")


def _check_no_split(where: Path, names: set[str]) -> None:
    if splits := {name for name in names if name.lower() in SPLIT_OF}:
        raise PrepareError(
            f"{where}: {_some(splits)} is named as a split, beside the class folders {_some(names - splits)}; keep one kind, "
            "or rename the folder if it is a class"
        )


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:EXAMPLES]) + (" ..." if len(names) > EXAMPLES else "")


def _classes(catalogue: Catalogue, paths: Sequence[PurePosixPath], layout: Layout) -> list[str]:
    """The names of the class folders, with those that hold no video, in the order of their labels."""
    parents = {path.parts[: layout.class_part] for path in paths}
    folders = (folder for folder in catalogue.folders if folder.parts[:-1] in parents and folder.parts)
    names = {folder.name for folder in folders}
    for name in names:
        check_listable(catalogue.root, name)
    if len(names) < 2:
        raise PrepareError(f"{catalogue.root}: there is only one class folder, {next(iter(names))}")
    return sorted(names, key=lambda name: (name.casefold(), name))


def _draw(
    catalogue: Catalogue, paths: Sequence[PurePosixPath], layout: Layout, grouping: Grouping
) -> dict[PurePosixPath, str]:
    """Draw the split of each path, or take it from the numbers of the groups."""
    pools: dict[str, dict[str, list[PurePosixPath]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        pool = "" if grouping.across_classes else layout.class_of(path)
        video_name = path.name if catalogue.takes_frames else path.stem
        pools[pool][_group(catalogue.root, path, video_name, grouping.pattern)].append(path)
    val = {path for pool, groups in pools.items() for path in _validation(pool, groups, grouping)}
    if grouping.val_groups is not None and not val:
        raise PrepareError(
            f"--val-groups: no video is in one of the groups {', '.join(map(str, sorted(grouping.val_groups)))}"
        )
    return {path: "val" if path in val else "train" for path in paths}


def _group(root: Path, path: PurePosixPath, video_name: str, pattern: str | None) -> str:
    if pattern is None:
        return path.as_posix()
    match = re.search(pattern, video_name)
    if match is None:
        raise PrepareError(f"{root / path}: --group-pattern {pattern!r} is not found in its name")
    return match[1] if match.re.groups else match[0]


def _validation(pool: str, groups: dict[str, list[PurePosixPath]], grouping: Grouping) -> list[PurePosixPath]:
    """The validation videos of one pool of groups. A draw depends on the pool's own videos only."""
    if grouping.val_groups is not None:
        return [path for group, paths in groups.items() if _number(group) in grouping.val_groups for path in paths]
    order = sorted(groups)
    random.Random(f"{grouping.seed}/{pool}").shuffle(order)
    target = grouping.val_share * sum(map(len, groups.values()))
    taken: list[PurePosixPath] = []
    for group in order[:-1]:  # at least one group stays for training
        if taken and abs(len(taken) + len(groups[group]) - target) >= abs(len(taken) - target):
            break
        taken += groups[group]
    return taken


def _number(group: str) -> int:
    if not group.isdecimal():
        raise PrepareError(f"--val-groups takes numbers, but --group-pattern finds {group!r}")
    return int(group)


def parse_groups(text: str) -> frozenset[int]:
    """`8-12` or `1,3,8-12` -> the group numbers, ends included; raises PrepareError."""
    groups: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise PrepareError(f"--val-groups: {text!r} must look like 8-12 or 1,3,8-12")
        groups.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(groups)


def identical_across_splits(root: Path, paths: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Pairs of byte-identical files in two splits, each as `path (split)`; only files of equal size are read.

    Args:
        paths: of the videos of each split, below `root`.
    """
    by_size: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for split in SPLITS:
        for path in paths.get(split, ()):
            by_size[(root / path).stat().st_size].append((split, path))
    pairs = []
    for videos in by_size.values():
        if len({split for split, _ in videos}) > 1:
            digests = {path: _digest(root / path) for _, path in videos}
            for (split, path), (other, copy) in combinations(videos, 2):
                if split != other and digests[path] == digests[copy]:
                    pairs.append((f"{path} ({split})", f"{copy} ({other})"))
    return pairs


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()
