"""What scripts/compare_methods.py found, to be read: tables, what they show in words, one picture.

Lives here: the scores of a data configuration and all text and drawing. Does not live here: running anything
(compare_methods.py, trials.py), the cost table's columns (profile_report.py).
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import write_atomic
from configs.schema import Config
from scripts.figures import line_style
from scripts.profile.report import NOTES, Row, milliseconds, number, summary
from scripts.reports import dict_table

OURS = "td4v"  # methods of this project begin so; what the tables say of them is said in words
SPREAD_ERRORS = 2  # standard errors above chance that count as above chance


@dataclass(frozen=True)
class Scores:
    """One method on one data configuration: top-1 in percent by seed, parameters, revisions of the runs' code."""

    method: str
    top1: dict[int, float]
    tuned: int
    total: int
    revisions: tuple[str, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None of one."""
        return statistics.stdev(self.top1.values()) if len(self.top1) > 1 else None

    @property
    def text(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


@dataclass(frozen=True)
class Accuracy:
    """One data configuration. `about` is its recipe in words, `chance` and `majority` (always the most frequent class)
    are top-1 in percent, `videos` are tested on."""

    name: str
    about: str
    chance: float
    majority: float
    videos: int
    methods: list[Scores]

    @property
    def chance_bound(self) -> float:
        """Top-1 up to which a mean is not told from chance. The seeds share the videos, so that they do not narrow it."""
        return self.chance + SPREAD_ERRORS * (self.chance * (100 - self.chance) / self.videos) ** 0.5

    def to_dict(self) -> dict[str, Any]:
        """All of it, raw and derived, as plain values."""
        derived = [{"mean": one.mean, "deviation": one.deviation} for one in self.methods]
        methods = [asdict(one) | more for one, more in zip(self.methods, derived, strict=True)]
        return asdict(self) | {"methods": methods, "chance_bound": self.chance_bound}


def about(recipe: str, base: Config, videos: int, majority: float) -> str:
    """What was trained and tested in words. `base` is the configuration without what is a method's own."""
    data, solver, vision = base.data, base.solver, base.network.vision
    rows = sum(1 for line in Path(data.train_list).read_text(encoding="utf-8").splitlines() if line.strip())
    tower = base.network.arch if vision is None else f"{vision.layers} layers of width {vision.width}"
    epochs = f"{solver.epochs} epoch{'s' * (solver.epochs != 1)}"
    return (
        f"{recipe} The tower ({tower}, {data.input_size} px) starts from RANDOM weights, nothing of CLIP is in it; "
        f"{rows} training and {videos} test videos, {data.num_classes} classes, T = {data.num_segments}, {epochs}, lr "
        f"{solver.lr:g}, weight decay {solver.weight_decay:g}. Top-1 of the last epoch's checkpoint on one clip and one "
        f"centre crop. Chance is {100 / data.num_classes:.1f} %, always naming the most frequent class gives "
        f"{majority:.1f} %. This shows what the methods learn from so little data on such towers, not how good they are "
        "on CLIP."
    )


def accuracy_table(accuracy: Accuracy) -> str:
    """One line a method: each seed, mean and spread, what was tuned."""
    return dict_table(
        [
            {
                "method": one.method,
                **{f"seed {seed}": f"{score:.1f}" for seed, score in one.top1.items()},
                "mean ± s.d." if one.deviation is not None else "mean": one.text,
                "tuned parameters": f"{one.tuned:,}",
                "of all": f"{100 * one.tuned / one.total:.1f} %",
            }
            for one in accuracy.methods
        ]
    )


def accuracy_findings(accuracy: Accuracy) -> list[str]:
    """What the table shows, also where TD4V does not win: a sentence each."""
    highest = max(one.mean for one in accuracy.methods)
    best = [f"{one.method}, {one.text} %" for one in accuracy.methods if math.isclose(one.mean, highest)]
    lines = [f"Highest mean: {'; '.join(best)}{' (a tie)' * (len(best) > 1)}."]
    for own in (one for one in accuracy.methods if one.method.startswith(OURS)):
        others = [one for one in accuracy.methods if one is not own]
        if len(own.top1) < 2:
            lines.append(f"{own.method}: of one seed each, no difference can be told from the luck of the draw.")
            continue
        above = [one.method for one in others if min(own.top1.values()) > max(one.top1.values())]
        below = [one.method for one in others if max(own.top1.values()) < min(one.top1.values())]
        mixed = [one.method for one in others if one.method not in (*above, *below)]
        parts = [
            f"{words} {', '.join(names)}"
            for words, names in (
                ("every seed above every seed of", above),
                ("every seed below every seed of", below),
                ("not told apart by these seeds from", mixed),
            )
            if names
        ]
        lines.append(f"{own.method} ({own.text} %): {'; '.join(parts)}.")
    low = [one.method for one in accuracy.methods if one.mean <= accuracy.chance_bound]
    bound = f"a mean up to {accuracy.chance_bound:.1f} %, chance and {SPREAD_ERRORS} standard errors of {accuracy.videos} videos"
    lines.append(f"Not told from chance ({bound}): {', '.join(low) or 'none'}.")
    return lines


COSTS: dict[str, Callable[[Row], float | None]] = {
    "tuned parameters, M": lambda row: row.tuned / 1e6,
    "training, GFLOPs a clip": lambda row: row.training_flops / 1e9,
    "saved for backward, MB a clip": lambda row: None if row.saved_a_clip is None else row.saved_a_clip / 1e6,
    "peak of a training step, MB": lambda row: None if row.peak is None else row.peak / 1e6,
    "training, ms a clip": lambda row: milliseconds(row, "training"),
    "inference, ms a clip": lambda row: milliseconds(row, "inference"),
}


def cost_findings(rows: Sequence[Row]) -> list[str]:
    """The methods from the cheapest on, in each measure."""
    lines = []
    for name, value in COSTS.items():
        known = sorted((cost, row.label) for row in rows if (cost := value(row)) is not None)
        if known:
            lines.append(f"{name}: " + ", ".join(f"{label} {number(cost)}" for cost, label in known) + ".")
    return lines


def costs_caption(made_by: Mapping[str, Sequence[str]], meta: Mapping[str, Any]) -> str:
    """Below the table of costs: under which conditions all rows were measured, and by which code where that differs."""
    threads = f"{meta['threads']} thread{'s' * (meta['threads'] != 1)}"
    return f"\nMeasured on {meta['processor']}, {threads}, torch {meta['torch']}.\n{revisions_text(made_by)}"


def revisions_text(made_by: Mapping[str, Sequence[str]]) -> str:
    """Which code each row comes from; empty where all come from the same."""
    if len(set(map(frozenset, made_by.values()))) < 2:
        return ""
    each = "; ".join(f"{name} {', '.join(revisions)}" for name, revisions in made_by.items())
    return f"\nThe rows come from different revisions of the code: {each}.\n"


def markdown(
    rows: Sequence[Row],
    made_by: Mapping[str, Sequence[str]],
    costs_of: str,
    accuracies: Sequence[Accuracy],
    meta: Mapping[str, Any],
) -> str:
    """The whole report. `made_by` has the revision of the code of each row of costs, by its label."""
    parts = ["# Methods compared\n", "![](methods.png)\n"]
    for accuracy in accuracies:
        parts += [f"## Top-1 on {accuracy.name}, %\n", accuracy_table(accuracy), f"{accuracy.about}\n"]
        parts += [revisions_text({one.method: one.revisions for one in accuracy.methods})]
        parts += [_listed(accuracy_findings(accuracy))]
    if rows:
        parts += [f"## What they cost: {costs_of}\n", summary(rows) + costs_caption(made_by, meta)]
        parts += ["From the cheapest on:\n", _listed(cost_findings(rows)), NOTES]
    star = " (* with uncommitted changes)" if any("*" in revision for revision in meta["revisions"]) else ""
    hardware = meta["hardware"]
    gpus = ", ".join(gpu["name"] for gpu in hardware["gpus"]) or "none"
    parts += [
        "## Where\n",
        f"- `{shlex.join(meta['command'])}`, {meta['started']}",
        f"- revisions of what was measured: {', '.join(meta['revisions']) or 'none'}{star}",
        f"- {hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB; GPUs: {gpus}; device: {meta['device']}",
        f"- {', '.join(f'{name} {version}' for name, version in meta['versions'].items())}\n",
    ]
    return "\n".join(parts)


def _listed(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def draw(rows: Sequence[Row], accuracies: Sequence[Accuracy], path: Path) -> None:
    """Above each data configuration with its seeds and chance, below each cost; one colour a method."""
    names = list(
        dict.fromkeys([one.method for each in accuracies for one in each.methods] + [row.label for row in rows])
    )
    colors = {
        name: style["color"]
        for name, style in zip(names, [line_style(index) for index in range(len(names))], strict=True)
    }
    columns = 3 if rows else max(1, len(accuracies))
    above = -(-len(accuracies) // columns)
    lines = above + (-(-len(COSTS) // columns) if rows else 0)
    figure = Figure(figsize=(4.6 * columns, (0.32 * len(names) + 1.0) * lines), layout="constrained", dpi=120)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, accuracy in zip(panels[:above].flat, accuracies, strict=False):
        means = {one.method: one.mean for one in accuracy.methods}
        dots = [accuracy.chance, *(score for one in accuracy.methods for score in one.top1.values())]
        _bars(axes, names, means, colors, f"top-1 on {accuracy.name}, %", up_to=max(dots))
        for one in accuracy.methods:
            places = [names.index(one.method)] * len(one.top1)
            axes.plot(list(one.top1.values()), places, "o", color="black", markersize=3.5, clip_on=False)
        axes.axvline(accuracy.chance, color="black", linestyle=":", linewidth=1.2)
        axes.text(accuracy.chance, -0.7, " chance", fontsize=8, va="center")
    for axes, (title, value) in zip(panels[above:].flat if rows else (), COSTS.items(), strict=False):
        costs = {row.label: cost for row in rows if (cost := value(row)) is not None}
        _bars(axes, names, costs, colors, title)
    random = "frozen and tuned towers from RANDOM weights; dots: seeds" if accuracies else "from RANDOM weights"
    figure.suptitle(f"Methods compared, {random}", fontsize=12)
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def _bars(
    axes: Axes, names: Sequence[str], values: dict[str, float], colors: dict[str, Any], title: str, up_to: float = 0.0
) -> None:
    """A bar a method; the axis ends beyond all of them and beyond `up_to`."""
    axes.set_axis_on()
    known = [name for name in names if name in values]
    places = [names.index(name) for name in known]
    axes.barh(places, [values[name] for name in known], color=[colors[name] for name in known], alpha=0.75)
    for name, place in zip(known, places, strict=True):
        axes.text(0, place, f"  {number(values[name])}", fontsize=8.5, va="center")
    axes.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -1.1)
    axes.set_xlim(0, 1.05 * max([up_to, *values.values()]) or 1)
    axes.set_title(title, fontsize=10.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
