"""model_best.pt of a run that goes on: valid, made again from a checkpoint, or lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.best_model import BestModel, find_best
from engine.checkpoint_file import BEST, LAST, load, save
from tests.helpers.cli_harness import assert_same, content


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run of one epoch, with averaged weights beside the last ones."""
    saved, best = content(trained / LAST), content(trained / BEST)
    averages = {"head.bias": saved["model_state_dict"]["head.bias"] + 1}
    save(tmp_path / LAST, saved | {"ema_state_dict": averages})
    save(tmp_path / BEST, best | {"model_state_dict": best["model_state_dict"] | averages})
    return tmp_path


def found(run: Path, in_place: bool = True) -> BestModel:
    return find_best(run, load(run / LAST), in_place)


def test_the_file_that_belongs_to_the_best_score_stays(run: Path):
    best = found(run)
    assert best.problem is None and not best.is_lost
    assert_same(best.content, content(run / BEST))


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "flipped", "folder", "weights alone", "score", "seed"])
def test_it_is_made_again_from_the_checkpoint_of_its_epoch(run: Path, damage: str):
    right, data = content(run / BEST), (run / BEST).read_bytes()
    (run / BEST).unlink()
    if damage in ("empty", "cut", "flipped"):
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        (run / BEST).write_bytes({"empty": b"", "cut": data[:middle], "flipped": flipped}[damage])
    elif damage == "folder":
        (run / BEST).mkdir()
    elif damage == "weights alone":
        torch.save(right["model_state_dict"], run / BEST)
    elif damage != "absent":
        other = {"best": right["best"] - 1} if damage == "score" else {"config": right["config"] | {"seed": 6}}
        save(run / BEST, right | other)
    best = found(run)
    assert best.problem.startswith(f"{run / BEST}: ") and best.problem.endswith(f"it is made again from {run / LAST}")
    assert_same(best.content, right)


def test_another_checkpoint_of_the_run_may_hold_it(run: Path):
    right = content(run / BEST)
    (run / BEST).unlink()
    save(run / "step_00000008.pt", content(run / LAST))
    save(run / LAST, content(run / LAST) | {"step": 9, "step_in_epoch": 1})
    best = found(run)
    assert best.problem.endswith(f"it is made again from {run / 'step_00000008.pt'}")
    assert_same(best.content, right)
    save(run / "step_00000008.pt", content(run / "step_00000008.pt") | {"evaluations_since_best": 1})
    assert found(run).problem.endswith(f"one with the same top-1 is taken from {run / 'step_00000008.pt'}")
    save(run / "step_00000008.pt", content(run / LAST) | {"config": right["config"] | {"seed": 6}})
    best = found(run)
    assert best.is_lost and best.content is None
    assert best.problem.endswith(f"no checkpoint of this run holds its weights (top-1 {right['best']:.2f})")


def test_a_better_one_of_a_later_step_stays(run: Path):
    right = content(run / BEST)
    save(run / BEST, right | {"best": 99.0, "step": 80})
    best = found(run)
    assert best.content is None and not best.is_lost and "holds a better model, top-1 99.00" in best.problem
    assert_same(found(run, in_place=False).content, right)  # the new folder of a run from an older checkpoint
