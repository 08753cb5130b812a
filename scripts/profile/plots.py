"""Figures of profiles: saved bytes by layer and part, time and memory against T or batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.text import plural
from scripts.figures import COLORS, GREY, bar_panel, empty_panel, legend_below, line_panel, line_style, save
from scripts.profile.report import Row, saved_by_part, title
from scripts.reports import number

OTHERS = "others"
Table = dict[str, dict["int | str", float]]  # MB by part, then by layer or by the name of a part outside all layers


def draw_saved(rows: Sequence[Row], path: Path) -> None:
    """One panel a row on one scale: a bar for each layer, stacked by part of the model."""
    tables = [_largest_parts(saved_by_part(row)) for row in rows]
    bars = [_bars_of(table) for table in tables]
    heights = [0.24 * max(len(names), len(table), 3) + 0.75 for names, table in zip(bars, tables, strict=True)]
    figure = Figure(figsize=(12, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    longest = 0.0
    for axes, row, table, names in zip(panels, rows, tables, bars, strict=True):
        bar_panel(axes, [f"layer {name}" if isinstance(name, int) else name for name in names], title(row))
        longest = max(longest, _stack(axes, table, names))
    panels[-1].set_xlim(0, 1.08 * longest or 1)
    panels[-1].set_xlabel("MB saved for backward, a clip")
    save(figure, path)


def _largest_parts(parts: dict[str, dict[int | None, float]]) -> Table:
    """As many parts as there are colours, the rest summed up. Parts outside all layers get a bar of their own."""
    by_size = sorted(parts, key=lambda part: -sum(parts[part].values()))
    kept = by_size if len(by_size) <= len(COLORS) else by_size[: len(COLORS)]
    table: Table = {}
    for part in [*(part for part in parts if part in kept), *(part for part in by_size if part not in kept)]:
        cells = table.setdefault(part if part in kept else OTHERS, {})
        for layer, size in parts[part].items():
            bar = part if layer is None else layer
            cells[bar] = cells.get(bar, 0.0) + size
    return table


def _bars_of(table: Table) -> list[int | str]:
    """The bars from top to bottom: what comes before the first layer, the layers, the rest."""
    bars = list(dict.fromkeys(bar for cells in table.values() for bar in cells))
    layers = sorted(bar for bar in bars if isinstance(bar, int))
    first = min((bars.index(layer) for layer in layers), default=0)
    return [*bars[:first], *layers, *(bar for bar in bars[first:] if not isinstance(bar, int))]


def _stack(axes: Axes, table: Table, bars: Sequence[int | str]) -> float:
    """Draw the bars, and return the length of the longest."""
    ends = [0.0] * len(bars)
    for index, (part, cells) in enumerate(table.items()):
        sizes = [cells.get(bar, 0.0) for bar in bars]
        axes.barh(
            range(len(bars)),
            sizes,
            left=ends,
            height=0.78,
            color=GREY if part == OTHERS else COLORS[index],
            label=f"{part}  {number(sum(sizes))}",
            edgecolor="white",
            linewidth=0.4,
        )
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for index, end in enumerate(ends):
        axes.text(end, index, f" {number(end)}", va="center", fontsize=8, color="#404040")
    if table:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=8.5, frameon=False, borderaxespad=0)
    else:
        empty_panel(axes, "nothing is saved")
    return max(ends, default=0.0)


def draw_scaling(rows: Sequence[Row], path: Path) -> None:
    """Time and memory of a clip against T, or against the batch size if there is only one T.

    One colour a configuration; dashes and markers tell the other one and the number of processes. Faint dots show
    growth in proportion to T.
    """
    over_frames = len({row.frames for row in rows}) > 1
    panels: dict[str, Callable[[Row], float | None]] = {
        "training, ms a clip": lambda row: row.milliseconds("training"),
        "inference, ms a clip": lambda row: row.milliseconds("inference"),
        "saved for backward, MB a clip": lambda row: row.saved_a_clip and row.saved_a_clip / 1e6,
        "peak of a step beyond standing, MB": lambda row: row.beyond and row.beyond / 1e6,
    }
    labels = list(dict.fromkeys(row.label for row in rows))
    others = sorted({_other(row, over_frames) for row in rows})
    xs = sorted({_x(row, over_frames) for row in rows})
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    for axes, (name, value) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        line_panel(axes, name, "T, frames a clip (faint dots: in proportion to T)" if over_frames else "clips a batch")
        lines, names = [], []
        for index, label in enumerate(labels):
            for variant, other in enumerate(others):
                series = [row for row in rows if row.label == label and _other(row, over_frames) == other]
                points = [(_x(row, over_frames), y) for row in series if (y := value(row))]
                lines += axes.plot(
                    *(zip(*points, strict=True) if points else ((), ())),
                    color=line_style(index)["color"],
                    linestyle=("-", "--", "-.", ":")[variant % 4],
                    marker="osD^v"[variant % 5],
                    markersize=4.5,
                    linewidth=1.5,
                )
                names.append(_series_name(label, other, over_frames, len(others)))
        _scale(axes, xs, proportional=over_frames)
    legend_below(figure, lines, names)
    save(figure, path)


def _x(row: Row, over_frames: bool) -> int:
    return row.frames if over_frames else row.batch


def _other(row: Row, over_frames: bool) -> tuple[int, int]:
    return (row.batch if over_frames else row.frames), row.processes


def _series_name(label: str, other: tuple[int, int], over_frames: bool, number_of_others: int) -> str:
    value, processes = other
    setting = plural(value, "clip") if over_frames else f"T = {value}"
    text = label if number_of_others == 1 else f"{label}, {setting}"
    return text.replace("$", r"\$") + (f", {processes} processes" if processes > 1 else "")


def _scale(axes: Axes, xs: Sequence[int], proportional: bool) -> None:
    """Let both axes begin at 0, and draw proportional growth from each line's first point."""
    axes.set_xlim(0, 1.05 * xs[-1])
    axes.set_xticks(xs)
    drawn = [line for line in axes.lines if len(line.get_ydata())]
    if not drawn:
        empty_panel(axes, "nothing measured")
        return
    top = 1.08 * max(max(line.get_ydata()) for line in drawn)
    for line in drawn if proportional else ():
        end = line.get_ydata()[0] / line.get_xdata()[0] * xs[-1]
        axes.plot([0, xs[-1]], [0, end], color=line.get_color(), linestyle=":", linewidth=0.9, alpha=0.5)
    axes.set_ylim(0, top)
