"""Exact accuracy: each video once, scores in float64, the same numbers for any batch size and number of processes.

A video's score depends on its own views alone and is computed on the CPU; all that follows is sorting and counting. The
logits do not depend on the batch either, because the model runs on passes of one size (evaluation.evaluate).

Letters: N videos, B videos of a batch, V views a video, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from engine.distributed import gather
from engine.errors import EngineError

_TENSORS = ("index", "score", "label", "positive_logit")  # what Scores collects, one row a video


class MetricsError(EngineError):
    """The scores are not one valid score for each video of the list."""


class DivergedError(MetricsError):
    """The model's scores are not finite."""


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """One row a video, in the order of the list; skipped videos have none.

    Args:
        index: (N,) int64, rows of the list, ascending.
        score: (N, K) float64, the mean over the views of the softmax of the logits.
        label: (N,) int64.
        path: the N names of the videos, or their indices as text if the loader gives no names.
        skipped: number of videos of the list that could not be read.
        positive_logit: (N, K) float64, the mean over the views of max(logit, 0), or None if that is not known.
    """

    index: Tensor
    score: Tensor
    label: Tensor
    path: tuple[str, ...]
    skipped: int = 0
    positive_logit: Tensor | None = None

    def rows(self) -> Iterator[tuple[int, str, int]]:
        """Index, path and label of each video."""
        return zip(self.index.tolist(), self.path, self.label.tolist(), strict=True)


@dataclass(frozen=True)
class Accuracy:
    """Percentages (0 to 100) over `videos` videos; `skipped` more could not be read and do not count.

    Equal scores rank by class number.

    Args:
        mean_class: the mean of `per_class`.
        per_class: None for a class without videos.
        confusion: [i][j] counts the videos of class i that were predicted as class j.
        predicted: (index in the list, class) of each video.
        table: the raw scores; not part of comparisons.
    """

    top1: float
    top5: float
    mean_class: float
    videos: int
    skipped: int
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    predicted: tuple[tuple[int, int], ...]
    table: ScoreTable | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All but `table`, as plain values for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "table"}


@dataclass
class Scores:
    """Collects the scores of the videos that this process evaluates."""

    index: list[Tensor] = field(default_factory=list)
    score: list[Tensor] = field(default_factory=list)
    positive_logit: list[Tensor] = field(default_factory=list)
    label: list[Tensor] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    skipped: int = 0

    def add(self, index: Tensor, logits: Tensor, label: Tensor, path: Sequence[str] | None = None) -> None:
        """Add B videos: index (B,) int64, logits (B, V, K) of any float type, label (B,) int64, B names or None."""
        names = [str(number) for number in index.tolist()] if path is None else list(path)
        if not len(index) == len(logits) == len(label) == len(names):
            raise ValueError(f"{len(index)} indices, {len(logits)} logits, {len(label)} labels, {len(names)} names")
        self.index.append(index.cpu())
        views = logits.cpu().double()
        self.score += [video.softmax(dim=-1).mean(dim=0, keepdim=True) for video in views]  # (V, K) -> (1, K) each
        self.positive_logit += [video.clamp(min=0).mean(dim=0, keepdim=True) for video in views]
        self.label.append(label.cpu())
        self.path += names

    def collect(self, expected: int) -> ScoreTable:
        """The scores of the videos of all processes, the same on each; every process must call it.

        Args:
            expected: number of videos in the list, whose indices are 0 to expected - 1.

        Raises:
            MetricsError: a video occurs twice or never, has a score that is not finite, or a label outside the classes.
        """
        parts = gather(self._packed())
        skipped = sum(part["skipped"] for part in parts)
        parts = [part for part in parts if part["path"]]
        if not parts:
            raise MetricsError(f"none of {expected} videos could be evaluated ({skipped} were skipped)")
        tensors = {name: torch.cat([part[name] for part in parts]) for name in _TENSORS}
        path = [name for part in parts for name in part["path"]]
        return _sorted_table(**tensors, path=path, expected=expected, skipped=skipped)

    def accuracy(self, expected: int) -> Accuracy:
        """The accuracy over the videos of all processes; arguments and errors as of `collect`."""
        return _count(self.collect(expected))

    def _packed(self) -> dict[str, Any]:
        """This process's scores for the others; few large tensors travel faster than many small ones."""
        if not self.path:
            return {"path": [], "skipped": self.skipped}
        tensors = {name: torch.cat(getattr(self, name)) for name in _TENSORS}
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
    names = [str(number) for number in index.tolist()] if path is None else path
    return _count(_sorted_table(index, score, label, names, expected, skipped))


def _sorted_table(
    index: Tensor,
    score: Tensor,
    label: Tensor,
    path: Sequence[str],
    expected: int,
    skipped: int,
    positive_logit: Tensor | None = None,
) -> ScoreTable:
    """The rows in the order of the list, after the checks."""
    index, order = index.sort()
    path = tuple(path[row] for row in order.tolist())
    positive_logit = None if positive_logit is None else positive_logit[order]
    table = ScoreTable(index, score[order], label[order], path, skipped, positive_logit)
    _check(table, expected)
    return table


def _count(table: ScoreTable) -> Accuracy:
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


def _check(table: ScoreTable, expected: int) -> None:
    index = table.index
    duplicate = (index[1:] == index[:-1]).nonzero()
    if len(duplicate):
        raise MetricsError(f"{_video(table, duplicate)} was evaluated more than once")
    outside = ((index < 0) | (index >= expected)).nonzero()
    if len(outside):
        raise MetricsError(f"{_video(table, outside)} was evaluated, but the list has only {expected}")
    if len(index) + table.skipped != expected:
        missing = sorted(set(range(expected)) - set(index.tolist()))
        raise MetricsError(
            f"{len(index)} videos were evaluated and {table.skipped} skipped, but the list has {expected}; "
            f"without a score: {', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}"
        )
    not_finite = (~table.score.isfinite().all(dim=1)).nonzero()
    if len(not_finite):
        raise DivergedError(f"the model's output for {_video(table, not_finite)} is not finite: it has diverged")
    classes = table.score.shape[1]
    wrong = ((table.label < 0) | (table.label >= classes)).nonzero()
    if len(wrong):
        label = int(table.label[int(wrong[0])])
        raise MetricsError(f"{_video(table, wrong)} has label {label}, but the model gives {classes} classes")


def _video(table: ScoreTable, rows: Tensor) -> str:
    """The first of some rows, such as `video 3 (a/b.mp4)`."""
    row = int(rows[0])
    index, name = int(table.index[row]), table.path[row]
    return f"video {index}" if name == str(index) else f"video {index} ({name})"
