"""Any videos in class folders, `<Class>/.../<video>`, without annotations; split by groups.

Clips cut from one recording look alike, so they must not be divided between training and validation. A pattern finds
each video's group in its file name, for UCF101 `_g(\\d+)_`, and all videos of a group go to the same split. Labels follow
the sorted names of the class folders, ignoring case, which is the published order of UCF101.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datasets.prepare.catalogue import Catalogue
from datasets.prepare.plan import Entry, Plan, PrepareError

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


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


def read(catalogue: Catalogue, grouping: Grouping, name: str) -> Plan:
    """Classes, labels and splits of the videos in class folders; `name` becomes the dataset's name.

    Raises:
        PrepareError: there are no class folders, a video is in none or has no group, or two differ only in suffix.
    """
    grouping.check()
    paths = [PurePosixPath(path) for path in catalogue.paths()]
    if not paths:
        raise PrepareError(f"--videos {catalogue.root}: holds no video; {catalogue.describe()}")
    base, classes = _class_folders(catalogue.root, paths)
    label_of = {folder: label for label, folder in enumerate(classes)}
    depth = len(base.parts)
    paths.sort(key=lambda path: (label_of[path.parts[depth]], path))
    pools: dict[str, dict[str, list[PurePosixPath]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        pool = "" if grouping.across_classes else path.parts[depth]
        pools[pool][_group(catalogue.root, path, grouping.pattern)].append(path)
    val = {path for pool, groups in pools.items() for path in _validation(pool, groups, grouping)}
    entries: dict[str, Entry] = {}
    for path in paths:
        stem = path.with_suffix("").as_posix()
        if stem in entries:
            raise PrepareError(f"{catalogue.root}: {entries[stem].path} and {path} differ only in suffix; keep one")
        entries[stem] = Entry(
            names=(stem,),
            split="val" if path in val else "train",
            label=label_of[path.parts[depth]],
            where=str(catalogue.root / path),
            path=path.as_posix(),
        )
    return Plan(name, name, tuple(classes), tuple(entries.values()), style="kinetics")


def _class_folders(root: Path, paths: Sequence[PurePosixPath]) -> tuple[PurePosixPath, list[str]]:
    """The folder of the class folders, below `root`, and the class names in the order of their labels."""
    shared = 0
    while all(len(path.parts) > shared + 1 and path.parts[shared] == paths[0].parts[shared] for path in paths):
        shared += 1  # a folder around everything, as in archives
    base = PurePosixPath(*paths[0].parts[:shared])
    outside = [path for path in paths if len(path.parts) < shared + 2]
    if outside:
        raise PrepareError(f"{root / outside[0]}: is not in a class folder, or there is only one class folder")
    classes = [entry.name for entry in (root / base).iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if {name.lower() for name in classes} <= SPLIT_NAMES:
        raise PrepareError(f"{root / base}: its folders {', '.join(sorted(classes))} are splits, not classes")
    return base, sorted(classes, key=lambda name: (name.casefold(), name))


def _group(root: Path, path: PurePosixPath, pattern: str | None) -> str:
    if pattern is None:
        return path.as_posix()
    match = re.search(pattern, path.stem)
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


def identical_across_splits(root: Path, train: Sequence[str], val: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (training video, validation video) of byte-identical files; only files of equal size are read."""
    by_size: dict[int, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for index, paths in enumerate((train, val)):
        for path in paths:
            by_size[(root / path).stat().st_size][index].append(path)
    pairs = []
    for of_train, of_val in by_size.values():
        if of_train and of_val:
            digests = {path: _digest(root / path) for path in (*of_train, *of_val)}
            pairs += [(one, other) for one in of_train for other in of_val if digests[one] == digests[other]]
    return pairs


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()
