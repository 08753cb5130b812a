"""MoSI: nine motions over one picture; and classes of reversed videos. From positions to the entry points."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import ConfigError, DataConfig, load_config
from datasets.build import class_names, test_loader, train_loader, val_loader
from datasets.mosi import MOTION_NAMES, MOTIONS, moving_clips, path, with_static_mask
from tests.helpers.cli_harness import VIDEOS, command, evaluated, metrics, train, training_refusal

SIDE, CROP, T = 60, 32, 8  # 28 pixels in 7 steps: whole pixels at both speeds


def data_of(tiny: Path, *overrides: str) -> DataConfig:
    mosi = ("data.task=mosi", "data.num_classes=9", f"data.scale_size={SIDE}")
    return load_config(tiny, [*(mosi if "data.reversed_classes=true" not in overrides else ()), *overrides]).data


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)


def test_where_the_crop_is() -> None:
    """The facts of the authors' code, by hand: distance (s - S) v / 2, starts that stay inside, the middle of them."""
    assert path(SIDE, CROP, 2, T, None).tolist() == [0, 4, 8, 12, 16, 20, 24, 28]
    assert path(SIDE, CROP, -2, T, None).tolist() == [28, 24, 20, 16, 12, 8, 4, 0]
    assert path(SIDE, CROP, 1, T, None).tolist() == [7, 9, 11, 13, 15, 17, 19, 21]
    assert path(SIDE, CROP, -1, T, None).tolist() == [21, 19, 17, 15, 13, 11, 9, 7]
    assert path(SIDE, CROP, 0, T, None).tolist() == [14] * T
    assert path(320, 112, 1, 16, None).tolist() == np.linspace(52, 156, 16).astype(int).tolist()
    rng = np.random.default_rng(0)
    for speed, starts in ((2, {0}), (-2, {28}), (1, set(range(15))), (-1, set(range(14, 29))), (0, set(range(29)))):
        drawn = [path(SIDE, CROP, speed, T, rng) for _ in range(500)]
        assert {one[0] for one in drawn} == starts
        assert all(0 <= one.min() and one.max() <= SIDE - CROP for one in drawn)


def test_clips_show_what_their_labels_say() -> None:
    image = picture()
    for rng in (None, np.random.default_rng(1)):
        clips = moving_clips(image, CROP, T, rng)
        assert clips.shape == (9, T, CROP, CROP, 3)
        for (x, y), clip in zip(MOTIONS, clips, strict=True):
            for before, after in itertools.pairwise(clip):  # the content moves against the crop
                rows, columns = slice(max(0, 2 * y), CROP + min(0, 2 * y)), slice(max(0, 2 * x), CROP + min(0, 2 * x))
                back_rows = slice(max(0, -2 * y), CROP + min(0, -2 * y))
                back_columns = slice(max(0, -2 * x), CROP + min(0, -2 * x))
                assert np.array_equal(before[rows, columns], after[back_rows, back_columns])
    assert len(MOTION_NAMES) == len(set(MOTION_NAMES)) == len(set(MOTIONS)) == 9


def test_without_the_order_of_frames_opposite_motions_are_the_same() -> None:
    """So what is blind to order tells 5 of 9 classes at most, and never the sign of a motion."""
    clips = moving_clips(picture(), CROP, T)
    bags = [sorted(frame.tobytes() for frame in clip) for clip in clips]
    opposite = {label: MOTIONS.index((-x, -y)) for label, (x, y) in enumerate(MOTIONS)}
    assert all(bags[label] == bags[other] for label, other in opposite.items())
    assert len({tuple(bag) for bag in bags}) == 5


def test_a_static_mask_moves_a_rectangle_alone() -> None:
    rng = np.random.default_rng(0)
    clip = moving_clips(picture(), CROP, T)[3]
    for _ in range(20):
        masked = with_static_mask(clip, rng)
        moves = (masked != masked[0]).any((0, 3))
        rows, columns = np.flatnonzero(moves.any(1)), np.flatnonzero(moves.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert 0.3 * CROP - 1 <= height <= 0.5 * CROP + 1 and 0.3 * CROP - 1 <= width <= 0.5 * CROP + 1
        inside = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        assert np.array_equal(masked[inside], clip[inside])
        assert any(np.array_equal(masked[0][~moves], frame[~moves]) for frame in clip)


def test_training_has_all_motions_of_a_frame_in_one_batch(tiny: Path) -> None:
    data = data_of(tiny)
    loader = train_loader(data, seed=3)
    loader.set_epoch(0)
    batch = next(iter(loader))
    assert batch["video"].shape == (4 * 9, T, 3, CROP, CROP) and batch["label"].tolist() == list(range(9)) * 4
    assert batch["index"].view(4, 9).eq(batch["index"].view(4, 9)[:, :1]).all() and len(batch["path"]) == 36
    dataset = loader.dataset
    again = dataset[(0, 5)]["video"]
    assert torch.equal(again, dataset[(0, 5)]["video"]) and not torch.equal(again, dataset[(1, 5)]["video"])
    fast_right = again[3]
    assert torch.equal(fast_right[1, :, : CROP - 4], fast_right[0, :, 4:])
    masked = train_loader(dataclasses.replace(data, static_mask=True), seed=3).dataset[(0, 5)]["video"]
    assert torch.equal(masked[8], again[8]) and not torch.equal(masked[3], again[3])


def test_pictures_are_mirrored_before_they_move(tiny: Path) -> None:
    plain, mirrored = (train_loader(data_of(tiny, f"data.flip={flip}"), seed=3).dataset for flip in ("false", "true"))
    flips = 0
    for index in range(8):
        one, other = plain[(0, index)]["video"][8, 0], mirrored[(0, index)]["video"]
        flips += not torch.equal(one, other[8, 0])
        assert torch.equal(other[3, 1, :, : CROP - 4], other[3, 0, :, 4:])  # right moves right, mirrored or not
    assert 0 < flips < 8


def test_evaluation_has_each_motion_of_each_video_once(tiny: Path) -> None:
    data = data_of(tiny)
    batches = list(val_loader(data))
    labels, indices = (torch.cat([batch[key] for batch in batches]) for key in ("label", "index"))
    assert indices.tolist() == list(range(9 * VIDEOS)) and labels.tolist() == list(range(9)) * VIDEOS
    assert batches[0]["video"].shape[1:] == (1, T, 3, CROP, CROP)
    assert class_names(data) == MOTION_NAMES
    with pytest.raises(ValueError, match="data.task: mosi is tested on one crop and one clip, not 3 crops"):
        test_loader(data, crops=3)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.num_classes=4", "data.num_classes: must be 9 with data.task: mosi, one a motion"),
        ("data.scale_size=32", "data.scale_size: must be above data.input_size 32 with data.task: mosi"),
        ("data.num_sample=2", "data.num_sample: has no effect with data.task: mosi"),
        ("data.dense=true", "data.dense: has no effect with data.task: mosi"),
        ("data.tast=mosi", "data.tast: unknown key; did you mean data.task"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        data_of(tiny, override)


def test_more_settings_that_do_not_fit(tiny: Path) -> None:
    for override, sentence in (
        ("data.static_mask=true", "data.static_mask: is for data.task: mosi"),
        (
            "data.reversed_classes=true data.num_classes=5",
            "data.num_classes: must be twice the classes of the lists .*, not 5",
        ),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_config(tiny, override.split())


def test_reversed_classes_show_the_same_videos_backwards(tiny: Path) -> None:
    plain, data = load_config(tiny).data, load_config(tiny, ["data.reversed_classes=true", "data.num_classes=8"]).data
    once, twice = val_loader(plain).dataset, val_loader(data).dataset
    assert len(twice) == 2 * len(once) == 2 * VIDEOS
    for index in (0, 5):
        forwards, backwards, original = twice[index], twice[VIDEOS + index], once[index]
        assert torch.equal(forwards["video"], original["video"]) and forwards["label"] == original["label"]
        assert torch.equal(backwards["video"], original["video"].flip(1))
        assert backwards["label"] == original["label"] + 4 and backwards["path"] == original["path"]
    names = class_names(plain)
    assert class_names(data) == (*names, *(f"{name}, reversed" for name in names))
    assert len(train_loader(data, seed=0).dataset) == 2 * len(train_loader(plain, seed=0).dataset)


def test_from_the_pretext_task_to_the_classes(tiny: Path, tmp_path: Path) -> None:
    """Train on motions, test, and start the training on the real classes from it."""
    mosi = ("data.task=mosi", "data.num_classes=9", f"data.scale_size={SIDE}",
            "solver.epochs=1", "data.batch_size=2")  # fmt: skip
    run = train(tiny, tmp_path / "mosi", *mosi)
    (row,) = metrics(run)
    result = evaluated(run / "config.yaml", run / "model_best.pt", tmp_path / "one.json")
    assert (result["top1"], result["videos"]) == (row["top1"], 9 * VIDEOS)
    start = f"pretrain={run / 'last_model.pt'}"
    assert "its classifier has 9 classes, data.num_classes is 4" in training_refusal(tiny, tmp_path / "no", start)
    done = train(tiny, tmp_path / "real", start, "pretrain_head=drop", "solver.epochs=1")
    assert len(metrics(done)) == 1
    status, text = command("test_vision.py", "--config", tiny, "--weights", run / "model_best.pt")
    assert status != 0 and "data.task was mosi and is now classify" in text
