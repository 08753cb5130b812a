"""Averages the scores of several tests of the same videos, as is done with models of 8 and of 16 frames.

    python -m scripts.ensemble RUN8/model_best_1crops_2clips.npz RUN16/model_best_1crops_2clips.npz
    python -m scripts.ensemble a.npz b.npz c.npz --weights 1 1 2 --out exp/three

A score is the softmaxed logits, averaged over a video's views by test_vision.py and here over the runs; neither the order
of the runs nor a common factor of the weights changes anything.
Lives here: what makes runs comparable, their average, the table. Does not live here: the files (engine/report.py) and the
accuracy (engine/metrics.py).
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.metrics import Accuracy, Table, compute_accuracy
from engine.results import SavedScores, check_target, class_name, files_of, load_scores, write
from engine.run_info import run_info

logger = logging.getLogger("td4v")


class EnsembleError(EngineError):
    """Runs that cannot be averaged; the message is one sentence."""


@dataclass(frozen=True)
class Run:
    """One file of scores and its accuracy alone."""

    path: Path
    saved: SavedScores
    weight: float
    accuracy: Accuracy


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, compare, average, write. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("scores", nargs="+", type=Path, metavar="X.npz", help="written by test_vision.py; two or more")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one a file; default: all the same")
    parser.add_argument(
        "--out", default="ensemble", metavar="NAME", help="results: NAME.json, NAME.npz, ... (ensemble)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        ensemble(options.scores, options.weights, Path(f"{options.out.removesuffix('.json')}.json"))
    except EngineError as error:
        logger.error("%s", error)
        return 1
    return 0


def ensemble(paths: Sequence[Path], weights: Sequence[float] | None, target: Path) -> Accuracy:
    """Average the runs, print the table, write the results to `target` (X.json) and beside it.

    Raises:
        EnsembleError: fewer than two files, the same or its copy twice, weights that do not fit, runs over different
            videos or classes. ReportError: a file that cannot be read or written.
    """
    if len(paths) < 2:
        raise EnsembleError(f"an ensemble needs at least two files of scores, not {len(paths)}")
    weights = [1.0] * len(paths) if weights is None else weights
    if len(weights) != len(paths):
        raise EnsembleError(f"--weights needs one number for each of the {len(paths)} files, not {len(weights)}")
    if bad := [weight for weight in weights if not 0 < weight < math.inf]:
        raise EnsembleError(f"--weights must be numbers above 0, not {bad[0]:g}")
    real = [path.resolve() for path in paths]
    if twice := [path for place, path in enumerate(paths) if real[place] in real[:place]]:
        raise EnsembleError(f"{twice[0]}: is given twice, and would count twice")
    check_target(target)
    if taken := [path for path in (target, *files_of(target).values()) if path.resolve() in real]:
        raise EnsembleError(f"--out: {taken[0]} is one of the runs to average, and would be overwritten")
    runs = [_read(path, weight) for path, weight in zip(paths, weights, strict=True)]
    for other in runs[1:]:
        if (difference := first_difference(runs[0], other)) is not None:
            raise EnsembleError(f"{runs[0].path} and {other.path} cannot be averaged: {difference}")
    for one, other in itertools.combinations(runs, 2):
        if torch.equal(one.saved.table.score, other.saved.table.score):
            raise EnsembleError(f"{one.path} and {other.path} hold the same scores: one result would count twice")
    accuracy = _accuracy(runs[0].saved.table, mean_score([run.saved.table.score for run in runs], weights))
    print(table(runs, accuracy), flush=True)
    names = next((run.saved.names for run in runs if run.saved.names is not None), None)
    write(target, accuracy, names, {"runs": [_about(run) for run in runs], "meta": run_info()})
    return accuracy


def mean_score(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of (N, K) float64 scores, bit for bit the same in any order of the runs."""
    total = math.fsum(weights)
    shares = torch.stack([score * (weight / total) for score, weight in zip(scores, weights, strict=True)])  # (R, N, K)
    return shares.sort(dim=0).values.sum(dim=0)


def first_difference(one: Run, other: Run) -> str | None:
    """Why two runs cannot be averaged, None where they can: classes, then videos and labels in the order of the list."""
    ours, theirs = one.saved, other.saved
    classes = [run.saved.table.score.shape[1] for run in (one, other)]
    if classes[0] != classes[1]:
        return f"{classes[0]} classes and {classes[1]}"
    for label, names in enumerate(zip(ours.names or (), theirs.names or (), strict=False)):
        if names[0] != names[1]:
            return f"class {label} is {names[0]!r} and {names[1]!r}"
    rows = [dict(zip(t.index.tolist(), zip(t.path, t.label.tolist(), strict=True), strict=True)) for t in (ours.table, theirs.table)]  # fmt: skip
    for place in sorted(rows[0].keys() & rows[1].keys()):
        (path, label), (their_path, their_label) = (each[place] for each in rows)
        if path != their_path:
            return f"video {place} of the list is {path} and {their_path}"
        if label != their_label:
            names = ours.names or theirs.names
            return f"video {place} ({path}) has label {label} ({class_name(names, label)}) and {their_label} ({class_name(names, their_label)})"
    lengths = [len(t.index) + t.skipped for t in (ours.table, theirs.table)]
    if lengths[0] != lengths[1]:
        return f"their lists have {lengths[0]} videos and {lengths[1]}"
    if alone := sorted(rows[0].keys() ^ rows[1].keys()):
        skipping, having = (one, rows[1]) if alone[0] in rows[1] else (other, rows[0])
        return f"video {alone[0]} ({having[alone[0]][0]}) was skipped in {skipping.path}"
    return None


def table(runs: Sequence[Run], accuracy: Accuracy) -> str:
    """Each run and the ensemble: aligned columns, percentages."""
    header = ("", "weight", "top-1", "top-5", "mean class", "videos")
    rows = [
        header,
        *(_row(str(run.path), f"{run.weight:g}", run.accuracy) for run in runs),
        _row("ensemble", "", accuracy),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(lines)


def _row(name: str, weight: str, accuracy: Accuracy) -> tuple[str, ...]:
    shares = (f"{value:.2f}" for value in (accuracy.top1, accuracy.top5, accuracy.mean_class))
    return (name, weight, *shares, str(accuracy.videos))


def _read(path: Path, weight: float) -> Run:
    saved = load_scores(path)
    return Run(path, saved, weight, _accuracy(saved.table, saved.table.score))


def _accuracy(rows: Table, score: Tensor) -> Accuracy:
    """Of other scores for the videos of a table."""
    places = len(rows.index) + rows.skipped
    return compute_accuracy(rows.index, score, rows.label, places, rows.skipped, rows.path)


def _about(run: Run) -> dict[str, Any]:
    numbers = {name: getattr(run.accuracy, name) for name in ("top1", "top5", "mean_class")}
    return {"file": str(run.path), "weight": run.weight, **numbers, "of": run.saved.meta}


if __name__ == "__main__":
    sys.exit(main())
