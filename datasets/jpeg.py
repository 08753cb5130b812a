"""JPEG files in memory -> uint8 pixels, by simplejpeg (libjpeg-turbo).

Whatever libjpeg complains of is an error, whichever part of the image is needed: Pillow passes over most of it and shows
smeared or grey pixels. Bytes that were changed into other valid ones cannot be detected.
Not worth it, since a crop is most of an image: decoding no rows below the crop (8 % faster, but the decoder then cannot
detect damage) or above it (by restart markers; nothing gained), and the faster inverse DCT (5 %, pixels off by 1 on
average).
"""

from __future__ import annotations

import numpy as np
import simplejpeg

START = b"\xff\xd8"
SCAN, APP1 = 0xDA, 0xE1  # markers: the pixels begin; EXIF or XMP
LARGEST_REDUCTION = 8


class JpegError(ValueError):
    """Bytes that are no JPEG file, a damaged one, or one of a kind that this decoder does not know."""


def is_jpeg(data: bytes) -> bool:
    """Whether the bytes begin as a JPEG file."""
    return data.startswith(START)


def has_metadata(data: bytes) -> bool:
    """Whether EXIF or XMP stands before the pixels."""
    position = len(START)
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in (SCAN, APP1):
            return marker == APP1
        length = data[position + 2] << 8 | data[position + 3]
        position += 1 if marker == 0xFF else 2 + length  # 0xFF may be repeated before a marker
    return False


def size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header. Raises JpegError."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # the latter for a header that ends too early
        raise JpegError(str(error) if isinstance(error, ValueError) else "its header ends too early") from None
    return height, width


def decode(data: bytes, fast: bool = False) -> np.ndarray:
    """The complete image: (H, W, 3) uint8 RGB, with the pixels that Pillow gives.

    Args:
        fast: do not smooth the colours, which are stored at half the resolution: 8 % faster. On video frames, values
            are off by 0.1 of 255 on average and by about 15 where colours meet; the most saturated edges by up to 40.

    Raises:
        JpegError: the image is damaged or of an unknown kind.
    """
    return _decode(data, fastupsample=fast)


def decode_reduced(data: bytes, factor: int) -> np.ndarray:
    """The image at 1/factor of its size, rounded up; `factor` is 2, 4 or 8. (h, w, 3) uint8 RGB. Raises JpegError."""
    height, width = size(data)
    return _decode(data, min_height=-(-height // factor), min_width=-(-width // factor))


def reduction(height: int, width: int, least_height: int, least_width: int) -> int:
    """The largest of 1, 2, 4, 8 by which an image can be divided and still have (least_height, least_width)."""
    factor = LARGEST_REDUCTION
    while factor > 1 and (height < factor * least_height or width < factor * least_width):
        factor //= 2
    return factor


def _decode(data: bytes, **options: bool | int) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, **options)
    except (ValueError, KeyError) as error:
        raise JpegError(str(error)) from None
