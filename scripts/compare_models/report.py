"""The report of a comparison: tables, what they show in words, and the figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.text import plural
from configs.schema import Config
from scripts.figures import BLACK, BLUE, GREY, bar_panel, save
from scripts.profile.report import NOTES, Row, summary
from scripts.reports import bullets, dict_table, environment, number

OWN_PREFIX = "td4v"  # of the project's own models, which the findings compare with the others
STANDARD_ERRORS = 2  # above chance, up to which a mean is not told from chance


@dataclass(frozen=True)
class Scores:
    """One model on one data configuration: top-1 in percent by seed, parameters, revisions of the runs' code."""

    model: str
    top1: dict[int, float]
    trainable: int
    total: int
    revisions: tuple[str, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None for one seed."""
        return statistics.stdev(self.top1.values()) if len(self.top1) > 1 else None

    @property
    def text(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


@dataclass(frozen=True)
class Accuracy:
    """All models on one data configuration.

    Args:
        about: the recipe in words.
        chance: top-1 of guessing, in percent. majority: top-1 of always naming the most frequent class.
        videos: number of test videos.
    """

    name: str
    about: str
    chance: float
    majority: float
    videos: int
    models: list[Scores]

    @property
    def chance_bound(self) -> float:
        """Top-1 up to which a mean is not told from chance. All seeds share the videos, so more seeds do not lower it."""
        return self.chance + STANDARD_ERRORS * (self.chance * (100 - self.chance) / self.videos) ** 0.5

    def relabelled(self, labels: Mapping[str, str]) -> Accuracy:
        """The same table with the models' labels for their names."""
        return replace(self, models=[replace(scores, model=labels[scores.model]) for scores in self.models])

    def to_dict(self) -> dict[str, Any]:
        """All values, measured and derived."""
        models = [asdict(scores) | {"mean": scores.mean, "deviation": scores.deviation} for scores in self.models]
        return asdict(self) | {"models": models, "chance_bound": self.chance_bound}


def about(recipe: str, base: Config, videos: int, majority: float) -> str:
    """What was trained and tested. `base` is the configuration without what is a model's own."""
    data, solver, vision = base.data, base.solver, base.network.vision
    rows = sum(1 for line in Path(data.train_list).read_text(encoding="utf-8").splitlines() if line.strip())
    tower = base.network.arch if vision is None else f"{vision.layers} layers of width {vision.width}"
    return (
        f"{recipe} The tower ({tower}, {data.input_size} px) has RANDOM weights, nothing of CLIP is in it, and models "
        f"without a tower start from random weights too; {rows} training and {videos} test videos, {data.num_classes} "
        f"classes, T = {data.num_segments}, {plural(solver.epochs, 'epoch')}, lr {solver.lr:g}, weight decay "
        f"{solver.weight_decay:g}. Top-1 of the last epoch's checkpoint on one clip and one centre crop. Chance is "
        f"{100 / data.num_classes:.1f} %, always naming the most frequent class gives {majority:.1f} %. This shows what "
        "the models learn from so little data without pretrained weights, not how good they are with them."
    )


def accuracy_table(accuracy: Accuracy) -> str:
    """One line a model: each seed, mean and spread, trainable parameters."""
    return dict_table(
        [
            {
                "model": scores.model,
                **{f"seed {seed}": f"{score:.1f}" for seed, score in scores.top1.items()},
                "mean ± s.d." if scores.deviation is not None else "mean": scores.text,
                "trainable parameters": f"{scores.trainable:,}",
                "of all": f"{100 * scores.trainable / scores.total:.1f} %",
            }
            for scores in accuracy.models
        ]
    )


def accuracy_findings(accuracy: Accuracy) -> list[str]:
    """What the table shows, a sentence each, also where TD4V does not win."""
    highest = max(scores.mean for scores in accuracy.models)
    best = [f"{scores.model}, {scores.text} %" for scores in accuracy.models if math.isclose(scores.mean, highest)]
    lines = [f"Highest mean: {'; '.join(best)}{' (a tie)' * (len(best) > 1)}."]
    for own in (scores for scores in accuracy.models if scores.model.startswith(OWN_PREFIX)):
        if len(own.top1) < 2:
            lines.append(f"{own.model}: with one seed each, no difference can be told from luck.")
            continue
        verdicts: dict[str, list[str]] = {"above": [], "below": [], "mixed": []}
        for other in accuracy.models:
            if other is not own:
                verdicts[_verdict(own, other)].append(other.model)
        words = {
            "above": "every seed above every seed of",
            "below": "every seed below every seed of",
            "mixed": "not told apart by these seeds from",
        }
        parts = [f"{words[verdict]} {', '.join(names)}" for verdict, names in verdicts.items() if names]
        lines.append(f"{own.model} ({own.text} %): {'; '.join(parts)}.")
    low = [scores.model for scores in accuracy.models if scores.mean <= accuracy.chance_bound]
    bound = f"a mean up to {accuracy.chance_bound:.1f} %, chance and {STANDARD_ERRORS} standard errors of {accuracy.videos} videos"
    lines.append(f"Not told from chance ({bound}): {', '.join(low) or 'none'}.")
    return lines


def _verdict(own: Scores, other: Scores) -> str:
    if min(own.top1.values()) > max(other.top1.values()):
        return "above"
    return "below" if max(own.top1.values()) < min(other.top1.values()) else "mixed"


COSTS: dict[str, Callable[[Row], float | None]] = {
    "trainable parameters, M": lambda row: row.trainable / 1e6,
    "training, GFLOPs a clip": lambda row: row.training_flops / 1e9,
    "saved for backward, MB a clip": lambda row: None if row.saved_a_clip is None else row.saved_a_clip / 1e6,
    "peak of a training step, MB": lambda row: None if row.peak is None else row.peak / 1e6,
    "training, ms a clip": lambda row: row.milliseconds("training"),
    "inference, ms a clip": lambda row: row.milliseconds("inference"),
}


def cost_findings(rows: Sequence[Row]) -> list[str]:
    """The models in each measure, the cheapest first."""
    lines = []
    for name, value in COSTS.items():
        known = sorted((cost, row.label) for row in rows if (cost := value(row)) is not None)
        if known:
            lines.append(f"{name}: " + ", ".join(f"{label} {number(cost)}" for cost, label in known) + ".")
    return lines


def costs_caption(made_by: Mapping[str, Sequence[str]], meta: Mapping[str, Any]) -> str:
    """Below the table of costs: the conditions of all rows, and the code of each where that differs."""
    threads = plural(meta["threads"], "thread")
    return f"\nMeasured on {meta['processor']}, {threads}, torch {meta['torch']}.\n{revisions_text(made_by)}"


def revisions_text(made_by: Mapping[str, Sequence[str]]) -> str:
    """The revision of the code behind each row; empty if all have the same."""
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
    """The complete report. `made_by` has the revisions of the code behind each row of costs, by its label."""
    parts = ["# Models compared\n", "![](models.png)\n"]
    if changed := [f"{label} is `{model}`." for label, model in meta["models"].items() if label != model]:
        parts += [bullets(changed)]
    for accuracy in accuracies:
        parts += [f"## Top-1 on {accuracy.name}, %\n", accuracy_table(accuracy), f"{accuracy.about}\n"]
        parts += [revisions_text({scores.model: scores.revisions for scores in accuracy.models})]
        parts += [bullets(accuracy_findings(accuracy))]
    if rows:
        parts += [f"## Costs: {costs_of}\n", summary(rows) + costs_caption(made_by, meta)]
        parts += ["The cheapest first:\n", bullets(cost_findings(rows)), NOTES]
    parts += [environment(meta, meta["revisions"])]
    return "\n".join(parts)


def draw(rows: Sequence[Row], accuracies: Sequence[Accuracy], path: Path) -> None:
    """Draw a panel for each data configuration, with seeds and chance, and below one for each cost."""
    labels = [scores.model for accuracy in accuracies for scores in accuracy.models] + [row.label for row in rows]
    names = list(dict.fromkeys(labels))
    columns = 3 if rows else max(1, len(accuracies))
    accuracy_lines = math.ceil(len(accuracies) / columns)
    lines = accuracy_lines + (math.ceil(len(COSTS) / columns) if rows else 0)
    figure = Figure(figsize=(4.6 * columns, (0.32 * len(names) + 1.0) * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, accuracy in zip(panels[:accuracy_lines].flat, accuracies, strict=False):
        _bars(axes, names, {scores.model: scores.mean for scores in accuracy.models}, f"top-1 on {accuracy.name}, %")
        for scores in accuracy.models:
            row = names.index(scores.model)
            axes.plot(
                list(scores.top1.values()), [row] * len(scores.top1), "o", color=BLACK, markersize=3.5, clip_on=False
            )
        highest = max(score for scores in accuracy.models for score in scores.top1.values())
        axes.set_xlim(0, 1.05 * max(highest, accuracy.chance) or 1)
        axes.axvline(accuracy.chance, color=BLACK, linestyle=":", linewidth=1.2)
        axes.set_xlabel(f"bar: mean; dots: seeds; dotted line: chance, {accuracy.chance:.1f} %", fontsize=9)
    for axes, (title, value) in zip(panels[accuracy_lines:].flat if rows else (), COSTS.items(), strict=False):
        _bars(axes, names, {row.label: cost for row in rows if (cost := value(row)) is not None}, title)
    figure.suptitle("Models compared; all weights start at RANDOM values, frozen ones too", fontsize=12)
    save(figure, path)


def _bars(axes: Axes, names: Sequence[str], values: Mapping[str, float], title: str) -> None:
    """A bar a model, the project's own in blue."""
    axes.set_axis_on()
    bar_panel(axes, names, title)
    for row, name in enumerate(names):
        if name in values:
            axes.barh(row, values[name], color=BLUE if name.startswith(OWN_PREFIX) else GREY, alpha=0.75)
            axes.text(0, row, f"  {number(values[name])}", fontsize=8.5, va="center")
    axes.set_xlim(0, 1.05 * max(values.values(), default=0) or 1)
