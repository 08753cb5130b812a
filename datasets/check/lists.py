"""The lists of a configuration: bad and repeated rows, videos in two lists, classes, lengths and sizes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import median
from typing import Literal

from common.tables import format_bytes, markdown_table
from configs.schema import DataConfig
from datasets.annotation import AnnotationError, VideoRecord, outside, read_rows
from datasets.build import build_reader, class_names, list_or_root, video_source
from datasets.check.report import Finding
from datasets.check.rows import RowResult
from datasets.list_doubts import EXAMPLES, examples, list_doubts, videos
from datasets.packed_frames import PackedVideo, PackError
from datasets.video_dataset import VideoSource

Split = Literal["train", "val", "test"]
ANY_LABEL = 2**31  # as number of classes: `findings_of` compares the labels with the real number


@dataclass
class CheckedList:
    """A list and, once its rows are checked, their results in the order of the list."""

    split: Split
    source: VideoSource
    results: list[RowResult] = field(default_factory=list)

    def path_of(self, record: VideoRecord) -> str:
        return os.path.normpath(os.path.join(self.source.root, record.path))

    def class_counts(self, num_classes: int) -> list[int]:
        """Videos of each class."""
        counts = Counter(record.label for record in self.source.records)
        return [counts[label] for label in range(num_classes)]


def open_lists(data: DataConfig) -> tuple[list[CheckedList], list[Finding]]:
    """The lists of training, validation and, if it has a list or root of its own, testing.

    Bad rows are findings; the lists have the others.

    Raises:
        ConfigError: a list or root is not set or does not exist.
    """
    splits: list[Split] = ["train", "val"]
    if (data.test_list or data.val_list, data.test_root or data.val_root) != (data.val_list, data.val_root):
        splits.append("test")
    lists, findings = [], []
    for split in splits:
        try:
            any_label = replace(data, num_classes=ANY_LABEL, task="classify", reversed_classes=False)
            lists.append(CheckedList(split, video_source(any_label, split)))
        except AnnotationError:
            source, errors = _valid_rows(data, split)
            findings += [Finding("problem", "list", str(error)) for error in errors]
            if source.records:
                lists.append(CheckedList(split, source))
    return lists, findings


def _valid_rows(data: DataConfig, split: Split) -> tuple[VideoSource, list[AnnotationError]]:
    """The valid rows of a list, and an error for each other row."""
    (list_key, list_file), (_, root) = list_or_root(data, split, "list"), list_or_root(data, split, "root")
    records: list[VideoRecord] = []
    errors: list[AnnotationError] = []
    try:
        for row in read_rows(list_file, data.modality, f"data.{list_key}"):
            if isinstance(row, VideoRecord) and row.label < 0:
                row = AnnotationError(f"{list_file}, line {row.line}: {outside(row, data.num_classes)}")
            (records if isinstance(row, VideoRecord) else errors).append(row)
        if not records and not errors:
            errors.append(AnnotationError(f"{list_file}: data.{list_key} has no rows"))
    except AnnotationError as error:
        errors.append(error)
    return VideoSource(tuple(records), root, build_reader(data), list_file), errors


def lists_alone(data: DataConfig, lists: Sequence[CheckedList]) -> DataConfig:
    """The configuration of the lists themselves, without what data.task or data.reversed_classes make of them."""
    largest = max((record.label for checked in lists for record in checked.source.records), default=0)
    classes = data.listed_classes or largest + 1
    return replace(data, num_classes=classes, task="classify", reversed_classes=False)


def label_names(data: DataConfig) -> tuple[tuple[str, ...] | None, list[Finding]]:
    """The class names; None, with a finding, if there are none or they do not fit data.num_classes."""
    try:
        names = class_names(data)
    except AnnotationError as error:
        return None, [Finding("problem", "labels", str(error))]
    if names is None:
        return None, [Finding("note", "labels", "data.label_list is not set: classes have no names")]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    return names, [
        Finding("warning", "labels", f"{name!r} names several classes", data.label_list) for name in repeated
    ]


def findings_of(checked: CheckedList, data: DataConfig, names: Sequence[str] | None) -> Iterator[Finding]:
    """What is wrong or unusual in one list."""
    records, file = checked.source.records, checked.source.list_file
    for result in checked.results:
        line = result.record.line
        if result.record.label >= data.num_classes:
            yield Finding("problem", "label", outside(result.record, data.num_classes), file, line)
        yield from (Finding("problem", kind, text, file, line) for kind, text in result.problems)
        yield from (Finding("note", kind, text, file, line) for kind, text in result.notes)
    missing = [result for result in checked.results if any("missing" in kind for kind, _ in result.problems)]
    if len(missing) == len(records):
        where = f"data.{checked.split}_root {checked.source.root}"
        yield Finding("problem", "root", f"no row of {file} is complete below {where}: is this the right folder?")
    rows_of = defaultdict(list)
    for record in records:
        rows_of[checked.path_of(record)].append(record)
    repeated = [rows for rows in rows_of.values() if len(rows) > 1]
    if repeated:
        shown = [f"{rows[0].path} (lines {examples([str(row.line) for row in rows])})" for rows in repeated]
        text = f"{videos(len(repeated))} more than once: {examples(shown)}"
        yield Finding("warning", "duplicates", text, file)
    for kind, text in list_doubts(records, data.modality, data.num_classes, names, trains=True):
        yield Finding("warning", kind, text, file)


def findings_between(lists: Sequence[CheckedList]) -> Iterator[Finding]:
    """Videos that two lists share: the same path, or another path with the same content.

    It is a warning if one of them is the training list, else a note.
    """
    for one, other in combinations(lists, 2):
        level = "warning" if "train" in (one.split, other.split) else "note"
        where = f"{one.source.list_file} and {other.source.list_file}"
        line_of = {one.path_of(record): record.line for record in one.source.records}
        shared = [
            f"{record.path} (lines {line_of[other.path_of(record)]} and {record.line})"
            for record in other.source.records
            if other.path_of(record) in line_of
        ]
        if shared:
            yield Finding(level, "shared videos", f"{where} share {videos(len(shared))}: {examples(shared)}")
        copies = [f"{a.path} (line {a.line}) = {b.path} (line {b.line})" for a, b in _copies(one, other)]
        if copies:
            text = f"{where} hold {videos(len(copies))} of the same content: {examples(copies)}"
            yield Finding(level, "copies", text)


def _copies(one: CheckedList, other: CheckedList) -> Iterator[tuple[VideoRecord, VideoRecord]]:
    """Pairs with different paths and equal bytes; only videos of equal size are read."""
    of_size = defaultdict(list)
    for result in one.results:
        of_size[result.num_bytes, result.frames].append(result.record)
    digests: dict[str, bytes | None] = {}

    def digest(checked: CheckedList, record: VideoRecord) -> bytes | None:
        path = checked.path_of(record)
        if path not in digests:
            digests[path] = _digest(checked.source, record)
        return digests[path]

    paths = {one.path_of(record) for record in one.source.records}
    for result in other.results:
        if other.path_of(result.record) in paths or result.num_bytes == 0:
            continue
        for twin in of_size[result.num_bytes, result.frames]:
            content = digest(one, twin)
            if content is not None and content == digest(other, result.record):
                yield twin, result.record
                break


def _digest(source: VideoSource, record: VideoRecord) -> bytes | None:
    """A hash of all bytes of a video's file, or of its frames' files in order; None if one cannot be read."""
    digest = hashlib.blake2b()
    try:
        for block in _content(source, record):
            digest.update(block)
    except (OSError, PackError):
        return None
    return digest.digest()


def _content(source: VideoSource, record: VideoRecord) -> Iterator[bytes]:
    path = os.path.join(source.root, record.path)
    stored = source.reader.stored_at(path)
    if stored != path:
        packed = PackedVideo(stored)
        yield from (packed.read(name) for name in sorted(packed.sizes()))
        return
    files = [path] if os.path.isfile(path) else sorted(entry.path for entry in os.scandir(path) if entry.is_file())
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(2**20):
                yield block


def balance_table(lists: Sequence[CheckedList], data: DataConfig) -> str:
    """Markdown: classes, lengths and sizes, one column a list."""
    columns = [_balance(checked, data) for checked in lists]
    rows = [[key, *(column[key] for column in columns)] for key in columns[0]]
    return markdown_table(["", *(checked.split for checked in lists)], rows)


def _balance(checked: CheckedList, data: DataConfig) -> dict[str, object]:
    counts = checked.class_counts(data.num_classes)
    counts_above_0 = [count for count in counts if count > 0]
    of_length = sorted((result for result in checked.results if result.frames), key=lambda result: result.frames)
    lengths = [result.frames for result in of_length]
    sizes = Counter(result.size for result in checked.results if result.size is not None)
    shown = [f"{w}x{h} ({count})" for (w, h), count in sizes.most_common(EXAMPLES)]
    more = [f"{len(sizes) - EXAMPLES} more"] if len(sizes) > EXAMPLES else []
    return {
        "videos": len(checked.source.records),
        "classes with videos": f"{len(counts_above_0)} of {data.num_classes}",
        "videos a class, min / median / max": _min_median_max(counts_above_0),
        "most frequent : rarest class": f"{max(counts_above_0) / min(counts_above_0):.1f}" if counts_above_0 else "-",
        "frames, min / median / max": _min_median_max(lengths),
        "shortest video": of_length[0].record.path if of_length else "-",
        "longest video": of_length[-1].record.path if of_length else "-",
        f"shorter than {data.num_segments} frames": sum(length < data.num_segments for length in lengths),
        "frame sizes": ", ".join(shown + more) or "-",
        "size on disk": format_bytes(sum(result.num_bytes for result in checked.results)),
    }


def _min_median_max(values: Sequence[int]) -> str:
    return f"{min(values)} / {median(values):g} / {max(values)}" if values else "-"


def values_of(checked: CheckedList, data: DataConfig) -> dict[str, object]:
    """The numbers behind the table, for report.json."""
    sizes = Counter(f"{r.size[0]}x{r.size[1]}" for r in checked.results if r.size is not None)
    lengths = [result.frames for result in checked.results if result.frames]
    return {
        "list": checked.source.list_file,
        "root": checked.source.root,
        "videos": len(checked.source.records),
        "videos_of_class": checked.class_counts(data.num_classes),
        "frames_min_max": [min(lengths), max(lengths)] if lengths else None,
        "frames_total": sum(lengths),
        "frame_sizes": dict(sizes.most_common()),
        "bytes": sum(result.num_bytes for result in checked.results),
    }
