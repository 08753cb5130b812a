"""Decoding part of a JPEG gives the pixels of the whole, and damage is an error."""

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
@pytest.mark.parametrize(
    "options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"restart_marker_rows": 1}]
)
def test_rows_are_those_of_the_whole_image(options, progressive):
    data = encoded(picture(), progressive=progressive, **options)
    whole = np.asarray(Image.open(io.BytesIO(data)))
    assert jpeg.is_jpeg(data) and jpeg.size(data) == (101, 150)
    assert (jpeg.decode(data) == whole).all()
    rng = np.random.default_rng(1)
    edges = [(0, 1), (0, 16), (15, 17), (0, 101), (100, 101), (85, 96), (31, 97)]
    for top, bottom in edges + [tuple(sorted(rng.choice(102, 2, replace=False))) for _ in range(40)]:
        assert (jpeg.decode(data, int(top), int(bottom)) == whole[top:bottom]).all()


def test_grey_images_become_rgb():
    data = encoded(picture().convert("L"))
    assert (jpeg.decode(data, 10, 30) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[10:30]).all()


def test_rows_below_are_not_decoded(monkeypatch):
    data, heights = encoded(picture(320, 64)), []
    real = jpeg.simplejpeg.decode_jpeg
    monkeypatch.setattr(jpeg.simplejpeg, "decode_jpeg", lambda *a, **o: heights.append(len(p := real(*a, **o))) or p)
    jpeg.decode(data, 3, 40)
    jpeg.decode(data, 300, 320)
    assert heights == [48, 320]


def test_fast_differs_little():
    smooth = picture(12, 12).resize((150, 101), Image.Resampling.BICUBIC)
    difference = np.abs(jpeg.decode(encoded(smooth), fast=True).astype(int) - jpeg.decode(encoded(smooth)))
    assert 0 < difference.mean() < 1 and difference.max() < 16


@pytest.mark.parametrize("keep", [2, 30, 200, 500, 0.5, -200, -1])
def test_a_file_that_ends_too_early(keep):
    data = encoded(picture())
    cut = data[: int(len(data) * keep) if isinstance(keep, float) else keep]
    for rows in ((0, None), (20, 40)):
        with pytest.raises(jpeg.JpegError):
            jpeg.size(cut)
            jpeg.decode(cut, *rows)


def test_reduction():
    assert [jpeg.reduction(1080, 1920, *least) for least in ((256, 340), (271, 340), (135, 240), (1, 1), (2000, 1))] == [
        4, 2, 8, 8, 1
    ]  # fmt: skip
    data = encoded(picture())
    for factor in (2, 4, 8):
        assert jpeg.decode_reduced(data, factor).shape == (-(-101 // factor), -(-150 // factor), 3)
