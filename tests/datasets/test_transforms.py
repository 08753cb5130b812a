"""Transforms: one draw a clip, the crops of the field, labels that follow a flip."""

import random

import numpy as np
import pytest
import torch

from datasets.box import Box
from datasets.readers import DecodedFrames
from datasets.transforms import EvalTransform, TrainTransform, scaled

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
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
    transform = TrainTransform(32, 40, rand_aug=True, gray_prob=0.5, mean=MEAN, std=STD)
    outputs = []
    for number in range(25):
        seed(number)
        video, label = train(transform, equal_frames(), 3)
        assert video.shape == (4, 3, 32, 32) and video.dtype == torch.uint8 and label == 3
        assert (video == video[:1]).all()
        outputs.append(video[0])
    assert len({tuple(frame.flatten().tolist()) for frame in outputs}) == 25


def test_same_seed_same_clip():
    transform = TrainTransform(32, 40, rand_aug=True, rand_erase=True, gray_prob=0.5, mean=MEAN, std=STD)
    for number in range(10):
        seed(number)
        first, _ = train(transform, equal_frames())
        seed(number)
        again, _ = train(transform, equal_frames())
        assert (first == again).all()


def test_rand_augment_draws_anew_for_each_clip():
    transform = TrainTransform(40, 40, rand_aug=True, flip=False, crop_scale=(1.0, 1.0), mean=MEAN, std=STD)
    seed(0)
    clips = [train(transform, equal_frames(height=40, width=40))[0].numpy() for _ in range(12)]
    assert len({clip.tobytes() for clip in clips}) > 6


def test_erasing_takes_the_same_box_in_all_frames():
    frames = np.full((4, 40, 40, 3), 128, np.uint8)
    plain = 128 / 255
    transform = TrainTransform(32, 40, flip=False, rand_erase=True, **PLAIN)
    erased = 0
    for number in range(200):
        seed(number)
        changed = (train(transform, frames)[0] - plain).abs() > 1e-6  # (T, 3, S, S)
        if changed.any():
            erased += 1
            assert (changed.any(1) == changed.any(1)[:1]).all()
    assert 30 < erased < 70  # a quarter


def test_flip_exchanges_labels_and_only_with_the_flip():
    transform = TrainTransform(16, 16, flip_pairs=((1, 2),), crop_scale=(1.0, 1.0), **PLAIN)
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
        assert train(TrainTransform(16, 16, flip=False, flip_pairs=((1, 2),), **PLAIN), frames, 1)[1] == 1


def test_gray_probability():
    for probability in (0.0, 1.0, 0.3):
        transform = TrainTransform(16, 20, gray_prob=probability, **PLAIN)
        seed(1)
        videos = [train(transform, equal_frames(2))[0] for _ in range(200)]
        share = np.mean([bool((video[:, 0] == video[:, 1]).all()) for video in videos])
        assert abs(share - probability) < 0.1 and (share == probability or 0 < probability < 1)


def test_crops_cover_the_asked_area_and_shape():
    """A picture whose channels hold the coordinates shows what was cropped."""
    transform = TrainTransform(32, (200, 250), flip=False, crop_scale=(0.2, 0.5), **PLAIN)
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
    transform = TrainTransform(32, (32, 320), crop_scale=(1.0, 1.0), **PLAIN)
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


def test_bad_arguments():
    with pytest.raises(ValueError, match="one of 1, 3, 5, 10, not 2"):
        EvalTransform(32, 40, 2)
    with pytest.raises(ValueError, match="smaller than input_size"):
        EvalTransform(32, (40, 31), 1)


def test_input_is_not_changed():
    frames = equal_frames()
    before = frames.copy()
    transform = TrainTransform(32, 40, rand_aug=True, rand_erase=True, mean=MEAN, std=STD)
    whole = Box(0, 0, 60, 80)
    for _ in range(20):
        transform(frames, whole, transform.draw(60, 80), 0)
    evaluate(EvalTransform(60, 60, 10), frames)
    assert (frames == before).all()


def test_a_frame_of_the_scaled_size_is_not_scaled():
    for size in ((256, 341), (341, 256), (256, 256), (256, 455)):
        assert scaled(*size, 256) == size
    assert scaled(240, 320, 256) == (256, 341) and scaled(240, 427, (256, 320)) == (256, 320)
