"""The comparison of two models over videos and seeds: what it tells apart, and how often it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.compare_models.paired import difference, differences, differences_table


def made(rng: np.random.Generator, accuracy: float, spread: float, seeds: int = 3, videos: int = 100) -> np.ndarray:
    """Right or wrong of a model whose seeds differ: (seeds, videos)."""
    of_seeds = np.clip(accuracy + spread * rng.standard_normal((seeds, 1)), 0, 1)
    return rng.random((seeds, videos)) < of_seeds


def test_means_and_intervals() -> None:
    right = {"a": np.array([[True] * 80 + [False] * 20] * 3), "b": np.array([[True] * 60 + [False] * 40] * 3)}
    found = difference("a", "b", right)
    assert (found.mean, found.one, found.is_told) == (pytest.approx(20), "a", True)
    error = 100 * (0.2 * 0.8 / 100) ** 0.5  # 20 of 100 videos differ, all in one direction
    assert (found.low, found.high) == (
        pytest.approx(20 - 1.96 * error, abs=1.1),
        pytest.approx(20 + 1.96 * error, abs=1.1),
    )
    assert difference("b", "a", right).high < 0
    assert difference("a", "a", right).mean == 0 and not difference("a", "a", right).is_told
    assert difference("a", "b", right) == found  # the same draws each time


def test_seeds_that_differ_make_the_interval_wide() -> None:
    steady = np.array([[True] * 60 + [False] * 40] * 4)
    moving = np.stack([np.arange(100) < share for share in (50, 80, 55, 75)])
    other = np.array([[True] * 55 + [False] * 45] * 4)
    narrow = difference("x", "y", {"x": steady, "y": other})
    wide = difference("x", "y", {"x": moving, "y": other})
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_equal_models_are_seldom_told_apart_and_unequal_ones_often() -> None:
    rng = np.random.default_rng(1)
    equal = [{name: made(rng, 0.5, 0.02, seeds=5) for name in "ab"} for _ in range(150)]
    assert sum(difference("a", "b", right, draws=600).is_told for right in equal) <= 0.12 * len(equal)
    unequal = [{"a": made(rng, 0.6, 0.02), "b": made(rng, 0.4, 0.02)} for _ in range(30)]
    assert sum(difference("a", "b", right, draws=600).is_told for right in unequal) >= 28


def test_all_pairs_in_a_table() -> None:
    rng = np.random.default_rng(2)
    right = {"low": made(rng, 0.2, 0.01), "high": made(rng, 0.9, 0.01), "same": made(rng, 0.9, 0.01)}
    found = differences(list(right), right)
    assert len(found) == 3 and all(one.mean >= 0 for one in found)
    assert {one.other for one in found[:2]} == {"low"} and found[0].is_told and not found[2].is_told
    head, _, *rows = differences_table(found).strip().splitlines()
    assert "95 % interval" in head and rows[0].strip("| ").endswith("yes") and rows[2].strip("| ").endswith("no")
