"""A confusion matrix as a picture that can be read for 4 classes and for 400.

Lives here: the drawing, and which labels fit. Does not live here: the numbers (metrics.py) and the file's name
(report.py). Importing it imports matplotlib.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import BinaryIO

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

NAMED = 200  # classes of which each still gets its name at its row
BOTH = 60  # and at its column
COUNTED = 25  # and each cell its number of videos
LONGEST = 56  # characters of a name
GREY = "#d0d0d0"
TICKS = (0, 1, 5, 10, 25, 50, 75, 100)


def draw(file: BinaryIO, confusion: Sequence[Sequence[int]], names: Sequence[str] | None, title: str) -> None:
    """Write a PNG of the K x K counts, each row as percent of its class's videos; rows without videos are grey.

    The square root of the share is what the colour follows: errors are small beside the diagonal.
    """
    counts = numpy.array(confusion)  # (K, K)
    classes = len(counts)
    total = counts.sum(1, keepdims=True)  # (K, 1)
    share = numpy.ma.masked_where(counts == 0, 100 * counts / numpy.maximum(total, 1))
    cell = 0.5 if classes <= COUNTED else max(0.095, 9 / classes) if classes <= NAMED else 14 / classes  # inches
    labels = _labels(names, classes)
    side = max(3.0, classes * cell)
    margin = 1 + max(map(len, labels), default=0) * 0.0085 * _points(cell)
    height = side + 0.6 + (margin if classes <= BOTH else 1)
    figure = Figure(figsize=(side + margin + 1.2, height), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="magma_r", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    for row in numpy.flatnonzero(total == 0):
        axes.axhspan(row - 0.5, row + 0.5, color=GREY, linewidth=0)
    bar = figure.colorbar(image, ax=axes, ticks=TICKS, shrink=min(1.0, 6 / side), pad=0.02)
    bar.set_label("% of the class's videos")
    _put_labels(axes, labels, classes, _points(cell))
    for row, column in zip(*counts.nonzero(), strict=True) if classes <= COUNTED else ():
        color = "white" if share[row, column] > 15 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=9, color=color)
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class")
    axes.set_title(title if total.all() else f"{title}; grey: no videos", fontsize=10, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of names in scripts that the font lacks
        figure.savefig(file, format="png")


def _points(cell: float) -> float:
    """The font size for rows of `cell` inches."""
    return min(9.0, 0.8 * 72 * cell)


def _labels(names: Sequence[str] | None, classes: int) -> list[str]:
    """The shown names, with numbers where the columns show numbers alone or names are cut to the same; none where they
    would not fit."""
    if names is None or classes > NAMED:
        return []
    plain = [" ".join(name.split()) for name in names]
    short = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in plain]
    if classes <= BOTH and len(set(short)) == classes:
        return short
    return [f"{name}  {label}" for label, name in enumerate(short)]


def _put_labels(axes: Axes, labels: Sequence[str], classes: int, points: float) -> None:
    """Names where they fit, else class numbers, all or every so many."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, classes) if classes / step <= 60)
    numbers = range(0, classes, 1 if labels else step)
    style = {"fontsize": points if labels else 9, "parse_math": False}
    axes.set_yticks(numbers, labels or list(map(str, numbers)), **style)
    both = labels and classes <= BOTH
    axes.set_xticks(numbers, labels if both else list(map(str, numbers)), rotation=90, **style)
    axes.tick_params(length=2, pad=1)
