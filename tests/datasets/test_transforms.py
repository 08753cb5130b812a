"""Transforms: one draw a clip, the crops of the field, labels that follow a flip."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.box import Box
from datasets.readers import DecodedFrames
from datasets.transforms import (
    EvalTransform,
    MultiScaleCrop,
    RandomResizedCrop,
    RandomShortSideCrop,
    TrainTransform,
    scaled,
)

TABLES = Path(__file__).parents[1] / "golden/tadn/tables"
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
POLICY = "rand-m7-n4-mstd0.5-inc1"
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def picture(height=60, width=80):
    """A smooth picture with another gradient in each channel."""
    rows, columns = np.mgrid[:height, :width]
    channels = [rows * 255 // height, columns * 255 // width, (rows + columns) * 255 // (height + width)]
    return np.stack(channels, -1).astype(np.uint8)


def equal_frames(T=4, **size):
    return np.stack([picture(**size)] * T)


def train(transform, pixels, label=0):
    """One view of (T, H, W, 3) pixels, of which no more than the draw needs is looked at: (T, 3, S, S), label."""
    height, width = pixels.shape[1:3]
    draw = transform.draw(height, width)
    whole = Box(0, 0, height, width)
    hidden = np.full_like(pixels, 99)
    draw.needs.cut(hidden, whole)[:] = draw.needs.cut(pixels, whole)
    video, label = transform(hidden, whole, draw, label)
    return video.permute(0, 3, 1, 2), label


def evaluate(transform, pixels):
    """All crops: (crops, T, 3, S, S)."""
    return transform(DecodedFrames(pixels)).permute(0, 1, 4, 2, 3)


def test_equal_frames_stay_equal():
    """Everything but erasing, whose noise differs, treats all frames alike."""
    transform = TrainTransform(32, RandomResizedCrop(40), rand_aug_policy=POLICY, gray_prob=0.5, mean=MEAN, std=STD)
    outputs = []
    for number in range(25):
        seed(number)
        video, label = train(transform, equal_frames(), 3)
        assert video.shape == (4, 3, 32, 32) and video.dtype == torch.uint8 and label == 3
        assert (video == video[:1]).all()
        outputs.append(video[0])
    assert len({tuple(frame.flatten().tolist()) for frame in outputs}) == 25


def test_same_seed_same_clip():
    transform = TrainTransform(
        32, RandomResizedCrop(40), rand_aug_policy=POLICY, rand_erase=True, gray_prob=0.5, mean=MEAN, std=STD
    )
    for number in range(10):
        seed(number)
        first, _ = train(transform, equal_frames())
        seed(number)
        again, _ = train(transform, equal_frames())
        assert (first == again).all()


def test_rand_augment_draws_again_for_each_clip():
    transform = TrainTransform(
        40, RandomResizedCrop(40, (1.0, 1.0)), rand_aug_policy=POLICY, flip=False, mean=MEAN, std=STD
    )
    seed(0)
    clips = [train(transform, equal_frames(height=40, width=40))[0].numpy() for _ in range(12)]
    assert len({clip.tobytes() for clip in clips}) > 6


def test_erasing_takes_the_same_box_in_all_frames():
    frames = np.full((4, 40, 40, 3), 128, np.uint8)
    plain = 128 / 255
    transform = TrainTransform(32, RandomResizedCrop(40), flip=False, rand_erase=True, **PLAIN)
    erased = 0
    for number in range(200):
        seed(number)
        changed = (train(transform, frames)[0] - plain).abs() > 1e-6  # (T, 3, S, S)
        if changed.any():
            erased += 1
            assert (changed.any(1) == changed.any(1)[:1]).all()
    assert 30 < erased < 70  # a quarter


def test_flip_exchanges_labels_and_only_with_the_flip():
    transform = TrainTransform(16, RandomResizedCrop(16, (1.0, 1.0)), flip_pairs=((1, 2),), **PLAIN)
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[:, :, 8:] = 255  # bright on the right
    flips = 0
    for number in range(100):
        for label, partner in ((1, 2), (2, 1), (0, 0)):
            seed(number)
            video, new = train(transform, frames, label)
            flipped = bool(video[..., :4].float().mean() > video[..., -4:].float().mean())
            assert new == (partner if flipped else label)
        flips += flipped
    assert 30 < flips < 70
    for number in range(30):
        seed(number)
        assert (
            train(TrainTransform(16, RandomResizedCrop(16), flip=False, flip_pairs=((1, 2),), **PLAIN), frames, 1)[1]
            == 1
        )


def test_gray_probability():
    for probability in (0.0, 1.0, 0.3):
        transform = TrainTransform(16, RandomResizedCrop(20), gray_prob=probability, **PLAIN)
        seed(1)
        videos = [train(transform, equal_frames(2))[0] for _ in range(200)]
        share = np.mean([bool((video[:, 0] == video[:, 1]).all()) for video in videos])
        assert abs(share - probability) < 0.1 and (share == probability or 0 < probability < 1)


def test_crops_cover_the_requested_area_and_shape():
    """A picture whose channels hold the coordinates shows what was cropped."""
    transform = TrainTransform(32, RandomResizedCrop((200, 250), (0.2, 0.5)), flip=False, **PLAIN)
    seed(2)
    areas, ratios, lefts = [], [], []
    for _ in range(300):
        video = train(transform, np.stack([picture(200, 250)]))[0] / 255
        # the outermost samples lie half a step inside the crop
        height = float(video[0, 0, -1].mean() - video[0, 0, 0].mean()) * 32 / 31
        width = float(video[0, 1, :, -1].mean() - video[0, 1, :, 0].mean()) * 32 / 31
        areas.append(height * width)
        ratios.append(width * 250 / (height * 200))
        lefts.append(float(video[0, 1, :, 0].mean()))
    assert 0.18 < min(areas) < 0.22 and 0.47 < max(areas) < 0.53
    assert 0.72 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.39
    assert 0.45 < np.mean(np.array(ratios) > 1) < 0.55  # sides swapped half the time
    assert min(lefts) < 0.05 and max(lefts) > 0.5


def test_crop_that_never_fits_takes_the_short_side():
    transform = TrainTransform(32, RandomResizedCrop((32, 320), (1.0, 1.0)), **PLAIN)
    assert train(transform, equal_frames(2))[0].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("crops", [1, 3, 5, 10])
def test_eval_shapes_and_determinism(crops):
    transform = EvalTransform(32, 40, crops)
    video = evaluate(transform, equal_frames())
    assert video.shape == (crops, 4, 3, 32, 32) and video.dtype == torch.uint8
    assert (video == evaluate(transform, equal_frames())).all()


def test_eval_crops_are_where_they_should_be():
    frames = equal_frames(1, height=40, width=60)  # no resize: the short side is 40 already
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)

    def cut(top, left):
        return pixels[..., top : top + 32, left : left + 32]

    one = evaluate(EvalTransform(32, 40, 1), frames)
    three = evaluate(EvalTransform(32, 40, 3), frames)
    ten = evaluate(EvalTransform(32, 40, 10), frames)
    assert torch.equal(one[0], cut(4, 14))
    for view, left in zip(three, (0, 28, 14), strict=True):
        assert torch.equal(view, cut(4, left))
    for view, corner in zip(ten, ((0, 0), (0, 28), (8, 0), (8, 28), (4, 14)), strict=False):
        assert torch.equal(view, cut(*corner))
    assert (ten[5:] == ten[:5].flip(-1)).all()
    assert (evaluate(EvalTransform(32, 40, 5), frames) == ten[:5]).all()


def test_three_crops_of_an_upright_video_go_down():
    frames = equal_frames(1, height=60, width=40)
    three = evaluate(EvalTransform(32, 40, 3), frames)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    for view, top in zip(three, (0, 28, 14), strict=True):
        assert torch.equal(view, pixels[..., top : top + 32, 4:36])


def test_something_resize_ignores_the_aspect():
    """(height, width) squeezes a wide video, a short side does not."""
    frames = equal_frames(1, height=40, width=100)
    exact = evaluate(EvalTransform(40, (40, 50), 3), frames)
    short = evaluate(EvalTransform(40, 40, 3), frames)
    exact_range, short_range = (int(view[2, 0, 1].max()) - int(view[2, 0, 1].min()) for view in (exact, short))
    assert exact_range > 191 > 115 > short_range


def coordinates(height, width):
    """One frame whose red is the row and whose green is the column; blue tells columns from 256 on."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows % 256, columns % 256, columns // 256], -1).astype(np.uint8)[None]


def test_three_crops_of_tdn():
    """In frames of the scaled size, which are not resized: their first pixel says where they are."""
    cases = json.loads((TABLES / "crops_test_tdn.json").read_text())
    assert cases
    for case in cases:
        transform = EvalTransform(case["crop"], 256, 3, "tdn")
        views = evaluate(transform, coordinates(case["height"], case["width"]))[:, 0].int()
        for view, (left, top, right, bottom) in zip(views, case["boxes_left_right_center"], strict=True):
            row, column, over = view[:, 0, 0].tolist()
            assert (column + 256 * over, row, *view.shape[1:]) == (left, top, bottom - top, right - left), case


@pytest.mark.parametrize("end", ["corner", "end"])
def test_crops_of_tada(end):
    """Of a frame that grows by 20 a pixel around the expected place: a corner of the crop is grey to a tenth of a pixel."""
    cases = json.loads((TABLES / "crops_test_tada.json").read_text())
    assert cases
    for case in cases:
        rows, columns = np.mgrid[: case["height"], : case["width"]]
        steps = [rows - case[f"row_of_{end}"], columns - case[f"column_of_{end}"], 0 * rows]
        frame = np.clip(np.round(128 + 20 * np.stack(steps, -1)), 0, 255).astype(np.uint8)
        views = evaluate(EvalTransform(case["crop"], case["test_scale"], case["crops"], "tada"), frame[None])[:, 0]
        view = views[case["index"] if len(views) == 1 else (0, 2, 1)[case["index"]]]  # theirs: start, centre, end
        corner = view[:, 0, 0] if end == "corner" else view[:, -1, -1]
        assert np.abs(corner.numpy().astype(int) - 128).max() <= 2, case


def test_where_the_crops_of_tada_are():
    """Halves are rounded down, in every direction; clip's go to the even number, tdn's margins are multiples of 4."""
    frames = coordinates(256, 455)
    for rule, left in (("tada", [0, 199, 99]), ("clip", [0, 199, 100]), ("tdn", [0, 196, 98])):
        views = evaluate(EvalTransform(256, 256, 3, rule), frames)[:, 0]
        assert views[:, 1, 0, 0].tolist() == left, rule
    for rule, left in (("tada", 99), ("clip", 100), ("tdn", 100)):
        assert evaluate(EvalTransform(256, 256, 1, rule), frames)[0, 0, 1, 0, 0] == left, rule


def test_interpolation_of_evaluation():
    frames = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    theirs = {
        "tdn": Image.fromarray(frames[0]).resize((32, 32), Image.Resampling.BILINEAR),
        "tada": torch.nn.functional.interpolate(
            torch.from_numpy(frames).permute(0, 3, 1, 2).float(), (32, 32), mode="bilinear", align_corners=False
        )[0].permute(1, 2, 0),
    }
    for rule, expected in theirs.items():
        view = evaluate(EvalTransform(32, 32, 1, rule), frames)[0, 0].permute(1, 2, 0).numpy()
        assert np.abs(view.astype(float) - np.asarray(expected, float)).max() <= 1, rule


def test_bad_arguments():
    with pytest.raises(ValueError, match="one of 1, 3, 5, 10, not 2"):
        EvalTransform(32, 40, 2)
    with pytest.raises(ValueError, match="smaller than input_size"):
        EvalTransform(32, (40, 31), 1)


def test_input_is_not_changed():
    frames = equal_frames()
    before = frames.copy()
    transform = TrainTransform(32, RandomResizedCrop(40), rand_aug_policy=POLICY, rand_erase=True, mean=MEAN, std=STD)
    whole = Box(0, 0, 60, 80)
    for _ in range(20):
        transform(frames, whole, transform.draw(60, 80), 0)
    evaluate(EvalTransform(60, 60, 10), frames)
    assert (frames == before).all()


def test_a_frame_of_the_scaled_size_is_not_scaled():
    for size in ((256, 341), (341, 256), (256, 256), (256, 455)):
        assert scaled(*size, 256) == size
    assert scaled(240, 320, 256) == (256, 341) and scaled(240, 427, (256, 320)) == (256, 320)


# ---- other training crops

CROPS = {
    "random_resized": RandomResizedCrop(40),
    "multi_scale": MultiScaleCrop(32),
    "random_short_side": RandomShortSideCrop(32, (36, 50)),
}


@pytest.mark.parametrize("name", CROPS)
def test_every_crop_treats_all_frames_alike_and_repeats_with_its_seed(name):
    transform = TrainTransform(32, CROPS[name], rand_aug_policy=POLICY, flip_pairs=((1, 2),), mean=MEAN, std=STD)
    seen, labels = set(), set()
    for number in range(25):
        found = []
        for _ in range(2):
            seed(number)
            video, label = train(transform, equal_frames(), label=1)
            assert video.shape == (4, 3, 32, 32) and video.dtype == torch.uint8 and (video == video[:1]).all()
            found.append((video[0].numpy().tobytes(), label))
        assert found[0] == found[1]
        seen.add(found[0][0])
        labels.add(label)
    assert len(seen) > 20 and labels == {1, 2}


def test_multi_scale_sides_are_pairs_of_neighbouring_scales():
    sides = MultiScaleCrop(224).sides(240, 320)
    assert sides == [
        (240, 240), (240, 210), (210, 240), (210, 210), (210, 180), (180, 210), (180, 180), (180, 158), (158, 180),
        (158, 158),
    ]  # fmt: skip
    assert (224, 224) in MultiScaleCrop(224).sides(257, 300)  # int(0.875 * 257) is 224
    assert (224, 224) in MultiScaleCrop(224).sides(226, 300) and (227, 227) in MultiScaleCrop(224).sides(227, 300)
    assert MultiScaleCrop(16, (1.0, 0.5)).sides(40, 60) == [(40, 40), (40, 20), (20, 40), (20, 20)]
    assert max(max(pair) for pair in MultiScaleCrop(224).sides(222, 300)) == 222  # never larger than the frame


def test_multi_scale_positions():
    assert MultiScaleCrop.positions(down=43, right=80) == [
        (0, 0), (0, 80), (40, 0), (40, 80), (20, 40), (20, 0), (20, 80), (40, 40), (0, 40), (10, 20), (10, 60),
        (30, 20), (30, 60),
    ]  # fmt: skip


def test_multi_scale_crops_are_tdns():
    cases = json.loads((TABLES / "crops_train_tdn.json").read_text())
    assert cases
    crop = MultiScaleCrop(224)
    for case in cases:
        height, width = case["height"], case["width"]
        pairs = crop.sides(height, width)
        assert [[w, h] for h, w in pairs] == case["pairs_width_height"], case
        for h, w in pairs:
            positions = crop.positions(height - h, width - w)
            assert [[x, y] for y, x in positions] == case["offsets_x_y"][f"{w}x{h}"], case


def test_multi_scale_draws_every_pair_and_position_about_equally():
    crop = MultiScaleCrop(32)
    seed(0)
    boxes = [crop.draw(60, 80) for _ in range(13000)]
    pairs, positions = {}, {}
    for box in boxes:
        pairs[box.height, box.width] = pairs.get((box.height, box.width), 0) + 1
        if (box.height, box.width) == (52, 45):
            positions[box.top, box.left] = positions.get((box.top, box.left), 0) + 1
        assert 0 <= box.top and box.bottom <= 60 and 0 <= box.left and box.right <= 80
    assert (
        set(pairs) == set(crop.sides(60, 80))
        and len(pairs) == 10
        and 1100 < min(pairs.values()) <= max(pairs.values()) < 1500
    )
    assert set(positions) == set(crop.positions(60 - 52, 80 - 45)) and len(positions) == 13
    assert 60 < min(positions.values()) <= max(positions.values()) < 140


def test_multi_scale_resizes_its_part_of_the_frame_and_nothing_before():
    """A frame of 1000 x 1500 pixels keeps its size: the sides are shares of 1000."""

    class Large(DecodedFrames):
        def reduced(self, *_):
            raise AssertionError("the frame was resized")

    frames = Large(np.zeros((1, 1000, 1500, 3), np.uint8))
    transform = TrainTransform(224, MultiScaleCrop(224), flip=False, **PLAIN)
    assert transform.shrink(frames) is frames
    seed(1)
    assert transform.draw(1000, 1500).needs.height in {1000, 875, 750, 660}


def test_random_short_side_is_uniform_and_its_crops_fill_the_frame():
    crop = RandomShortSideCrop(32, (36, 40))
    seed(2)
    boxes = [crop.draw(400, 600) for _ in range(5000)]  # ten stored pixels and more for each of the scaled frame
    heights = np.array([box.height for box in boxes])
    expected = {round(32 * 400 / short) for short in range(36, 41)}
    assert {int(height) for height in heights} <= {height + step for height in expected for step in (-1, 0, 1)}
    shorts = np.round(32 * 400 / heights).astype(int)
    counts = np.bincount(shorts, minlength=41)[36:]
    assert counts.sum() == 5000 and 900 < counts.min() and counts.max() < 1100
    for box in boxes:
        assert 0 <= box.top and box.bottom <= 400 and 0 <= box.left and box.right <= 600
        assert abs(box.height - box.width) <= 4  # the scaled width is a whole number, too
    assert min(box.top for box in boxes) == 0 and max(box.bottom for box in boxes) == 400
    assert min(box.left for box in boxes) == 0 and max(box.right for box in boxes) > 595


def test_random_short_side_of_the_stored_size_cuts_without_a_resize():
    transform = TrainTransform(32, RandomShortSideCrop(32, (60, 60)), flip=False, **PLAIN)
    frames = equal_frames(2)
    seed(3)
    draw = transform.draw(60, 80)
    video, _ = transform(frames, Box(0, 0, 60, 80), draw, 0)
    assert (video.numpy() == draw.needs.cut(frames, Box(0, 0, 60, 80))).all()


def test_random_short_side_decodes_large_frames_small():
    class Large(DecodedFrames):
        def reduced(self, least_height, least_width):
            self.least = least_height, least_width
            return self

    frames = Large(np.zeros((1, 1000, 1500, 3), np.uint8))
    TrainTransform(224, RandomShortSideCrop(224, (256, 320)), **PLAIN).shrink(frames)
    assert frames.least == (320, 480)


def test_the_mean_fills_what_a_warp_brings_in():
    transform = TrainTransform(32, RandomResizedCrop(40), rand_aug_policy=POLICY, mean=(0.2, 0.4, 0.6), std=STD)
    assert transform.rand_augment.fill == (51, 102, 153)


@pytest.mark.parametrize(
    "policy", ["rand-m7-q3", "rand-m7-n4-w0", "rand-m7.5", "rand-mstd", "augmix-m3", "rand-tweights", ""]
)
def test_unknown_policies(policy):
    with pytest.raises(ValueError, match="has an unknown part"):
        TrainTransform(32, RandomResizedCrop(40), rand_aug_policy=policy, mean=MEAN, std=STD)


def test_policies_are_timms():
    for policy, operations, count in (
        ("rand-m9-n2", "Brightness", 2),
        ("rand-m9-n3-p1-inc1", "BrightnessIncreasing", 3),
    ):
        augment = TrainTransform(32, RandomResizedCrop(40), rand_aug_policy=policy, mean=MEAN, std=STD).rand_augment
        seed(0)
        steps = [augment.draw() for _ in range(60)]
        assert operations in {step.name for draw in steps for step in draw}
        assert max(map(len, steps)) == count and (min(map(len, steps)) == count) == ("p1" in policy)
