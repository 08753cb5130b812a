"""The plot of a confusion matrix, readable for 4 classes and for 400."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import BinaryIO

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

NAMED_ROWS = 200  # up to so many classes, each row has its class's name
NAMED_COLUMNS = 60  # and each column
COUNTED_CELLS = 25  # and each cell its number of videos
NAME_LENGTH = 56  # characters
GREY = "#d0d0d0"
TICKS = (0, 1, 5, 10, 25, 50, 75, 100)


def draw(file: BinaryIO, confusion: Sequence[Sequence[int]], names: Sequence[str] | None, title: str) -> None:
    """Write a PNG of the K x K counts, each row in percent of its class's videos; rows without videos are grey.

    The colour follows the square root of the share, because errors are small beside the diagonal.
    """
    counts = numpy.array(confusion)  # (K, K)
    classes = len(counts)
    total = counts.sum(1, keepdims=True)  # (K, 1)
    share = numpy.ma.masked_where(counts == 0, 100 * counts / numpy.maximum(total, 1))
    cell = (
        0.5 if classes <= COUNTED_CELLS else max(0.095, 9 / classes) if classes <= NAMED_ROWS else 14 / classes
    )  # inches
    labels = _labels(names, classes)
    side = max(3.0, classes * cell)
    margin = 1 + max(map(len, labels), default=0) * 0.0085 * _points(cell)
    height = side + 0.6 + (margin if classes <= NAMED_COLUMNS else 1)
    figure = Figure(figsize=(side + margin + 1.2, height), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="magma_r", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    for row in numpy.flatnonzero(total == 0):
        axes.axhspan(row - 0.5, row + 0.5, color=GREY, linewidth=0)
    bar = figure.colorbar(image, ax=axes, ticks=TICKS, shrink=min(1.0, 6 / side), pad=0.02)
    bar.set_label("% of the class's videos")
    _put_labels(axes, labels, classes, _points(cell))
    for row, column in zip(*counts.nonzero(), strict=True) if classes <= COUNTED_CELLS else ():
        color = "white" if share[row, column] > 15 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=9, color=color)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title if total.all() else f"{title}; grey: no videos", fontsize=10, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of names in scripts that the font does not have
        figure.savefig(file, format="png")


def _points(cell: float) -> float:
    """The font size for rows of `cell` inches."""
    return min(9.0, 0.8 * 72 * cell)


def _labels(names: Sequence[str] | None, classes: int) -> list[str]:
    """The names to show, or none if they do not fit.

    Class numbers are added where columns show numbers alone, or where names are equal after they are cut.
    """
    if names is None or classes > NAMED_ROWS:
        return []
    plain = [" ".join(name.split()) for name in names]
    short = [name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…" for name in plain]
    if classes <= NAMED_COLUMNS and len(set(short)) == classes:
        return short
    return [f"{name}  {label}" for label, name in enumerate(short)]


def _put_labels(axes: Axes, labels: Sequence[str], classes: int, points: float) -> None:
    """Names if they fit, else class numbers, at most 60 of them."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, classes) if classes / step <= 60)
    numbers = range(0, classes, 1 if labels else step)
    style = {"fontsize": points if labels else 9, "parse_math": False}
    axes.set_yticks(numbers, labels or list(map(str, numbers)), **style)
    both = labels and classes <= NAMED_COLUMNS
    axes.set_xticks(numbers, labels if both else list(map(str, numbers)), rotation=90, **style)
    axes.tick_params(length=2, pad=1)
