"""List file -> validated records: the rows of a list of videos, class names, few-shot selection.

records = read_list("lists/train.txt", modality="RGB", num_classes=51, key="data.train_list")
"""

from __future__ import annotations

import csv
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,9}")


class AnnotationError(ValueError):
    """A list file that cannot be used; the message names the file and, where there is one, the line."""


@dataclass(frozen=True)
class VideoRecord:
    """One row: `path` relative to the root, number of frames (None: the file tells), class, line number from 1."""

    path: str
    num_frames: int | None
    label: int
    line: int


def read_list(
    path: str, modality: Literal["RGB", "video"], num_classes: int | None, key: str = "list"
) -> tuple[VideoRecord, ...]:
    """Read a list of videos.

    Rows are `path num_frames label` for modality RGB and `path label` for video, split at white space from the right,
    so that paths may contain spaces. A row `path number label` is accepted for video too; its number is kept as the
    number of frames. A byte order mark, CRLF and blank lines are accepted; commas between the fields, quotes around a
    path, backslashes between folders and a header line are not.

    Args:
        num_classes: None where the labels are not used.
        key: the name of the file in messages, e.g. `data.train_list`.

    Raises:
        AnnotationError: no such file, no rows, or a row with too few fields, with a frame count that is not a whole
            number above 0, or with a label that is not a whole number in 0..num_classes-1.
    """
    records = []
    for row in read_rows(path, modality, key):
        if isinstance(row, AnnotationError):
            raise row
        records.append(row)
    if not records:
        raise AnnotationError(f"{path}: {key} has no rows")
    largest = max(record.label for record in records)
    for record in records if num_classes is not None else ():
        if not 0 <= record.label < num_classes:
            hint = from_1(records) if largest == num_classes else ""
            raise AnnotationError(f"{path}, line {record.line}: {outside(record, num_classes)}{hint}")
    return tuple(records)


def read_rows(
    path: str, modality: Literal["RGB", "video"], key: str = "list"
) -> Iterator[VideoRecord | AnnotationError]:
    """The rows of a list one by one, as `read_list` but with any label; a bad row gives its error.

    Raises:
        AnnotationError: no such file, or no text.
    """
    for line, text in _lines(path, key):
        try:
            yield _record(text, modality, line, f"{path}, line {line}")
        except AnnotationError as error:
            yield error


def outside(record: VideoRecord, num_classes: int) -> str:
    """What is wrong with a label that is not in 0..num_classes-1."""
    return f"label {record.label} is outside 0..{num_classes - 1}"


def from_1(records: Sequence[VideoRecord]) -> str:
    """A clause about the labels where the smallest is 1, else nothing."""
    first = min(records, key=lambda record: record.label)
    if first.label != 1:
        return ""
    return f"; labels seem to begin at 1 (line {first.line}), but the first class is 0"


def _record(text: str, modality: str, line: int, where: str) -> VideoRecord:
    *front, label_text = text.rsplit(maxsplit=1)
    if "," in label_text or ";" in label_text:
        raise AnnotationError(f"{where}: fields are separated by spaces or tabs, not as in {text!r}")
    label = _whole_number(label_text, "label", where)
    video, num_frames = "".join(front), None
    front = video.rsplit(maxsplit=1)
    if modality == "RGB" or (len(front) == 2 and WHOLE_NUMBER.fullmatch(front[1])):
        if len(front) < 2:
            hint = "; data.modality: video reads `path label`" if front else ""
            raise AnnotationError(f"{where}: needs `path num_frames label`, not {text!r}{hint}")
        video, num_frames = front[0], _whole_number(front[1], "number of frames", where)
        if num_frames < 1:
            raise AnnotationError(f"{where}: the number of frames must be above 0, not {num_frames}")
    if not video:
        raise AnnotationError(f"{where}: needs `path label`, not {text!r}")
    if modality == "video" and video[-1] in ",;":
        raise AnnotationError(f"{where}: fields are separated by spaces or tabs, not as in {text!r}")
    if (fault := path_fault(video)) is not None:
        raise AnnotationError(f"{where}: {fault}: {video!r}")
    return VideoRecord(video, num_frames, label, line)


def path_fault(video: str) -> str | None:
    """Why a list cannot hold this path: it looks like another format's, which no file would be found for; or None."""
    if "\\" in video:
        return "folders are separated by /, not by a backslash"
    if len(video) > 1 and video[0] in "\"'" and video[0] == video[-1]:
        return "paths are written without quotes, even with spaces"
    return "a path cannot hold a NUL" if "\0" in video else None


def read_labels(path: str, num_classes: int, key: str = "data.label_list") -> tuple[str, ...]:
    """Class names in the order of their ids, from a csv with the header `id,name`.

    Raises:
        AnnotationError: no such file, no header, a row that is not `id,name`, or ids that are not 0..num_classes-1
            once each.
    """
    names: dict[int, str] = {}
    for number, (line, text) in enumerate(_lines(path, key)):
        row = [field.strip() for field in next(csv.reader([text]))]
        if number == 0:
            if row != ["id", "name"]:
                raise AnnotationError(f"{path}, line {line}: the header must be `id,name`, not {text!r}")
            continue
        where = f"{path}, line {line}"
        if len(row) < 2 or not row[1]:
            raise AnnotationError(f"{where}: needs `id,name`, not {text!r}")
        label = _whole_number(row[0], "id", where)
        if label in names:
            raise AnnotationError(f"{where}: id {label} occurs twice")
        names[label] = ",".join(row[1:])
    if sorted(names) != list(range(num_classes)):
        found = f"{len(names)} classes" if len(names) != num_classes else f"ids up to {max(names)}"
        raise AnnotationError(f"{path}: holds {found}, but data.num_classes needs the ids 0..{num_classes - 1}")
    return tuple(names[label] for label in range(num_classes))


def few_shot(records: Sequence[VideoRecord], shot: int, seed: int) -> tuple[VideoRecord, ...]:
    """Pick `shot` videos of each class and repeat them to about the length of the list (as Side4Video does).

    The choice depends on the order of the records and on `seed` alone. Every picked video is repeated
    max(1, len(records) // picked) times, so an epoch keeps its number of steps.

    Raises:
        AnnotationError: a class has fewer than `shot` videos.
    """
    of_class = defaultdict(list)
    for record in records:
        of_class[record.label].append(record)
    rng = random.Random(seed)
    picked = []
    for label in sorted(of_class):
        if len(of_class[label]) < shot:
            raise AnnotationError(f"data.shot: class {label} has {len(of_class[label])} training videos, not {shot}")
        picked += rng.sample(of_class[label], shot)
    return tuple(picked) * max(1, len(records) // len(picked))


def _lines(path: str, key: str) -> list[tuple[int, str]]:
    """(number from 1, stripped text) of each line that is not blank."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [(number, text.strip()) for number, text in enumerate(file, 1) if text.strip()]
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: {key} is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise AnnotationError(f"{key}: cannot read {path} ({error.strerror})") from None


def _whole_number(text: str, what: str, where: str) -> int:
    if not WHOLE_NUMBER.fullmatch(text):
        raise AnnotationError(f"{where}: the {what} must be a whole number, not {text!r}")
    return int(text)
