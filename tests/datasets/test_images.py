"""Images come out upright and at their stored brightness, whatever their kind, or are refused with one sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from datasets.box import Box
from datasets.images import ImageError, open_image
from datasets.limits import SizeError

GREY_16 = np.linspace(0, 65535, 12 * 16).astype(np.uint16).reshape(12, 16)
COLOUR = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)).resize((40, 24)))


def encoded(image, kind, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def decoded(data):
    image = open_image("a/1.img", data)
    pixels = image.decode(Box(0, 0, image.height, image.width), fast=False)
    assert pixels.shape == (image.height, image.width, 3) and pixels.dtype == np.uint8
    return pixels


def refusal(data, kind=ImageError):
    with pytest.raises(kind) as caught:
        decoded(data)
    message = str(caught.value)
    assert message.startswith("a/1.img: ") and "\n" not in message
    return message


def png(height, width, bits, colour, rows, rest=b""):
    """A PNG of any depth, which Pillow does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rest + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_grey_of_16_bits_keeps_its_brightness(kind):
    data = encoded(GREY_16, kind)
    assert (decoded(data) == (GREY_16 >> 8)[:, :, None]).all()


@pytest.mark.parametrize("most", [65535, 1023])
def test_pgm_of_more_than_8_bits_keeps_its_brightness(most):
    values = GREY_16 >> (6 if most == 1023 else 0)
    data = f"P5\n16 12\n{most}\n".encode() + values.astype(">u2").tobytes()
    assert np.abs(decoded(data).astype(int) - (GREY_16 >> 8)[:, :, None]).max() <= 1


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_png_of_16_bits_in_colour_and_with_alpha_keeps_its_brightness(colour, channels):
    values = np.repeat(GREY_16[:, :, None], channels, axis=2).astype(">u2")
    data = png(12, 16, 16, colour, [row.tobytes() for row in values])
    assert (decoded(data) == (GREY_16 >> 8)[:, :, None]).all()


def test_tiff_whose_16_bits_are_high_byte_first_keeps_its_brightness():
    image = Image.frombytes("I;16B", (16, 12), GREY_16.astype(">u2").tobytes())
    assert (decoded(encoded(image, "TIFF")) == (GREY_16 >> 8)[:, :, None]).all()


@pytest.mark.parametrize("type_", [np.float32, np.int32])
def test_pixels_whose_white_is_not_known_are_refused(type_):
    message = refusal(encoded(GREY_16.astype(type_), "TIFF"))
    assert f"mode {'F' if type_ is np.float32 else 'I'}" in message and "8 or 16 bits" in message


def test_tiff_of_16_bits_whose_white_is_0_is_refused():
    assert "mode I;16" in refusal(encoded(GREY_16, "TIFF", tiffinfo={262: 0}))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "1", "L", "CMYK"])
def test_other_modes_become_rgb_without_their_alpha(mode):
    image = Image.fromarray(COLOUR).convert("L" if mode in ("LA", "L", "1") else "RGB")
    image = image.convert("P").convert(mode) if mode == "PA" else image.convert(mode)
    expected = np.asarray(image.convert("RGB"))
    if mode in ("RGBA", "LA"):
        image.putalpha(0)  # all is transparent, and shown all the same
    assert (decoded(encoded(image, "TIFF" if mode in ("PA", "CMYK") else "PNG")) == expected).all()


def test_a_palette_with_transparency_shows_its_colours():
    image = Image.fromarray(COLOUR).quantize(16)
    assert (decoded(encoded(image, "PNG", transparency=bytes(16))) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB"), ("TIFF", "RGB")]
)
def test_every_orientation_is_shown_upright(kind, mode, orientation):
    """JPEGs go through libjpeg-turbo, the others through Pillow."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(COLOUR).convert(mode), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(decoded(data).astype(int) - expected).max() <= (1 if mode == "CMYK" else 0)


def test_a_turned_jpeg_is_reduced_and_cropped_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(COLOUR).resize((200, 120)), "JPEG", exif=exif, quality=95)
    whole = decoded(data)
    image = open_image("a/1.img", data)
    assert (image.height, image.width) == (200, 120)
    assert (image.decode(Box(10, 20, 50, 90), fast=False) == whole[10:50, 20:90]).all()
    half = image.reduced(60, 60)
    assert (half.height, half.width) == (100, 60)
    small = np.asarray(Image.fromarray(whole).resize((60, 100), Image.Resampling.BOX), int)
    assert np.abs(half.decode(Box(0, 0, 100, 60), fast=False) - small).mean() < 3


def test_damaged_metadata_leaves_the_image_as_stored():
    plain = encoded(COLOUR, "JPEG")
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", b"Exif\0\0garbage", b"\0"):
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
        assert (decoded(data) == decoded(plain)).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_files_of_several_pictures_are_refused_and_of_one_are_read(kind):
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    assert decoded(encoded(first, kind)).shape == (24, 40, 3)
    assert "holds 2 pictures" in refusal(encoded(first, kind, save_all=True, append_images=[second]))


def states(data, size):
    """A JPEG whose header states another size."""
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", *size) + data[frame + 4 :]


@pytest.mark.parametrize("size", [(65500, 65500), (20000, 10), (9000, 9000)])
def test_absurd_sizes_are_refused_before_anything_is_decoded(size):
    assert f"{size[1]}x{size[0]} pixels" in refusal(states(encoded(COLOUR, "JPEG"), size), SizeError)
    assert "pixels" in refusal(png(*size, 8, 2, []), SizeError)  # above 179 million it is Pillow that refuses


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG"])
def test_files_that_are_cut_short_are_refused(kind):
    data = encoded(COLOUR, kind)
    for end in (0, 1, 10, 40, len(data) // 2):
        assert "is not a readable image" in refusal(data[:end])


def test_a_png_with_any_changed_byte_is_refused():
    data = encoded(COLOUR, "PNG")
    for position in range(8, len(data) - 12, 7):
        refusal(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :], (ImageError, SizeError))


def test_postscript_is_not_run():
    assert "PostScript" in refusal(encoded(COLOUR, "EPS"))
