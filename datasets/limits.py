"""How large a frame may be. Asked with the size that a header states, before memory is taken for it.

A damaged or malicious header of a few bytes may state any size: a JPEG of 65,500 pixels a side takes 13 GB. 8K video
has 33 million pixels a frame and frames are mostly below 1 million, so no data of this field comes near the limits.
"""

from __future__ import annotations

MAX_SIDE = 16_384  # pixels
MAX_PIXELS = 2**26  # 64 Mi: 192 MiB as RGB
MAX_FILE_BYTES = 8 * MAX_PIXELS  # of an image: RGBA of 16 bits, not compressed


class SizeError(ValueError):
    """A frame that is too large to be read, or has no pixels; the message names the file."""


def check_size(path: str, height: int, width: int) -> None:
    """Refuse a frame of `path` that is `height` x `width` pixels where that is above the limits or below 1.

    Raises:
        SizeError: one sentence that begins with `path`.
    """
    if min(height, width) < 1:
        raise SizeError(f"{path}: states a size of {width}x{height} pixels")
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise SizeError(
            f"{path}: states a size of {width}x{height} pixels; "
            f"at most {MAX_SIDE} a side and {MAX_PIXELS // 2**20} Mi in all are read"
        )


def check_file_size(path: str, num_bytes: int) -> None:
    """Refuse the file of a frame that is larger than any frame of the largest size. Raises SizeError as above."""
    if num_bytes > MAX_FILE_BYTES:
        raise SizeError(f"{path}: holds {num_bytes:,} bytes; at most {MAX_FILE_BYTES // 2**20} MiB are read as a frame")
