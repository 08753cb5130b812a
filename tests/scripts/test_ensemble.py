"""Averaging runs: numbers worked out by hand, the files it leaves, and every reason to refuse."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from engine.metrics import Scores, compute_accuracy
from engine.results import load_scores, write
from scripts.ensemble import main, mean_score

NAMES = ("left", "right", "up")
SCORES = {  # of the true class; the rest goes to the class after it
    "a": [0.9, 0.9, 0.4, 0.4],
    "b": [0.4, 0.9, 0.9, 0.4],
    "c": [0.4, 0.4, 0.9, 0.9],
}
LABELS = (0, 1, 2, 0)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _run(name: str, **other: Any) -> str:
    """A file of scores as test_vision.py leaves it, but for `other`."""
    index = torch.tensor(other.get("index", range(4)))
    label = torch.tensor(other.get("label", LABELS))
    classes = other.get("classes", 3)
    score = torch.zeros(len(index), classes, dtype=torch.float64)
    for row, value in enumerate(other.get("score", SCORES[name])[: len(index)]):
        score[row, label[row]] = value
        score[row, (label[row] + 1) % 3] = 1 - value
    path = other.get("path", [f"v{place}.avi" for place in index.tolist()])
    expected = other.get("expected", 4)
    accuracy = compute_accuracy(index, score, label, expected, expected - len(index), path)
    write(Path(f"{name}.json"), accuracy, other.get("names", NAMES), {"crops": 1, "weights": f"{name}.pt"})
    return f"{name}.npz"


def _refusal(capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, *words: str) -> str:
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    caplog.clear()
    assert main(words) == 1 and capsys.readouterr().out == ""
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "\n" not in record.getMessage()
    assert {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before
    return record.getMessage()


def test_two_runs_are_better_than_each(capsys: pytest.CaptureFixture) -> None:
    assert main([_run("a"), _run("b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert rows[0] == ["scores", "weight", "top-1", "top-5", "mean class", "videos"]
    assert rows[1] == ["a.npz", "1", "50.00", "100.00", "50.00", "4"]  # left half right, right right, up wrong
    assert rows[2] == ["b.npz", "1", "50.00", "100.00", "66.67", "4"]
    assert rows[3] == ["ensemble", "", "75.00", "100.00", "83.33", "4"]

    result = json.loads(Path("ensemble.json").read_text())
    assert (result["top1"], result["mean_class"]) == (75.0, pytest.approx(100 * 2.5 / 3))
    assert result["class_names"] == list(NAMES)
    assert [(run["file"], run["weight"], run["top1"], run["of"]["weights"]) for run in result["runs"]] == [
        ("a.npz", 1.0, 50.0, "a.pt"),
        ("b.npz", 1.0, 50.0, "b.pt"),
    ]
    saved = load_scores("ensemble.npz")
    assert saved.table.score[0].tolist() == pytest.approx([0.65, 0.35, 0]) and saved.table.path[3] == "v3.avi"
    assert saved.meta["runs"][0]["file"] == "a.npz"
    with open("ensemble_per_class.csv", newline="") as file:
        assert [row["top1"] for row in csv.DictReader(file)] == ["50.0", "100.0", "100.0"]
    assert Path("ensemble_confusion.csv").is_file() and Path("ensemble_confusion.png").is_file()


def test_three_runs_with_weights_in_any_order(capsys: pytest.CaptureFixture) -> None:
    runs = [(_run(name), weight) for name, weight in zip("abc", ("1", "1", "3"), strict=True)]
    results = []
    for number, order in enumerate(([0, 1, 2], [2, 0, 1], [1, 2, 0])):
        files, weights = zip(*(runs[place] for place in order), strict=True)
        assert main([*files, "--weights", *weights, "--out", f"three{number}.json"]) == 0
        results.append(load_scores(f"three{number}.npz").table.score)
    # (0.9 + 0.4 + 3 * 0.4) / 5 = 0.5 to 0.5: equal scores rank by class; (0.4 + 0.4 + 3 * 0.9) / 5 = 0.7
    assert results[0][0].tolist() == pytest.approx([0.5, 0.5, 0]) and results[0][3, 0] == pytest.approx(0.7)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert "c.npz" in capsys.readouterr().out


def _tested(name: str, logits: list) -> str:
    """The file of a test whose logits of (video, view, class) are these."""
    scores = Scores()
    count = len(logits)
    scores.add(torch.arange(count), torch.tensor(logits), torch.zeros(count, dtype=torch.int64))
    write(Path(f"{name}.json"), scores.accuracy(count), NAMES, {})
    return f"{name}.npz"


def test_tdns_rule_sums_positive_logits_over_the_views(capsys: pytest.CaptureFixture, caplog) -> None:
    """The first video: class 0 by 5 + 1 of 4 views to 2 + 2, where the mean of the softmax says class 1."""
    one = _tested("eight", [[[5.0, 0.0, -9.0], [-9.0, 2.0, -9.0]], [[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]]])
    two = _tested("sixteen", [[[1.0, 0.0, -9.0], [-9.0, 2.0, -9.0]], [[-1.0, -2.0, -2.0], [-1.0, -5.0, -3.0]]])
    assert main([one, two, "--rule", "positive_logits"]) == 0
    assert load_scores("ensemble.npz").table.score[0].tolist() == pytest.approx([0.6, 0.4, 0.0])
    assert load_scores("ensemble.npz").table.score[1].tolist() == pytest.approx([1 / 3] * 3)  # no logit is positive
    assert json.loads(Path("ensemble.json").read_text())["rule"] == "positive_logits"
    assert main([one, two, "--out", "usual"]) == 0
    usual = load_scores("usual.npz").table.score
    capsys.readouterr()
    assert usual[0, 1] > usual[0, 0] and json.loads(Path("usual.json").read_text())["rule"] == "softmax"
    said = _refusal(capsys, caplog, one, "ensemble.npz", "--rule", "positive_logits", "--out", "again")
    assert said == (
        "ensemble.npz: --rule positive_logits: holds no logits, as it is an ensemble or of an older version"
    )


def test_the_mean_is_exact_in_any_order_and_for_any_common_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(50, 7, generator=generator, dtype=torch.float64) for _ in range(5)]
    weights = [0.1, 0.2, 0.3, 0.7, 1.1]
    mean = mean_score(scores, weights)
    assert torch.equal(mean, mean_score(scores[::-1], weights[::-1]))
    assert torch.equal(mean, mean_score(scores, [4 * weight for weight in weights]))
    expected = numpy.average(torch.stack(scores).numpy(), axis=0, weights=weights)
    numpy.testing.assert_allclose(mean.numpy(), expected, rtol=1e-14)


def test_runs_that_skipped_the_same_video_are_averaged(capsys: pytest.CaptureFixture) -> None:
    some = {"index": [0, 1, 3], "label": [0, 1, 0]}
    assert main([_run("a", **some), _run("b", **some)]) == 0
    result = json.loads(Path("ensemble.json").read_text())
    assert (result["videos"], result["skipped"]) == (3, 1)


def test_class_names_may_be_missing_in_one(capsys: pytest.CaptureFixture) -> None:
    assert main([_run("a", names=None), _run("b")]) == 0
    assert json.loads(Path("ensemble.json").read_text())["class_names"] == list(NAMES)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"path": ["v0.avi", "w1.avi", "v2.avi", "v3.avi"]}, "video 1 of the list is v1.avi and w1.avi"),
        ({"label": (0, 1, 1, 0)}, "video 2 (v2.avi) has label 2 (up) and 1 (right)"),
        ({"classes": 5, "names": None}, "3 classes and 5"),
        ({"names": ("left", "wrong", "down")}, "class 1 is 'right' and 'wrong'"),
        ({"expected": 5, "index": range(5), "label": (*LABELS, 1)}, "their lists have 4 videos and 5"),
        ({"index": [0, 2, 3], "label": (0, 2, 0)}, "video 1 (v1.avi) was skipped in b.npz"),
    ],
)
def test_runs_over_other_videos_or_classes_are_refused(capsys, caplog, other: dict, difference: str) -> None:
    files = _run("a"), _run("b", **{"score": [0.9] * 5, **other})
    assert _refusal(capsys, caplog, *files) == f"a.npz and b.npz cannot be averaged: {difference}"


def test_a_video_skipped_in_the_first_or_in_each_another(capsys, caplog) -> None:
    first = _run("a", index=[0, 2, 3], label=(0, 2, 0))
    said = _refusal(capsys, caplog, first, _run("b"))
    assert said == "a.npz and b.npz cannot be averaged: video 1 (v1.avi) was skipped in a.npz"
    said = _refusal(capsys, caplog, first, _run("b", index=[0, 1, 2], label=(0, 1, 2)))
    assert said == "a.npz and b.npz cannot be averaged: video 1 (v1.avi) was skipped in a.npz"
    said = _refusal(capsys, caplog, _run("a"), _run("b"), _run("c", index=[0, 1, 2], label=(0, 1, 2)))
    assert said == "a.npz and c.npz cannot be averaged: video 3 (v3.avi) was skipped in c.npz"


def test_what_is_given_is_checked(capsys, caplog) -> None:
    a, b = _run("a"), _run("b")
    assert "at least two files of scores, not 1" in _refusal(capsys, caplog, a)
    assert "a.npz: is given twice" in _refusal(capsys, caplog, a, b, f"./{a}")
    Path("copy.npz").write_bytes(Path(a).read_bytes())
    said = _refusal(capsys, caplog, b, a, "copy.npz", "--weights", "1", "1", "2")
    assert said == "a.npz and copy.npz hold the same scores: one result would count twice"
    assert "one number for each of the 2 files, not 3" in _refusal(capsys, caplog, a, b, "--weights", "1", "1", "1")
    for weight in ("0", "-1", "nan", "inf"):
        assert "must be numbers above 0" in _refusal(capsys, caplog, a, b, "--weights", "1", weight)
    assert "a.npz is one of the runs" in _refusal(capsys, caplog, a, b, "--out", "a")
    assert "there is no folder nowhere" in _refusal(capsys, caplog, a, b, "--out", "nowhere/x")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_missing_broken_and_pickled_files_are_refused(capsys, caplog) -> None:
    a, whole = _run("a"), Path(_run("b")).read_bytes()
    assert _refusal(capsys, caplog, a, "absent.npz") == "absent.npz: there is no such file of scores"
    Path("b.npz").write_bytes(whole[:-40])
    assert _refusal(capsys, caplog, a, "b.npz") == "b.npz: truncated, or not an .npz file"
    numpy.savez("b.npz", numbers=numpy.arange(3))
    assert _refusal(capsys, caplog, a, "b.npz").startswith("b.npz: not the scores of a test: index, score")
    with numpy.load(a) as file:
        arrays = {name: file[name] for name in file.files}
    numpy.savez("b.npz", **{**arrays, "meta": numpy.array([Evil()], dtype=object)})
    assert _refusal(capsys, caplog, "b.npz", a).startswith("b.npz: holds pickled objects")
    assert not Path("evil").exists()


def test_a_run_without_class_names_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert main([_run("a"), _run("b", names=None)]) == 0
    assert "b.npz: has no class names, so the order of its classes cannot be compared" in caplog.text
