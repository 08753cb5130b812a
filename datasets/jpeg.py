"""JPEG files in memory -> uint8 pixels, decoding little more than what is asked for.

Lives here: the call of the decoder (simplejpeg: libjpeg-turbo), and how rows are left out.
Does not live here: files and folders (readers.py), and which rows are wanted (transforms.py).

Half of the time goes into the Huffman code, which has no places to jump to, so rows above the wanted ones cost almost as
much as these. Rows below are never reached: the decoder gets a copy of the header that says that the image ends there.
Tried and left out: restart markers after each row of blocks, to skip the rows above (nothing gained for usual crops),
and the faster inverse DCT (5 % faster, pixels off by 1 on average).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import simplejpeg

START = b"\xff\xd8"
END = b"\xff\xd9"
SCAN = b"\xff\xda"
BASELINE = (0xC0, 0xC1)  # frame headers of JPEGs that are stored from top to bottom
BLOCK_ROWS = 16  # the highest row of blocks that the usual colour samplings have, in pixels
LARGEST_REDUCTION = 8


class JpegError(ValueError):
    """Bytes that are no JPEG file, or a damaged one."""


def is_jpeg(data: bytes) -> bool:
    """Whether it begins as one."""
    return data.startswith(START)


def size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header. Raises JpegError."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # the latter for a header that ends too early
        raise JpegError(str(error)) from None
    return height, width


def decode(data: bytes, top: int = 0, bottom: int | None = None, fast: bool = False) -> np.ndarray:
    """Rows top..bottom-1 of the image: (bottom - top, W, 3) uint8 RGB, to the last bit those of the whole image.

    A file that ends too early is an error. Other damage is one, too, if the image is decoded down to its last rows.

    Args:
        top, bottom: 0 <= top < bottom <= H; without them the whole image.
        fast: do not smooth the colours, which are stored at half the resolution, over the borders of their pixels:
            8 % faster, values off by 0.1 of 255 on average and by 15 at edges of colours.
    Raises:
        JpegError.
    """
    strict = True
    if bottom is not None and data.endswith(END):
        height_at = _height_at(data[: data.find(SCAN)])
        # a decoder that smooths colours looks one pixel beyond a row of blocks
        rows = (bottom // BLOCK_ROWS + 1) * BLOCK_ROWS
        if height_at and rows < int.from_bytes(data[height_at : height_at + 2], "big"):
            data = data[:height_at] + rows.to_bytes(2, "big") + data[height_at + 2 :]
            strict = False  # the decoder complains of what comes after the last row
    try:
        return simplejpeg.decode_jpeg(data, fastupsample=fast, strict=strict)[top:bottom]
    except (ValueError, KeyError) as error:
        raise JpegError(str(error)) from None


def decode_reduced(data: bytes, factor: int) -> np.ndarray:
    """The image at 1/factor of its size, rounded up; `factor` is 2, 4 or 8. (h, w, 3) uint8 RGB. Raises JpegError."""
    height, width = size(data)
    try:
        return simplejpeg.decode_jpeg(data, min_height=-(-height // factor), min_width=-(-width // factor))
    except ValueError as error:
        raise JpegError(str(error)) from None


def reduction(height: int, width: int, least_height: int, least_width: int) -> int:
    """The largest of 1, 2, 4, 8 by which an image can be divided and still have (least_height, least_width)."""
    factor = LARGEST_REDUCTION
    while factor > 1 and (height < factor * least_height or width < factor * least_width):
        factor //= 2
    return factor


@lru_cache(maxsize=64)
def _height_at(head: bytes) -> int:
    """Where the height stands, given the file up to its pixels; 0 where it cannot be changed (progressive files)."""
    at = len(START)
    while at + 4 <= len(head) and head[at] == 0xFF:
        if head[at + 1] in BASELINE:
            return at + 5
        at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return 0
