"""Frames come out as stored, and every kind of broken storage is refused with one sentence that names it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.readers import FrameFolderReader, ReadError, VideoReader

SAMPLES = Path(__file__).parents[2] / "shared/data/samples"
UCF101 = Path(__file__).parents[2] / "shared/data/ucf101_10/UCF-101"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the sample videos are not here")

# name: frames that a full decode by another FFmpeg binding (PyAV) gives, height, width
SIZES = {
    "R6llTwEh07w.mp4": (303, 256, 340),
    "RATRACE_wave_f_nm_np1_fr_goo_37.avi": (72, 240, 560),
    "SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi": (74, 240, 320),
    "TrumanShow_wave_f_nm_np1_fr_med_26.avi": (48, 240, 432),
    "flipping_a_pancake.mkv": (310, 240, 426),
    "rotated_90.mov": (3, 568, 320),
    "something_like.webm": (58, 240, 427),
    "v_SoccerJuggling_g23_c01.avi": (240, 240, 320),
}


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


def test_folder_reads_in_the_order_asked(folder):
    clip = FrameFolderReader("{:06d}.jpg").open(str(folder), 10)
    frames = clip.read(np.array([9, 0, 3, 3]))
    assert clip.num_frames == 10 and frames.shape == (4, 20, 30, 3) and frames.dtype == np.uint8
    assert np.abs(frames.mean((1, 2, 3)) - [180, 0, 60, 60]).max() < 2


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
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or real(file))
    FrameFolderReader("{:06d}.jpg").open(str(folder), 10).read(np.array([2, 2, 5, 2]))
    assert len(opened) == 2


def test_fewer_frames_than_declared_even_if_not_asked_for(folder):
    message = failure(FrameFolderReader("{:06d}.jpg"), folder, 12)
    assert "000012.jpg is missing" in message and "10 files" in message and "declares 12" in message


def test_missing_frame_inside(folder):
    (folder / "000004.jpg").unlink()
    message = failure(FrameFolderReader("{:06d}.jpg"), folder, 10, [3])
    assert "000004.jpg is missing" in message and "9 files" in message and "declares 10" in message


def test_missing_folder_and_unknown_length(folder):
    assert "no such folder" in failure(FrameFolderReader("{:06d}.jpg"), folder / "nothing", 3)
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


@needs_samples
@pytest.mark.parametrize("name", SIZES)
def test_real_videos_any_subset_equals_the_full_decode(name, capfd):
    num_frames, height, width = SIZES[name]
    clip = VideoReader().open(str(SAMPLES / name), None)
    assert clip.num_frames == num_frames
    whole = clip.read(np.arange(num_frames))
    assert whole.shape == (num_frames, height, width, 3) and whole.dtype == np.uint8
    rng = np.random.default_rng(0)
    for _ in range(4):
        indices = np.append(rng.integers(num_frames, size=6), num_frames - 1)
        assert (VideoReader().open(str(SAMPLES / name), None).read(indices) == whole[indices]).all()
        assert (clip.read(indices) == whole[indices]).all()  # a second read of the same handle
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not UCF101.is_dir(), reason="the UCF101 clips are not here")
def test_videos_without_time_stamps_are_read_from_the_start():
    path = str(UCF101 / "WallPushups/v_WallPushups_g10_c02.avi")
    clip = VideoReader().open(path, 69)
    whole = clip.read(np.arange(69))
    for index in (68, 40, 13):
        assert (VideoReader().open(path, None).read(np.array([index]))[0] == whole[index]).all()


@needs_samples
def test_repeated_video_frames_are_decoded_once(monkeypatch):
    clip = VideoReader().open(str(SAMPLES / "something_like.webm"), None)
    asked = []
    real = clip._video.get_batch
    monkeypatch.setattr(clip._video, "get_batch", lambda wanted: asked.append(wanted.tolist()) or real(wanted))
    frames = clip.read(np.array([7, 3, 7, 7]))
    assert asked == [[3, 7]] and (frames[0] == frames[2]).all() and (frames[0] != frames[1]).any()


@needs_samples
def test_video_with_fewer_frames_than_declared():
    message = failure(VideoReader(), SAMPLES / "rotated_90.mov", 4)
    assert "holds 3 frames" in message and "declares 4" in message


@needs_samples
def test_damaged_videos(tmp_path):
    assert "cannot be decoded" in failure(VideoReader(), SAMPLES / "corrupted.mp4", None, [0, 20, 40])
    half = tmp_path / "half.mp4"
    half.write_bytes((SAMPLES / "WUzgd7C1pWA.mp4").read_bytes()[:300000])
    assert "cannot be decoded" in failure(VideoReader(), half, None)
    half = tmp_path / "half.avi"
    half.write_bytes((SAMPLES / "v_SoccerJuggling_g23_c01.avi").read_bytes()[:200000])
    assert "holds 97 frames" in failure(VideoReader(), half, 240)


def test_no_video_at_all(tmp_path):
    (tmp_path / "empty.avi").touch()
    (tmp_path / "text.avi").write_text("hello")
    assert "is empty" in failure(VideoReader(), tmp_path / "empty.avi", None)
    assert "cannot be decoded" in failure(VideoReader(), tmp_path / "text.avi", None)
    assert "no such file" in failure(VideoReader(), tmp_path / "none.avi", None)
    assert "no such file" in failure(VideoReader(), tmp_path, None)
