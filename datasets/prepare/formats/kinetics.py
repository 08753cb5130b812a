"""Kinetics-400 (Kay et al. 2017): train.csv, val.csv (validate.csv), test.csv with the header
`label,youtube_id,time_start,time_end,split`, and kinetics_400_labels.csv (`id,name`) where given.

Without the labels file, labels follow the sorted names of the training csv; for the published files that is the same.
Videos are `<youtube_id>_<start>_<end>.mp4`, seconds in six digits, or `<youtube_id>.mp4`, in any folder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from datasets.prepare.annotation_files import AnnotationFiles, class_names, parse_number, read_table
from datasets.prepare.plan import Entry, Plan, PrepareError

PREFIXES = ("", "kinetics_", "kinetics-400_", "kinetics400_", "kinetics_400_", "k400_")
NAMES = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}
COLUMNS = ("label", "youtube_id", "time_start", "time_end")

logger = logging.getLogger("td4v")


def read(annotations: AnnotationFiles, split_number: int, requested: Sequence[str] | None) -> Plan:
    """Kinetics-400; the test split only if its csv has labels."""
    files = annotations.split_files(
        {
            split: tuple(f"{prefix}{name}.csv" for name in names for prefix in PREFIXES)
            for split, names in NAMES.items()
        },
        requested,
    )
    rows = {split: _read_rows(path, split) for split, path in files.items()}
    label_file = annotations.find("kinetics_400_labels.csv", "kinetics400_labels.csv")
    if label_file is None:
        label_file = files.get("train")
        if label_file is None:
            annotations.require("kinetics_400_labels.csv", *(f"{prefix}train.csv" for prefix in PREFIXES))
        names = tuple(sorted({label for _, label, _ in rows["train"]}))
        notes = (f"labels follow the sorted class names of {label_file.name}, as kinetics_400_labels.csv is not there",)
    else:
        names, notes = _read_classes(label_file), ()
    ids = {name: label for label, name in enumerate(names)}
    entries = []
    for split, split_rows in rows.items():
        for where, label, video_names in split_rows:
            if label not in ids:
                raise PrepareError(f"{where}: class {label!r} is not in {label_file}; are both of one version?")
            entries.append(Entry(video_names, split, ids[label], where))
    return Plan("Kinetics-400", "k400", names, tuple(entries), notes=notes)


def _read_rows(path: Path, split: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(where, class name, names that the video may have) for each row; none if a test csv has no labels."""
    table = read_table(path)
    header = table[0][1] if table else []
    if split == "test" and "label" not in header and "youtube_id" in header:
        logger.warning("%s has no labels: no test.txt", path)
        return []
    if missing := [name for name in COLUMNS if name not in header]:
        raise PrepareError(f"{path}: its header has no {', '.join(missing)}")
    rows = []
    for where, fields in table[1:]:
        if len(fields) < len(header):
            raise PrepareError(f"{where}: has {len(fields)} fields, the header {len(header)}")
        row = dict(zip(header, fields, strict=False))
        if (named := row.get("split", "")) and named not in NAMES[split]:
            raise PrepareError(f"{where}: names the split {named!r}, in the file of {split}")
        start, end = (parse_number(row[key], key, where) for key in ("time_start", "time_end"))
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
            raise PrepareError(f"{where}: must be `id,name` with a new name, not {','.join(fields)!r}")
        ids[fields[1]] = parse_number(fields[0], "the id", where)
    return class_names(ids, path)
