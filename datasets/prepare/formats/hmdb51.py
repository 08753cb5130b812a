"""HMDB51 (Kuehne et al. 2011), `testTrainMulti_7030_splits`: <class>_test_split<N>.txt for 51 classes, N = 1, 2, 3.

Rows are `<name>.avi 1` (train), `2` (test, which becomes the split `val`) or `0` (not in this split). The file name gives
the class; labels follow the sorted class names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from datasets.prepare.annotation_files import AnnotationFiles, read_lines
from datasets.prepare.plan import Entry, Plan, PrepareError, choose_splits

FILE = re.compile(r"(?P<name>\w+)_test_split(?P<split>[123])\.txt")
ROW = re.compile(r"(?P<stem>.+)\.avi\s+(?P<part>[012])")
SPLIT_OF = {"1": "train", "2": "val"}


def read(annotations: AnnotationFiles, split_number: int, requested: Sequence[str] | None) -> Plan:
    """The videos of one of the three splits."""
    files = annotations.matching(FILE)
    if not files:
        annotations.require("brush_hair_test_split1.txt")
    classes = sorted({match["name"] for match, _ in files})
    of_split = {match["name"]: path for match, path in files if int(match["split"]) == split_number}
    splits = choose_splits("HMDB51", ("train", "val"), requested)
    entries = []
    for label, name in enumerate(classes):
        path = of_split.get(name) or annotations.require(f"{name}_test_split{split_number}.txt")
        for number, line in read_lines(path):
            where = f"{path}, line {number}"
            row = ROW.fullmatch(line)
            if row is None:
                raise PrepareError(f"{where}: must be `name.avi` and 0, 1 or 2, not {line!r}")
            if SPLIT_OF.get(row["part"]) in splits:
                entries.append(Entry((row["stem"],), SPLIT_OF[row["part"]], label, where))
    return Plan("HMDB51", "hmdb51", tuple(classes), tuple(entries))
