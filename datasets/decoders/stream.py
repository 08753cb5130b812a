"""The video stream of a file as PyAV shows it: which stream is read, its packets, and what they say of its frames.

All packets are read once, which costs less than a millisecond for a clip, and stay in memory.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from datasets.decoders.base import DecodeError, decoding, library
from datasets.limits import MAX_PIXELS, SizeError, check_size

DATED_CONTAINERS = {"avi", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}
EDITED_CONTAINER = "mov,mp4,m4a,3gp,3g2,mj2"  # its header counts frames that an edit list hides, its index marks them
HALF_FRAME_CONTAINERS = {"mpegts", "mpeg"}  # a packet may be half a frame, so packets cannot be counted
UNCOUNTED_CONTAINERS = {"matroska,webm", "flv"}  # their headers state a duration, but no number of frames
ONE_FRAME_A_PACKET = {"h264", "hevc", "mpeg4", "vp9", "av1", "libdav1d", "mjpeg"}
UNKNOWN_OR_PROGRESSIVE = {0, 1}  # AVFieldOrder; of interlaced video, a packet may be half a frame
EMPTY_MPEG4 = 16  # bytes: an MPEG-4 packet up to this size may hold no frame ("not coded"), a larger one holds one
VP8_SHOWN = 0x10  # bit of the first byte of a VP8 packet; the others are references that are never shown
B_PICTURE, MAX_B_PICTURES = 3, 16  # AV_PICTURE_TYPE_B; x264 makes at most so many in a row
OGG_PAGE, OGG_LAST = 2**16, 0x04  # bytes of the largest page; the bit of its flags that says that it is the last
DEFAULT_STREAM_PIXELS = 5_000_000  # by which ffmpeg prefers the stream that is marked as the default


class Stream:
    """The video stream of a file: the one that ffmpeg takes, never a cover or thumbnails.

    Attributes:
        context: its decoder, on one thread.
        packets: all of the stream.
        is_one_of_several: whether there are other streams of moving pictures.
    """

    def __init__(self, path: str):
        self.path = path
        with decoding(path, library("pyav").FFmpegError):
            self._container = _open(path)
            candidates = _candidates(path, self._container)
            self.is_one_of_several = len(candidates) > 1
            self._stream = _best(path, candidates)
            self.context = _context(path, self._stream)
            self.packets = [packet for packet in self._container.demux(self._stream) if packet.size]
        if not self.context.has_b_frames and self.packets and self.packets[-1].is_corrupt:
            self.packets.pop()  # cut off by the end of the file
        self._untouched = True

    @property
    def kind(self) -> str:
        """Codec and container, for messages."""
        return f"{self.context.codec.canonical_name} in {self._container.format.name.split(',')[0]}"

    @property
    def fps(self) -> float | None:
        """Frames a second on average, as the file states them, or None."""
        return float(self._stream.average_rate) if self._stream.average_rate else None

    @property
    def container(self) -> str:
        return self._container.format.name

    @cached_property
    def declared_frames(self) -> int:
        """The frames that the file says it holds; more than decode if it is damaged or cut; 0 if it does not say.

        It is the larger of the packets' count and the header's, as a cut file lacks packets. Frames that are not shown
        do not count. Where the header states a duration alone, frames that are missing from it count.
        """
        edited = self.container == EDITED_CONTAINER
        header = sum(not entry.is_discard for entry in self._stream.index_entries) if edited else self._stream.frames
        if self.container in HALF_FRAME_CONTAINERS:
            return header
        shown = [packet for packet in self.packets if not packet.is_discard]
        if self.context.name == "vp8":
            shown = [packet for packet in shown if memoryview(packet)[0] & VP8_SHOWN]
        return max(header, len(shown) + self._cut_off(len(shown)))

    def _cut_off(self, shown: int) -> int:
        """How many frames are missing between the end of all streams and the end that the header states."""
        if self.container == "ogg":
            return int(not _ends_as_ogg(self.path))  # at least one
        if self.container not in UNCOUNTED_CONTAINERS or not self._container.duration:
            return 0
        stated = self._container.duration / 1e6  # AV_TIME_BASE
        end = 0.0
        with decoding(self.path, library("pyav").FFmpegError), _open(self.path) as container:
            for packet in container.demux():
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        missing = int(shown * (stated / end - 1)) if end else 0
        return missing if missing > 1 else 0  # the last frame's duration may be unknown

    @cached_property
    def order(self) -> list[int] | None:
        """Time stamps of the frames that are shown, in order; None where they do not tell which frame is which."""
        stamps = [packet.pts for packet in self.packets]
        known = self.container in DATED_CONTAINERS and self.context.name in ONE_FRAME_A_PACKET
        if not stamps or not known or None in stamps or len(set(stamps)) < len(stamps):
            return None
        if min(stamps) < stamps[0] or not self.packets[0].is_keyframe:  # without what its first pictures depend on
            return None
        if any(packet.is_corrupt or packet.has_sidedata("new_extradata") for packet in self.packets):
            return None
        if self.context.field_order not in UNKNOWN_OR_PROGRESSIVE or self._has_guessed_stamps(stamps):
            return None
        if self.context.name == "mpeg4" and any(packet.size <= EMPTY_MPEG4 for packet in self.packets):
            return None
        return sorted(packet.pts for packet in self.packets if not packet.is_discard)

    def _has_guessed_stamps(self, stamps: list[int]) -> bool:
        """Whether the frames are shown in another order than they are stored, and the time stamps may not say which.

        AVI has no time stamps of presentation. A raw stream that is copied into another container gets those of the
        order in which it is stored.
        """
        if not self.context.has_b_frames:
            return False
        return self.container == "avi" or self.context.name == "mpeg4" or stamps == sorted(stamps)

    def decoded(self) -> Iterator[Any]:
        """Every frame that is shown, by a decoder that begins with the first packet.

        They end before the damage where the file is cut off. Raises DecodeError where decoding fails elsewhere, and at a
        frame of which FFmpeg conceals that parts are missing. The frames before it that may depend on it are not given.
        """
        stream = self if self._untouched else Stream(self.path)  # what a decoder has seen may change what it does
        stream._untouched = False
        is_cut = bool(stream.packets) and stream.packets[-1].is_corrupt
        held: deque[Any] = deque()  # B pictures, which may depend on the picture that is shown after them
        found = 0
        for number, packet in enumerate([*stream.packets, None], 1):
            try:
                with decoding(self.path, library("pyav").FFmpegError):
                    for frame in stream.context.decode(packet):
                        if frame.is_corrupt:
                            raise DecodeError(f"{self.path}: frame {found} is damaged")
                        held.append(frame)
                        found += 1
            except DecodeError:
                if is_cut and number >= len(stream.packets):
                    return
                raise
            while held and (held[-1].pict_type != B_PICTURE or len(held) > MAX_B_PICTURES):
                yield held.popleft()
        yield from held

    def restarted(self) -> Any:
        """The decoder, ready for packets from any key frame on."""
        self._untouched = False
        self.context.flush_buffers()
        return self.context


def _open(path: str) -> Any:
    av = library("pyav")
    return av.open(path, metadata_errors="ignore", options={"max_pixels": str(MAX_PIXELS)})


def _ends_as_ogg(path: str) -> bool:
    """Whether the last page of an Ogg file is the last one of its stream (RFC 3533, section 6)."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - OGG_PAGE))
        _, mark, page = file.read().rpartition(b"OggS")
    return bool(mark) and len(page) > 1 and bool(page[1] & OGG_LAST)


def _candidates(path: str, container: Any) -> list[Any]:
    """The streams of moving pictures."""
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise DecodeError(f"{path}: holds no video stream")
    return streams


def _best(path: str, streams: list[Any]) -> Any:
    """The stream that ffmpeg would take, but one that has several frames where there is one."""
    from av.stream import Disposition

    if len(streams) == 1:
        return streams[0]
    with _open(path) as container:
        frames = Counter(packet.stream_index for packet in container.demux(*container.streams.video) if packet.size)

    def rank(stream: Any) -> tuple[bool, int]:
        context = stream.codec_context
        pixels = context.height * context.width if context else 0
        return frames[stream.index] > 1, pixels + DEFAULT_STREAM_PIXELS * bool(stream.disposition & Disposition.default)

    return max(streams, key=rank)


def _context(path: str, stream: Any) -> Any:
    """The decoder of a stream, which refuses frames above the limits wherever in the stream they come."""
    context = stream.codec_context
    if context is None:
        raise DecodeError(f"{path}: its codec is not one that FFmpeg decodes")
    if context.width:  # otherwise the header does not state it
        try:
            check_size(path, context.height, context.width)
        except SizeError as error:
            raise DecodeError(str(error)) from None
    context.options = {"max_pixels": str(MAX_PIXELS)}
    context.thread_type, context.thread_count = "NONE", 1
    return context
