"""Each row of a list against disk, in parallel.

Videos are opened and decoded by the readers of training, so a row without a problem can be trained on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.workers import Workers
from datasets.annotation import VideoRecord
from datasets.decoders import LARGEST_LOSS
from datasets.packed_frames import PackedVideo, PackError
from datasets.readers import Clip, FrameFolderReader, ReadError
from datasets.video_dataset import VideoSource

MAX_DECODED_BYTES = 2**28  # of pixels at once, if every frame is decoded


@dataclass(frozen=True)
class RowResult:
    """What is on disk for a row."""

    record: VideoRecord
    frames: int | None = None  # None: unknown
    unused: int = 0  # frames that no clip shows, because the list does not declare them
    size: tuple[int, int] | None = None  # (width, height) in pixels; None: unknown
    num_bytes: int = 0  # of the video, or of the frames' files, packed or not
    problems: tuple[tuple[str, str], ...] = ()  # (kind, sentence)
    notes: tuple[tuple[str, str], ...] = ()  # (kind, sentence)


@dataclass(frozen=True)
class RowChecker:
    """Checks one row.

    Args:
        source: the list's root and reader.
        full: decode every frame, instead of two: the first and last of frames, the middle and last of a video.
    """

    source: VideoSource
    full: bool = False

    def __call__(self, record: VideoRecord) -> RowResult:
        reader = self.source.reader
        path = os.path.join(self.source.root, record.path)
        stored = reader.stored_at(path)
        if not os.path.exists(stored):
            kind = "folder missing" if isinstance(reader, FrameFolderReader) else "file missing"
            return RowResult(record, problems=((kind, f"{path}: does not exist"),))
        try:
            if isinstance(reader, FrameFolderReader):
                return self._check_frames(record, path, stored, reader)
            return self._check_video(record, path)
        except (ReadError, PackError) as error:
            reason = str(error)
        except OSError as error:
            reason = f"{path}: {error.strerror or error}"
        except Exception as error:  # a bug in a reader must not end the check of all other rows
            reason = f"{path}: reading it failed with {type(error).__name__}: {error}"
        num_bytes = os.path.getsize(stored) if os.path.isfile(stored) else 0
        return RowResult(record, num_bytes=num_bytes, problems=(("unreadable", reason),))

    def _check_frames(self, record: VideoRecord, path: str, stored: str, reader: FrameFolderReader) -> RowResult:
        def name(index: int) -> str:
            return os.path.basename(reader.names.name(index))

        declared = record.num_frames or 0
        if stored != path:
            sizes = PackedVideo(stored).sizes()
        else:
            # A template may name a folder too.
            sizes = _file_sizes(os.path.dirname(os.path.join(path, reader.names.name(0))))
        names = [name(index) for index in range(declared)]
        missing = [name for name in names if name not in sizes]
        num_bytes = sum(sizes.get(name, 0) for name in names)
        result = RowResult(record, frames=declared - len(missing), num_bytes=num_bytes)
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            text = f"{path}: {len(missing)} of {declared} declared frames are missing ({shown})"
            text += reader.names.advice(sizes)
            return replace(result, problems=(("frames missing", text),))
        if empty := [name for name in names if sizes[name] == 0]:
            text = f"{path}: {len(empty)} of {declared} frames are empty files, first {empty[0]}"
            return replace(result, problems=(("unreadable", text),))
        existing = declared
        while name(existing) in sizes:
            existing += 1
        notes = _note_more_frames(path, existing, declared)
        if (zeroth := name(-1)) in sizes:  # with data.index_base 1
            text = f"{path}: holds {zeroth} too, and the first frame that is read is {name(0)}: is data.index_base 0?"
            notes += (("more frames", text),)
        size = self._decode(reader.open(path, declared), first=0)
        return replace(result, size=size, notes=notes, unused=existing - declared + (zeroth in sizes))

    def _check_video(self, record: VideoRecord, path: str) -> RowResult:
        clip = self.source.reader.open(path, record.num_frames)
        found, declared = clip.num_frames, clip.declared_frames
        result = RowResult(
            record,
            frames=found,
            size=self._decode(clip, first=found // 2),
            num_bytes=os.path.getsize(path),
            notes=_note_more_frames(path, found, record.num_frames),
        )
        if declared - found > LARGEST_LOSS * declared:
            text = f"{path}: is damaged or cut: it declares {declared} frames, {found} decode"
            return replace(result, problems=(("frames missing", text),))
        return result

    def _decode(self, clip: Clip, first: int) -> tuple[int, int]:
        """Decode frame `first` and the last one, or all; returns (width, height). Raises ReadError."""
        frames = clip.read(np.array([first, clip.num_frames - 1]))  # (2, H, W, 3)
        if self.full:
            step = max(1, MAX_DECODED_BYTES // frames[0].nbytes)
            for start in range(0, clip.num_frames, step):
                clip.read(np.arange(start, min(start + step, clip.num_frames)))
        height, width = frames.shape[1:3]
        return width, height


def check_rows(checker: RowChecker, records: Sequence[VideoRecord], jobs: int) -> Iterator[RowResult]:
    """The result of every record, in any order, from `jobs` processes.

    A process that dies (its decoder crashes, or memory runs out) costs the row that it was reading, which is reported.
    """
    checker = replace(checker, source=replace(checker.source, records=()))  # it is sent with every row
    with Workers(jobs, start="fork") as workers:
        for record, result in workers.run(checker, records):
            yield result or _crashed(checker.source.root, record)


def _crashed(root: str, record: VideoRecord) -> RowResult:
    text = f"{os.path.join(root, record.path)}: the process that read it died: its decoder crashed, or memory ran out"
    return RowResult(record, problems=(("crash", text),))


def _note_more_frames(path: str, existing: int, declared: int | None) -> tuple[tuple[str, str], ...]:
    if declared is None or existing <= declared:
        return ()
    return (("more frames", f"{path}: holds {existing} frames, the list declares {declared}"),)


def _file_sizes(folder: str) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}
