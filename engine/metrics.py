"""From logits to accuracy: each video exactly once, in float64, the same numbers on any number of processes.

Lives here: scores of a video from its views, collecting them over processes, top-1, top-5, mean-class accuracy and the
confusion matrix. Does not live here: running the model (evaluation.py) or writing the numbers down (report.py).

What is guaranteed: given the logits of each video, scores and accuracy are the same, bit for bit, for any order of the
videos, any batch size and any number of processes, because a video's score is computed from its own views alone, on the
CPU, and everything after that is sorting and counting whole numbers. The logits do not depend on them either, because
the model runs on passes of one size (evaluation.evaluate).

N is the number of videos, B of a batch, V the views of a video, K the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from engine.distributed import gather
from engine.errors import EngineError


class MetricsError(EngineError):
    """The scores at hand are not one valid score for each video of the list."""


class DivergedError(MetricsError):
    """The model gives scores that are not finite."""


@dataclass(frozen=True, eq=False)
class Table:
    """One row a video, in the order of the list; videos that were skipped have none.

    Args:
        index: (N,) int64, places in the list, ascending.
        score: (N, K) float64, the mean over the views of the softmaxed logits.
        label: (N,) int64.
        path: the N names of the videos, their places as text where the loader gives no names.
        skipped: videos of the list that could not be read.
    """

    index: Tensor
    score: Tensor
    label: Tensor
    path: tuple[str, ...]
    skipped: int = 0


@dataclass(frozen=True)
class Accuracy:
    """Percentages (0 to 100) over `videos` videos; `skipped` more could not be read and count nowhere.

    `per_class` is None where no video has the class, and `mean_class` the mean of the others. `confusion[i][j]` counts
    videos of class i taken for class j. Equal scores rank by class number. `table` holds the raw scores; it takes no
    part in comparisons.
    """

    top1: float
    top5: float
    mean_class: float
    videos: int
    skipped: int
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    predicted: tuple[tuple[int, int], ...]  # (place in the list, class) of each video
    table: Table | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON: all but `table`."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "table"}


@dataclass
class Scores:
    """The scores of the videos that this process has seen."""

    index: list[Tensor] = field(default_factory=list)
    score: list[Tensor] = field(default_factory=list)
    label: list[Tensor] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    skipped: int = 0

    def add(self, index: Tensor, logits: Tensor, label: Tensor, path: Sequence[str] | None = None) -> None:
        """Take in B videos: index (B,) int64, logits (B, V, K) of any float type, label (B,) int64, B names or None."""
        names = [str(place) for place in index.tolist()] if path is None else list(path)
        if not len(index) == len(logits) == len(label) == len(names):
            raise ValueError(f"{len(index)} indices, {len(logits)} logits, {len(label)} labels, {len(names)} names")
        self.index.append(index.cpu())
        views = logits.cpu().double()
        self.score += [video.softmax(dim=-1).mean(dim=0, keepdim=True) for video in views]  # (V, K) -> (1, K) each
        self.label.append(label.cpu())
        self.path += names

    def collect(self, expected: int) -> Table:
        """The scores of the videos of all processes, the same on each; every process must call it.

        Args:
            expected: videos in the list, which have the indices 0 to expected - 1.

        Raises:
            MetricsError: a video occurs twice or never, has a score that is not finite, or a label outside the classes.
        """
        parts = gather(self._share())
        skipped = sum(part["skipped"] for part in parts)
        parts = [part for part in parts if part["path"]]
        if not parts:
            raise MetricsError(f"none of {expected} videos could be evaluated ({skipped} were skipped)")
        index, score, label = (torch.cat([part[name] for part in parts]) for name in ("index", "score", "label"))
        return _table(index, score, label, [name for part in parts for name in part["path"]], expected, skipped)

    def accuracy(self, expected: int) -> Accuracy:
        """As `collect`, and counted; the scores themselves are in the result's `table`."""
        return _count(self.collect(expected))

    def _share(self) -> dict[str, Any]:
        """What this process tells the others: few large tensors travel faster than many small ones."""
        if not self.path:
            return {"path": [], "skipped": self.skipped}
        tensors = {name: torch.cat(getattr(self, name)) for name in ("index", "score", "label")}
        return {**tensors, "path": self.path, "skipped": self.skipped}


def compute_accuracy(
    index: Tensor,
    score: Tensor,
    label: Tensor,
    expected: int,
    skipped: int = 0,
    path: Sequence[str] | None = None,
) -> Accuracy:
    """Accuracy from one score a video, in any order: index (N,), score (N, K) float64, label (N,), N names or None.

    Raises MetricsError as Scores.collect does.
    """
    names = [str(place) for place in index.tolist()] if path is None else path
    return _count(_table(index, score, label, names, expected, skipped))


def _table(index: Tensor, score: Tensor, label: Tensor, path: Sequence[str], expected: int, skipped: int) -> Table:
    """The rows sorted by their place in the list, and checked."""
    index, order = index.sort()
    table = Table(index, score[order], label[order], tuple(path[row] for row in order.tolist()), skipped)
    _check(table, expected)
    return table


def _count(table: Table) -> Accuracy:
    videos, classes = table.score.shape
    ranked = table.score.argsort(dim=1, descending=True, stable=True)  # (N, K), equal scores by class number
    hits = ranked == table.label[:, None]
    predicted = ranked[:, 0]
    pairs = table.label * classes + predicted  # (N,)
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)  # (K, K)
    total = confusion.sum(1).tolist()
    right = confusion.diagonal().tolist()
    per_class = tuple(100.0 * r / t if t else None for r, t in zip(right, total, strict=True))
    seen = [value for value in per_class if value is not None]
    return Accuracy(
        top1=100.0 * sum(right) / videos,
        top5=100.0 * int(hits[:, : min(5, classes)].sum()) / videos,
        mean_class=sum(seen) / len(seen),
        videos=videos,
        skipped=table.skipped,
        per_class=per_class,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        predicted=tuple(zip(table.index.tolist(), predicted.tolist(), strict=True)),
        table=table,
    )


def _check(table: Table, expected: int) -> None:
    index, name = table.index, lambda row: f"video {int(index[row])}{_named(table, row)}"
    twice = (index[1:] == index[:-1]).nonzero()
    if len(twice):
        raise MetricsError(f"{name(int(twice[0]))} was evaluated more than once")
    outside = ((index < 0) | (index >= expected)).nonzero()
    if len(outside):
        raise MetricsError(f"{name(int(outside[0]))} was evaluated, but the list has only {expected}")
    if len(index) + table.skipped != expected:
        missing = sorted(set(range(expected)) - set(index.tolist()))
        raise MetricsError(
            f"{len(index)} videos were evaluated and {table.skipped} skipped, but the list has {expected}; "
            f"without a score: {', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}"
        )
    bad = (~table.score.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise DivergedError(f"the model's output for {name(int(bad[0]))} is not finite: it has diverged")
    classes = table.score.shape[1]
    wrong = ((table.label < 0) | (table.label >= classes)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise MetricsError(f"{name(row)} has label {int(table.label[row])}, but the model gives {classes} classes")


def _named(table: Table, row: int) -> str:
    """The name in brackets where there is one."""
    name = table.path[row]
    return "" if name == str(int(table.index[row])) else f" ({name})"
