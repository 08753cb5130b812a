"""Small real videos for tests, made without an encoder: Motion JPEG in AVI, and a rar that stores its files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


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
