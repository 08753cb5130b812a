"""A rectangle of pixels: the part of a frame that is read, augmented or shown."""

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
        """The part inside a frame (height, width); at least one pixel."""
        top, left = min(max(self.top, 0), height - 1), min(max(self.left, 0), width - 1)
        return Box(top, left, min(max(self.bottom, top + 1), height), min(max(self.right, left + 1), width))

    def moved(self, down: int, right: int) -> Box:
        return Box(self.top + down, self.left + right, self.bottom + down, self.right + right)

    def rescaled(self, size: tuple[int, int], to_size: tuple[int, int]) -> Box:
        """The same part, in whole pixels, of a frame whose (height, width) goes from `size` to `to_size`."""
        down, right = to_size[0] / size[0], to_size[1] / size[1]
        box = Box(
            round(self.top * down), round(self.left * right), round(self.bottom * down), round(self.right * right)
        )
        return box.clipped(*to_size)

    def joined(self, other: Box) -> Box:
        """The smallest box that holds both."""
        return Box(
            top=min(self.top, other.top),
            left=min(self.left, other.left),
            bottom=max(self.bottom, other.bottom),
            right=max(self.right, other.right),
        )

    def cut(self, frames: np.ndarray, origin: Box) -> np.ndarray:
        """(T, ., ., 3) frames of which only the box `origin` is there -> this box of them, a view."""
        top, left = self.top - origin.top, self.left - origin.left
        return frames[:, top : top + self.height, left : left + self.width]
