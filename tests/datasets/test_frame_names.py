"""What a folder holds is said in the words of the settings that read it."""

import pytest

from datasets.frame_names import FrameNames


def names(template, first, last):
    return [template.format(number) for number in range(first, last + 1)]


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (names("{:06d}.jpg", 0, 7), "000000.jpg to 000007.jpg: set data.index_base: 0"),
        (names("img_{:05d}.jpg", 1, 8), "img_00001.jpg to img_00008.jpg: set data.image_tmpl: 'img_{:05d}.jpg'"),
        (names("{:06d}.JPG", 1, 3), "000001.JPG to 000003.JPG: set data.image_tmpl: '{:06d}.JPG'"),
        (names("{:06d}.jpeg", 1, 3), "set data.image_tmpl: '{:06d}.jpeg'"),
        (names("{}.png", 0, 12), "0.png to 12.png: set data.image_tmpl: '{}.png' and data.index_base: 0"),
        (names("{:04d}.jpg", 9998, 10001), "9998.jpg to 10001.jpg, but frames are numbered from 0 or 1"),
        (names("{:06d}.jpg", 2, 5), "000002.jpg to 000005.jpg, but frames are numbered from 0 or 1"),
        (names("frame{:03d}_rgb.jp2", 1, 4), "set data.image_tmpl: 'frame{:03d}_rgb.jp2'"),
        (names("x2_{:03d}.jpg", 1, 4), "set data.image_tmpl: 'x2_{:03d}.jpg'"),
        (names("{{a}}{:02d}.jpg", 1, 4), "set data.image_tmpl: '{{a}}{:02d}.jpg'"),
        ([*names("flow_x_{:05d}.jpg", 1, 8), *names("img_{:05d}.jpg", 1, 7)], "set data.image_tmpl: 'img_{:05d}.jpg'"),
        ([*names("x{}.jpg", 1, 9), *names("{:06d}.jpg", 0, 3)], "000000.jpg to 000003.jpg: set data.index_base: 0"),
        (["notes.txt", ".x", *names("{:06d}.jpg", 0, 2)], "000000.jpg to 000002.jpg: set data.index_base: 0"),
    ],
)
def test_files_of_other_names_say_which_settings_read_them(files, advice):
    found = FrameNames().advice(files)
    assert found.startswith("; its files are ") and found.endswith(advice)


@pytest.mark.parametrize("files", [[], ["notes.txt"], names("{:06d}.jpg", 1, 5)])
def test_files_that_are_named_as_set_need_no_advice(files):
    assert FrameNames().advice(files) == ""


def test_numbering_from_1_that_is_read_from_0():
    assert FrameNames(index_base=0).advice(["000001.jpg"]).endswith("set data.index_base: 1")
    assert FrameNames(index_base=0).name(0) == "000000.jpg"
