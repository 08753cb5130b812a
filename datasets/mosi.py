"""MoSI: nine motions of a crop over one still frame, which only a model that sees motion can tell apart.

Each frame gives nine clips of T frames, one a motion: rest, and two speeds in four directions. The background comes
from one picture, so a single frame of a clip says nothing, and the average of all frames at best axis and speed: a
motion and its opposite have the same average. A model that is blind to order reaches 5 of 9.

Source: Huang et al., CVPR 2021 (arXiv 2104.00240), section 3. The authors' code mirrors a clip after it is made and
keeps its label; here the picture is mirrored before.

Letters: T frames, s side of the square picture, S side of the crop, in pixels.
"""

from __future__ import annotations

import math

import numpy as np

# Speeds (x, y) by label, in the authors' order: right and down are positive, 2 crosses the picture in T frames, 1 half of it.
MOTIONS = ((-2, 0), (-1, 0), (1, 0), (2, 0), (0, -2), (0, -1), (0, 1), (0, 2), (0, 0))
MOTION_NAMES = (
    *("left fast", "left slow", "right slow", "right fast", "up fast", "up slow", "down slow", "down fast", "rest"),
)
MASK_SIDES = (0.3, 0.5)  # smallest and largest side of the moving rectangle, as a share of the crop's


def path(side: int, crop: int, speed: int, frames: int, rng: np.random.Generator | None) -> np.ndarray:
    """Where the crop begins in each frame, along one axis.

    It covers (side - crop) * speed / 2 pixels. Where it starts is uniform among the starts that keep it inside.

    Args:
        rng: None for the start in the middle of those.

    Returns:
        (T,) int64.
    """
    distance = (side - crop) * speed / 2
    first, last = math.ceil(max(0, -distance)), math.floor(min(side - crop, side - crop - distance))
    start = (first + last) // 2 if rng is None else int(rng.integers(first, last, endpoint=True))
    return np.linspace(start, start + distance, frames).astype(np.int64)


def moving_clip(
    picture: np.ndarray, crop: int, frames: int, motion: tuple[int, int], rng: np.random.Generator | None = None
) -> np.ndarray:
    """The clip of one motion: (s, s, 3) -> (T, S, S, 3), both uint8.

    Args:
        crop: S, below s.
        motion: of MOTIONS.
        rng: draws where the motion starts; None for the middle.
    """
    columns, rows = (path(len(picture), crop, speed, frames, rng) for speed in motion)
    corners = zip(columns, rows, strict=True)
    return np.stack([picture[top : top + crop, left : left + crop] for left, top in corners])


def moving_clips(picture: np.ndarray, crop: int, frames: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """One clip a motion, in the order of the labels: (s, s, 3) -> (9, T, S, S, 3). See `moving_clip`."""
    return np.stack([moving_clip(picture, crop, frames, motion, rng) for motion in MOTIONS])


def with_static_mask(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A clip that stands still, at one random frame, outside a random rectangle: (T, S, S, 3) -> (T, S, S, 3)."""
    T, S = clip.shape[:2]
    height, width = (round(S * rng.uniform(*MASK_SIDES)) for _ in range(2))
    top, left = int(rng.integers(S - height, endpoint=True)), int(rng.integers(S - width, endpoint=True))
    still = np.repeat(clip[rng.integers(T)][None], T, 0)
    still[:, top : top + height, left : left + width] = clip[:, top : top + height, left : left + width]
    return still
