"""One row of a list against disk, and all rows of a list in parallel.

Lives here: what is looked at in a folder of frames and in a file, and what becomes of a row whose decoder takes its
process down.
Does not live here: what rows mean together (lists.py).

What is opened and decoded goes through the reader of the loaders, so that a row which passes here can be trained on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from common.workers import Workers
from datasets.annotation import VideoRecord
from datasets.packed_frames import PackedVideo, PackError
from datasets.readers import Clip, FrameReader, ReadError, VideoReader
from datasets.video_dataset import VideoSource

CHUNK = 8  # rows that a process takes at a time
DECODED_AT_ONCE = 2**28  # bytes of pixels, where everything is decoded


@dataclass(frozen=True)
class RowResult:
    """What disk says of a row. `frames` and `size` (width, height; pixels) are None where they could not be found out.

    `problems` and `notes` are (kind, sentence) pairs; `num_bytes` counts the files of the row's frames, packed ones too.
    """

    record: VideoRecord
    frames: int | None = None
    size: tuple[int, int] | None = None
    num_bytes: int = 0
    problems: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RowChecker:
    """Checks a row of `source`.

    Args:
        full: decode every frame, instead of the first and last of a folder, the middle and last of a file.
    """

    source: VideoSource
    full: bool = False

    def __call__(self, record: VideoRecord) -> RowResult:
        path = os.path.join(self.source.root, record.path)
        reader = self.source.reader
        if isinstance(reader, FrameReader | VideoReader) and not os.path.exists(reader.stored_at(path)):
            kind = "folder missing" if isinstance(reader, FrameReader) else "file missing"
            return RowResult(record, problems=((kind, f"{path}: is not there"),))
        try:
            if isinstance(reader, FrameReader):
                return self._frames(record, path, reader)
            return self._video(record, path)
        except (ReadError, PackError) as error:
            num_bytes = os.path.getsize(path) if os.path.isfile(path) else 0
            return RowResult(record, num_bytes=num_bytes, problems=(("unreadable", str(error)),))
        except OSError as error:
            return RowResult(record, problems=(("unreadable", f"{path}: {error.strerror or error}"),))
        except Exception as error:  # no reader should, but one broken video must not cost the check of all others
            text = f"{path}: reading it failed with {type(error).__name__}: {error}"
            return RowResult(record, problems=(("unreadable", text),))

    def _frames(self, record: VideoRecord, path: str, reader: FrameReader) -> RowResult:
        def name(index: int) -> str:
            return os.path.basename(reader.name(index))

        declared = record.num_frames or 0
        stored = reader.stored_at(path)
        if stored != path:
            sizes = PackedVideo(stored).sizes()
        else:  # a template may name a folder, too
            sizes = _file_sizes(os.path.dirname(os.path.join(path, reader.name(0))))
        names = [name(index) for index in range(declared)]
        missing = [name for name in names if name not in sizes]
        present = [name for name in names if name in sizes]
        found = {"frames": declared - len(missing), "num_bytes": sum(sizes[name] for name in present)}
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            text = f"{path}: {len(missing)} of {declared} declared frames are missing ({shown})"
            return RowResult(record, problems=(("frames missing", text),), **found)
        if empty := [name for name in names if sizes[name] == 0]:
            text = f"{path}: {len(empty)} of {declared} frames are empty files, first {empty[0]}"
            return RowResult(record, problems=(("unreadable", text),), **found)
        further = declared
        while name(further) in sizes:
            further += 1
        notes = (("more frames", f"{path}: holds {further} frames, the list declares {declared}"),)
        clip = reader.open(path, declared)
        frames = clip.read(np.array([0, declared - 1]))
        if self.full:
            _decode_all(clip, frames[0].nbytes)
        height, width = frames.shape[1:3]
        return RowResult(record, size=(width, height), notes=notes[: further > declared], **found)

    def _video(self, record: VideoRecord, path: str) -> RowResult:
        clip = self.source.reader.open(path, record.num_frames)
        declared, frames = record.num_frames, clip.num_frames
        notes = (("more frames", f"{path}: holds {frames} frames, the list declares {declared}"),)
        pixels = clip.read(np.array([frames // 2, frames - 1]))
        if self.full:
            _decode_all(clip, pixels[0].nbytes)
        height, width = pixels.shape[1:3]
        num_bytes = os.path.getsize(path) if os.path.isfile(path) else 0
        more = declared is not None and frames > declared
        return RowResult(record, frames, (width, height), num_bytes, notes=notes[:more])


def check_rows(checker: RowChecker, records: Sequence[VideoRecord], jobs: int) -> Iterator[RowResult]:
    """The result of every record, in no particular order, from `jobs` processes.

    A process that dies (a crash in a decoder, or no memory left) costs the row it was reading, not the check: its rows
    are repeated one by one, and the one that dies again is reported.
    """
    checker = replace(checker, source=replace(checker.source, records=()))  # it goes along with every chunk
    check = partial(_check_chunk, checker)
    lost: list[VideoRecord] = []
    with Workers(jobs, start="fork") as workers:
        for chunk, results in workers.run(check, [records[at : at + CHUNK] for at in range(0, len(records), CHUNK)]):
            lost.extend(chunk if results is None else ())
            yield from results or ()
        for (record,), results in workers.run(check, [[record] for record in lost]):
            yield from results or [_crashed(checker.source.root, record)]


def _crashed(root: str, record: VideoRecord) -> RowResult:
    text = f"{os.path.join(root, record.path)}: the process that read it died: its decoder crashed, or memory ran out"
    return RowResult(record, problems=(("crash", text),))


def _check_chunk(checker: RowChecker, records: Sequence[VideoRecord]) -> list[RowResult]:
    return [checker(record) for record in records]


def _file_sizes(folder: str) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}


def _decode_all(clip: Clip, frame_bytes: int) -> None:
    step = max(1, DECODED_AT_ONCE // frame_bytes)
    for start in range(0, clip.num_frames, step):
        clip.read(np.arange(start, min(start + step, clip.num_frames)))
