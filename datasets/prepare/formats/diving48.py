"""Diving48 (Li et al. 2018), the corrected annotations: Diving48_V2_train.json, Diving48_V2_test.json, and
Diving48_vocab.json (48 classes, each a list of words such as ["Back", "15som", "05Twis", "FREE"]).

Rows hold `vid_name` and `label`; the test file becomes the split `val`. The files of version 1 (Diving48_train.json) are
not read, as many of their labels are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets.prepare.annotation_files import AnnotationFiles, json_field, parse_number, read_json
from datasets.prepare.plan import Entry, Plan, PrepareError


def read(annotations: AnnotationFiles, split_number: int, requested: Sequence[str] | None) -> Plan:
    """Diving48, version 2 of the annotations."""
    vocabulary = annotations.require("Diving48_vocab.json")
    names = tuple(
        " ".join(map(str, words)) if isinstance(words, list) else str(words) for words in read_json(vocabulary, list)
    )
    files = annotations.split_files(
        {"train": ("Diving48_V2_train.json",), "val": ("Diving48_V2_test.json",)}, requested
    )
    entries = []
    for split, path in files.items():
        for number, item in enumerate(read_json(path, list), 1):
            where = f"{path}, entry {number}"
            label = parse_number(json_field(item, "label", where), "label", where)
            if label >= len(names):
                raise PrepareError(f"{where}: label {label} is not one of the {len(names)} classes of {vocabulary}")
            entries.append(Entry((str(json_field(item, "vid_name", where)),), split, label, where))
    return Plan("Diving48", "diving48", names, tuple(entries))
