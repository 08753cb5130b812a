"""From logits to accuracy: each video exactly once, in float64, the same numbers on any number of processes.

Lives here: scores of a video from its views, collecting them over processes, top-1, top-5, mean-class accuracy and the
confusion matrix. Does not live here: running the model (loop.py) or writing the numbers down (log.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.distributed import EngineError, gather


class MetricsError(EngineError):
    """The scores at hand are not one valid score for each video of the list."""


@dataclass(frozen=True)
class Accuracy:
    """Percentages (0 to 100) over `videos` videos; `skipped` more could not be read and count nowhere.

    `per_class` is None where no video has the class, and `mean_class` the mean of the others. `confusion[i][j]` counts
    videos of class i taken for class j. Equal scores rank by class number.
    """

    top1: float
    top5: float
    mean_class: float
    videos: int
    skipped: int
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    predicted: tuple[tuple[int, int], ...]  # (place in the list, class) of each video

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return asdict(self)


@dataclass
class Scores:
    """The scores of the videos that this process has seen."""

    index: list[Tensor] = field(default_factory=list)
    score: list[Tensor] = field(default_factory=list)
    label: list[Tensor] = field(default_factory=list)
    skipped: int = 0

    def add(self, index: Tensor, logits: Tensor, label: Tensor) -> None:
        """Take in B videos: index (B,) int64, logits (B, V, K) of any float type, label (B,) int64."""
        self.index.append(index.cpu())
        self.score.append(logits.double().softmax(dim=-1).mean(dim=1).cpu())  # (B, V, K) -> (B, K)
        self.label.append(label.cpu())

    def accuracy(self, expected: int) -> Accuracy:
        """The accuracy over the videos of all processes, the same on each; every process must call it.

        Args:
            expected: videos in the list, which have the indices 0 to expected - 1.

        Raises:
            MetricsError: a video occurs twice or never, has a score that is not finite, or a label outside the classes.
        """
        parts = gather((self.index, self.score, self.label, self.skipped))
        index, score, label = ([item for part in parts for item in part[kind]] for kind in range(3))
        skipped = sum(part[3] for part in parts)
        if not index:
            raise MetricsError(f"none of {expected} videos could be evaluated ({skipped} were skipped)")
        return compute_accuracy(torch.cat(index), torch.cat(score), torch.cat(label), expected, skipped)


def compute_accuracy(index: Tensor, score: Tensor, label: Tensor, expected: int, skipped: int = 0) -> Accuracy:
    """Accuracy from one score a video, in any order: index (N,), score (N, K) float64, label (N,).

    Raises MetricsError as Scores.accuracy does.
    """
    index, order = index.sort()
    score, label = score[order], label[order]
    videos, classes = score.shape
    _check(index, score, label, expected, skipped)

    ranked = score.argsort(dim=1, descending=True, stable=True)  # (N, K), equal scores by class number
    hits = ranked == label[:, None]
    predicted = ranked[:, 0]
    confusion = torch.bincount(label * classes + predicted, minlength=classes**2).view(classes, classes)  # (K, K)
    total = confusion.sum(1).tolist()
    right = confusion.diagonal().tolist()
    per_class = tuple(100.0 * r / t if t else None for r, t in zip(right, total, strict=True))
    seen = [value for value in per_class if value is not None]
    return Accuracy(
        top1=100.0 * sum(right) / videos,
        top5=100.0 * int(hits[:, : min(5, classes)].sum()) / videos,
        mean_class=sum(seen) / len(seen),
        videos=videos,
        skipped=skipped,
        per_class=per_class,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        predicted=tuple(zip(index.tolist(), predicted.tolist(), strict=True)),
    )


def _check(index: Tensor, score: Tensor, label: Tensor, expected: int, skipped: int) -> None:
    twice = index[1:][index[1:] == index[:-1]]
    if len(twice):
        raise MetricsError(f"video {int(twice[0])} was evaluated more than once")
    outside = index[(index < 0) | (index >= expected)]
    if len(outside):
        raise MetricsError(f"video {int(outside[0])} was evaluated, but the list has only {expected}")
    if len(index) + skipped != expected:
        missing = sorted(set(range(expected)) - set(index.tolist()))
        raise MetricsError(
            f"{len(index)} videos were evaluated and {skipped} skipped, but the list has {expected}; "
            f"without a score: {', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}"
        )
    bad = index[~score.isfinite().all(dim=1)]
    if len(bad):
        raise MetricsError(f"the model's output for video {int(bad[0])} is not finite: it has diverged")
    wrong = label[(label < 0) | (label >= score.shape[1])]
    if len(wrong):
        raise MetricsError(f"a video has label {int(wrong[0])}, but the model gives {score.shape[1]} classes")
