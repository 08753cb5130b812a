"""The quickstart's figure: what the data are, and what each variant reaches on them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from scripts.figures import BLACK, BLUE, GREY, save
from scripts.quickstart import CHANCE

GAP = 5  # pixels between frames


def draw(data: Path, scores: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write a PNG: the first test scene in its four classes, and top-1 by variant with one dot a seed.

    Args:
        data: the folder of the quickstart's data.
        scores: title of a variant -> top-1 in percent of each seed.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left.suptitle("One scene, four classes: the same 8 frames in four orders", fontsize=12)
    right.suptitle("Top-1 on 128 test videos, %", fontsize=12)
    videos = [line.rsplit(" ", 2) for line in (data / "val.txt").read_text(encoding="utf-8").splitlines()]
    names = [line.split(",", 1)[1] for line in (data / "labels.csv").read_text(encoding="utf-8").splitlines()[1:]]
    numbers: dict[bytes, int] = {}  # of the scene's images, in the order of its first video
    for axes, (video, _, label) in zip(left.subplots(len(names), 1), videos, strict=False):
        files = sorted((data / "frames" / video).iterdir())
        order = [numbers.setdefault(file.read_bytes(), len(numbers) + 1) for file in files]
        _film_strip(axes, [np.asarray(Image.open(file)) for file in files], order, names[int(label)])
    _bars(right.subplots(), scores)
    save(figure, path, dpi=150)


def _film_strip(axes: Axes, frames: Sequence[np.ndarray], order: Sequence[int], name: str) -> None:
    height, width, _ = frames[0].shape
    strip = np.full((height, len(frames) * (width + GAP) - GAP, 3), 255, np.uint8)
    for index, (frame, number) in enumerate(zip(frames, order, strict=True)):
        start = index * (width + GAP)
        strip[:, start : start + width] = frame
        axes.text(start + 4, 5, str(number), color="white", fontsize=8, fontweight="bold", va="top")
    axes.imshow(strip)
    axes.set_axis_off()
    axes.text(-8, height / 2, name, ha="right", va="center", fontsize=10)


def _bars(axes: Axes, scores: Mapping[str, Sequence[float]]) -> None:
    for row, (title, values) in enumerate(scores.items()):
        axes.barh(row, statistics.mean(values), color=BLUE if title.startswith("TD4V") else GREY, alpha=0.75)
        axes.plot(values, [row] * len(values), "o", color=BLACK, markersize=4, clip_on=False)
        axes.text(115, row, f"{statistics.mean(values):.1f}", ha="right", va="center", fontsize=10)
    axes.axvline(CHANCE, color=BLACK, linestyle=":", linewidth=1.2)
    axes.text(CHANCE, -0.62, " chance", fontsize=9, va="center")
    axes.set_yticks(range(len(scores)), [title.replace(" without ", "\nwithout ") for title in scores], fontsize=10)
    axes.set_ylim(len(scores) - 0.45, -0.85)
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("bar: mean; dots: seeds" if len(next(iter(scores.values()))) > 1 else "one seed")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
