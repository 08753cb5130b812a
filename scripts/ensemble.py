"""Averages the scores of several tests of the same videos, as is done with models of 8 and of 16 frames.

    python -m scripts.ensemble RUN8/model_best_1crops_2clips.npz RUN16/model_best_1crops_2clips.npz
    python -m scripts.ensemble a.npz b.npz c.npz --weights 1 1 2 --out exp/three
    python -m scripts.ensemble RUN8/X.npz RUN16/X.npz --rule positive_logits

A score is the softmax of the logits, averaged over a video's views by test_vision.py and here over the runs. With
`--rule positive_logits` it is max(logit, 0) that is averaged, as TDN's authors do with networks of 8 and 16 segments
(MCG-NJU/TDN; they sum over the views, which ranks the classes alike), and the result is divided by its sum over the
classes. Neither the order of the runs nor a common factor of the weights changes the result.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import Parser, expanded, log_to_console, show
from common.tables import markdown_table
from scripts.cli import run

if TYPE_CHECKING:
    from torch import Tensor

    from engine.metrics import Accuracy, ScoreTable
    from engine.results import SavedScores


RULES = ("softmax", "positive_logits")

logger = logging.getLogger("td4v")


class EnsembleError(ValueError):
    """Runs that cannot be averaged; the message is one sentence."""


@dataclass(frozen=True)
class Run:
    """One file of scores, its weight, and its accuracy alone."""

    path: Path
    saved: SavedScores
    weight: float
    accuracy: Accuracy


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(prog="python -m scripts.ensemble", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("scores", nargs="+", type=Path, metavar="X.npz", help="written by test_vision.py; two or more")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one a file (default: all the same)")
    parser.add_argument("--rule", choices=RULES, default="softmax", help="what is averaged (default: %(default)s)")
    parser.add_argument("--out", type=expanded, default="ensemble", metavar="NAME",
                        help="results: NAME.json, NAME.npz, ... (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    log_to_console()
    target = Path(f"{options.out.removesuffix('.json')}.json")
    return run(lambda: ensemble(options.scores, options.weights, target, options.rule))


def ensemble(paths: Sequence[Path], weights: Sequence[float] | None, target: Path, rule: str = "softmax") -> None:
    """Average the runs, print the table, write the results to `target` (X.json) and beside it.

    Args:
        rule: one of RULES.

    Raises:
        EnsembleError: fewer than two files, one file or its copy twice, weights that do not fit, runs over different
            videos or classes, a file without what the rule averages.
        ResultsError: a file that cannot be read or written.
    """
    from engine.results import check_target, files_of, write  # here, as all that imports torch
    from engine.run_info import run_info

    weights = [1.0] * len(paths) if weights is None else weights
    check_arguments(paths, weights)
    check_target(target)
    real = [path.resolve() for path in paths]
    if overwritten := [path for path in (target, *files_of(target).values()) if path.resolve() in real]:
        raise EnsembleError(f"--out: {overwritten[0]} is one of the runs to average and would be overwritten")
    runs = [_read(path, weight) for path, weight in zip(paths, weights, strict=True)]
    check_runs(runs)
    score = mean_score([averaged(run, rule) for run in runs], weights)
    if rule == "positive_logits":
        score = as_shares(score)
    accuracy = _accuracy(runs[0].saved.table, score)
    show(table(runs, accuracy))
    names = next((run.saved.names for run in runs if run.saved.names is not None), None)
    about = {"rule": rule, "runs": [_to_dict(run) for run in runs], "meta": run_info()}
    write(target, accuracy, names, about)


def check_arguments(paths: Sequence[Path], weights: Sequence[float]) -> None:
    if len(paths) < 2:
        raise EnsembleError(f"an ensemble needs at least two files of scores, not {len(paths)}")
    if len(weights) != len(paths):
        raise EnsembleError(f"--weights needs one number for each of the {len(paths)} files, not {len(weights)}")
    if bad := [weight for weight in weights if not 0 < weight < math.inf]:
        raise EnsembleError(f"--weights must be numbers above 0, not {bad[0]:g}")
    real = [path.resolve() for path in paths]
    if twice := [path for index, path in enumerate(paths) if real[index] in real[:index]]:
        raise EnsembleError(f"{twice[0]}: is given twice and would count twice")


def check_runs(runs: Sequence[Run]) -> None:
    import torch

    for other in runs[1:]:
        if (difference := first_difference(runs[0], other)) is not None:
            raise EnsembleError(f"{runs[0].path} and {other.path} cannot be averaged: {difference}")
    for one, other in itertools.combinations(runs, 2):
        if torch.equal(one.saved.table.score, other.saved.table.score):
            raise EnsembleError(f"{one.path} and {other.path} hold the same scores: one result would count twice")
    unnamed = [run.path for run in runs if run.saved.names is None]
    if unnamed and len(unnamed) < len(runs):
        logger.warning("%s: has no class names, so the order of its classes cannot be compared", unnamed[0])


def averaged(run: Run, rule: str) -> Tensor:
    """What a rule averages: (N, K) float64."""
    if rule == "softmax":
        return run.saved.table.score
    if run.saved.table.positive_logit is None:
        raise EnsembleError(f"{run.path}: --rule {rule}: holds no logits, as it is an ensemble or of an older version")
    return run.saved.table.positive_logit


def as_shares(score: Tensor) -> Tensor:
    """(N, K) numbers from 0 -> divided by their sum over the classes; all alike where that is 0."""
    total = score.sum(dim=1, keepdim=True)
    return (score / total).where(total > 0, 1 / score.shape[1])


def mean_score(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of (N, K) float64 scores, bit for bit the same in any order of the runs."""
    import torch

    total = math.fsum(weights)
    shares = torch.stack([score * (weight / total) for score, weight in zip(scores, weights, strict=True)])  # (R, N, K)
    return shares.sort(dim=0).values.sum(dim=0)


def first_difference(one: Run, other: Run) -> str | None:
    """Why two runs cannot be averaged, or None: classes first, then videos and labels in the order of the list."""
    from engine.results import class_name

    tables = [run.saved.table for run in (one, other)]
    classes = [table.score.shape[1] for table in tables]
    if classes[0] != classes[1]:
        return f"{classes[0]} classes and {classes[1]}"
    for label, (name, other_name) in enumerate(zip(one.saved.names or (), other.saved.names or (), strict=False)):
        if name != other_name:
            return f"class {label} is {name!r} and {other_name!r}"
    names = one.saved.names or other.saved.names
    rows, other_rows = ({index: (path, label) for index, path, label in table.rows()} for table in tables)
    for index in sorted(rows.keys() & other_rows.keys()):
        (path, label), (other_path, other_label) = rows[index], other_rows[index]
        if path != other_path:
            return f"video {index} of the list is {path} and {other_path}"
        if label != other_label:
            labels = f"{label} ({class_name(names, label)}) and {other_label} ({class_name(names, other_label)})"
            return f"video {index} ({path}) has label {labels}"
    lengths = [len(table.index) + table.skipped for table in tables]
    if lengths[0] != lengths[1]:
        return f"their lists have {lengths[0]} videos and {lengths[1]}"
    if in_one := sorted(rows.keys() ^ other_rows.keys()):
        index = in_one[0]
        without, path = (other, rows[index][0]) if index in rows else (one, other_rows[index][0])
        return f"video {index} ({path}) was skipped in {without.path}"
    return None


def table(runs: Sequence[Run], accuracy: Accuracy) -> str:
    """Markdown: each run and the ensemble, in percent."""
    rows = [(str(run.path), f"{run.weight:g}", run.accuracy) for run in runs] + [("ensemble", None, accuracy)]
    cells = [
        [name, weight, f"{found.top1:.2f}", f"{found.top5:.2f}", f"{found.mean_class:.2f}", found.videos]
        for name, weight, found in rows
    ]
    return markdown_table(["scores", "weight", "top-1", "top-5", "mean class", "videos"], cells, align="lrrrrr")


def _read(path: Path, weight: float) -> Run:
    from engine.results import load_scores

    saved = load_scores(path)
    return Run(path, saved, weight, _accuracy(saved.table, saved.table.score))


def _accuracy(table: ScoreTable, score: Tensor) -> Accuracy:
    """The accuracy of other scores for the videos of a table."""
    from engine.metrics import compute_accuracy

    return compute_accuracy(
        index=table.index,
        score=score,
        label=table.label,
        expected=len(table.index) + table.skipped,
        skipped=table.skipped,
        path=table.path,
    )


def _to_dict(run: Run) -> dict[str, Any]:
    numbers = {name: getattr(run.accuracy, name) for name in ("top1", "top5", "mean_class")}
    return {"file": str(run.path), "weight": run.weight, **numbers, "of": run.saved.meta}


if __name__ == "__main__":
    sys.exit(main())
