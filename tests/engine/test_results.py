"""The files of a test: what they hold, that they are whole, what is refused before and when reading back."""

from __future__ import annotations

import csv
import json
import logging
import os
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from engine import confusion_plot, results
from engine.metrics import Accuracy, Scores, compute_accuracy
from engine.results import ResultsError, check_target, load_scores, worst_confusions, write

NAMES = ("left", "in $x", "out, $y$ \u5de6", "never")
#        index, label, predicted
VIDEOS = [(0, 0, 0), (1, 0, 1), (2, 0, 1), (3, 1, 1), (4, 1, 0), (6, 2, 1)]  # video 5 was skipped; no video of class 3


@pytest.fixture
def accuracy() -> Accuracy:
    index, label, predicted = (torch.tensor(column) for column in zip(*VIDEOS, strict=True))
    score = torch.full((6, 4), 0.1, dtype=torch.float64)
    score[torch.arange(6), predicted] = 0.7
    return compute_accuracy(index, score, label, 7, skipped=1, path=[f"v {number}/ü.avi" for number in index.tolist()])


def _rows(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_all_files_of_a_test(accuracy: Accuracy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "td4v"):
        write(tmp_path / "run.json", accuracy, NAMES, {"crops": 3, "config": {"seed": 1}})
    result = json.loads((tmp_path / "run.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", *result["files"].values()}
    assert sorted(result["files"].values()) == [
        "run.npz", "run_confusion.csv", "run_confusion.png", "run_per_class.csv"
    ]  # fmt: skip
    assert {name: result[name] for name in ("top1", "videos", "skipped", "crops")} == {
        "top1": pytest.approx(100 / 3), "videos": 6, "skipped": 1, "crops": 3
    }  # fmt: skip
    assert result["class_names"] == list(NAMES) and "table" not in result
    first = result["worst_confusions"][0]
    assert first == {"label": 0, "predicted": 1, "times": 2, "videos": 3, "sentence": "left predicted as in $x: 2 of 3"}
    assert "  left predicted as in $x: 2 of 3\n" in caplog.text and "run_per_class.csv" in caplog.text

    assert _rows(tmp_path / "run_per_class.csv") == [
        ["id", "name", "videos", "correct", "top1", "predicted", "predicted_name", "times"],
        ["0", "left", "3", "1", "33.3333", "1", "in $x", "2"],
        ["1", "in $x", "2", "1", "50.0", "0", "left", "1"],
        ["2", NAMES[2], "1", "0", "0.0", "1", "in $x", "1"],
        ["3", "never", "0", "0", "", "", "", "0"],
    ]
    assert _rows(tmp_path / "run_confusion.csv") == [
        ["id", "name", *NAMES],
        ["0", "left", "1", "2", "0", "0"],
        ["1", "in $x", "1", "1", "0", "0"],
        ["2", NAMES[2], "0", "1", "0", "0"],
        ["3", "never", "0", "0", "0", "0"],
    ]


def test_the_scores_are_read_back_bit_for_bit_without_pickle(accuracy: Accuracy, tmp_path: Path) -> None:
    about = {"views": 1 / 3, "weights": "best.pt", "none": None}
    for names in (NAMES, None):
        write(tmp_path / "run.json", accuracy, names, about)
        with numpy.load(tmp_path / "run.npz", allow_pickle=False) as file:
            assert {name: file[name].dtype.kind for name in file.files} == {
                "index": "i", "score": "f", "label": "i", "path": "U", "skipped": "i", "class_names": "U",
                "sha256": "U", "meta": "U",
            }  # fmt: skip
        saved = load_scores(tmp_path / "run.npz")
        for name in ("index", "score", "label"):
            assert torch.equal(getattr(saved.table, name), getattr(accuracy.table, name))
        assert (saved.table.path, saved.table.skipped) == (accuracy.table.path, 1)
        assert saved.table.path[5] == "v 6/ü.avi" and saved.table.score.dtype == torch.float64
        assert (saved.names, saved.meta) == (names, about)


def test_positive_logits_are_read_back_and_checked(tmp_path: Path) -> None:
    scores = Scores()
    scores.add(torch.arange(2), torch.tensor([[[1.0, -2.0]], [[0.5, 3.0]]]), torch.tensor([0, 1]))
    write(tmp_path / "x.json", scores.accuracy(2), None, {})
    assert load_scores(tmp_path / "x.npz").table.positive_logit.tolist() == [[1.0, 0.0], [0.5, 3.0]]
    with numpy.load(tmp_path / "x.npz") as file:
        arrays = dict(file)
    logit = arrays["positive_logit"]
    for wrong in (-logit, logit[:1], numpy.full_like(logit, numpy.nan)):
        numpy.savez(tmp_path / "x.npz", **{**arrays, "positive_logit": wrong})
        with pytest.raises(ResultsError, match="positive_logit does not hold one finite number from 0 for each score"):
            load_scores(tmp_path / "x.npz")


def test_the_worst_confusions_come_first_and_ties_by_share_and_number() -> None:
    confusion = ((5, 3, 1, 0), (3, 0, 0, 0), (2, 0, 9, 2), (0, 0, 0, 0))
    empty = Accuracy(0.0, 0.0, 0.0, 25, 0, (), confusion, ())
    found = [(each.label, each.predicted, each.times, each.videos) for each in worst_confusions(empty)]
    assert found == [(1, 0, 3, 3), (0, 1, 3, 9), (2, 0, 2, 13), (2, 3, 2, 13), (0, 2, 1, 9)]
    assert len(worst_confusions(empty, most=2)) == 2
    names = ["a\nline\r\n", " b\tb", "c", "d"]
    assert worst_confusions(empty)[0].sentence(names) == "b b predicted as a line: 3 of 3"
    assert worst_confusions(empty)[0].sentence(None) == "class 1 predicted as class 0: 3 of 3"


@pytest.mark.parametrize("classes", [1, 4, 51, 174, 400])
def test_pictures_of_any_number_of_classes(tmp_path: Path, classes: int, recwarn: pytest.WarningsRecorder) -> None:
    label = torch.arange(3 * classes) % classes
    label[label == 2] = 0  # a class without videos
    score = torch.rand(3 * classes, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score[:, 0] += 0.5
    names = tuple(f"a long name of class {label} with $ and \u5de6 " * (1 + label % 3) for label in range(classes))
    for shown in (names, None) if classes < 100 else (names,):
        write(tmp_path / "x.json", compute_accuracy(torch.arange(3 * classes), score, label, 3 * classes), shown, {})
        with Image.open(tmp_path / "x_confusion.png") as image:
            assert 300 < image.width < 3500 and 300 < image.height < 3500
            colours = image.convert("RGB").getcolors(1 << 24)
    if classes > 4:  # the row without videos
        assert max(count for count, colour in colours if colour == (0xD0, 0xD0, 0xD0)) > 1000
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_classes_whose_names_are_cut_to_the_same_have_numbers() -> None:
    start = "Pretending to put something onto something else but it falls "
    assert confusion_plot._labels(["a\n b", "c"], 2) == ["a b", "c"]
    cut = confusion_plot._labels([f"{start}left", f"{start}right", "c"], 3)
    assert cut == [f"{start[:55]}…  0", f"{start[:55]}…  1", "c  2"]


def test_what_cannot_be_written_is_refused_before_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "x.json")
    with pytest.raises(ResultsError, match=r"x\.npz: the name of the results must end in \.json"):
        check_target(tmp_path / "x.npz")
    with pytest.raises(ResultsError, match=r"run\.json: is the name of a run's record"):
        check_target(tmp_path / "run.json")
    with pytest.raises(ResultsError, match=f"there is no folder {tmp_path}/absent"):
        check_target(tmp_path / "absent" / "x.json")
    (tmp_path / "x_confusion.png").mkdir()
    with pytest.raises(ResultsError, match=r"x_confusion\.png: is a folder"):
        check_target(tmp_path / "x.json")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *arguments: False)
        with pytest.raises(ResultsError, match="cannot be written into this folder"):
            check_target(tmp_path / "y.json")
    with monkeypatch.context() as patch:
        patch.setattr(results.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ResultsError, match="pip install matplotlib"):
            check_target(tmp_path / "y.json")


def test_a_disk_that_fills_up_leaves_the_previous_files_complete(
    accuracy: Accuracy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.json", accuracy, NAMES, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match=r"x\.npz: cannot be written \(No space left on device\)"):
        write(tmp_path / "x.json", accuracy, None, {"other": 1})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def _changed(path: Path, arrays: dict[str, object]) -> None:
    with numpy.load(path) as file:
        held = {name: file[name] for name in file.files}
    numpy.savez(path, **{name: value for name, value in {**held, **arrays}.items() if value is not None})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"label": None}, r"label missing"),
        ({"score": numpy.zeros((6, 4), numpy.float32)}, "score holds float32"),
        ({"score": numpy.zeros(6)}, r"score has shape \(6,\)"),
        ({"score": numpy.full((6, 4), numpy.nan)}, "not finite"),
        ({"label": numpy.arange(5)}, r"label has shape \(5,\), not \(6,\)"),
        ({"label": numpy.arange(6)}, r"a label is outside 0\.\.3"),
        ({"label": numpy.zeros(6, numpy.int64)}, "changed after the test"),
        ({"index": numpy.zeros(6, numpy.int64)}, "does not ascend"),
        ({"class_names": numpy.array(["a"])}, r"class_names has shape \(1,\) for 4 classes"),
        ({"path": numpy.array(["v"] * 6)}, "changed after the test"),
        ({"score": 5 * numpy.eye(6, 4)}, "score does not hold probabilities that sum to 1 for each video"),
        ({"score": numpy.tile([-0.5, 0.5, 0.5, 0.5], (6, 1))}, "score does not hold probabilities"),
        ({"score": numpy.full((6, 4), 1e308)}, "score does not hold probabilities"),
        ({"meta": numpy.array("{")}, "meta is not JSON"),
        ({"meta": numpy.array("[1]")}, "meta is not a JSON object"),
        *(({"meta": numpy.array('{"a":' * deep + "1" + "}" * deep)}, "meta is not") for deep in (102, 900, 100_000)),
        ({"path": numpy.array([Evil()] * 6, dtype=object)}, "holds pickled objects"),
    ],
)
def test_files_that_are_not_scores_are_refused(
    accuracy: Accuracy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.json", accuracy, NAMES, {})
    _changed(tmp_path / "x.npz", arrays)
    with pytest.raises(ResultsError, match=message) as caught:
        load_scores(tmp_path / "x.npz")
    assert str(caught.value).startswith(str(tmp_path / "x.npz")) and "\n" not in str(caught.value)
    assert not Path("evil").exists()


def test_damaged_files_are_refused_whatever_byte_it_is(accuracy: Accuracy, tmp_path: Path) -> None:
    write(tmp_path / "x.json", accuracy, NAMES, {})
    whole, path = (tmp_path / "x.npz").read_bytes(), tmp_path / "broken.npz"
    with pytest.raises(ResultsError, match="there is no such file"):
        load_scores(path)
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(ResultsError, match=r"broken\.npz: truncated, or not an \.npz file"):
            load_scores(path)
    path.write_bytes(b"\x80\x04garbage")
    with pytest.raises(ResultsError, match="truncated, or not"):
        load_scores(path)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        place = whole.index(b"\x93NUMPY", archive.getinfo("score.npy").header_offset) + 200
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ResultsError, match=r"damaged \(Bad CRC-32"):
        load_scores(path)
