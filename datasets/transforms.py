"""Frames of a clip -> the square that a model sees, as uint8 pixels, with one random draw for all frames.

T is the number of frames, H and W their height and width in pixels, h and w those of a part of them, S the side of the
square that a model sees. Pixels are (T, H, W, 3). Training draws come from Python's global generator, and erasing from
torch's too; the caller seeds them. Normalising happens later, on the model's device.

Source of the recipe: HJYao00/Side4Video, Recognition/utils/Augmentation.py; the operations are torchvision's, timm's
and, for RandAugment, OpenCV's. A training crop is cut out of the frame as stored and resized once, where the recipe
resizes the frame to `scale_size` before it crops; frames stored at twice that size or more are decoded at a
fraction of it. On real video frames of 256 pixels and crops out of 256 the same draw gives the recipe's pixels within
0.3 of 255 on average and 3 for 99 %; on frames of 240 and 1080 pixels within 2.3 and 23, for there is one resampling
instead of two, and the edges of a crop are whole stored pixels. Evaluation has the recipe's pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, Protocol

import cv2
import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode

from datasets.box import Box
from datasets.rand_augment import RandAugment, Step
from datasets.readers import Frames
from datasets.seeding import seeded

ERASE_PROBABILITY = 0.25
ASPECT_RATIO = (3 / 4, 4 / 3)  # width / height of a random resized crop
CROPS = (1, 3, 5, 10)  # the crops a frame that EvalTransform knows


# ---- where a training view looks


class Crop(Protocol):
    """A rule for the part of the frames that a training view shows; the part is then resized to S x S."""

    def shrink(self, frames: Frames) -> Frames:
        """The frames at a fraction of their size, where they are stored much larger than the crop needs."""
        ...

    def draw(self, height: int, width: int) -> Box:
        """Draw one part of frames (H, W)."""
        ...


@dataclass(frozen=True)
class RandomResizedCrop:
    """Area and aspect ratio uniform, sides swapped half the time; where none of ten fits, a plain random crop.

    Args:
        scale_size: the size of the frame that the crop is drawn in: its short side, or exactly (height, width).
        area: smallest and largest share of the area that a crop covers.
    """

    scale_size: int | tuple[int, int]
    area: tuple[float, float] = (0.08, 1.0)

    def shrink(self, frames: Frames) -> Frames:
        return frames.reduced(*scaled(frames.height, frames.width, self.scale_size))

    def draw(self, height: int, width: int) -> Box:
        scaled_height, scaled_width = scaled(height, width, self.scale_size)
        for _ in range(10):
            area = random.uniform(*self.area) * scaled_height * scaled_width
            ratio = random.uniform(*ASPECT_RATIO)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if random.random() < 0.5:
                w, h = h, w
            if 0 < w <= scaled_width and 0 < h <= scaled_height:
                break
        else:
            w = h = min(scaled_height, scaled_width)
        top, left = random.randint(0, scaled_height - h), random.randint(0, scaled_width - w)
        return Box(top, left, top + h, left + w).rescaled((scaled_height, scaled_width), (height, width))


@dataclass(frozen=True)
class MultiScaleCrop:
    """Sides that are shares of the frame's short side, at one of 13 fixed positions. The frame is not resized before.

    Both sides are drawn together, from the pairs whose shares are the same or next to each other in `scales`. A side
    within 2 pixels of S becomes S.

    Source: TSN (Wang et al. 2016, section 3.2) and MCG-NJU/TDN, ops/transforms.py, GroupMultiScaleCrop.

    Args:
        input_size: S, pixels.
        scales: shares of the short side, in descending order.
    """

    input_size: int
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)

    def shrink(self, frames: Frames) -> Frames:
        return frames

    def draw(self, height: int, width: int) -> Box:
        h, w = random.choice(self.sides(height, width))
        top, left = random.choice(self.positions(height - h, width - w))
        return Box(top, left, top + h, left + w)

    def sides(self, height: int, width: int) -> list[tuple[int, int]]:
        """All pairs (h, w) for frames (H, W)."""
        sides = [int(scale * min(height, width)) for scale in self.scales]
        sides = [self.input_size if abs(side - self.input_size) <= 2 else side for side in sides]
        sides = [min(side, height, width) for side in sides]
        return [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]

    @staticmethod
    def positions(down: int, right: int) -> list[tuple[int, int]]:
        """The 13 (top, left) of a crop that leaves `down` rows and `right` columns of the frame out."""
        quarters = [
            (0, 0),
            (0, 4),
            (4, 0),
            (4, 4),
            (2, 2),
            (2, 0),
            (2, 4),
            (4, 2),
            (0, 2),
            (1, 1),
            (1, 3),
            (3, 1),
            (3, 3),
        ]
        return [(y * (down // 4), x * (right // 4)) for y, x in quarters]


@dataclass(frozen=True)
class RandomShortSideCrop:
    """A square of S x S pixels out of a frame whose short side is resized to a uniform whole number of pixels.

    Source: TAda2D (alibaba-mmai-research/TAdaConv), after SlowFast's random short side scale jitter.

    Args:
        input_size: S, pixels.
        short_side: smallest and largest short side in pixels, both included; not smaller than S.
    """

    input_size: int
    short_side: tuple[int, int]

    def shrink(self, frames: Frames) -> Frames:
        return frames.reduced(*scaled(frames.height, frames.width, self.short_side[1]))

    def draw(self, height: int, width: int) -> Box:
        scaled_height, scaled_width = scaled(height, width, random.randint(*self.short_side))
        top = random.randint(0, scaled_height - self.input_size)
        left = random.randint(0, scaled_width - self.input_size)
        box = Box(top, left, top + self.input_size, left + self.input_size)
        return box.rescaled((scaled_height, scaled_width), (height, width))


# ---- training


@dataclass(frozen=True)
class Draw:
    """All that is random about one training view of frames (H, W), drawn before a pixel is decoded.

    Attributes:
        boxes: what each step of RandAugment needs, then the crop, in pixels of the frames.
        steps: of RandAugment, maybe none.
        erase: seeds erasing.
    """

    height: int
    width: int
    boxes: tuple[Box, ...]
    steps: tuple[Step, ...]
    flip: bool
    gray: bool
    erase: int

    @property
    def needs(self) -> Box:
        """The part of the frames that must be decoded."""
        return self.boxes[0]


class TrainTransform:
    """RandAugment, random crop, flip, grayscale, erase: each drawn once a clip.

    Args:
        input_size: S, pixels.
        crop: how the crop is drawn.
        rand_aug_policy: RandAugment in timm's words, e.g. "rand-m7-n4-mstd0.5-inc1", on the frames as read, before
            anything else; None: no RandAugment.
        rand_erase: with probability 0.25, noise in a box of 2 % to a third of the area. The frames are seen as
            channels of one image: the box is the same in all of them, the noise is not. Its noise is of normalised
            pixels, so clips come out normalised, as float32.
        flip: flip left and right with probability 1/2.
        flip_pairs: labels that a flip exchanges, e.g. "pushing left to right" and "pushing right to left".
        gray_prob: probability of turning the clip grey.
        mean, std: of each channel, for pixels in 0..1; the mean fills what RandAugment's warps bring in.

    Raises:
        ValueError: a policy that timm does not know.
    """

    def __init__(
        self,
        input_size: int,
        crop: Crop,
        *,
        rand_aug_policy: str | None = None,
        rand_erase: bool = False,
        flip: bool = True,
        flip_pairs: Sequence[tuple[int, int]] = (),
        gray_prob: float = 0.0,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ):
        self.input_size, self.crop, self.flip, self.gray_prob = input_size, crop, flip, gray_prob
        self.mirrored_label = {a: b for pair in flip_pairs for a, b in (pair, pair[::-1])}
        self.mean, self.std = mean, std
        red, green, blue = (round(255 * value) for value in mean)
        self.rand_augment = RandAugment(rand_aug_policy, (red, green, blue)) if rand_aug_policy is not None else None
        self.erase = RandomErasing(ERASE_PROBABILITY, mode="pixel", max_count=1, device="cpu") if rand_erase else None

    def shrink(self, frames: Frames) -> Frames:
        """The frames at a fraction of their size, where they are stored much larger than the crop needs."""
        return self.crop.shrink(frames)

    def draw(self, height: int, width: int) -> Draw:
        """Decide everything about one view of frames (H, W)."""
        steps = self.rand_augment.draw() if self.rand_augment is not None else ()
        crop = self.crop.draw(height, width)
        boxes = self.rand_augment.boxes(steps, crop, height, width) if self.rand_augment is not None else [crop]
        flip = self.flip and random.random() < 0.5
        gray = random.random() < self.gray_prob
        return Draw(height, width, tuple(boxes), steps, flip, gray, erase=random.getrandbits(32))

    def __call__(self, frames: np.ndarray, origin: Box, draw: Draw, label: int) -> tuple[torch.Tensor, int]:
        """Make the view.

        Args:
            frames: (T, h, w, 3) uint8, the box `origin` of the frames; it holds `draw.needs`.
            label: of the video.

        Returns:
            (T, S, S, 3) uint8, or float32 and normalised with `rand_erase`; the label after a possible flip.
        """
        frames = draw.needs.cut(frames, origin)
        if self.rand_augment is not None:
            frames = self.rand_augment(frames, draw.steps, draw.boxes, draw.height, draw.width)
        video = _resized(frames, (self.input_size, self.input_size), InterpolationMode.BILINEAR)  # (T, S, S, 3)
        if draw.flip:
            video, label = _mirrored(video), self.mirrored_label.get(label, label)
        if draw.gray:
            video = F.rgb_to_grayscale(video.movedim(-1, 1), num_output_channels=3).movedim(1, -1)
        if self.erase is not None:
            video = self._erased(video, draw.erase)
        return video.contiguous(), label

    def _erased(self, video: torch.Tensor, seed: int) -> torch.Tensor:
        """(T, S, S, 3) uint8 -> normalised float32, maybe with a box of noise, which is drawn frame by frame."""
        frames = video.movedim(-1, 1).contiguous()  # (T, 3, S, S)
        frames = F.normalize(F.to_dtype(frames, torch.float32, scale=True), self.mean, self.std)
        with seeded(seed):
            self.erase(frames.flatten(0, 1))  # in place, on a view of (T * 3, S, S)
        return frames.movedim(1, -1)


# ---- evaluation


EvalRule = Literal["clip", "tdn", "tada"]


class EvalTransform:
    """Resize and take fixed crops; nothing is random.

    The rules differ in the interpolation and, by a few pixels, in where the crops are:

    - clip: bicubic. A half of an odd number of pixels is rounded to the even one.
    - tdn: bilinear. Of several crops, the margins are multiples of four pixels, and three lie side by side in upright
      frames too. Source: MCG-NJU/TDN, the crops of its tests.
    - tada: bilinear, and not antialiased where frames shrink. Halves are rounded down. Source:
      alibaba-mmai-research/TAdaConv, tadaconv/datasets/utils, the crops of testing; it resizes floats.

    Args:
        input_size: S, pixels.
        scale_size: the short side in pixels, or the exact (height, width); not smaller than `input_size`.
        crops: 1 centre; 3 both ends of the long side and its centre (left, right, centre); 5 the corners
            (top left, top right, bottom left, bottom right) and the centre; 10 those five, then their mirror images.
        rule: of which authors.

    Raises:
        ValueError: another number of crops, or a scale_size that is smaller than input_size.
    """

    def __init__(self, input_size: int, scale_size: int | tuple[int, int], crops: int, rule: EvalRule = "clip"):
        if crops not in CROPS:
            raise ValueError(f"crops must be one of {', '.join(map(str, CROPS))}, not {crops}")
        if input_size > (scale_size if isinstance(scale_size, int) else min(scale_size)):
            raise ValueError(f"scale_size {scale_size} is smaller than input_size {input_size}")
        self.input_size, self.scale_size, self.crops, self.rule = input_size, scale_size, crops, rule

    def __call__(self, frames: Frames) -> torch.Tensor:
        """T frames -> (crops, T, S, S, 3) uint8."""
        size = scaled(frames.height, frames.width, self.scale_size)
        side = self.input_size
        crops = [Box(top, left, top + side, left + side) for top, left in self._corners(*size)]
        if size == (frames.height, frames.width):  # no resize: decode only what the crops show
            origin = reduce(Box.joined, crops)
            pixels = frames.decode(origin)
        else:
            origin = Box(0, 0, *size)
            mode = InterpolationMode.BICUBIC if self.rule == "clip" else InterpolationMode.BILINEAR
            pixels = _resized(frames.decode(), size, mode, antialias=self.rule != "tada").numpy()  # (T, H, W, 3)
        views = [crop.cut(pixels, origin) for crop in crops]
        if self.crops == 10:
            views += [view[:, :, ::-1] for view in views]
        return torch.from_numpy(np.stack(views))

    def _corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) of each crop that is not mirrored."""
        bottom, right = height - self.input_size, width - self.input_size
        if self.rule == "tdn" and self.crops > 1:
            bottom, right = bottom // 4 * 4, right // 4 * 4
        half = math.floor if self.rule == "tada" else round
        centre = (half(bottom / 2), half(right / 2))
        if self.crops == 1:
            return [centre]
        if self.crops == 3:
            if width >= height or self.rule == "tdn":
                return [(centre[0], 0), (centre[0], right), centre]
            return [(0, centre[1]), (bottom, centre[1]), centre]
        return [(0, 0), (0, right), (bottom, 0), (bottom, right), centre]


def picture(frames: Frames, side: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """A square of the first frame, whose short side is resized to `side`: (side, side, 3) uint8.

    Args:
        rng: draws where it lies on the long side; None for the centre.
    """
    height, width = scaled(frames.height, frames.width, side)
    pixels = _resized(frames.decode()[:1], (height, width), InterpolationMode.BICUBIC)[0].numpy()
    room = height - side, width - side
    top, left = (each // 2 if rng is None else int(rng.integers(each, endpoint=True)) for each in room)
    return pixels[top : top + side, left : left + side]


# ---- pixels


def scaled(height: int, width: int, scale_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width after a resize to a short side of `scale_size`, or to exactly (height, width)."""
    if not isinstance(scale_size, int):
        return scale_size
    short, long = min(height, width), max(height, width)
    sides = scale_size, int(scale_size * long / short)
    return sides if height <= width else sides[::-1]


def _resized(
    frames: np.ndarray, size: tuple[int, int], interpolation: InterpolationMode, antialias: bool = True
) -> torch.Tensor:
    """(T, h, w, 3) uint8 -> (T, *size, 3) uint8. torchvision wants a view with the channels first."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, 1)  # (T, 3, h, w)
    return F.resize(video, list(size), interpolation, antialias=antialias).movedim(1, -1)


def _mirrored(video: torch.Tensor) -> torch.Tensor:
    """(T, S, S, 3) uint8 with left and right exchanged; OpenCV does it faster than torch."""
    rows = video.contiguous().flatten(0, 1).numpy()  # (T * S, S, 3)
    return torch.from_numpy(cv2.flip(rows, 1)).view(video.shape)
