"""Pictures of scripts/profile.py: bytes kept for backward by layer and part, time and memory against T.

Does not live here: the numbers, and how modules are grouped (profile_report.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.figures import line_style
from scripts.profile.report import Row, by_place, clips, milliseconds, number, title

NAMED = 9  # parts with a colour of their own; the rest is `others`
OTHERS = "others"
COLORS = matplotlib.colormaps["tab10"].colors
GREY = "#b8b8b8"


def draw_saved(rows: Sequence[Row], path: Path) -> None:
    """One panel a row on one scale: a bar for each layer, stacked by part of the model."""
    tables = [_fewer(by_place(row)) for row in rows]
    places = [_places(table) for table in tables]
    heights = [0.24 * max(len(bars), len(table), 3) + 0.75 for bars, table in zip(places, tables, strict=True)]
    figure = Figure(figsize=(12, sum(heights) + 0.4), layout="constrained", dpi=120)
    panels = figure.subplots(len(rows), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, row, table, bars in zip(panels, rows, tables, places, strict=True):
        _bars(axes, table, bars)
        axes.set_title(title(row), fontsize=10.5, loc="left", fontweight="bold", parse_math=False)
    longest = max(
        (
            sum(cells.get(bar, 0) for cells in table.values())
            for table, bars in zip(tables, places, strict=True)
            for bar in bars
        ),
        default=0,
    )
    panels[-1].set_xlim(0, 1.08 * longest or 1)
    panels[-1].set_xlabel("MB kept for backward, a clip")
    figure.savefig(path)


def _fewer(table: dict[str, dict[int | str, float]]) -> dict[str, dict[int | str, float]]:
    """The largest parts, and the others together. Modules in no layer become bars of their own."""
    table = {
        part: {part if layer is None else layer: size for layer, size in cells.items()} for part, cells in table.items()
    }
    by_size = sorted(table, key=lambda part: -sum(table[part].values()))
    kept = by_size if len(by_size) <= NAMED + 1 else by_size[:NAMED]
    fewer = {part: cells for part, cells in table.items() if part in kept}
    for part in by_size[len(kept) :]:
        for layer, size in table[part].items():
            others = fewer.setdefault(OTHERS, {})
            others[layer] = others.get(layer, 0.0) + size
    return fewer


def _places(table: dict[str, dict[int | str, float]]) -> list[int | str]:
    """The bars from top to bottom: those that keep something before the layers, the layers, the rest."""
    found = list(dict.fromkeys(place for cells in table.values() for place in cells))
    layers = sorted(place for place in found if isinstance(place, int))
    before = [place for place in found[: next((i for i, place in enumerate(found) if isinstance(place, int)), 0)]]
    return [*before, *layers, *(place for place in found if place not in before and not isinstance(place, int))]


def _bars(axes: Axes, table: dict[str, dict[int | str, float]], places: Sequence[int | str]) -> None:
    ends = dict.fromkeys(places, 0.0)
    colors = iter(COLORS)
    for part, cells in table.items():
        color = GREY if part == OTHERS else next(colors)
        sizes = [cells.get(place, 0.0) for place in places]
        label = f"{part}  {number(sum(sizes))}"
        axes.barh(range(len(places)), sizes, left=list(ends.values()), height=0.78, color=color, label=label,
                  edgecolor="white", linewidth=0.4)  # fmt: skip
        ends = {place: ends[place] + size for place, size in zip(places, sizes, strict=True)}
    for index, end in enumerate(ends.values()):
        axes.text(end, index, f" {number(end)}", va="center", fontsize=8, color="#404040")
    names = [f"layer {place}" if isinstance(place, int) else place for place in places]
    axes.set_yticks(range(len(places)), names, fontsize=8.5, parse_math=False)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if table:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=8.5, frameon=False, borderaxespad=0)
    else:
        axes.text(0.01, 0.5, "nothing is kept", transform=axes.transAxes, va="center", color="gray")


def draw_scaling(rows: Sequence[Row], path: Path) -> None:
    """Time and memory of a clip against T, or against the clips of a batch where there is one T; one line a
    configuration, dashes and markers by the other one. Faint dots go on in proportion to T."""
    over_frames = len({row.frames for row in rows}) > 1
    panels: dict[str, Callable[[Row], float | None]] = {
        "training, ms a clip": lambda row: milliseconds(row, "training"),
        "inference, ms a clip": lambda row: milliseconds(row, "inference"),
        "saved for backward, MB a clip": lambda row: row.saved_a_clip and row.saved_a_clip / 1e6,
        "peak beyond what stands, MB a step": lambda row: row.beyond and row.beyond / 1e6,
    }
    labels = list(dict.fromkeys(row.label for row in rows))
    others = sorted({_other(row, over_frames) for row in rows})
    figure = Figure(figsize=(11, 7.6), layout="constrained", dpi=120)
    for axes, (name, value) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for label, style in zip(labels, [line_style(index) for index in range(len(labels))], strict=True):
            for place, other in enumerate(others):
                series = [row for row in rows if row.label == label and _other(row, over_frames) == other]
                points = [(_place(row, over_frames), y) for row in series if (y := value(row))]
                axes.plot(*zip(*points, strict=True) if points else ((), ()), color=style["color"],
                          linestyle=("-", "--", "-.", ":")[place % 4], marker="osD^v"[place % 5], markersize=4.5,
                          linewidth=1.5, label=_series_name(label, other, over_frames, len(others)))  # fmt: skip
        _scale(axes, sorted({_place(row, over_frames) for row in rows}), over_frames)
        axes.set_title(name, fontsize=10.5)
        axes.set_xlabel("T, frames a clip (faint dots: in proportion to T)" if over_frames else "clips a batch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, min(4, 150 // (max(map(len, names)) + 8))),
                  fontsize=8.5, frameon=False)  # fmt: skip
    figure.savefig(path)


def _place(row: Row, over_frames: bool) -> int:
    return row.frames if over_frames else row.batch


def _other(row: Row, over_frames: bool) -> tuple[int, int]:
    return (row.batch if over_frames else row.frames), row.processes


def _series_name(label: str, other: tuple[int, int], over_frames: bool, number: int) -> str:
    value, processes = other
    text = label if number == 1 else f"{label}, {clips(value) if over_frames else f'T = {value}'}"
    return text.replace("$", r"\$") + (f", {processes} processes" if processes > 1 else "")


def _scale(axes: Axes, places: Sequence[int], proportional: bool) -> None:
    """Axes from 0 with the measured places, and dots that grow as the places do."""
    axes.set_xlim(0, 1.05 * places[-1])
    axes.set_xticks(places)
    drawn = [line for line in axes.lines if len(line.get_ydata())]
    if not drawn:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "nothing measured", ha="center", transform=axes.transAxes, color="gray")
        return
    top = 1.08 * max(max(line.get_ydata()) for line in drawn)
    for line in drawn if proportional else ():
        slope = line.get_ydata()[0] / line.get_xdata()[0]
        axes.plot(
            [0, places[-1]], [0, slope * places[-1]], color=line.get_color(), linestyle=":", linewidth=0.9, alpha=0.5
        )
    axes.set_ylim(0, top)
