"""Kinetics-400 (Kay et al. 2017): train.csv, val.csv (validate.csv), test.csv with the header
`label,youtube_id,time_start,time_end,split`, and kinetics_400_labels.csv (`id,name`) where given.

Without the labels file labels follow the names of the training csv in order, which for the owners' files is the same.
Videos are `<youtube_id>_<start>_<end>.mp4`, seconds in six digits, or `<youtube_id>.mp4`, in any folders.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from datasets.prepare.annotation_files import AnnotationFiles, class_names, read_table, whole_number
from datasets.prepare.lists import PrepareError
from datasets.prepare.plan import Entry, Plan

PREFIXES = ("", "kinetics_", "kinetics-400_", "kinetics400_", "kinetics_400_", "k400_")
NAMES = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}
COLUMNS = ("label", "youtube_id", "time_start", "time_end")

logger = logging.getLogger("td4v")


def read(owners: AnnotationFiles, split: int, wanted: Sequence[str] | None) -> Plan:
    """Kinetics-400; the test split only where its csv has labels."""
    files = owners.split_files(
        {side: tuple(f"{prefix}{name}.csv" for name in names for prefix in PREFIXES) for side, names in NAMES.items()},
        wanted,
    )
    rows = {side: _read_rows(path, side) for side, path in files.items()}
    label_file = owners.find("kinetics_400_labels.csv", "kinetics400_labels.csv")
    if label_file is None:
        label_file = files.get("train")
        if label_file is None:
            owners.need("kinetics_400_labels.csv", *(f"{prefix}train.csv" for prefix in PREFIXES))
        names = tuple(sorted({label for _, label, _ in rows["train"]}))
    else:
        names = _read_classes(label_file)
    ids = {name: label for label, name in enumerate(names)}
    entries = []
    for side, side_rows in rows.items():
        for where, label, video_names in side_rows:
            if label not in ids:
                raise PrepareError(f"{where}: class {label!r} is not in {label_file}; are both of one version?")
            entries.append(Entry(video_names, side, ids[label], where))
    return Plan("Kinetics-400", "k400", names, tuple(entries))


def _read_rows(path: Path, side: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(where, class name, names that the video may have) for each row; none where a test csv has no labels."""
    table = read_table(path)
    header = table[0][1] if table else []
    if side == "test" and "label" not in header and "youtube_id" in header:
        logger.warning("%s has no labels: no test.txt", path)
        return []
    if lacking := [name for name in COLUMNS if name not in header]:
        raise PrepareError(f"{path}: its header has no {', '.join(lacking)}")
    rows = []
    for where, fields in table[1:]:
        if len(fields) < len(header):
            raise PrepareError(f"{where}: has {len(fields)} fields, the header {len(header)}")
        row = dict(zip(header, fields, strict=False))
        if (said := row.get("split", "")) and said not in NAMES[side]:
            raise PrepareError(f"{where}: is of the split {said!r}, in the file of {side}")
        start, end = (whole_number(row[key], key, where) for key in ("time_start", "time_end"))
        video = row["youtube_id"]
        rows.append((where, row["label"], (f"{video}_{start:06d}_{end:06d}", video)))
    return rows


def _read_classes(path: Path) -> tuple[str, ...]:
    table = read_table(path)
    if not table or table[0][1] != ["id", "name"]:
        raise PrepareError(f"{path}, line 1: the header must be `id,name`")
    ids: dict[str, int] = {}
    for where, fields in table[1:]:
        if len(fields) != 2 or fields[1] in ids:
            raise PrepareError(f"{where}: must be `id,name` with a name of its own, not {','.join(fields)!r}")
        ids[fields[1]] = whole_number(fields[0], "the id", where)
    return class_names(ids, path)
