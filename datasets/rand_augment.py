"""RandAugment for all frames of a clip at once, computed only where the crop will look.

timm draws the operations; here they run on uint8 arrays, as tables and warps of OpenCV instead of one Pillow image
after the other. An operation needs of its input what the crop shows of its output: the same box (tables), a pixel more
on each side (sharpness), the box that a warp looks at, or the complete frame where it depends on a histogram. So the
boxes are computed from the last operation back to the first, and the operations then run forward on no more than those.

Compared with Pillow, tables are exact; colour, sharpness and translations are within 2 of 255 levels; rotations and
shears differ as two bicubic kernels do (OpenCV's a is -0.75, Pillow's -1) and in how 2 pixels at the border to the fill
blend. Source of policy and magnitudes: timm.data.auto_augment; of the operations: Pillow's ImageOps, ImageEnhance,
Image. T frames, H and W height and width of a frame, h and w of a box, in pixels.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from datasets.box import Box

# Workers share the cores among themselves. This comes before OpenCV starts threads, which a fork would not copy.
cv2.setNumThreads(1)

# Parts of a policy: magnitude, number of operations, probability of each, the magnitude's deviation and largest value,
# and whether severity increases with the magnitude.
POLICY_PART = re.compile(r"(m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?")

BICUBIC_REACH = 2  # pixels that bicubic interpolation looks beyond a point
REPLICATE = cv2.BORDER_REPLICATE
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH
GRAY = np.array([0.299, 0.587, 0.114], np.float32)
IDENTITY = np.arange(256, dtype=np.float64)


class Step(NamedTuple):
    """One operation as timm drew it: its name in timm's table and its arguments."""

    name: str
    args: tuple[float, ...] = ()


class RandAugment:
    """A policy such as "rand-m7-n4-mstd0.5-inc1".

    Args:
        policy: in timm's words (rand_augment_transform): "rand", then parts of POLICY_PART.
        fill: RGB, 0..255, for what warps bring in from outside the frame.

    Raises:
        ValueError: a part that timm does not know.
    """

    def __init__(self, policy: str, fill: tuple[int, int, int]):
        kind, *parts = policy.split("-")
        unknown = [part for part in parts if not POLICY_PART.fullmatch(part)] + ([kind] if kind != "rand" else [])
        if unknown:
            raise ValueError(
                f"{policy!r} has an unknown part {unknown[0]!r}; write e.g. rand-m7-n4-mstd0.5-inc1 "
                "(m, n, p, mstd, mmax, inc with a number each)"
            )
        self.fill = fill
        self._policy = rand_augment_transform(policy, {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC})
        for operation in self._policy.ops:
            operation.aug_fn = partial(_record_step, operation.name)

    def draw(self) -> tuple[Step, ...]:
        """Let timm draw for one image, from Python's generator alone: it seeds NumPy's, which is then restored."""
        state = np.random.get_state()
        np.random.seed(random.getrandbits(32))
        try:
            return self._policy(())
        finally:
            np.random.set_state(state)

    def boxes(self, steps: Sequence[Step], box: Box, height: int, width: int) -> list[Box]:
        """The box that each step needs of its input, and as the last entry `box` itself, for frames (H, W)."""
        boxes = [box]
        for step in reversed(steps):
            needed = LOOKS_AT[step.name](step, boxes[0], height, width)
            boxes.insert(0, needed.clipped(height, width))
        return boxes

    def __call__(
        self, frames: np.ndarray, steps: Sequence[Step], boxes: Sequence[Box], height: int, width: int
    ) -> np.ndarray:
        """Apply the steps.

        Args:
            frames: (T, h, w, 3) uint8, the box `boxes[0]` of frames (H, W); it is not changed.
            steps: of `draw`.
            boxes: of `boxes`, for these steps.
        Returns:
            (T, h, w, 3) uint8, the box `boxes[-1]` of the augmented frames.
        """
        for step, before, after in zip(steps, boxes[:-1], boxes[1:], strict=True):
            if step.name in SHIFTS:
                frames = _shift(frames, step, before, after, (height, width), self.fill)
            elif step.name in WARPS:
                matrix = WARPS[step.name](step.args[0], height, width)
                frames = _warp(frames, matrix, before, after, self.fill)
            elif step.name.startswith("Sharpness"):
                frames = after.cut(_sharpness(frames, step.args[0], before, height, width), before)
            else:
                frames = after.cut(_recolour(frames, step), before)
        return frames


def _record_step(name: str, steps: tuple[Step, ...], *args: float, **_: object) -> tuple[Step, ...]:
    """Takes the place of timm's operation on an image: the "image" is the tuple of the steps so far."""
    return (*steps, Step(name, args))


# ---- what a step looks at to fill a box of its output


def _same_box(step: Step, box: Box, height: int, width: int) -> Box:
    return box


def _complete_frame(step: Step, box: Box, height: int, width: int) -> Box:
    return Box(0, 0, height, width)


def _one_pixel_more(step: Step, box: Box, height: int, width: int) -> Box:
    return Box(box.top - 1, box.left - 1, box.bottom + 1, box.right + 1)


def _warp_source(step: Step, box: Box, height: int, width: int) -> Box:
    corners = np.array([(x, y, 1) for x in (box.left, box.right - 1) for y in (box.top, box.bottom - 1)])  # (4, 3)
    x, y = WARPS[step.name](step.args[0], height, width) @ corners.T  # (4,) each
    return Box(
        top=math.floor(y.min()) - BICUBIC_REACH,
        left=math.floor(x.min()) - BICUBIC_REACH,
        bottom=math.ceil(y.max()) + BICUBIC_REACH + 1,
        right=math.ceil(x.max()) + BICUBIC_REACH + 1,
    )


# ---- warps: where in the input the pixel (x, y) of the output comes from, as (2, 3) matrices for pixel centres at
# whole numbers


def _affine(matrix: Sequence[float]) -> np.ndarray:
    """Pillow's matrix, whose pixel centres lie at halves: shift by half a pixel, there and back."""
    a, b, c, d, e, f = matrix
    return np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])


def _rotation(degrees: float, height: int, width: int) -> np.ndarray:
    cos, sin = math.cos(math.radians(-degrees)), math.sin(math.radians(-degrees))
    x, y = width / 2, height / 2
    return _affine((cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y))


WARPS: dict[str, Callable[[float, int, int], np.ndarray]] = {
    "Rotate": _rotation,
    "ShearX": lambda factor, height, width: _affine((1, factor, 0, 0, 1, 0)),
    "ShearY": lambda factor, height, width: _affine((1, 0, 0, factor, 1, 0)),
    "TranslateXRel": lambda share, height, width: _affine((1, 0, share * width, 0, 1, 0)),
    "TranslateYRel": lambda share, height, width: _affine((1, 0, 0, 0, 1, share * height)),
}
# Warps that move every pixel alike, along one axis: four products a value instead of sixteen, and Pillow's kernel.
SHIFTS = ("TranslateXRel", "TranslateYRel")


def _shift(
    frames: np.ndarray, step: Step, before: Box, after: Box, size: tuple[int, int], fill: tuple[int, int, int]
) -> np.ndarray:
    """Translate frames, which show the box `before`, and give the box `after`."""
    down = step.name == "TranslateYRel"
    length = size[0] if down else size[1]
    amount = step.args[0] * length
    whole = math.floor(amount)
    weights = np.array(_bicubic(amount - whole), np.float32)
    low, high = math.ceil(-amount - 0.5), math.ceil(length - amount - 0.5)  # what comes from inside the frame
    if down:
        kernel, anchor, border, by = weights[:, None], (0, 1), (1, 1, 0, 0), (whole, 0)
        inside = after._replace(top=max(after.top, low), bottom=min(after.bottom, high))
    else:
        kernel, anchor, border, by = weights[None], (1, 0), (0, 0, 1, 1), (0, whole)
        inside = after._replace(left=max(after.left, low), right=min(after.right, high))
    out = np.empty((len(frames), after.height, after.width, 3), np.uint8)
    out[:] = fill
    if inside.height > 0 and inside.width > 0:
        above, below, on_left, on_right = border
        padded = Box(before.top - above, before.left - on_left, before.bottom + below, before.right + on_right)
        for frame, shifted in zip(frames, out, strict=True):
            frame = cv2.copyMakeBorder(frame, *border, REPLICATE)
            frame = cv2.filter2D(frame, -1, kernel, anchor=anchor, borderType=REPLICATE)
            inside.cut(shifted[None], after)[:] = inside.moved(*by).cut(frame[None], padded)
    return out


def _bicubic(part: float) -> tuple[float, float, float, float]:
    """Weights of the pixels at -1, 0, 1 and 2 for a point `part` of the way from 0 to 1; Pillow's, with a = -1."""

    def near(x: float) -> float:
        return (x - 2) * x * x + 1

    def far(x: float) -> float:
        return ((5 - x) * x - 8) * x + 4

    return far(1 + part), near(part), near(1 - part), far(2 - part)


def _warp(frames: np.ndarray, matrix: np.ndarray, before: Box, after: Box, fill: tuple[int, int, int]) -> np.ndarray:
    """Warp frames, which show the box `before`, and give the box `after`."""
    matrix = matrix.copy()
    matrix[:, 2] += matrix[:, :2] @ (after.left, after.top) - (before.left, before.top)
    size = (after.width, after.height)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    out = np.empty((len(frames), size[1], size[0], 3), np.uint8)
    for frame, warped in zip(frames, out, strict=True):
        cv2.warpAffine(frame, matrix, size, dst=warped, flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill)
    return out


# ---- values


def _sharpness(frames: np.ndarray, factor: float, box: Box, height: int, width: int) -> np.ndarray:
    """Blend with a smoothed frame; Pillow does not smooth the outermost pixels of a frame."""
    out = np.empty(frames.shape, np.uint8)
    for frame, sharp in zip(frames, out, strict=True):
        cv2.filter2D(frame, -1, SMOOTH, dst=sharp, borderType=REPLICATE)
        if box.top == 0:
            sharp[0] = frame[0]
        if box.bottom == height:
            sharp[-1] = frame[-1]
        if box.left == 0:
            sharp[:, 0] = frame[:, 0]
        if box.right == width:
            sharp[:, -1] = frame[:, -1]
        cv2.addWeighted(frame, factor, sharp, 1 - factor, 0, dst=sharp)
    return out


def _recolour(frames: np.ndarray, step: Step) -> np.ndarray:
    """Give each pixel a value that depends on its own and, for the steps of STATISTICS, on the frame's histogram."""
    if step.name.startswith("Color"):
        factor = step.args[0]
        matrix = factor * np.eye(3, dtype=np.float32) + (1 - factor) * GRAY  # (3 out, 3 in)
        return _each(frames, lambda frame: cv2.transform(frame, matrix))
    name = step.name.removesuffix("Increasing")
    if name in STATISTICS:
        table_of = STATISTICS[name]
        return _each(frames, lambda frame: cv2.LUT(frame, table_of(frame, *step.args)))
    table = TABLES[name](*step.args)
    if table is None:
        return frames
    count, height, width, _ = frames.shape
    flat = np.ascontiguousarray(frames).reshape(count * height, width, 3)
    return cv2.LUT(flat, table).reshape(frames.shape)  # (T, h, w, 3)


def _each(frames: np.ndarray, operation: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.stack([operation(np.ascontiguousarray(frame)) for frame in frames])


def _contrast(frame: np.ndarray, factor: float) -> np.ndarray:
    """Away from the mean grey, or towards it."""
    mean = int(cv2.mean(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _table(mean + factor * (IDENTITY - mean))


def _auto_contrast(frame: np.ndarray) -> np.ndarray:
    """Each channel's darkest value to 0 and brightest to 255."""
    tables = np.tile(IDENTITY, (3, 1))  # (3, 256)
    for channel, counts in enumerate(_histograms(frame)):
        used = np.flatnonzero(counts)
        low, high = int(used[0]), int(used[-1])
        if high > low:
            scale = 255.0 / (high - low)
            tables[channel] = IDENTITY * scale - low * scale
    return _table(tables.T)[:, None]  # (256, 1, 3)


def _equalize(frame: np.ndarray) -> np.ndarray:
    """Each channel's values spread so that all become about equally frequent; Pillow's rounding."""
    tables = np.tile(IDENTITY, (3, 1))  # (3, 256)
    for channel, counts in enumerate(_histograms(frame)):
        used = counts[counts > 0]
        step = int(used.sum() - used[-1]) // 255
        if len(used) > 1 and step:
            tables[channel] = (step // 2 + np.cumsum(counts) - counts) // step
    return _table(tables.T)[:, None]  # (256, 1, 3)


def _histograms(frame: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 -> (3, 256) int64: how often each value occurs in each channel."""
    counts = [cv2.calcHist([frame], [channel], None, [256], [0, 256]).reshape(256) for channel in range(3)]
    return np.stack(counts).astype(np.int64)


def _posterize(bits: int) -> np.ndarray | None:
    return None if bits >= 8 else _table(np.arange(256) & ~(2 ** (8 - bits) - 1))


def _table(values: np.ndarray) -> np.ndarray:
    """Numbers -> uint8, clipped to 0..255 and cut to whole numbers."""
    return np.clip(values, 0, 255).astype(np.uint8)


TABLES: dict[str, Callable[..., np.ndarray | None]] = {
    "Invert": lambda: _table(255 - IDENTITY),
    "Posterize": _posterize,
    "Solarize": lambda threshold: _table(np.where(threshold > IDENTITY, IDENTITY, 255 - IDENTITY)),
    "SolarizeAdd": lambda add: _table(np.where(IDENTITY < 128, IDENTITY + add, IDENTITY)),
    "Brightness": lambda factor: _table(factor * IDENTITY),
}
STATISTICS: dict[str, Callable[..., np.ndarray]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Contrast": _contrast,
}
LOOKS_AT: dict[str, Callable[[Step, Box, int, int], Box]] = (
    dict.fromkeys(WARPS, _warp_source)
    | {f"{name}{end}": _complete_frame for name in STATISTICS for end in ("", "Increasing")}
    | {f"{name}{end}": _same_box for name in (*TABLES, "Color") for end in ("", "Increasing")}
    | {"Sharpness": _one_pixel_more, "SharpnessIncreasing": _one_pixel_more}
)
