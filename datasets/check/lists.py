"""The lists of a configuration as wholes: repeated rows, videos in two lists, classes, lengths, sizes.

Lives here: reading the lists, what their rows mean together, and the tables of class balance and of videos.
Does not live here: looking at a video (rows.py).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import median
from typing import Literal

from configs.schema import DataConfig
from datasets.annotation import AnnotationError, VideoRecord, read_rows
from datasets.build import build_reader, class_names, list_or_root, video_source
from datasets.check.report import Finding, Table
from datasets.check.rows import RowResult
from datasets.packed_frames import PackedVideo, PackError
from datasets.video_dataset import VideoSource

Split = Literal["train", "val", "test"]
ANY_LABEL = 2**31  # as a number of classes: labels are compared with the real one here, all of them
EXAMPLES = 3


@dataclass
class CheckedList:
    """A list and, once its rows were looked at, their results in the order of the list."""

    split: Split
    source: VideoSource
    results: list[RowResult] = field(default_factory=list)

    def path(self, index: int) -> str:
        return os.path.normpath(os.path.join(self.source.root, self.source.records[index].path))


def open_lists(data: DataConfig) -> tuple[list[CheckedList], list[Finding]]:
    """The lists that training, validation and, where it has a list or root of its own, testing read.

    Raises:
        ConfigError: a list or root is not set or not there.
            What is wrong with a list or a row is a finding; the other rows are there.
    """
    splits: list[Split] = ["train", "val"]
    if (data.test_list or data.val_list, data.test_root or data.val_root) != (data.val_list, data.val_root):
        splits.append("test")
    lists, findings = [], []
    for split in splits:
        try:
            lists.append(CheckedList(split, video_source(replace(data, num_classes=ANY_LABEL), split)))
        except AnnotationError:
            source, found = _good_rows(data, split)
            findings += [Finding("problem", "list", str(error)) for error in found]
            if source.records:
                lists.append(CheckedList(split, source))
    return lists, findings


def _good_rows(data: DataConfig, split: Split) -> tuple[VideoSource, list[AnnotationError]]:
    """What `video_source` gives where a list has bad rows: the source of the others, and what is wrong with each bad one."""
    (list_key, list_file), (_, root) = list_or_root(data, split, "list"), list_or_root(data, split, "root")
    records: list[VideoRecord] = []
    errors: list[AnnotationError] = []
    try:
        any_label, real = (
            read_rows(list_file, data.modality, num_classes, f"data.{list_key}")
            for num_classes in (ANY_LABEL, data.num_classes)
        )
        for row, strict in zip(any_label, real, strict=True):
            if isinstance(row, VideoRecord):
                records.append(row)
            else:
                errors.append(strict)  # it names the real range of labels
        if not records and not errors:
            errors.append(AnnotationError(f"{list_file}: data.{list_key} has no rows"))
    except AnnotationError as error:
        errors.append(error)
    return VideoSource(tuple(records), root, build_reader(data), list_file), errors


def label_names(data: DataConfig) -> tuple[tuple[str, ...] | None, list[Finding]]:
    """Class names, or None where there are none or they do not fit data.num_classes, which is a finding."""
    try:
        names = class_names(data)
    except AnnotationError as error:
        return None, [Finding("problem", "labels", str(error))]
    if names is None:
        return None, [Finding("note", "labels", "data.label_list is not set: classes have no names")]
    twice = [name for name, count in Counter(names).items() if count > 1]
    found = [Finding("warning", "labels", f"{name!r} names several classes", data.label_list) for name in twice]
    return names, found


def findings_of(checked: CheckedList, data: DataConfig, names: Sequence[str] | None) -> Iterator[Finding]:
    """What is wrong or odd in one list, row by row and as a whole."""
    records, file = checked.source.records, checked.source.list_file
    for result in checked.results:
        line = result.record.line
        if result.record.label >= data.num_classes:
            text = f"label {result.record.label} is outside 0..{data.num_classes - 1}"
            yield Finding("problem", "label", text, file, line)
        yield from (Finding("problem", kind, text, file, line) for kind, text in result.problems)
        yield from (Finding("note", kind, text, file, line) for kind, text in result.notes)
    missing = [result for result in checked.results if any("missing" in kind for kind, _ in result.problems)]
    if len(missing) == len(records):
        where = f"data.{checked.split}_root {checked.source.root}"
        yield Finding("problem", "root", f"not one row of {file} is whole below {where}: is this the right folder?")
    rows_of = defaultdict(list)
    for index, record in enumerate(records):
        rows_of[checked.path(index)].append(record)
    repeated = {path: rows for path, rows in rows_of.items() if len(rows) > 1}
    if repeated:
        rows = [f"{rows[0].path} (lines {_examples([str(row.line) for row in rows])})" for rows in repeated.values()]
        yield Finding("warning", "duplicates", f"{_videos(len(rows))} more than once: {_examples(rows)}", file)
    torn = [rows[0].path for rows in repeated.values() if len({row.label for row in rows}) > 1]
    if torn:
        yield Finding("warning", "labels", f"{_videos(len(torn))} with different labels: {_examples(torn)}", file)
    seen = {record.label for record in records}
    empty = [label for label in range(data.num_classes) if label not in seen]
    if empty:
        text = (
            f"{len(empty)} of {data.num_classes} classes have no video: {_examples([_class(c, names) for c in empty])}"
        )
        yield Finding("warning", "classes", text, file)


def findings_between(lists: Sequence[CheckedList]) -> Iterator[Finding]:
    """Videos that two lists share: by path, and as copies with the same content under another path.

    Something shared with the training list is a warning; validation and testing may well be alike, a note.
    """
    for one, other in combinations(lists, 2):
        level = "warning" if "train" in (one.split, other.split) else "note"
        where = f"{one.source.list_file} and {other.source.list_file}"
        line_of = {one.path(index): record.line for index, record in enumerate(one.source.records)}
        shared = [
            f"{record.path} (lines {line_of[other.path(index)]} and {record.line})"
            for index, record in enumerate(other.source.records)
            if other.path(index) in line_of
        ]
        if shared:
            yield Finding(level, "shared videos", f"{where} share {_videos(len(shared))}: {_examples(shared)}")
        copies = [
            f"{a.record.path} (line {a.record.line}) = {b.record.path} (line {b.record.line})"
            for a, b in _copies(one, other)
        ]
        if copies:
            text = f"{where} hold {_videos(len(copies))} of the same content: {_examples(copies)}"
            yield Finding(level, "copies", text)


def _copies(one: CheckedList, other: CheckedList) -> Iterator[tuple[RowResult, RowResult]]:
    """Pairs with different paths and equal bytes; only what has equal sizes is read."""
    of_size = defaultdict(list)
    for result in one.results:
        of_size[result.num_bytes, result.frames].append(result)
    digests: dict[str, bytes | None] = {}

    def digest(checked: CheckedList, result: RowResult) -> bytes | None:
        path = os.path.normpath(os.path.join(checked.source.root, result.record.path))
        if path not in digests:
            digests[path] = _digest(checked.source, result.record)
        return digests[path]

    paths = {one.path(index) for index in range(len(one.source.records))}
    for result in other.results:
        if os.path.normpath(os.path.join(other.source.root, result.record.path)) in paths or result.num_bytes == 0:
            continue
        for twin in of_size[result.num_bytes, result.frames]:
            content = digest(one, twin)
            if content is not None and content == digest(other, result):
                yield twin, result
                break


def _digest(source: VideoSource, record: VideoRecord) -> bytes | None:
    """Of all bytes of a video's file or, in order, of its frames' files. None where one cannot be read."""
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


def readable(size: float) -> str:
    """Bytes for people, e.g. 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def class_counts(checked: CheckedList, num_classes: int) -> list[int]:
    """Videos of each class."""
    counts = Counter(record.label for record in checked.source.records)
    return [counts[label] for label in range(num_classes)]


def balance_table(lists: Sequence[CheckedList], data: DataConfig) -> Table:
    """One column a list: videos a class, lengths, sizes."""
    columns = [_balance(checked, data) for checked in lists]
    table = Table("Classes and videos", ["", *(checked.split for checked in lists)])
    table.rows = [[key, *(column[key] for column in columns)] for key in (columns[0] if columns else ())]
    return table


def _balance(checked: CheckedList, data: DataConfig) -> dict[str, str]:
    counts = class_counts(checked, data.num_classes)
    held = [count for count in counts if count > 0]
    of_length = sorted((r for r in checked.results if r.frames), key=lambda r: r.frames)
    lengths = [result.frames for result in of_length]
    short = sum(length < data.num_segments for length in lengths)
    sizes = Counter(result.size for result in checked.results if result.size is not None)
    shown = [f"{w}x{h} ({count})" for (w, h), count in sizes.most_common(3)]
    return {
        "videos": str(len(checked.source.records)),
        "classes with videos": f"{len(held)} of {data.num_classes}",
        "videos a class, min / median / max": f"{min(held)} / {median(held):g} / {max(held)}" if held else "-",
        "most frequent : rarest class": f"{max(held) / min(held):.1f}" if held else "-",
        "frames, min / median / max": f"{lengths[0]} / {median(lengths):g} / {lengths[-1]}" if lengths else "-",
        "shortest video": of_length[0].record.path if of_length else "-",
        "longest video": of_length[-1].record.path if of_length else "-",
        f"shorter than {data.num_segments} frames": str(short),
        "frame sizes": ", ".join(shown) + (f", {len(sizes) - 3} more" if len(sizes) > 3 else "") or "-",
        "size on disk": readable(sum(result.num_bytes for result in checked.results)),
    }


def values_of(checked: CheckedList, data: DataConfig) -> dict[str, object]:
    """The numbers behind the table, for the JSON file."""
    sizes = Counter(f"{r.size[0]}x{r.size[1]}" for r in checked.results if r.size is not None)
    lengths = [result.frames for result in checked.results if result.frames]
    return {
        "list": checked.source.list_file,
        "root": checked.source.root,
        "videos": len(checked.source.records),
        "videos_of_class": class_counts(checked, data.num_classes),
        "frames_min_max": [min(lengths), max(lengths)] if lengths else None,
        "frames_total": sum(lengths),
        "frame_sizes": dict(sizes.most_common()),
        "bytes": sum(result.num_bytes for result in checked.results),
    }


def _examples(texts: Sequence[str]) -> str:
    return ", ".join(texts[:EXAMPLES]) + (", ..." if len(texts) > EXAMPLES else "")


def _videos(count: int) -> str:
    return f"{count} video{'' if count == 1 else 's'}"


def _class(label: int, names: Sequence[str] | None) -> str:
    return f"{label} ({names[label]})" if names else str(label)


def sorted_results(results: Iterable[RowResult]) -> list[RowResult]:
    """In the order of the list."""
    return sorted(results, key=lambda result: result.record.line)
