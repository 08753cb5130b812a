"""One image file in memory -> uint8 RGB pixels, upright, at its stored brightness; or a sentence why not.

    image = open_image(path, data)          # knows its height and width
    image.reduced(128, 128).decode(box)     # (h, w, 3) uint8

What an image is besides 8-bit RGB:

- Orientation: shown upright, as EXIF says, like a video's rotation. cv2.imread does the same; Pillow alone does not.
- 16 bits a channel: the upper 8 are used, as cv2.imread does. Other ranges have no known white and are refused.
- Alpha: left out. The colours beneath are shown.
- Several pictures in one file (animations, pages): refused, for a frame is one picture.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from datasets import jpeg
from datasets.box import Box
from datasets.limits import SizeError, check_size

ORIENTATION = 0x0112  # EXIF's tag: 1 upright, 2 to 4 mirrored or half a turn, 5 to 8 with height and width exchanged
MODES_8_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
TIFF_BITS, TIFF_PHOTOMETRIC, BLACK_IS_ZERO = 258, 262, 1


class ImageError(ValueError):
    """An image that cannot be read; the message names the file."""


def open_image(path: str, data: bytes) -> JpegImage | PixelImage:
    """A JPEG is decoded later; whatever else Pillow reads is decoded at once.

    Args:
        path: for messages.

    Raises:
        ImageError: no image, a damaged one, or one whose pixels have no meaning as RGB.
        SizeError: a header that states a size above the limits; nothing is decoded then.
    """
    if jpeg.is_jpeg(data):
        try:
            return JpegImage(path, data, jpeg_orientation(data))
        except jpeg.JpegError:  # an unusual one, which Pillow may know, or a damaged one
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(path, image.height, image.width)
            if image.format == "PNG":
                Image.open(io.BytesIO(data)).verify()  # the checksums, which Pillow does not compare when it decodes
            pixels = _pixels(path, image)
            return PixelImage(path, _upright(pixels, _orientation(image)))
    except (ImageError, SizeError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, above ours
        raise SizeError(f"{path}: is too large ({error})") from None
    except Exception as error:  # there is hardly a kind that Pillow does not raise for damaged files
        raise _not_readable(path, type(error).__name__) from error


class JpegImage:
    """A JPEG that is not decoded yet, perhaps to be decoded at a fraction of its size."""

    def __init__(self, path: str, data: bytes, orientation: int = 1, factor: int = 1):
        self.path, self.data, self.orientation, self.factor = path, data, orientation, factor
        stored = jpeg.size(data)
        check_size(path, *stored)
        height, width = stored if orientation < 5 else stored[::-1]
        self.height, self.width = -(-height // factor), -(-width // factor)

    def decode(self, box: Box, fast: bool) -> np.ndarray:
        try:
            pixels = jpeg.decode_reduced(self.data, self.factor) if self.factor > 1 else jpeg.decode(self.data, fast)
        except jpeg.JpegError as error:
            raise _not_readable(self.path, str(error)) from error
        return _upright(pixels, self.orientation)[box.top : box.bottom, box.left : box.right]

    def reduced(self, least_height: int, least_width: int) -> JpegImage:
        factor = jpeg.reduction(self.height, self.width, least_height, least_width)
        return self if factor == 1 else JpegImage(self.path, self.data, self.orientation, factor)


class PixelImage:
    """An image that is decoded already."""

    def __init__(self, path: str, pixels: np.ndarray):
        self.path, self.pixels = path, pixels  # (H, W, 3)
        self.height, self.width, _ = pixels.shape

    def decode(self, box: Box, fast: bool) -> np.ndarray:
        return self.pixels[box.top : box.bottom, box.left : box.right]

    def reduced(self, least_height: int, least_width: int) -> PixelImage:
        return self


def jpeg_orientation(data: bytes) -> int:
    """The orientation of a JPEG; Pillow is asked only where there is metadata, for it takes longer than decoding."""
    if not jpeg.has_metadata(data):
        return 1
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _orientation(image)
    except Exception:  # as above; that the image is damaged is seen when it is decoded
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata states no orientation
        return 1
    return found if found in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3), or (W, H, 3) for the orientations 5 to 8."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    flips_rows, flips_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1]


def _pixels(path: str, image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, not turned."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photo with previews beside it
        raise ImageError(f"{path}: holds {image.n_frames} pictures, but a frame is one")
    if image.format == "EPS":  # Pillow would run Ghostscript on it
        raise ImageError(f"{path}: is PostScript, not an image")
    if image.mode in MODES_8_BIT:
        return np.asarray(image.convert("RGB"))
    if not _has_16_bits(image):
        raise ImageError(
            f"{path}: its pixels are of Pillow's mode {image.mode}, whose white is not known; "
            "write frames with 8 or 16 bits a channel"
        )
    upper = (np.asarray(image) >> 8).astype(np.uint8)  # (H, W)
    return np.repeat(upper[:, :, None], 3, axis=2)


def _has_16_bits(image: Image.Image) -> bool:
    """Whether grey values are 0, black, to 65535, white."""
    if image.format == "TIFF":
        tags = image.tag_v2
        plain = tags.get(TIFF_BITS) == (16,) and tags.get(TIFF_PHOTOMETRIC) == BLACK_IS_ZERO
        return plain and image.mode.startswith("I;16")
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))


def _not_readable(path: str, reason: str) -> ImageError:
    return ImageError(f"{path}: is not a readable image ({reason})")
