"""decord behind the interface of base.py: an option where it has wheels (no release since 2022).

decord 0.6.0 gives pixels, PyAV proves that they are those of the requested frames: it chooses the stream, counts the
frames and decodes what is read once more, without converting it, to see damage. What decord gets wrong:
- It counts packets. MPEG-4 AVIs with packed B-frames (many of HMDB51) hold one packet more than frames, some of UCF101
  hold packets that say "nothing changed" and give no frame. Where a frame is missing decord silently returns another
  one; with a `fault_tol` close to 0 it raises instead. Its seeks count packets too, so they land too far on.
- Without good time stamps, or with recovery points in place of key frames, a seek may land elsewhere, up to 20 frames
  off. It then decodes from the first frame on, as PyAV does.
- It takes the position of a key frame in the file for its position in the order of presentation. With open GOPs (H.264)
  that is up to 16 frames too early: frames from there to the key frame come out wrong after a seek to it, others are
  right. They are reached from the key frame before, which costs up to a fifth more on Kinetics.
- It starts an MPEG transport stream several frames late. Other containers than AVI, MP4, Matroska and FLV are decoded
  from their start to their end, and refused if frames are missing.
- It knows no AV1, mirrors nothing and cannot be asked for one of several streams. Such files are refused.
- Frames narrower than 64 pixels may come with their row padding taken for a fourth channel.
- FFmpeg's messages from native code are silenced here.
- Its worker thread decodes ahead of what is requested and starts again at each seek, and no option changes that;
  neither skip_frames nor decoding from the start is faster. PyAV takes less than half of the time on UCF101.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from datasets.decoders.base import KEEP_BYTES, DecodeError, VideoFile, library
from datasets.decoders.orientation import is_turn
from datasets.decoders.pyav_file import PyAVFile, layout
from datasets.decoders.stream import EDITED_CONTAINER

KNOWN_CONTAINERS = {"avi", "matroska,webm", EDITED_CONTAINER, "flv"}  # which decord reads from their first frame on
NO_SUBSTITUTES = 1e-9  # decord's fault_tol: the share of frames that it may replace by others
MAX_REORDER = 17  # an open GOP's key frame comes at most 16 frames (H.264's largest buffer) before it is shown


class DecordFile(VideoFile):
    def __init__(self, path: str):
        library("decord")
        self.path = path
        self._proof = PyAVFile(path)
        if self._proof.stream.is_one_of_several:
            raise self._refused("it cannot be asked for one of several streams")
        if self._proof.stream.container == "mpegts":
            raise self._refused("it starts transport streams late")
        self._is_known = self._proof.stream.container in KNOWN_CONTAINERS
        if not self._is_known:
            _ = self.num_frames  # counts by decoding, which refuses what is damaged
        self._position = 0  # the frame that `next` gives
        self._kept: dict[int, Any] | None = None

    @cached_property
    def _video(self) -> Any:
        return _open(self.path)

    @cached_property
    def _keys(self) -> list[int] | None:
        """The key frames, to which decord seeks; None if its time stamps do not tell which frame is which."""
        starts = self._video.get_frame_timestamp(range(len(self._video)))[:, 0]  # (packets,) seconds
        # a missing time stamp is about -1e17; one below 0 belongs to a packet that is not shown
        dated = len(starts) == self.num_frames and starts[0] >= 0 and (np.diff(starts) > 0).all()
        return sorted({0, *self._video.get_key_indices()}) if dated else None

    @property
    def num_frames(self) -> int:
        return self._proof.num_frames

    @property
    def declared_frames(self) -> int:
        return self._proof.declared_frames

    @property
    def fps(self) -> float | None:
        return self._proof.fps

    def read(self, indices: np.ndarray) -> np.ndarray:
        wanted, inverse = self._wanted(indices)
        self._proof.pictures(wanted, self._require_usual)
        with self._decoding():
            if self._proof.is_dated and self._keys:
                frames = [self._frame_at(int(index)) for index in wanted]
            else:
                frames = self._from_start(wanted)
        return np.stack([frames[i] for i in inverse])  # (T, H, W, 3)

    def frames(self) -> Iterator[np.ndarray]:
        with self._decoding():
            video = _open(self.path)
        pictures = self._proof.decodable()
        for index, picture in enumerate(pictures):
            self._require_usual(picture)
            try:
                with self._decoding():
                    pixels = _pixels(video.next())
            except DecodeError:
                if index > 0 and index + 1 + sum(1 for _ in pictures) < self.num_frames:
                    return  # damage, which decord meets earlier as it decodes ahead
                raise
            yield pixels

    def _require_usual(self, picture: Any) -> None:
        """Refuse what decord shows in another way than FFmpeg does today. Raises DecodeError."""
        height, width, matrix = layout(picture)
        turned = matrix is not None and is_turn(matrix) and self._proof.stream.container == EDITED_CONTAINER
        if matrix != self._proof.first[2] or not (matrix is None or turned):
            raise self._refused("it does not show this file's rotation or mirroring")
        if (height, width) != self._proof.first[:2]:
            raise self._refused("the size of the frames changes")

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
        while (key := self._key_before(index)) > 0 and key != here and index < key + MAX_REORDER:
            index = key - 1
        return index

    def _key_before(self, index: int) -> int:
        return self._keys[bisect_right(self._keys, index) - 1]

    def _from_start(self, wanted: np.ndarray) -> list[np.ndarray]:
        """Frames reached by decoding from the first one on; all are kept if they are not too many."""
        if self._kept is None:
            video = _open(self.path)
            first = video.next()
            whole = math.prod(first.shape) * self.num_frames <= KEEP_BYTES
            last = self.num_frames - 1 if whole or not self._is_known else int(wanted[-1])
            needed = set(range(self.num_frames) if whole else wanted.tolist())
            decoded = itertools.chain([first], (video.next() for _ in range(last)))
            kept = {index: frame for index, frame in enumerate(decoded) if index in needed}
            self._kept = kept if whole else None
        else:
            kept = self._kept
        return [_pixels(kept[index]) for index in wanted.tolist()]

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """What PyAV decodes and decord does not is decord's fault, which one sentence says."""
        import decord

        try:
            yield
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, StopIteration) as error:
            next(self._proof.decodable())  # or PyAV says what is wrong with the file
            raise self._refused("it fails on this file") from error

    def _refused(self, reason: str) -> DecodeError:
        kind = self._proof.stream.kind
        return DecodeError(f"{self.path}: is refused with decord, as {reason} ({kind}); use data.decoder: pyav")


def _open(path: str) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader(path, num_threads=1, fault_tol=NO_SUBSTITUTES)


def _pixels(frame: Any) -> np.ndarray:
    """decord's array -> (H, W, 3) uint8, without the padding that it may take for a channel."""
    array = frame.asnumpy()  # (H, W, C)
    height, width, channels = array.shape
    return array if channels == 3 else array.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
