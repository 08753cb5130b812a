"""Diving48 (Li et al. 2018), the corrected annotations: Diving48_V2_train.json, Diving48_V2_test.json, and
Diving48_vocab.json (48 classes, each a list of words such as ["Back", "15som", "05Twis", "FREE"]).

Rows hold `vid_name` and `label`; the test file is our split `val`. The first version's files (Diving48_train.json) label
many dives wrongly and are not read.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets.prepare.annotation_files import AnnotationFiles, json_field, read_json, whole_number
from datasets.prepare.lists import PrepareError
from datasets.prepare.plan import Entry, Plan


def read(owners: AnnotationFiles, split: int, wanted: Sequence[str] | None) -> Plan:
    """Diving48, version 2 of the annotations."""
    vocabulary = owners.need("Diving48_vocab.json")
    names = tuple(
        " ".join(map(str, words)) if isinstance(words, list) else str(words) for words in read_json(vocabulary, list)
    )
    files = owners.split_files({"train": ("Diving48_V2_train.json",), "val": ("Diving48_V2_test.json",)}, wanted)
    entries = []
    for side, path in files.items():
        for number, item in enumerate(read_json(path, list), 1):
            where = f"{path}, entry {number}"
            label = whole_number(json_field(item, "label", where), "label", where)
            if label >= len(names):
                raise PrepareError(f"{where}: label {label} is not one of the {len(names)} classes of {vocabulary}")
            entries.append(Entry((str(json_field(item, "vid_name", where)),), side, label, where))
    return Plan("Diving48", "diving48", names, tuple(entries))
