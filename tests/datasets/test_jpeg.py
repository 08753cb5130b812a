"""Decoding part of a JPEG gives the pixels of the complete image, and damage is an error."""

import io

import numpy as np
import pytest
from PIL import Image

from datasets import jpeg


def picture(height=101, width=150):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **{"quality": 90, **options})
    return buffer.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}])
def test_pixels_are_pillows(options, progressive):
    data = encoded(picture(), progressive=progressive, **options)
    assert jpeg.is_jpeg(data) and jpeg.size(data) == (101, 150)
    assert (jpeg.decode(data) == np.asarray(Image.open(io.BytesIO(data)))).all()


def test_grey_images_become_rgb():
    data = encoded(picture().convert("L"))
    assert (jpeg.decode(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_fast_differs_little():
    smooth = picture(12, 12).resize((150, 101), Image.Resampling.BICUBIC)
    difference = np.abs(jpeg.decode(encoded(smooth), fast=True).astype(int) - jpeg.decode(encoded(smooth)))
    assert 0 < difference.mean() < 1 and difference.max() < 16


@pytest.mark.parametrize("keep", [2, 30, 200, 500, 0.5, -200, -1])
def test_a_file_that_ends_too_early(keep):
    data = encoded(picture())
    cut = data[: int(len(data) * keep) if isinstance(keep, float) else keep]
    for fast in (False, True):
        with pytest.raises(jpeg.JpegError):
            jpeg.size(cut)
            jpeg.decode(cut, fast)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:1500] + data[2500:], lambda data: data[: len(data) // 2] + data[-2:]]
)
def test_damage_inside_is_an_error(damage):
    """Pillow takes such files and shows something."""
    data = damage(encoded(picture()))
    assert np.asarray(Image.open(io.BytesIO(data))).shape == (101, 150, 3)
    with pytest.raises(jpeg.JpegError):
        jpeg.decode(data)


def test_reduction():
    assert [jpeg.reduction(1080, 1920, *least) for least in ((256, 340), (271, 340), (135, 240), (1, 1), (2000, 1))] == [
        4, 2, 8, 8, 1
    ]  # fmt: skip
    data = encoded(picture())
    for factor in (2, 4, 8):
        assert jpeg.decode_reduced(data, factor).shape == (-(-101 // factor), -(-150 // factor), 3)
