"""Stored pixels -> upright ones: what a file's display matrix asks for, as `ffmpeg -autorotate` and players do it."""

from __future__ import annotations

import numpy as np

STRAIGHT = 0.02  # sine of the angle (about 1 degree) below which FFmpeg, too, takes an axis for straight


def is_turn(matrix: bytes) -> bool:
    """Whether a display matrix turns by a multiple of 90 degrees, exactly, and mirrors nothing."""
    (a, b), (c, d) = _axes(matrix, tolerance=1e-4)
    return a * d - b * c == 1


def upright(pixels: np.ndarray, matrix: bytes | None) -> np.ndarray:
    """Turn and mirror a picture as its display matrix says.

    Args:
        pixels: (H, W, 3) as stored.
        matrix: 9 native int32, row by row: a stored pixel (x, y) is shown at (ax + cy, bx + dy), with a, b in the first
            row and c, d in the second; their scale and the other numbers do not count. None: shown as stored.

    Raises:
        ValueError: the matrix turns by another angle, or skews.
    """
    if matrix is None:
        return pixels
    (a, b), (c, d) = _axes(matrix)
    if abs(a * d) == 1 and b == c == 0:
        return np.ascontiguousarray(pixels[::d, ::a])
    if abs(b * c) == 1 and a == d == 0:
        return np.ascontiguousarray(pixels.swapaxes(0, 1)[::b, ::c])
    raise ValueError


def _axes(matrix: bytes, tolerance: float = STRAIGHT) -> list[list[int]]:
    """The signs [[a, b], [c, d]]; 2 stands for what is neither 0 nor 1. A matrix of zeros changes nothing, as in FFmpeg."""
    linear = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].astype(float)
    scale = np.hypot(*linear)  # of the columns
    if not scale.all():
        return [[1, 0], [0, 1]]
    linear /= scale
    straight = np.abs(linear - linear.round()) < tolerance
    return np.where(straight, linear.round(), 2).astype(int).tolist()
