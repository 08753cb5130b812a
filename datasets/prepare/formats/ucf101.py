"""UCF101 (Soomro et al. 2012), `ucfTrainTestlist`: classInd.txt, trainlist0N.txt, testlist0N.txt; N = 1, 2, 3.

    classInd.txt      `1 ApplyEyeMakeup`, ids from 1
    trainlist01.txt   `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`
    testlist01.txt    `ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`; the test list becomes the split `val`

The videos may lie in class folders or in one folder. The class HandstandPushups has files named v_HandStandPushups_*;
copies that spell the files like the class are found too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from datasets.prepare.annotation_files import AnnotationFiles, class_names, parse_number, read_lines
from datasets.prepare.plan import Entry, Plan, PrepareError

ROW = re.compile(r"(?P<folder>[^/]+)/(?P<stem>v_(?P<name>\w+)(?P<cut>_g\d+_c\d+))\.avi(?:\s+(?P<id>\S+))?")


def read(annotations: AnnotationFiles, split_number: int, requested: Sequence[str] | None) -> Plan:
    """The videos of one of the three splits."""
    class_file = annotations.require("classInd.txt")
    ids = _read_classes(class_file)
    classes = class_names(ids, class_file)
    lists = annotations.split_files(
        {"train": (f"trainlist0{split_number}.txt",), "val": (f"testlist0{split_number}.txt",)}, requested
    )
    entries = []
    for split, path in lists.items():
        for number, line in read_lines(path):
            where = f"{path}, line {number}"
            row = ROW.fullmatch(line)
            if row is None:
                raise PrepareError(f"{where}: must be `Class/v_Class_gNN_cMM.avi`, then its id, not {line!r}")
            if row["folder"] not in ids:
                raise PrepareError(f"{where}: class {row['folder']} is not in {class_file}")
            label = ids[row["folder"]]
            if row["id"] is not None and parse_number(row["id"], "the id", where) != label + 1:
                raise PrepareError(f"{where}: gives {row['folder']} the id {row['id']}, {class_file} {label + 1}")
            names = dict.fromkeys((row["stem"], f"v_{row['folder']}{row['cut']}"))
            entries.append(Entry(tuple(names), split, label, where))
    return Plan("UCF101", "ucf101", classes, tuple(entries))


def _read_classes(path: Path) -> dict[str, int]:
    """Class name -> label, from 0."""
    ids: dict[str, int] = {}
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        fields = line.split()
        if len(fields) != 2 or fields[1] in ids:
            raise PrepareError(f"{where}: must be `id Class` with a new class, not {line!r}")
        ids[fields[1]] = parse_number(fields[0], "the id", where) - 1
    return ids
