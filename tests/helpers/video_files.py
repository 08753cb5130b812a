"""Small real videos for tests: any codec by PyAV, Motion JPEG in AVI without an encoder; and a rar."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image


def picture(i: int, height: int, width: int) -> np.ndarray:
    """Frame i: slanted stripes that move, a square that moves, a level that changes; no two are alike."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([x * 3 + i * 7, y * 3 + i * 11, np.full((height, width), i * 37)], -1) % 256
    frame[8:24, i % (width - 16) : i % (width - 16) + 16] = [i * 53 % 256, 255 - i * 53 % 256, 128]
    return frame.astype(np.uint8)  # (H, W, 3)


def write_video(
    path: Path,
    codec: str = "libx264",
    frames: int = 40,
    size: tuple[int, int] = (48, 64),
    pix_fmt: str = "yuv420p",
    stamps: Sequence[int] | None = None,
    rotation: int = 0,
    metadata: dict[str, str] | None = None,
    **options: object,
) -> Path:
    """Encode `frames` pictures (`picture`); skip the test where PyAV has no such encoder.

    Args:
        size: (height, width).
        stamps: the time of each frame in milliseconds; by default there are 25 frames a second.
        rotation: degrees, as phones write it.
        options: of the encoder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        try:
            stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        except (av.codec.codec.UnknownCodecError, ValueError):
            pytest.skip(f"this build of PyAV has no {codec}")
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, height, width), format="rgb24").reformat(format=pix_fmt)
            if stamps is not None:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def overwrite(path: Path, start: float, end: float) -> Path:
    """Damage a file: zeros from `start` to `end`, shares of its length."""
    data = path.read_bytes()
    first, last = int(start * len(data)), int(end * len(data))
    path.write_bytes(data[:first] + bytes(last - first) + data[last:])
    return path


def cut_off(path: Path, share: float) -> Path:
    """Keep the first part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def write_avi(path: Path, frames: int = 4, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    """A video of `frames` frames, (width, height) `size`; frame t is of one grey, seed + 20 * t modulo 256."""
    images = []
    for t in range(frames):
        buffer = io.BytesIO()
        Image.fromarray(np.full((size[1], size[0], 3), (seed + 20 * t) % 256, np.uint8)).save(buffer, "JPEG")
        images.append(buffer.getvalue() + b"\0" * (len(buffer.getvalue()) % 2))
    width, height = size
    main = struct.pack("<10I16x", 40000, 0, 0, 0x10, frames, 0, 1, 1 << 16, width, height)
    stream = b"vidsMJPG" + struct.pack("<IHHI8I4H", 0, 0, 0, 0, 1, 25, 0, frames, 1 << 16, 0, 0, 0, 0, 0, width, height)
    bitmap = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0)
    header = _list(b"hdrl", _chunk(b"avih", main) + _list(b"strl", _chunk(b"strh", stream) + _chunk(b"strf", bitmap)))
    index, offset = b"", 4
    for image in images:
        index += b"00dc" + struct.pack("<III", 0x10, offset, len(image))
        offset += 8 + len(image)
    movie = _list(b"movi", b"".join(_chunk(b"00dc", image) for image in images))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_chunk(b"RIFF", b"AVI " + header + movie + _chunk(b"idx1", index)))
    return path


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data


def _list(name: bytes, data: bytes) -> bytes:
    return _chunk(b"LIST", name + data)


def write_rar(path: Path, files: dict[str, bytes]) -> Path:
    """A rar (format 2.9) that holds `files`, name -> content, without compression."""
    blocks = [b"Rar!\x1a\x07\0", _block(0x73, 0, bytes(6))]
    for name, data in files.items():
        stored = struct.pack("<IIBIIBBHI", len(data), len(data), 3, zlib.crc32(data), 0, 29, 0x30, len(name), 0o100644)
        blocks += [_block(0x74, 0x8000, stored + name.encode()), data]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join([*blocks, _block(0x7B, 0x4000, b"")]))
    return path


def _block(kind: int, flags: int, body: bytes) -> bytes:
    head = struct.pack("<BHH", kind, flags, 7 + len(body)) + body
    return struct.pack("<H", zlib.crc32(head) & 0xFFFF) + head
