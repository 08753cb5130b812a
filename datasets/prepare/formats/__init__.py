"""The datasets that `python -m datasets.prepare` knows: one file each, from published annotations to a `Plan`.

A new dataset is a file here and a line in FORMATS; folder.py needs no annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets.prepare.annotation_files import AnnotationFiles
from datasets.prepare.formats import diving48, hmdb51, kinetics, something, ucf101
from datasets.prepare.plan import Plan


@dataclass(frozen=True)
class Format:
    """An annotated dataset.

    Args:
        title: its name in messages.
        read: (annotation files, number of the published split, requested splits or None) -> Plan; raises PrepareError.
        num_splits: how many alternative splits are published.
    """

    title: str
    read: Callable[[AnnotationFiles, int, Sequence[str] | None], Plan]
    num_splits: int = 1


FORMATS = {
    "ucf101": Format("UCF101", ucf101.read, num_splits=3),
    "hmdb51": Format("HMDB51", hmdb51.read, num_splits=3),
    "ssv2": Format("Something-Something v2", something.read_v2),
    "ssv1": Format("Something-Something v1", something.read_v1),
    "k400": Format("Kinetics-400", kinetics.read),
    "diving48": Format("Diving48", diving48.read),
}
