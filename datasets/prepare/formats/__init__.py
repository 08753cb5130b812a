"""The datasets that `python -m datasets.prepare` knows: one file each, from the owners' annotations to a `Plan`.

ucf101.py  hmdb51.py  something.py (versions 1 and 2)  kinetics.py  diving48.py  folder.py (no annotations, any videos)

A new dataset is a file here and a line in FORMATS. Does not live here: anything that looks into a video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets.prepare.annotation_files import AnnotationFiles
from datasets.prepare.formats import diving48, hmdb51, kinetics, something, ucf101
from datasets.prepare.plan import Plan


@dataclass(frozen=True)
class Format:
    """An annotated dataset: its name in sentences, and `read(owners, number of the split, wanted splits) -> Plan`."""

    title: str
    read: Callable[[AnnotationFiles, int, Sequence[str] | None], Plan]
    numbered_splits: int = 1  # how many alternative splits its owners publish


FORMATS = {
    "ucf101": Format("UCF101", ucf101.read, numbered_splits=3),
    "hmdb51": Format("HMDB51", hmdb51.read, numbered_splits=3),
    "ssv2": Format("Something-Something v2", something.read_v2),
    "ssv1": Format("Something-Something v1", something.read_v1),
    "k400": Format("Kinetics-400", kinetics.read),
    "diving48": Format("Diving48", diving48.read),
}
