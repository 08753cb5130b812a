"""decord behind the interface of base.py: an option where it has wheels (no release since 2022).

What decord 0.6.0 gets wrong, seen on HMDB51, UCF101 and Kinetics files and on small files of the common encoders, and
how its frames are made exact:
- It turns rotated phone videos upright, and reads .webm, .mkv and files with metadata in any encoding.
- It counts packets. MPEG-4 AVIs with packed B-frames (many of HMDB51) hold one packet more than frames, some of UCF101
  hold packets that say "nothing changed" and give no frame. Where a frame is missing decord silently returns another
  one; with a `fault_tol` close to 0 it raises instead. Its seeks count packets too, so they land too far on.
- Where packets carry no time stamps (AVIs with B-frames: HMDB51, a tenth of UCF101) a seek may land elsewhere, up to 20
  frames off. Decoding from the first frame on is right.
- It takes the position of a key frame in the file for its position in the order of presentation. With open GOPs (H.264)
  that is up to 16 frames too early: frames from there to the key frame come out wrong after a seek to it, others are
  right. They are reached from the key frame before, which costs up to a fifth more on Kinetics.
- It starts an MPEG transport stream several frames late. Containers other than AVI, MP4, Matroska and FLV are therefore
  decoded from their start, and refused if frames are missing.
- Frames narrower than 64 pixels may come with their row padding taken for a fourth channel.
- A file that is no video prints one line to stderr from native code; everything of FFmpeg's own is silenced here.
- Its worker thread decodes ahead of what is requested and starts again at each seek, and no option changes that;
  neither skip_frames nor decoding from the start is faster. PyAV takes less than half of the time on UCF101.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from datasets.decoders.base import EMPTY_MPEG4, KEEP_BYTES, VideoFile, decoding, library

NO_SUBSTITUTES = 1e-9  # decord's fault_tol: the share of frames that it may replace by others
KNOWN_STARTS = {b"RIFF", b"\x1aE\xdf\xa3", b"FLV\x01", b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}
MAX_REORDER = 17  # an open GOP's key frame comes at most 16 frames (H.264's largest buffer) before it is shown


class DecordFile(VideoFile):
    def __init__(self, path: str):
        self.path = path
        with _decoding(path):
            self._video = _open(path)
            self.declared_frames = len(self._video)
            if self.declared_frames == 0:
                raise self._short(0)
            starts = self._video.get_frame_timestamp(range(self.declared_frames))[:, 0]  # (packets,) seconds
            keys = self._video.get_key_indices()
        # a missing time stamp is about -1e17; one below 0 belongs to a packet that is not shown
        dated = starts[0] >= 0 and bool((np.diff(starts) > 0).all())
        chunks = _avi_chunk_sizes(path)  # None for what is no AVI
        full = chunks is None or (len(chunks) > 0 and chunks.min() > EMPTY_MPEG4)
        known = _is_known(path)
        self._seekable = known and dated and full
        self._unsafe = MAX_REORDER if chunks is None else 0  # AVIs with time stamps have no B-frames, so no open GOPs
        self._keys = sorted({0, *keys})
        self._position = 0  # the frame that `next` gives
        self._kept: list[Any] | None = None
        self.num_frames = self.declared_frames if self._seekable else self._count()
        if not known and self.num_frames < self.declared_frames:
            raise self._short(self.num_frames)

    def read(self, indices: np.ndarray) -> np.ndarray:
        import decord

        wanted, inverse = self._wanted(indices)
        with _decoding(self.path):
            frames = None
            if self._seekable:
                try:
                    frames = [self._frame_at(int(index)) for index in wanted]
                except (decord.DECORDLimitReachedError, StopIteration):
                    self._seekable = False  # a frame was not where the key frames promise it: damage
            if frames is None:
                frames = self._from_start(wanted)
        return np.stack([frames[i] for i in inverse])  # (T, H, W, 3)

    def frames(self) -> Iterator[np.ndarray]:
        if self._kept is not None:
            yield from map(_pixels, self._kept)
            return
        import decord

        with _decoding(self.path):
            video = _open(self.path)
        for index in range(self.num_frames):
            try:
                frame = _pixels(video.next())
            except (decord.DECORDError, decord.DECORDLimitReachedError, StopIteration) as error:
                if index == 0:
                    raise self._short(0) from error
                return
            yield frame

    def _frame_at(self, index: int) -> np.ndarray:
        """One frame, reached by a seek that is exact."""
        if index != self._position:
            start = self._safe_start(index)
            self._video.seek_accurate(start)
            for _ in range(start, index):
                self._video.next()
        self._position = index + 1
        return _pixels(self._video.next())

    def _safe_start(self, index: int) -> int:
        """The last frame up to `index` that decord can go to without ending up among those around an open GOP."""
        here = self._key_before(self._position) if index >= self._position else None
        while (key := self._key_before(index)) > 0 and key != here and index < key + self._unsafe:
            index = key - 1
        return index

    def _key_before(self, index: int) -> int:
        return self._keys[bisect_right(self._keys, index) - 1]

    def _from_start(self, wanted: np.ndarray) -> list[np.ndarray]:
        import decord

        if self._kept is not None:
            return [_pixels(self._kept[index]) for index in wanted]
        video, keep, frames = _open(self.path), set(wanted.tolist()), []
        for index in range(int(wanted[-1]) + 1):
            try:
                frame = video.next()
            except (decord.DECORDLimitReachedError, StopIteration) as error:
                raise self._short(index) from error
            if index in keep:
                frames.append(_pixels(frame))
        return frames

    def _count(self) -> int:
        """Count the frames by decoding them, and keep them, as decord's arrays, if they are not too many."""
        import decord

        kept: list[Any] | None = []
        count, frame_bytes = 0, 0
        with _decoding(self.path):
            while count < self.declared_frames:
                try:
                    frame = self._video.next()
                except (decord.DECORDLimitReachedError, StopIteration):
                    break
                count += 1
                frame_bytes = frame_bytes or math.prod(frame.shape)
                if count * frame_bytes > KEEP_BYTES:
                    kept = None
                elif kept is not None:
                    kept.append(frame)
        if count == 0:
            raise self._short(0)
        self._kept = kept
        return count


def _open(path: str) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader(path, num_threads=1, fault_tol=NO_SUBSTITUTES)


def _decoding(path: str) -> AbstractContextManager[None]:
    decord = library("decord")
    return decoding(path, decord.DECORDError, decord.DECORDLimitReachedError)


def _pixels(frame: Any) -> np.ndarray:
    """decord's array -> (H, W, 3) uint8, without the padding that it may take for a channel."""
    array = frame.asnumpy()  # (H, W, C)
    height, width, channels = array.shape
    return array if channels == 3 else array.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _is_known(path: str) -> bool:
    """Whether decord reads a file of this kind from its first frame on."""
    with open(path, "rb") as file:
        head = file.read(8)
    return head[:4] in KNOWN_STARTS or head[4:] in KNOWN_STARTS


def _avi_chunk_sizes(path: str) -> np.ndarray | None:
    """Bytes of each video chunk, from an AVI's own index (`idx1`); none if that is missing; None if it is no AVI."""
    entry = np.dtype([("id", "S4"), ("flags", "<u4"), ("offset", "<u4"), ("size", "<u4")])
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"AVI ":
            return None
        while len(chunk := file.read(8)) == 8:
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"idx1":
                index = file.read(size)
                entries = np.frombuffer(index[: len(index) // entry.itemsize * entry.itemsize], entry)
                return entries["size"][np.isin(entries["id"], [b"00dc", b"00db", b"01dc", b"01db"])]
            file.seek(size + size % 2, os.SEEK_CUR)
    return np.zeros(0, np.uint32)
