"""Frames of a clip -> normalised tensor, with one random draw for all of them.

Lives here: what training and evaluation do to pixels, with plain arguments.
Does not live here: which dataset flips or turns grey (traits.py) and who seeds the draws (video_dataset.py): the
transforms draw from Python's, NumPy's and torch's global generators.

T is the number of frames, H and W their height and width in pixels, S the side of the square that a model sees.
Source of the recipe: HJYao00/Side4Video, Recognition/utils/Augmentation.py; the operations are torchvision's and timm's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode

RAND_AUGMENT = "rand-m7-n4-mstd0.5-inc1"
RAND_AUGMENT_SIDE = 256  # the image side that RandAugment's translations are measured by
ERASE_PROBABILITY = 0.25
ASPECT_RATIO = (3 / 4, 4 / 3)  # width / height of a training crop
CROPS = (1, 3, 5, 10)  # the views a frame that EvalTransform knows


class TrainTransform:
    """RandAugment, resize, random crop, flip, grayscale, normalise, erase: each drawn once a clip.

    Args:
        input_size: S, pixels.
        scale_size: before cropping, the short side in pixels, or the exact (height, width).
        rand_aug: RandAugment "rand-m7-n4-mstd0.5-inc1" on the frames as read, before anything else.
        rand_erase: with probability 0.25, noise in a box of 2 % to a third of the area. The frames are seen as
            channels of one image: the box is the same in all of them, the noise is not.
        flip: flip left and right with probability 1/2.
        flip_pairs: labels that a flip exchanges, e.g. "pushing left to right" and "pushing right to left".
        gray_prob: probability of turning the clip grey.
        crop_scale: smallest and largest share of the area that a crop covers.
        mean, std: of each channel, for pixels in 0..1.
    """

    def __init__(
        self,
        input_size: int,
        scale_size: int | tuple[int, int],
        *,
        rand_aug: bool = False,
        rand_erase: bool = False,
        flip: bool = True,
        flip_pairs: Sequence[tuple[int, int]] = (),
        gray_prob: float = 0.0,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ):
        self.input_size, self.scale_size = input_size, scale_size
        self.flip, self.gray_prob, self.crop_scale = flip, gray_prob, crop_scale
        self.mirrored = {a: b for pair in flip_pairs for a, b in (pair, pair[::-1])}
        self.mean, self.std = mean, std
        hparams = {
            "translate_const": int(RAND_AUGMENT_SIDE * 0.45),
            "img_mean": tuple(round(255 * value) for value in mean),
            "interpolation": Image.Resampling.BICUBIC,
        }
        self.rand_augment = rand_augment_transform(RAND_AUGMENT, hparams) if rand_aug else None
        self.erase = RandomErasing(ERASE_PROBABILITY, mode="pixel", max_count=1, device="cpu") if rand_erase else None

    def __call__(self, frames: np.ndarray, label: int) -> tuple[torch.Tensor, int]:
        """(T, H, W, 3) uint8 and its label -> (T, 3, S, S) float32 and the label after a possible flip."""
        if self.rand_augment is not None:
            frames = self._rand_augment(frames)
        video = _to_video(frames)
        video = _resize(video, self.scale_size)
        video = self._random_crop(video)
        if self.flip and random.random() < 0.5:
            video, label = F.horizontal_flip(video), self.mirrored.get(label, label)
        if random.random() < self.gray_prob:
            video = F.rgb_to_grayscale(video, num_output_channels=3)
        video = _normalize(video, self.mean, self.std)
        if self.erase is not None:
            self.erase(video.flatten(0, 1))  # in place, on a view of (T * 3, S, S)
        return video, label

    def _rand_augment(self, frames: np.ndarray) -> np.ndarray:
        python_state, numpy_state = random.getstate(), np.random.get_state()
        augmented = []
        for frame in frames:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            augmented.append(np.asarray(self.rand_augment(Image.fromarray(frame))))
        return np.stack(augmented)

    def _random_crop(self, video: torch.Tensor) -> torch.Tensor:
        """Area and aspect ratio uniform, sides swapped half the time; where none of ten fits, a plain random crop."""
        height, width = video.shape[-2:]
        for _ in range(10):
            area = random.uniform(*self.crop_scale) * height * width
            ratio = random.uniform(*ASPECT_RATIO)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if random.random() < 0.5:
                w, h = h, w
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w = h = min(height, width)
        top, left = random.randint(0, height - h), random.randint(0, width - w)
        size = [self.input_size, self.input_size]
        return F.resized_crop(video, top, left, h, w, size, InterpolationMode.BILINEAR, antialias=True)


class EvalTransform:
    """Resize and take fixed crops; nothing is random.

    Args:
        input_size: S, pixels.
        scale_size: the short side in pixels, or the exact (height, width); not smaller than `input_size`.
        crops: 1 centre; 3 both ends of the long side and its centre (left, right, centre); 5 the corners
            (top left, top right, bottom left, bottom right) and the centre; 10 those five, then their mirror images.
        mean, std: of each channel, for pixels in 0..1.

    Raises:
        ValueError: another number of crops, or a scale_size that is smaller than input_size.
    """

    def __init__(
        self,
        input_size: int,
        scale_size: int | tuple[int, int],
        crops: int,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ):
        if crops not in CROPS:
            raise ValueError(f"crops must be one of {', '.join(map(str, CROPS))}, not {crops}")
        if input_size > (scale_size if isinstance(scale_size, int) else min(scale_size)):
            raise ValueError(f"scale_size {scale_size} is smaller than input_size {input_size}")
        self.input_size, self.scale_size, self.crops = input_size, scale_size, crops
        self.mean, self.std = mean, std

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """(T, H, W, 3) uint8 -> (crops, T, 3, S, S) float32."""
        video = _resize(_to_video(frames), self.scale_size)
        size = self.input_size
        corners = self._corners(*video.shape[-2:])
        views = [video[..., top : top + size, left : left + size] for top, left in corners]
        if self.crops == 10:
            views += [F.horizontal_flip(view) for view in views]
        return _normalize(torch.stack(views), self.mean, self.std)

    def _corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) of each crop that is not mirrored."""
        bottom, right = height - self.input_size, width - self.input_size
        centre = (round(bottom / 2), round(right / 2))
        if self.crops == 1:
            return [centre]
        if self.crops == 3:
            ends = [(centre[0], 0), (centre[0], right)] if width >= height else [(0, centre[1]), (bottom, centre[1])]
            return [*ends, centre]
        return [(0, 0), (0, right), (bottom, 0), (bottom, right), centre]


def _to_video(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # (T, 3, H, W) uint8


def _resize(video: torch.Tensor, scale_size: int | tuple[int, int]) -> torch.Tensor:
    """(T, 3, H, W) uint8 to a short side of `scale_size`, or to exactly (height, width); bicubic."""
    size = [scale_size] if isinstance(scale_size, int) else list(scale_size)
    return F.resize(video, size, InterpolationMode.BICUBIC, antialias=True)


def _normalize(video: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(..., 3, S, S) uint8 -> float32, zero mean and unit variance."""
    video = F.to_dtype(video.contiguous(), torch.float32, scale=True)
    return F.normalize(video, list(mean), list(std), inplace=True)
