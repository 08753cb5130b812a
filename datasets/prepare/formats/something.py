"""Something-Something (Goyal et al. 2017), versions 2 (.webm videos) and 1 (folders of 00001.jpg ...).

Version 2; file names are those of the current release, or the older ones with the prefix `something-something-v2-`:
    labels.json       {"Putting something onto something": "108", ...}
    train.json        [{"id": "78687", "template": "Putting [something] onto [something]", ...}, ...]
    validation.json   the same
    test.json         [{"id": "1420"}, ...]; the labels are in test-answers.csv `id;template`, if published
    A template without its brackets is a name of labels.json.
Version 1; file names have the prefix `something-something-v1-`:
    labels.csv        one template a line, in an order of its own
    train.csv         `id;template`; validation.csv likewise; test.csv has ids only
Labels of version 2 are the ids of labels.json. Labels of version 1 follow the sorted templates, as in the list scripts of
TSM, TDN and their relatives, so that they fit published checkpoints; they equal those of version 2, which has the same
templates. The line numbers of labels.csv are others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets.frame_names import FrameNames
from datasets.prepare.annotation_files import (
    AnnotationFiles,
    class_names,
    json_field,
    parse_number,
    read_json,
    read_lines,
    read_table,
)
from datasets.prepare.plan import Entry, Plan, PrepareError

V1, V2 = "something-something-v1-", "something-something-v2-"
FRAME_NAMES = FrameNames("{:05d}.jpg")  # of version 1

logger = logging.getLogger("td4v")


def read_v2(annotations: AnnotationFiles, split_number: int, requested: Sequence[str] | None) -> Plan:
    """Version 2; the test split only if its answers are there."""
    label_file = annotations.require("labels.json", f"{V2}labels.json")
    ids = {
        name: parse_number(number, "the id", f"{label_file}: {name!r}")
        for name, number in read_json(label_file, dict).items()
    }
    files = annotations.split_files(
        {
            "train": ("train.json", f"{V2}train.json"),
            "val": ("validation.json", f"{V2}validation.json"),
            "test": ("test-answers.csv", f"{V2}test-answers.csv"),
        },
        requested,
    )
    if "test" not in files and annotations.find("test.json", f"{V2}test.json"):
        logger.warning("%s: test.json has no labels and test-answers.csv is not there: no test.txt", annotations.root)
    entries: list[Entry] = []
    for split, path in files.items():
        rows = _csv_rows(path) if split == "test" else _json_rows(path)
        entries += _entries(rows, split, ids, label_file)
    return Plan("Something-Something v2", "ssv2", class_names(ids, label_file), tuple(entries))


def read_v1(annotations: AnnotationFiles, split_number: int, requested: Sequence[str] | None) -> Plan:
    """Version 1; its test split has no published labels."""
    label_file = annotations.require(f"{V1}labels.csv")
    lines = [line for _, line in read_lines(label_file)]
    names = sorted(lines)
    ids = {name: label for label, name in enumerate(names)}
    if len(ids) < len(names):
        raise PrepareError(f"{label_file}: names a template twice")
    files = annotations.split_files({"train": (f"{V1}train.csv",), "val": (f"{V1}validation.csv",)}, requested)
    entries: list[Entry] = []
    for split, path in files.items():
        entries += _entries(_csv_rows(path), split, ids, label_file)
    note = "labels follow the sorted templates, as in the list scripts of TSM and TDN"
    if names != lines:
        note += f", not the lines of {label_file.name}"
    return Plan("Something-Something v1", "ssv1", tuple(names), tuple(entries), frame_names=FRAME_NAMES, notes=(note,))


def _entries(
    rows: Iterable[tuple[str, str, str]], split: str, ids: dict[str, int], label_file: Path
) -> Iterable[Entry]:
    """(where, video id, template) -> entries."""
    for where, video, template in rows:
        name = template.replace("[", "").replace("]", "")
        if name not in ids:
            raise PrepareError(f"{where}: template {template!r} is not in {label_file}; are both of one version?")
        yield Entry((video,), split, ids[name], where)


def _json_rows(path: Path) -> Iterable[tuple[str, str, str]]:
    for number, item in enumerate(read_json(path, list), 1):
        video = str(json_field(item, "id", f"{path}, entry {number}"))
        where = f"{path}, entry {number} (id {video})"
        yield where, video, str(json_field(item, "template", where))


def _csv_rows(path: Path) -> Iterable[tuple[str, str, str]]:
    for where, fields in read_table(path, delimiter=";"):
        if len(fields) != 2 or not all(fields):
            raise PrepareError(f"{where}: must be `id;template`, not {';'.join(fields)!r}")
        yield where, fields[0], fields[1]
