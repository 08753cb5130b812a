"""Every decoder reads real files of HMDB51, UCF101, Kinetics and others; test_decoders.py makes files of its own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from datasets.decoders import open_video
from tests.datasets.test_decoders import (
    DECODERS,
    TOLERANCE,
    check_any_subset,
    check_damaged,
    needs_decord,
    read_two,
    sentence,
)

SHARED = Path(__file__).parents[3] / "shared/data"
SAMPLES, UCF101 = SHARED / "samples", SHARED / "ucf101_10/UCF-101"
if not (SAMPLES.is_dir() and UCF101.is_dir()):
    pytest.skip("the sample videos, which are not ours to publish, are not here", allow_module_level=True)

# name: frames, frames declared, height, width
SIZES = {
    "R6llTwEh07w.mp4": (303, 303, 256, 340),
    "SOX5yA1l24A.mp4": (332, 332, 256, 340),
    "WUzgd7C1pWA.mp4": (327, 327, 256, 340),
    "RATRACE_wave_f_nm_np1_fr_goo_37.avi": (72, 73, 240, 560),
    "SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi": (74, 75, 240, 320),
    "TrumanShow_wave_f_nm_np1_fr_med_26.avi": (48, 49, 240, 432),
    "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi": (83, 84, 240, 320),
    "flipping_a_pancake.mkv": (310, 310, 240, 426),
    "rotated_90.mov": (3, 3, 568, 320),
    "something_like.webm": (58, 58, 240, 427),
    "v_SoccerJuggling_g23_c01.avi": (240, 240, 240, 320),
    "v_SoccerJuggling_g24_c01.avi": (251, 251, 240, 320),
}
# name: frames, packets without a frame; the first has no time stamps, the others miss frames in their middle
UCF101_ODD = {
    "WallPushups/v_WallPushups_g10_c02.avi": (69, 0),
    "JumpRope/v_JumpRope_g17_c04.avi": (613, 6),
    "JumpingJack/v_JumpingJack_g20_c01.avi": (116, 4),
    "JumpingJack/v_JumpingJack_g20_c03.avi": (138, 2),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", SIZES)
def test_samples(name, decoder, capfd):
    frames, declared, height, width = SIZES[name]
    video = open_video(str(SAMPLES / name), decoder)
    assert (video.num_frames, video.declared_frames) == (frames, declared)
    assert (video.height, video.width) == (height, width)
    assert len(check_any_subset(SAMPLES / name, decoder, rounds=1)) == frames
    assert capfd.readouterr() == ("", "")


@needs_decord
@pytest.mark.parametrize("name", SIZES)
def test_samples_are_the_same_by_every_decoder(name):
    one, two = (open_video(str(SAMPLES / name), decoder).frames() for decoder in ("decord", "pyav"))
    assert all(np.abs(a.astype(int) - b).max() <= TOLERANCE for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", UCF101_ODD)
def test_clips_with_missing_frames_or_time_stamps(name, decoder):
    frames, missing = UCF101_ODD[name]
    video = open_video(str(UCF101 / name), decoder)
    assert (video.num_frames, video.declared_frames) == (frames, frames + missing)
    check_any_subset(UCF101 / name, decoder, rounds=1)


@needs_decord
def test_ucf101_is_the_same_by_every_decoder():
    paths = [*sorted(UCF101.glob("*/*.avi"))[::25], *(UCF101 / name for name in UCF101_ODD)]
    rng = np.random.default_rng(0)
    for path in paths:
        one, two = open_video(str(path), "decord"), open_video(str(path), "pyav")
        assert one.num_frames == two.num_frames, path
        indices = rng.integers(one.num_frames, size=5)
        assert np.abs(one.read(indices).astype(int) - two.read(indices)).max() <= TOLERANCE, path


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_corrupted_sample(decoder, capfd):
    check_damaged(SAMPLES / "corrupted.mp4", decoder, declared=50)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("decoder", DECODERS)
def test_truncated_samples(decoder, tmp_path):
    half = tmp_path / "half.mp4"
    half.write_bytes((SAMPLES / "WUzgd7C1pWA.mp4").read_bytes()[:300000])
    assert "cannot be decoded" in sentence(half, decoder)
    half = tmp_path / "half.avi"
    half.write_bytes((SAMPLES / "v_SoccerJuggling_g23_c01.avi").read_bytes()[:200000])
    assert open_video(str(half), decoder).num_frames == len(check_any_subset(half, decoder, rounds=1)) == 96


@pytest.mark.parametrize("decoder", DECODERS)
def test_worker_processes_are_silent(decoder, capfd):
    """The file has metadata in another encoding, and FFmpeg by itself complains about its packed B-frames."""
    path = str(SAMPLES / "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_two, (path, decoder)) == (2, 240, 320, 3)
    assert capfd.readouterr() == ("", "")
