"""model_best.pt of a run: the file that belongs to the best score, or one made again from a checkpoint of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.compare import difference
from configs.schema import ConfigError, load_config
from engine import checkpoint_file
from engine.checkpoint_file import Checkpoint, CheckpointError


@dataclass(frozen=True)
class BestModel:
    """What became of a best model.

    Args:
        content: to write into model_best.pt; None: the file is right as it is, or lost.
        problem: what is wrong with the file, and whether it is made again; None: nothing.
        is_lost: no file holds these weights any more.
    """

    content: dict[str, Any] | None = None
    problem: str | None = None
    is_lost: bool = False


def find_best(folder: Path, run: Checkpoint, in_place: bool) -> BestModel:
    """The best model up to a checkpoint of a run: in model_best.pt, in this checkpoint, or in another one of `folder`.

    Args:
        in_place: the run goes on in `folder`. A better model there stays: it is of a later step, which the run went
            back from and comes to again.
    """
    path, top1 = folder / checkpoint_file.BEST, run.content["best"]
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: is missing")
        best = checkpoint_file.load(path)
        problem = _why_another(best, run)
        if problem is None:
            return BestModel(best.content)
        if in_place and best.content.get("best", -1) > top1 and _other_run(best, run) is None:
            found = f"holds a better model, top-1 {best.content['best']:.2f}, than there was up to {run.path.name}"
            return BestModel(problem=f"{path}: {found}; one with more than {top1:.2f} replaces it")
        problem = f"{path}: {problem}"
    except CheckpointError as error:
        problem = str(error)
    candidates = [run, *_others(folder, run)]
    for checkpoint in sorted(candidates, key=lambda checkpoint: checkpoint.content["evaluations_since_best"]):
        if (content := best_content(checkpoint, top1)) is not None:
            is_same = not checkpoint.content["evaluations_since_best"]
            what = "it is made again" if is_same else "one with the same top-1 is taken"
            return BestModel(content, f"{problem}; {what} from {checkpoint.path}")
    return BestModel(
        problem=f"{problem}, and no checkpoint of this run holds its weights (top-1 {top1:.2f})", is_lost=True
    )


def best_content(run: Checkpoint, top1: float) -> dict[str, Any] | None:
    """The content of model_best.pt from a checkpoint that was saved right after an evaluation with that top-1."""
    content = run.content
    last = content["history"][-1] if content["history"] else {}
    if last.get("top1") != top1 or content["step"] != last["step"] or content["unevaluated_epoch"] is not None:
        return None
    weights = {**content["model_state_dict"], **(content.get("ema_state_dict") or {})}
    kept = {key: content.get(key) for key in ("epoch", "step", "best", "backbone", "full", "config", "meta")}
    return {**kept, "model_state_dict": weights}


def _why_another(best: Checkpoint, run: Checkpoint) -> str | None:
    """Why a file is not the best model up to a checkpoint, or None."""
    if (reason := _other_run(best, run)) is not None:
        return reason
    steps = [row["step"] for row in run.content["history"] if row.get("top1") == run.content["best"]]
    if best.content.get("best") != run.content["best"] or best.content.get("step") not in steps:
        return f"is not the best model up to {run.path.name}"
    return None


def _other_run(best: Checkpoint, run: Checkpoint) -> str | None:
    """What says that a file is of another run, or None."""
    if best.config == run.config:
        return None
    try:
        found = difference(best.config or {}, load_config(run.config), more_epochs=True, same_start=False)
    except ConfigError as error:
        found = str(error)
    return found and f"is of another run ({found})"


def _others(folder: Path, run: Checkpoint) -> list[Checkpoint]:
    """Other valid checkpoints of the same run in a folder."""
    found = []
    for path in checkpoint_file.of_run(folder):
        try:
            checkpoint = checkpoint_file.load(path)
        except CheckpointError:
            continue
        if path != run.path and checkpoint.is_run and _other_run(checkpoint, run) is None:
            found.append(checkpoint)
    return found
