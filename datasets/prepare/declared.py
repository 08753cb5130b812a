"""How many frames a video file says it holds: what tells a damaged or cut file from a whole one.

A decoder counts the packets that are there, so of a file that was cut off it misses the end; the container's header does
not. It is read with PyAV (the package `av`) where that is installed; otherwise the decoder's count has to do. Containers
without a count (Matroska, WebM) declare what is there.
Does not live here: decoding (datasets/decoders/), and which loss is too much (decode.py).
"""

from __future__ import annotations

from pathlib import Path

from datasets.decoders import VideoFile

HALF_FRAMES = {"mpegts", "mpeg"}  # containers in which a packet may be half a frame, so that packets tell nothing
EDITED = "mov,mp4,m4a,3gp,3g2,mj2"  # its header also counts frames that an edit list hides; its index tells them apart
VP8_SHOWN = 0x10  # of the first byte of a VP8 packet; others are references that are never shown


def declared_frames(source: Path, video: VideoFile) -> int:
    """The larger of the packets' count and the header's, without frames not to be shown; 0: nothing is said."""
    try:
        import av
    except ImportError:
        return video.declared_frames
    try:
        with av.open(str(source), metadata_errors="ignore") as container:
            stream, kind = container.streams.video[0], container.format.name
            vp8 = stream.codec_context.name == "vp8"
            header = sum(not entry.is_discard for entry in stream.index_entries) if kind == EDITED else stream.frames
            packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
            shown = sum(not vp8 or bool(bytes(packet)[0] & VP8_SHOWN) for packet in packets)
            return header if kind in HALF_FRAMES else max(header, shown)
    except (av.FFmpegError, IndexError):
        return video.declared_frames
