"""PyAV (the package `av`) behind the interface of base.py: the default.

All packets of the video are read once, which costs less than a millisecond for a clip, and stay in memory; frames are
found by time stamp. What is exact, and where that ends:
- Decoding starts at the last key frame (in the file) that is not shown after a wanted frame: the frames that an open
  GOP shows before its key frame start at the key frame before. If a wanted frame does not come out, or a "key frame"
  turns out to be none, the read starts again at the beginning of the file.
- H.264 pictures that the stream marks as being no reference are not decoded unless wanted: the standard forbids others
  to depend on them. It saves a fifth of the time on Kinetics. HEVC's mark means less than that, so only H.264 does so.
- AVI stores no time stamps of presentation: with B-frames those of FFmpeg are guesses. Packets of MPEG-4 may hold no
  frame, or two. VP8 has frames that are never shown, MPEG streams split frames in two packets. Such files are decoded
  from their start: HMDB51, an eighth of UCF101, and every container or codec that is not listed below.
- FFmpeg's own messages are off in PyAV unless `av.logging.set_level` turns them on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from datasets.decoders.base import EMPTY_MPEG4, KEEP_BYTES, DecodeError, VideoFile, decoding, library

DATED_CONTAINERS = {"avi", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}
ONE_FRAME_A_PACKET = {"h264", "hevc", "mpeg4", "vp9", "av1", "libdav1d", "mjpeg"}
I_PICTURE = 1  # AV_PICTURE_TYPE_I


class PyAVFile(VideoFile):
    def __init__(self, path: str):
        av = library("pyav")
        self.path = path
        with decoding(path, av.FFmpegError):
            self._container = av.open(path, metadata_errors="ignore")
            if not self._container.streams.video:
                raise DecodeError(f"{path}: holds no video stream")
            stream = self._container.streams.video[0]
            self._context = stream.codec_context
            self._context.thread_type, self._context.thread_count = "NONE", 1
            self._packets = [packet for packet in self._container.demux(stream) if packet.size]
        self._reformatter = av.video.reformatter.VideoReformatter()
        hidden = sum(packet.is_discard for packet in self._packets)  # by an edit list
        self.declared_frames = max(stream.frames, len(self._packets)) - hidden
        self._order = self._presentation_order()
        self._kept: list[Any] | None = None
        self.num_frames = self._count() if self._order is None else len(self._order)

    def read(self, indices: np.ndarray) -> np.ndarray:
        wanted, inverse = self._wanted(indices)
        frames: dict[int, np.ndarray] = {}
        with decoding(self.path, library("pyav").FFmpegError):
            if self._order is not None:
                frames = {index: self._rgb(frame) for index, frame in self._by_time(wanted)}
                if len(frames) < len(wanted):
                    self._order = None  # packets and frames do not correspond
            if self._order is None:
                frames = {index: self._rgb(frame) for index, frame in self._by_count(wanted)}
        return np.stack([frames[int(wanted[i])] for i in inverse])  # (T, H, W, 3)

    def frames(self) -> Iterator[np.ndarray]:
        import av

        found = 0
        try:
            for frame in self._decoded():
                yield self._rgb(frame)
                found += 1
        except av.FFmpegError as error:
            if found == 0:
                raise self._short(0) from error

    def _presentation_order(self) -> list[int] | None:
        """Time stamps of the frames that are shown, in order; None where they do not tell which frame is which."""
        stamps = [packet.pts for packet in self._packets]
        codec, container = self._context.name, self._container.format.name
        known = container in DATED_CONTAINERS and codec in ONE_FRAME_A_PACKET
        if not stamps or not known or None in stamps or len(set(stamps)) < len(stamps):
            return None
        if any(packet.is_corrupt for packet in self._packets):  # cut off: what FFmpeg conceals depends on the start
            return None
        if min(stamps) < stamps[0]:  # the file starts with an open GOP, without what its first pictures depend on
            return None
        if container == "avi" and self._context.has_b_frames:
            return None
        if codec == "mpeg4" and any(packet.size <= EMPTY_MPEG4 for packet in self._packets):
            return None
        return sorted(packet.pts for packet in self._packets if not packet.is_discard)

    def _by_time(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(index, frame) of the wanted frames, in rising order, seeking; fewer than wanted if something does not fit."""
        waiting = {self._order[index]: int(index) for index in wanted}  # time stamp: index
        keys = [number for number, packet in enumerate(self._packets) if packet.is_keyframe]
        skip = self._context.name == "h264"
        position, expected = None, None
        for stamp in list(waiting):
            start = max((key for key in keys if self._packets[key].pts <= stamp), default=0)
            if position is None or start > position:
                self._context.flush_buffers()
                position, expected = start, self._packets[start].pts
            while stamp in waiting:
                if position > len(self._packets):
                    return
                packet = self._packets[position] if position < len(self._packets) else None
                if skip:
                    self._context.skip_frame = "DEFAULT" if packet is None or packet.pts in waiting else "NONREF"
                for frame in self._context.decode(packet):
                    if frame.pts == expected and frame.pict_type != I_PICTURE:
                        return
                    if frame.pts in waiting:
                        yield waiting.pop(frame.pts), frame
                position += 1

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
        """All frames, from the first packet on."""
        if self._kept is not None:
            yield from self._kept
            return
        self._context.flush_buffers()
        self._context.skip_frame = "DEFAULT"
        for packet in [*self._packets, None]:
            yield from self._context.decode(packet)

    def _count(self) -> int:
        """Count the frames by decoding them, and keep them, not converted, if they are not too many."""
        kept: list[Any] | None = []
        count = 0
        with decoding(self.path, library("pyav").FFmpegError):
            for frame in self._decoded():
                count += 1
                if kept is not None:
                    kept.append(frame)
                    if count * sum(plane.buffer_size for plane in kept[0].planes) > KEEP_BYTES:
                        kept = None
        if count == 0:
            raise self._short(0)
        self._kept = kept
        return count

    def _rgb(self, frame: Any) -> np.ndarray:
        pixels = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
        turns = frame.rotation // 90 if frame.rotation % 90 == 0 else 0
        return np.ascontiguousarray(np.rot90(pixels, turns))
