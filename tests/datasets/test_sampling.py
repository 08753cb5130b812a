"""Frame sampling: every golden index, and what must hold for any number of frames."""

import json

import numpy as np
import pytest

from datasets.sampling import ClipSampling, train_indices, val_indices, with_neighbours
from datasets.sampling import test_indices as clips_of_test
from tests.helpers.golden import FOLDERS, GOLDEN, check_sampling

SAMPLING = [folder / "sampling.json" for folder in FOLDERS if (folder / "sampling.json").is_file()]
STYLES = ("kinetics", "something")
LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 127, 128, 129, 130, 300, 1001)
SIZES = (1, 2, 3, 5, 8, 16, 32, 128, 200)


@pytest.mark.parametrize("path", SAMPLING, ids=lambda path: path.stem)
def test_golden_indices(path):
    check_sampling(json.loads(path.read_text()))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_shapes_and_range_for_every_length(style, dense):
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        for T in SIZES:
            train = train_indices(length, T, style, dense, rng)
            val = val_indices(length, T, style, dense)
            assert train.shape == val.shape == (T,)
            found = [train, val]
            for clips in (1, 2, 3, 10):
                test = clips_of_test(length, T, clips, style, dense)
                assert test.shape == (clips, T)
                found.append(test)
            for indices in found:
                assert indices.dtype == np.int64
                assert indices.min() >= 0 and indices.max() < length, (length, T)
            if not dense:
                assert (np.diff(train) >= 0).all() and (np.diff(val) >= 0).all()


def test_val_is_deterministic_and_dense_val_is_centred():
    assert (val_indices(228, 8, "kinetics", True) == np.arange(8) * 16 + 50).all()
    assert (val_indices(90, 8, "kinetics", True) == np.arange(8) * 16 % 90).all()


def test_dense_test_with_one_clip_starts_at_the_first_frame():
    assert (clips_of_test(300, 8, 1, "something", True)[0] == np.arange(8) * 16).all()


def test_short_something_video_shows_every_frame():
    rng = np.random.default_rng(0)
    for length in range(1, 9):
        for _ in range(20):
            assert set(train_indices(length, 8, "something", False, rng)) == set(range(length))


def draws(length, T, style, dense, times):
    rng = np.random.default_rng(3)
    return np.stack([train_indices(length, T, style, dense, rng) for _ in range(times)])


def is_uniform(values, low, high):
    """Chi-square: within 5 standard deviations of its mean for `low`..`high`, both included."""
    counts = np.bincount(values - low, minlength=high - low + 1)
    assert len(counts) == high - low + 1
    freedom = high - low
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return chi < freedom + 5 * (2 * freedom) ** 0.5


def test_kinetics_training_is_uniform_inside_segments():
    taken = draws(65, 8, "kinetics", False, 6000)
    for i in range(8):
        assert taken[:, i].min() == 8 * i and taken[:, i].max() == 8 * (i + 1)  # borders included
        assert is_uniform(taken[:, i], 8 * i, 8 * (i + 1))


def test_something_training_is_uniform_inside_ticks():
    taken = draws(50, 8, "something", False, 6000)
    for i in range(8):
        low, high = i * 50 // 8, (i + 1) * 50 // 8 - 1
        assert taken[:, i].min() == low and taken[:, i].max() == high
        assert is_uniform(taken[:, i], low, high)


def test_dense_training_start_is_uniform():
    starts = draws(148, 8, "kinetics", True, 6000)[:, 0]
    assert starts.min() == 0 and starts.max() == 20
    assert is_uniform(starts, 0, 20)


def test_same_generator_same_frames():
    first = train_indices(100, 8, "kinetics", False, np.random.default_rng(5))
    assert (first == train_indices(100, 8, "kinetics", False, np.random.default_rng(5))).all()


def test_neighbours_follow_their_index_and_stop_at_the_last_frame():
    assert with_neighbours(np.array([0, 4, 7, 9]), 10, 3).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 9, 9, 9]
    clips = with_neighbours(np.array([[0, 4], [1, 5]]), 6, 2)
    assert clips.tolist() == [[0, 1, 4, 5], [1, 2, 5, 5]] and clips.dtype == np.int64


def test_neighbours_are_tdns():
    cases = json.loads((GOLDEN / "tdn" / "neighbours.json").read_text())
    assert cases
    for case in cases:
        starts = np.array(case["starts"]) - 1
        assert (with_neighbours(starts, case["num_frames"], 5) + 1).tolist() == case["indices"], case


@pytest.mark.parametrize("family", ["tdn", "tada"])
def test_training_draws_reach_the_bounds_of_the_family(family):
    """All draws lie between the authors' least and greatest frames of many draws, and reach most of both."""
    cases = json.loads((GOLDEN / f"tadn/tables/sampling_train_{family}.json").read_text())
    assert cases
    rng = np.random.default_rng(0)
    for case in cases:
        style, f = case.get("style", "tdn"), 5 if family == "tdn" else 1
        sampling = ClipSampling(case["T"], style, frames_per_segment=f, interval=case.get("interval", 8))
        clips = [sampling.train(case["num_frames"], rng, case.get("fps"))[::f] for _ in range(400)]
        starts = np.stack(clips) + (family == "tdn")  # TDN's are numbered from 1
        names = ("start_low", "start_high") if family == "tdn" else ("low", "high")
        low, high = (np.array(case[name]) for name in names)
        assert (np.diff(starts) >= 0).all()
        sorted_draws = family == "tdn" and case["T"] < case["num_frames"] < case["T"] + f - 1
        slack = 1 if sorted_draws else 0  # their ends are rare
        assert (starts >= low - slack).all() and (starts <= high + slack).all(), case
        near = np.maximum(1, (high - low) // 20)
        assert (starts.min(0) <= low + near).all() and (starts.max(0) >= high - near).all(), case


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_every_split_reads_neighbours(style, dense):
    """One frame a segment is today's clip; with f frames, every f-th frame is that clip's, then its neighbours."""
    for length in LENGTHS:
        for T in (2, 8, 16):
            one, five = (ClipSampling(T, style, dense, frames_per_segment=f) for f in (1, 5))
            assert (one.clip_frames, five.clip_frames) == (T, 5 * T)
            found = [
                (sampling.train(length, np.random.default_rng(7)), sampling.val(length), *sampling.test(length, 3))
                for sampling in (one, five)
            ]
            expected = (
                train_indices(length, T, style, dense, np.random.default_rng(7)),
                val_indices(length, T, style, dense),
                *clips_of_test(length, T, 3, style, dense),
            )
            for single, several, clip in zip(*found, expected, strict=True):
                assert (single == clip).all()
                segments = several.reshape(T, 5)
                assert (segments[:, 0] == clip).all() and segments.max() < length
                for step in range(1, 5):
                    assert (segments[:, step] == np.minimum(clip + step, length - 1)).all()
