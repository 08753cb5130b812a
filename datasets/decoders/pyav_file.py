"""PyAV (the package `av`) behind the interface of base.py: the default.

Frames are found by time stamp where the packets prove that these tell which frame is which (stream.py), otherwise by
decoding the file from its start. What is exact, and where that ends:
- Decoding starts at the last key frame (in the file) that is not shown after a wanted frame: the frames that an open
  GOP shows before its key frame start at the key frame before. If a wanted frame does not come out, if frames come out
  in another order, or if a "key frame" turns out to be none, the read starts again at the beginning of the file.
- H.264 pictures that the stream marks as being no reference are not decoded unless wanted: the standard forbids others
  to depend on them. It saves a fifth of the time on Kinetics. HEVC's mark means less than that, so only H.264 does so.
- AVI stores no time stamps of presentation: with B-frames those of FFmpeg are guesses. Packets of MPEG-4 may hold no
  frame, or two. VP8 has frames that are never shown, MPEG streams split frames in two packets. Such files are decoded
  from their start: HMDB51, an eighth of UCF101, and every container or codec that stream.py does not list.
- A frame that FFmpeg marks as damaged is refused, and all that depend on it. Of a file that is decoded from its start
  every read is refused. FFmpeg marks nothing for VP8, VP9 and Theora, and does not see every flipped bit elsewhere.
- FFmpeg's own messages are off in PyAV unless `av.logging.set_level` turns them on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from datasets.decoders.base import KEEP_BYTES, DecodeError, VideoFile, decoding, library
from datasets.decoders.orientation import upright
from datasets.decoders.stream import Stream

I_PICTURE = 1  # AV_PICTURE_TYPE_I


class PyAVFile(VideoFile):
    def __init__(self, path: str):
        self.path = path
        self.stream = Stream(path)
        self._order = self.stream.order
        self._kept: list[Any] | None = None
        self._reformatter = library("pyav").video.reformatter.VideoReformatter()

    @cached_property
    def num_frames(self) -> int:
        return self._count() if self._order is None else len(self._order)

    @cached_property
    def declared_frames(self) -> int:
        return self.stream.declared_frames or self.num_frames

    @property
    def fps(self) -> float | None:
        return self.stream.fps

    def read(self, indices: np.ndarray) -> np.ndarray:
        wanted, inverse = self._wanted(indices)
        frames = self.pictures(wanted, self._rgb)
        return np.stack([frames[int(wanted[i])] for i in inverse])  # (T, H, W, 3)

    def pictures(self, wanted: np.ndarray, use: Callable[[Any], Any]) -> dict[int, Any]:
        """Decode distinct frames, in rising order: index -> what `use` makes of PyAV's frame. Raises DecodeError."""
        with decoding(self.path, library("pyav").FFmpegError):
            if self._order is not None:
                found = self._by_time(wanted, use)
                if found is not None:
                    return found
                self._order = None  # packets and frames do not correspond, or something is damaged
            return {index: use(frame) for index, frame in self._by_count(wanted)}

    def frames(self) -> Iterator[np.ndarray]:
        for frame in self.decodable():
            yield self._rgb(frame)

    def decodable(self) -> Iterator[Any]:
        """PyAV's frames from the first one to the last before any damage. Raises DecodeError if there is none."""
        found = 0
        try:
            for frame in self._decoded():
                yield frame
                found += 1
        except DecodeError:
            if found == 0:
                raise
        if found == 0:
            raise self._empty()

    @property
    def is_dated(self) -> bool:
        """Whether time stamps tell which frame is which, as far as is known after the reads up to now."""
        return self._order is not None

    def _by_time(self, wanted: np.ndarray, use: Callable[[Any], Any]) -> dict[int, Any] | None:
        """The wanted frames, in rising order, seeking; None if something does not fit."""
        packets = self.stream.packets
        waiting = {self._order[index]: int(index) for index in wanted}  # time stamp: index
        keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        skip = self.stream.context.name == "h264"
        found: dict[int, Any] = {}
        context, position, first, last = None, 0, 0, None
        for stamp in list(waiting):
            start = max((key for key in keys if packets[key].pts <= stamp), default=0)
            if context is None or start > position:
                if context is not None and not _rest_is_whole(context):
                    return None
                context = self.stream.restarted()
                position, first, last = start, packets[start].pts, None
            while stamp in waiting:
                if position == len(packets):
                    return None
                packet = packets[position]
                if skip:
                    context.skip_frame = "DEFAULT" if packet.pts in waiting else "NONREF"
                for frame in [*context.decode(packet), *(context.decode(None) if position + 1 == len(packets) else ())]:
                    if not _follows(frame, first, last):
                        return None
                    last = frame.pts
                    if start == 0 and last == first:
                        self.first = layout(frame)
                    self._require_one_turn(frame)
                    if frame.pts in waiting:
                        found[waiting.pop(frame.pts)] = use(frame)
                position += 1
        return found if position == len(packets) or _rest_is_whole(context) else None

    def _by_count(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(index, frame) of the wanted frames, in rising order, decoding from the first packet on."""
        waiting = set(wanted.tolist())
        found = 0
        for frame in self._decoded():
            if found in waiting:
                yield found, frame
            found += 1
            if found > wanted[-1]:
                return
        raise self._short(found)

    def _decoded(self) -> Iterator[Any]:
        frames = iter(self._kept) if self._kept is not None else self.stream.decoded()
        for number, frame in enumerate(frames):
            if number == 0:
                self.first = layout(frame)
            self._require_one_turn(frame)
            yield frame

    def _count(self) -> int:
        """Count the frames by decoding them, and keep them, not converted, if they are not too many."""
        kept: list[Any] | None = []
        count = 0
        for frame in self._decoded():
            count += 1
            if kept is not None:
                kept.append(frame)
                if count * sum(plane.buffer_size for plane in kept[0].planes) > KEEP_BYTES:
                    kept = None
        if count == 0:
            raise self._empty()
        self._kept = kept
        return count

    def _empty(self) -> DecodeError:
        return DecodeError(f"{self.path}: no frame of it can be decoded")

    @cached_property
    def first(self) -> tuple[int, int, bytes | None]:
        """The first frame's height, width and display matrix, which are those of the video."""
        return layout(next(self.stream.decoded()))

    def _require_one_turn(self, frame: Any) -> None:
        """Refuse a video that is turned in mid-stream, as H.264 and HEVC may be; frames that do not say follow the first."""
        if self.stream.context.name not in ("h264", "hevc"):
            return
        _, _, matrix = layout(frame)
        if matrix is not None and matrix != self.first[2]:
            raise DecodeError(f"{self.path}: is turned or mirrored in parts, not as a whole")

    def _rgb(self, frame: Any) -> np.ndarray:
        """(H, W, 3), of the first frame's size and turned as it is."""
        height, width, matrix = self.first
        pixels = self._reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()  # (h, w, 3)
        try:
            return upright(pixels, matrix)
        except ValueError:
            raise DecodeError(f"{self.path}: is shown skewed or turned by no multiple of 90 degrees") from None


def _rest_is_whole(context: Any) -> bool:
    """Whether no frame is damaged of those that are decoded but not shown yet, on which the last ones may depend."""
    return not any(frame.is_corrupt for frame in context.decode(None))


def _follows(frame: Any, first: int, last: int | None) -> bool:
    """Whether a frame is what comes out of a decoder that began at a key frame: whole, and in the order of time.

    Args:
        first: time stamp of the key frame.
        last: of the frame before, None if there is none.
    """
    if frame.is_corrupt or frame.pts is None or (last is not None and frame.pts <= last):
        return False
    if frame.pts == first:
        return frame.pict_type == I_PICTURE
    return frame.pts < first or (last is not None and last >= first)


def layout(frame: Any) -> tuple[int, int, bytes | None]:
    """Height, width and display matrix of PyAV's frame."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return frame.height, frame.width, None if matrix is None else bytes(matrix)
