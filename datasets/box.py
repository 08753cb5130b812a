"""A rectangle of pixels: the part of a frame that is read, augmented or shown.

Does not live here: how it is drawn (transforms.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """Pixels top..bottom-1, left..right-1 of a frame."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def clipped(self, height: int, width: int) -> Box:
        """What of it lies inside a frame (height, width); at least one pixel."""
        top, left = min(max(self.top, 0), height - 1), min(max(self.left, 0), width - 1)
        return Box(top, left, min(max(self.bottom, top + 1), height), min(max(self.right, left + 1), width))

    def moved(self, down: int, right: int) -> Box:
        return Box(self.top + down, self.left + right, self.bottom + down, self.right + right)

    def joined(self, other: Box) -> Box:
        """The smallest box that holds both."""
        return Box(
            min(self.top, other.top), min(self.left, other.left),
            max(self.bottom, other.bottom), max(self.right, other.right),
        )  # fmt: skip

    def cut(self, frames: np.ndarray, origin: Box) -> np.ndarray:
        """(T, ., ., 3) frames of which only the box `origin` is there -> this box of them, a view."""
        top, left = self.top - origin.top, self.left - origin.left
        return frames[:, top : top + self.height, left : left + self.width]
