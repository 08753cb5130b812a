"""HMDB51 (Kuehne et al. 2011), `testTrainMulti_7030_splits`: <class>_test_split<N>.txt for 51 classes, N = 1, 2, 3.

Rows are `<name>.avi 1` (train), `2` (test, our split `val`) or `0` (not in this split). The class is the file's name;
labels follow the classes' names in order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from datasets.prepare.annotation_files import AnnotationFiles, read_lines
from datasets.prepare.lists import PrepareError
from datasets.prepare.plan import Entry, Plan, choose_splits

FILE = re.compile(r"(?P<name>\w+)_test_split(?P<split>[123])\.txt")
ROW = re.compile(r"(?P<stem>.+)\.avi\s+(?P<use>[012])")
SIDES = {"1": "train", "2": "val"}


def read(owners: AnnotationFiles, split: int, wanted: Sequence[str] | None) -> Plan:
    """The videos of one of the three splits."""
    files = owners.matching(FILE)
    if not files:
        owners.need("brush_hair_test_split1.txt")
    classes = sorted({fit["name"] for fit, _ in files})
    of_split = {fit["name"]: path for fit, path in files if int(fit["split"]) == split}
    sides = choose_splits("HMDB51", ("train", "val"), wanted)
    entries = []
    for label, name in enumerate(classes):
        path = of_split.get(name) or owners.need(f"{name}_test_split{split}.txt")
        for number, line in read_lines(path):
            where = f"{path}, line {number}"
            row = ROW.fullmatch(line)
            if row is None:
                raise PrepareError(f"{where}: must be `name.avi` and 0, 1 or 2, not {line!r}")
            if SIDES.get(row["use"]) in sides:
                entries.append(Entry((row["stem"],), SIDES[row["use"]], label, where))
    return Plan("HMDB51", "hmdb51", tuple(classes), tuple(entries))
