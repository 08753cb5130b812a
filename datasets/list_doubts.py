"""Lists whose rows are all valid and that probably mean something else; a sentence about each such doubt.

Training says them before it starts, `datasets.check` reports them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from datasets.annotation import VideoRecord, from_1

EXAMPLES = 3  # in a sentence


def list_doubts(
    records: Sequence[VideoRecord], modality: str, num_classes: int, names: Sequence[str] | None, trains: bool
) -> Iterator[tuple[str, str]]:
    """All doubts about a list, as (kind, sentence).

    Args:
        names: of the classes, if they have any.
        trains: it is a training list, where each class should have a video.
    """
    if modality == "video" and (text := frame_counts(records, num_classes)) is not None:
        yield "frame counts", text
    if (text := several_labels(records)) is not None:
        yield "labels", text
    if trains and (text := empty_classes(records, num_classes, names)) is not None:
        yield "classes", text


def frame_counts(records: Sequence[VideoRecord], num_classes: int) -> str | None:
    """Rows `path number label` of video files, where the number could as well be another label."""
    counted = [record for record in records if record.num_frames is not None]
    if not counted or (len(counted) == len(records) and max(row.num_frames for row in counted) >= num_classes):
        return None
    row = counted[0]
    return (
        f"{len(counted)} of {len(records)} rows have a number between path and label, which is taken for the number of "
        f"frames: in line {row.line}, {row.path!r} has {row.num_frames} frames and label {row.label}"
    )


def several_labels(records: Sequence[VideoRecord]) -> str | None:
    """Videos that several rows give different labels."""
    first: dict[str, VideoRecord] = {}
    other: dict[str, VideoRecord] = {}
    for record in records:
        path = os.path.normpath(record.path)  # ./a and a are one video
        if first.setdefault(path, record).label != record.label:
            other.setdefault(path, record)
    shown = [f"{path} (lines {first[path].line} and {row.line})" for path, row in other.items()]
    return f"{videos(len(shown))} with different labels: {examples(shown)}" if shown else None


def empty_classes(records: Sequence[VideoRecord], num_classes: int, names: Sequence[str] | None) -> str | None:
    """Classes without a video; where the first is one of them, labels may begin at 1."""
    used = {record.label for record in records}
    empty = [label for label in range(num_classes) if label not in used]
    if not empty:
        return None
    shown = [f"{label} ({names[label]})" if names else str(label) for label in empty]
    text = f"{len(empty)} of {num_classes} classes have no video: {examples(shown)}"
    return f"{text}{from_1(records)}" if num_classes - 1 in used else text


def examples(texts: Sequence[str]) -> str:
    """The first few, and whether there are more."""
    return ", ".join(texts[:EXAMPLES]) + (", ..." if len(texts) > EXAMPLES else "")


def videos(count: int) -> str:
    """`1 video`, `2 videos`."""
    return f"{count} video{'' if count == 1 else 's'}"
