"""Rows that can be read and are probably not what was meant: foreign folders, unused frames, tiny and one-frame videos."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence

from datasets.annotation import VideoRecord
from datasets.check.lists import CheckedList
from datasets.check.report import Finding
from datasets.list_doubts import examples, videos

LEAST_SIDE = 32  # pixels; smaller is more often a thumbnail than a video


def row_doubts(checked: CheckedList, names: Sequence[str] | None) -> Iterator[Finding]:
    """One warning of each kind, with its first rows."""
    file, results = checked.source.list_file, checked.results
    foreign = _in_other_folders([result.record for result in results], names or ())
    if foreign:
        text = f"{videos(len(foreign))} in the folder of another class: {examples(foreign)}"
        yield Finding("warning", "class folders", text, file)
    tiny = [result for result in results if result.size is not None and min(result.size) < LEAST_SIDE]
    kinds = {
        "unused frames": (
            [result for result in results if result.unused],
            "hold frames that the list does not declare and that are never shown",
            lambda row: f"{row.unused} beside the declared {row.record.num_frames}",
        ),
        "tiny videos": (
            tiny,
            f"have a side of less than {LEAST_SIDE} pixels",
            lambda row: f"{row.size[0]}x{row.size[1]}",
        ),
        "one frame": ([result for result in results if result.frames == 1], "have one frame", lambda row: "1"),
    }
    for kind, (found, what, value) in kinds.items():
        if found:
            shown = [f"{_row(result.record)}: {value(result)}" for result in found]
            yield Finding("warning", kind, f"{len(found)} of {videos(len(results))} {what}: {examples(shown)}", file)


def _in_other_folders(records: Sequence[VideoRecord], names: Sequence[str]) -> list[str]:
    """The rows below a folder that is named as another class and below none that is named as theirs."""
    classes = defaultdict(set)
    for label, name in enumerate(names):
        classes[_plain(name)].add(label)
    classes.pop("", None)
    labels_of: dict[str, dict[str, set[int]]] = {}  # of a folder's path: the labels that its parts name, by part
    found = []
    for record in records:
        folder = os.path.dirname(record.path)
        if folder not in labels_of:
            parts = folder.split("/")
            labels_of[folder] = {part: classes[_plain(part)] for part in parts if _plain(part) in classes}
        named = labels_of[folder]
        if named and not any(record.label in labels for labels in named.values()):
            own = names[record.label] if 0 <= record.label < len(names) else "no class"
            found.append(f"{_row(record)} has label {record.label} ({own})")
    return found


def _plain(name: str) -> str:
    """ApplyEyeMakeup, apply_eye_makeup and "apply eye makeup" are one name."""
    return "".join(filter(str.isalnum, name.casefold()))


def _row(record: VideoRecord) -> str:
    return f"{record.path} (line {record.line})"
