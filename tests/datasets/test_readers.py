"""Frames come out as stored, and every kind of broken storage is refused with one sentence that names it."""

import multiprocessing
import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from datasets import jpeg
from datasets.box import Box
from datasets.limits import MAX_FILE_BYTES
from datasets.packed_frames import pack
from datasets.readers import FrameFolderReader, ReadError, VideoReader
from tests.helpers.video_files import cut_off, overwrite, write_video


@pytest.fixture
def folder(tmp_path):
    """Ten frames of 20 x 30 pixels; frame i has the grey value 20 * i."""
    for i in range(10):
        Image.new("RGB", (30, 20), (20 * i,) * 3).save(tmp_path / f"{i + 1:06d}.jpg", quality=95)
    return tmp_path


def failure(reader, path, declared, indices=(0,)):
    with pytest.raises(ReadError) as caught:
        reader.open(str(path), declared).read(np.array(indices))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_folder_reads_in_the_requested_order(folder):
    clip = FrameFolderReader("{:06d}.jpg").open(str(folder), 10)
    frames = clip.read(np.array([9, 0, 3, 3]))
    assert clip.num_frames == 10 and frames.shape == (4, 20, 30, 3) and frames.dtype == np.uint8
    assert np.abs(frames.mean((1, 2, 3)) - [180, 0, 60, 60]).max() < 2
    frames = clip.read(np.array([6, 9, 2, 5]))  # each once, as a dense clip that continues at the first frame
    assert np.abs(frames.mean((1, 2, 3)) - [120, 180, 40, 100]).max() < 2


def test_folder_numbered_from_zero_and_channel_order(tmp_path):
    Image.new("RGB", (8, 8), (200, 100, 0)).save(tmp_path / "frame0.png")
    frames = FrameFolderReader("frame{:d}.png", index_base=0).open(str(tmp_path), 1).read(np.array([0]))
    assert frames[0, 0, 0].tolist() == [200, 100, 0]


def test_list_decides_the_number_of_frames(folder):
    assert FrameFolderReader("{:06d}.jpg").open(str(folder), 4).num_frames == 4


def test_grey_images_become_rgb(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "1.png")
    assert FrameFolderReader("{}.png").open(str(tmp_path), 1).read(np.array([0])).shape == (1, 8, 8, 3)


def test_repeated_frames_are_decoded_once(folder, monkeypatch):
    decoded = []
    real = jpeg.decode
    monkeypatch.setattr(jpeg, "decode", lambda *arguments: decoded.append(1) or real(*arguments))
    FrameFolderReader("{:06d}.jpg").open(str(folder), 10).read(np.array([2, 2, 5, 2]))
    assert len(decoded) == 2


def test_fewer_frames_than_declared_even_if_not_requested(folder):
    message = failure(FrameFolderReader("{:06d}.jpg"), folder, 12)
    assert "000012.jpg is missing" in message and "10 files" in message and "declares 12" in message


def test_missing_frame_inside(folder):
    (folder / "000004.jpg").unlink()
    message = failure(FrameFolderReader("{:06d}.jpg"), folder, 10, [3])
    assert "000004.jpg is missing" in message and "9 files" in message and "declares 10" in message


def test_frames_under_other_names_say_which_settings_read_them(folder, tmp_path):
    reader = FrameFolderReader(
        "{:06d}.jpg", index_base=0
    )  # 000009.jpg is there, so the last frame alone would be read wrong
    message = failure(reader, folder, 10)
    assert "000000.jpg is missing" in message and message.endswith("000010.jpg: set data.index_base: 1")
    message = failure(FrameFolderReader("img_{:05d}.jpg"), folder, 10)
    assert message.endswith("its files are 000001.jpg to 000010.jpg: set data.image_tmpl: '{:06d}.jpg'")
    message = failure(FrameFolderReader("rgb/{:06d}.jpg"), folder, 10)
    assert "rgb/000010.jpg is missing; there are 0 files" in message


def test_a_video_file_where_a_folder_should_be_names_the_setting(tmp_path):
    (tmp_path / "x.mp4").touch()
    assert "data.modality: video" in failure(FrameFolderReader("{:06d}.jpg"), tmp_path / "x.mp4", 3)


def test_missing_folder_and_unknown_length(folder):
    assert "there is no such folder" in failure(FrameFolderReader("{:06d}.jpg"), folder / "nothing", 3)
    assert "how many frames" in failure(FrameFolderReader("{:06d}.jpg"), folder, None)


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_damaged_image(folder, content):
    file = folder / "000002.jpg"
    file.write_bytes(file.read_bytes()[:-200] if content == "truncated" else content)
    assert "000002.jpg: is not a readable image" in failure(FrameFolderReader("{:06d}.jpg"), folder, 10, [1])


def test_frames_of_different_sizes(folder):
    Image.new("RGB", (31, 20)).save(folder / "000003.jpg")
    message = failure(FrameFolderReader("{:06d}.jpg"), folder, 10, [1, 2])
    assert "000003.jpg" in message and "31x20" in message and "30x20" in message


def test_frames_that_are_upright_together_have_one_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(tmp_path / "1.jpg")
    Image.new("RGB", (30, 20)).save(tmp_path / "2.jpg", exif=exif)
    assert FrameFolderReader("{}.jpg").open(str(tmp_path), 2).read(np.arange(2)).shape == (2, 30, 20, 3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bomb", ["pixels", "bytes"])
def test_bombs_are_refused_in_folders_and_zips(tmp_path, packed, bomb):
    (tmp_path / "v").mkdir()
    frame = tmp_path / "v/1.bmp"
    Image.new("L", (4, 4)).save(frame)
    with open(frame, "r+b") as file:
        if bomb == "pixels":
            file.seek(18)
            file.write((20_000).to_bytes(4, "little"))  # the width
        else:
            file.truncate(MAX_FILE_BYTES + 1)  # zeros, which take no space
    if packed:
        with zipfile.ZipFile(tmp_path / "v.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("1.bmp", frame.read_bytes() if bomb == "pixels" else b"")
            archive.infolist()[0].file_size = os.path.getsize(frame)
        shutil.rmtree(tmp_path / "v")
    message = failure(FrameFolderReader("{}.bmp"), tmp_path / "v", 1)
    assert "1.bmp: " in message and ("20000x4 pixels" if bomb == "pixels" else "MiB are read") in message


def test_video_with_fewer_frames_than_declared(tmp_path):
    message = failure(VideoReader(), write_video(tmp_path / "turned.mov", frames=3, rotation=90), 4)
    assert "holds 3 frames" in message and "declares 4" in message


def test_frames_a_second(tmp_path, folder):
    assert FrameFolderReader("{:06d}.jpg").open(str(folder), 4).fps is None
    assert FrameFolderReader("{:06d}.jpg", fps=12.5).open(str(folder), 4).fps == 12.5
    assert VideoReader().open(str(write_video(tmp_path / "a.mp4")), None).fps == 25
    assert VideoReader().open(str(write_video(tmp_path / "a.avi", codec="mpeg4")), None).fps == 25
    uneven = write_video(tmp_path / "uneven.mp4", frames=3, stamps=[0, 50, 200])
    assert 10 <= VideoReader().open(str(uneven), None).fps <= 20


def test_damaged_videos(tmp_path):
    damaged = overwrite(write_video(tmp_path / "some.mp4", frames=100, **{"x264-params": "keyint=15"}), 0.5, 0.55)
    assert "cannot be decoded" in failure(VideoReader(), damaged, None, range(0, 100, 10))
    half = cut_off(write_video(tmp_path / "half.mp4"), 0.5)
    assert "cannot be decoded" in failure(VideoReader(), half, None)
    half = cut_off(write_video(tmp_path / "half.avi", codec="mpeg4", frames=100), 0.5)
    assert "frames, the list declares 100" in failure(VideoReader(), half, 100)


def test_no_video_at_all(tmp_path):
    (tmp_path / "empty.avi").touch()
    (tmp_path / "text.avi").write_text("hello")
    assert "is empty" in failure(VideoReader(), tmp_path / "empty.avi", None)
    assert "cannot be decoded" in failure(VideoReader(), tmp_path / "text.avi", None)
    assert "no such file" in failure(VideoReader(), tmp_path / "none.avi", None)
    assert "no such file" in failure(VideoReader(), tmp_path, None)


@pytest.fixture
def noise(tmp_path):
    """Folders and zips of the same six frames of 90 x 60 pixels: `frames/a class/clip`, `packed/a class/clip.zip`."""
    rng = np.random.default_rng(0)
    (tmp_path / "frames/a class/clip").mkdir(parents=True)
    for number in range(1, 7):
        pixels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 60)).save(tmp_path / f"frames/a class/clip/{number:06d}.jpg")
    pack(tmp_path / "frames", tmp_path / "packed")
    return tmp_path


def test_packed_frames_read_as_their_folder_does(noise):
    reader = FrameFolderReader("{:06d}.jpg")
    indices = np.array([5, 0, 2, 2])
    folder = reader.open(str(noise / "frames/a class/clip"), 6)
    for path in (noise / "packed/a class/clip", f"{noise}/packed/a class/clip/"):
        clip = reader.open(str(path), 6)
        assert clip.num_frames == 6 and reader.open(str(path), 4).num_frames == 4
        assert (clip.read(indices) == folder.read(indices)).all()
        assert (clip.fetch(indices).decode(Box(3, 5, 20, 50)) == folder.read(indices)[:, 3:20, 5:50]).all()


def test_a_zip_goes_before_the_folder_beside_it(noise):
    path, reader = noise / "frames/a class/clip", FrameFolderReader("{:06d}.jpg")
    assert reader.stored_at(str(path)) == str(path)
    shutil.copy(noise / "packed/a class/clip.zip", f"{path}.zip")
    assert reader.stored_at(str(path)) == f"{path}.zip"
    expected = reader.open(str(path), 6).read(np.arange(6))
    shutil.rmtree(path)
    assert (reader.open(str(path), 6).read(np.arange(6)) == expected).all()


def test_packed_frames_that_are_missing(noise):
    reader, path = FrameFolderReader("{:06d}.jpg"), noise / "packed/a class/clip"
    message = failure(reader, path, 7)
    assert "clip.zip: 000007.jpg is missing; there are 6 files, the list declares 7 frames" in message
    message = failure(reader, f"{path}2", 6)
    assert "clip2: there is no such folder, and no clip2.zip" in message
    with pytest.raises(ReadError, match=r"clip\.zip: frame1\.jpg is missing; there are 6 files"):
        FrameFolderReader("frame{}.jpg").open(str(path), 1)


def test_damaged_packed_frames(noise):
    path = noise / "packed/a class/clip.zip"
    whole = path.read_bytes()
    reader = FrameFolderReader("{:06d}.jpg")
    clip = reader.open(str(path.with_suffix("")), 6)
    path.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    with pytest.raises(ReadError, match=r"clip\.zip: 00000\d\.jpg is damaged \(Bad CRC-32"):
        clip.read(np.arange(6))  # changed while a run reads it
    path.write_bytes(whole[: len(whole) // 2])
    assert "clip.zip: is damaged or no zip" in failure(reader, path.with_suffix(""), 6)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("000001.jpg", b"no image")
    assert "clip.zip: 000001.jpg: is not a readable image" in failure(reader, path.with_suffix(""), 1)


def read_packed(path):
    return FrameFolderReader("{:06d}.jpg").open(path, 6).read(np.arange(6)).sum()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_read_packed_frames_at_the_same_time(noise, start):
    """The parent has a zip open, so that forked processes inherit its handle and must not disturb each other."""
    path = str(noise / "packed/a class/clip")
    clip = FrameFolderReader("{:06d}.jpg").open(path, 6)
    expected = read_packed(path)
    with multiprocessing.get_context(start).Pool(2) as pool:
        assert set(pool.map(read_packed, [path] * 40)) == {expected}
    assert clip.read(np.arange(6)).sum() == expected


def test_no_handle_stays_open(noise):
    path = str(noise / "packed/a class/clip")
    before = len(os.listdir("/proc/self/fd"))
    frames = [FrameFolderReader("{:06d}.jpg").open(path, 6).fetch(np.arange(6)) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and len(frames) == 20


def test_large_images_are_decoded_small_and_never_too_small(tmp_path):
    Image.linear_gradient("L").convert("RGB").resize((200, 120)).save(tmp_path / "1.jpg", quality=95)
    frames = FrameFolderReader("{}.jpg").open(str(tmp_path), 1).fetch(np.array([0, 0]))
    whole = frames.decode()
    for least, expected in (
        ((60, 100), (60, 100)),
        ((61, 100), (120, 200)),
        ((20, 20), (30, 50)),
        ((15, 25), (15, 25)),
    ):
        small = frames.reduced(*least)
        assert (small.height, small.width) == expected
        pixels = small.decode()
        assert pixels.shape == (2, *expected, 3)
        smooth = np.asarray(Image.fromarray(whole[0]).resize(expected[::-1], Image.Resampling.BOX), int)
        assert np.abs(pixels[0] - smooth).mean() < 3
