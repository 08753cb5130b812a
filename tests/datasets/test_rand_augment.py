"""RandAugment for a clip gives what timm and Pillow give for each frame, and needs no more than the crop shows."""

import random

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform

from datasets.box import Box
from datasets.rand_augment import LOOKS_AT, STATISTICS, WARPS, RandAugment, Step

POLICY = "rand-m7-n4-mstd0.5-inc1"
FILL = (123, 117, 104)
# (name, arguments, mean difference from Pillow that is allowed, and share of values off by more than 16)
CASES = [
    ("AutoContrast", (), 0, 0), ("Equalize", (), 0, 0), ("Invert", (), 0, 0),
    ("PosterizeIncreasing", (2,), 0, 0), ("PosterizeIncreasing", (1,), 0, 0), ("PosterizeIncreasing", (8,), 0, 0),
    ("SolarizeIncreasing", (90,), 0, 0), ("SolarizeAdd", (70,), 0, 0),
    ("BrightnessIncreasing", (1.6,), 0, 0), ("BrightnessIncreasing", (0.4,), 0, 0),
    ("ContrastIncreasing", (1.6,), 1, 0), ("ContrastIncreasing", (0.4,), 1, 0),
    ("ColorIncreasing", (1.6,), 1, 0), ("ColorIncreasing", (0.4,), 1, 0),
    ("SharpnessIncreasing", (1.6,), 1, 0), ("SharpnessIncreasing", (0.4,), 1, 0),
    ("Rotate", (17.3,), 2, 0.01), ("Rotate", (-8.0,), 2, 0.01),
    ("ShearX", (0.2,), 2, 0.01), ("ShearY", (-0.25,), 2, 0.01),
    ("TranslateXRel", (0.31,), 1, 0), ("TranslateXRel", (-0.45,), 1, 0), ("TranslateXRel", (0.25,), 1, 0),
    ("TranslateYRel", (0.123,), 1, 0), ("TranslateYRel", (-0.2,), 1, 0), ("TranslateYRel", (0.99,), 1, 0),
]  # fmt: skip


def clip(T=3, height=96, width=128, seed=0):
    """Smooth frames with a few hard edges, dark and bright parts, and all three channels different."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(T):
        coarse = Image.fromarray(rng.integers(20, 230, (6, 8, 3), dtype=np.uint8))
        frame = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
        frame[30:60, 40:80] = rng.integers(0, 256, 3)
        frames.append(frame)
    return np.stack(frames)


def by_pillow(frames, name, args):
    options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    return np.stack([np.asarray(NAME_TO_OP[name](Image.fromarray(frame), *args, **options)) for frame in frames])


@pytest.mark.parametrize("box", [Box(0, 0, 96, 128), Box(17, 25, 81, 99), Box(0, 60, 40, 128)])
@pytest.mark.parametrize(("name", "args", "mean", "share"), CASES)
def test_each_operation_is_pillows(name, args, mean, share, box):
    frames, steps = clip(), [Step(name, args)]
    whole, augment = Box(0, 0, 96, 128), RandAugment(POLICY, FILL)
    boxes = augment.boxes(steps, box, 96, 128)
    ours = augment(boxes[0].cut(frames, whole), steps, boxes, 96, 128)
    difference = np.abs(ours.astype(int) - box.cut(by_pillow(frames, name, args), whole))
    assert ours.dtype == np.uint8 and difference.mean() <= mean and (difference > 16).mean() <= share
    if mean == 0:
        assert difference.max() == 0
    elif share == 0:
        assert difference.max() <= 2


def test_one_value_in_a_channel():
    frames = np.full((2, 9, 9, 3), 77, np.uint8)
    for name in STATISTICS:
        args = (1.5,) if name == "Contrast" else ()
        whole = [Box(0, 0, 9, 9)] * 2
        assert (
            RandAugment(POLICY, FILL)(frames, [Step(name, args)], whole, 9, 9) == by_pillow(frames, name, args)
        ).all()


def test_a_crop_is_the_crop_of_the_whole():
    """Whatever is drawn: working out only what a box needs changes no pixel of it."""
    augment, frames, whole = RandAugment(POLICY, FILL), clip(2), Box(0, 0, 96, 128)
    random.seed(0)
    seen, least = set(), 1.0
    for number in range(150):
        steps = augment.draw()
        top, left = random.randrange(60), random.randrange(80)
        box = Box(top, left, top + random.randrange(10, 36), left + random.randrange(10, 48))
        full = augment(frames, steps, [whole] * (len(steps) + 1), 96, 128)
        boxes = augment.boxes(steps, box, 96, 128)
        hidden = np.full_like(frames, number)  # nothing outside the first box may matter
        boxes[0].cut(hidden, whole)[:] = boxes[0].cut(frames, whole)
        part = augment(boxes[0].cut(hidden, whole), steps, boxes, 96, 128)
        difference = np.abs(part.astype(int) - box.cut(full, whole))
        assert part.shape == (2, box.bottom - box.top, box.right - box.left, 3)
        assert difference.max() <= (3 if any(step.name in WARPS for step in steps) else 0), steps
        seen |= {step.name for step in steps}
        least = min(least, (boxes[0].bottom - boxes[0].top) * (boxes[0].right - boxes[0].left) / (96 * 128))
    assert len(seen) == 15 and least < 0.1


def test_draws_are_timms():
    """The same operations with the same arguments as timm makes for an image, from the same generators."""
    augment = RandAugment(POLICY, FILL)
    timms = rand_augment_transform(POLICY, {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC})
    made = []
    for operation in timms.ops:
        operation.aug_fn = lambda image, *args, name=operation.name, **_: made.append((name, args)) or image
    for number in range(30):
        random.seed(number)
        steps, after = augment.draw(), random.random()
        random.seed(number)
        np.random.seed(random.getrandbits(32))
        made.clear()
        timms(None)
        assert [tuple(step) for step in steps] == made and random.random() == after


def test_draws_leave_numpys_generator_alone():
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    RandAugment(POLICY, FILL).draw()
    assert np.random.rand() == expected


def test_every_operation_of_timms_policy_is_known():
    assert {operation.name for operation in rand_augment_transform(POLICY, {}).ops} <= set(LOOKS_AT)
