"""What the figures share: colours that colour-blind readers tell apart, bar panels, one way to save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import write_atomic

# The palette of Okabe and Ito, without its yellow, which is pale on white.
BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000"
)  # fmt: skip
COLORS = (BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, BLACK)
GREY = "#9a9a9a"
DASHES = ("-", "--", ":", "-.")


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the line number `index`; the first lines differ by colour alone."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index // len(COLORS) % len(DASHES)]}


def bar_styles(number: int) -> list[dict[str, Any]]:
    """Fill of each of `number` kinds of bars; beyond the colours, with hatches."""
    return [
        {
            "color": COLORS[index % len(COLORS)],
            "hatch": ("", "///", "...")[index // len(COLORS) % 3],
            "edgecolor": "white",
        }
        for index in range(number)
    ]


def bar_panel(axes: Axes, labels: Sequence[str], title: str) -> None:
    """Prepare axes for one horizontal bar a label, from top to bottom."""
    axes.set_yticks(range(len(labels)), labels, fontsize=9, parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(title, fontsize=10.5, loc="left", parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def line_panel(axes: Axes, title: str, xlabel: str) -> None:
    """Prepare axes for curves."""
    axes.set_title(title, fontsize=10.5, loc="left", parse_math=False)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def empty_panel(axes: Axes, text: str) -> None:
    """Say in the middle of the axes why they are empty."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="gray")


def legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """One legend under all panels, in as many columns as the longest name allows."""
    columns = max(1, min(4, len(names), 150 // (max(map(len, names)) + 8)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a PNG atomically."""
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=dpi))
