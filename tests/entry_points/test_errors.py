"""Wrong input on the command line: each ends in one sentence that names it, and nothing is left behind."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.cli_harness import evaluated, metrics, refusal, rewritten, script, train, training_refusal


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("network.model=td4v_finetune", "holds the weights of another model or another network"),
        ("data.num_segments=4", "was made for T = 8 frames, data.num_segments is 4"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny: Path, trained: Path, tmp_path: Path, override: str, sentence: str):
    weights = trained / "last_model.pt"
    of_test = refusal("test_vision.py", "--config", tiny, "--weights", weights, "--set", override)
    assert of_test.startswith(f"{weights}: {sentence}")
    assert training_refusal(tiny, tmp_path / "run", f"pretrain={weights}", override) == of_test
    assert " in this run and is now " in training_refusal(tiny, tmp_path / "run", f"resume={weights}", override)
    assert not (tmp_path / "run").exists()


def test_what_testing_needs_is_checked_before_it_starts(tiny: Path, trained: Path, tmp_path: Path):
    weights = trained / "last_model.pt"
    call = ("test_vision.py", "--config", tiny, "--weights", weights)
    assert "nope.csv" in refusal(*call, "--set", f"data.label_list={tmp_path / 'nope.csv'}")
    assert "there is no folder" in refusal(*call, "--json", tmp_path / "nowhere" / "x.json")


def test_missing_files_are_named(tiny: Path, tmp_path: Path):
    weights = tmp_path / "absent.pt"
    arguments = ("--config", tiny, "--weights", weights)
    assert refusal("test_vision.py", *arguments) == f"{weights}: there is no such checkpoint"
    for key in ("pretrain", "resume"):
        sentence = training_refusal(tiny, tmp_path / "run", f"{key}={weights}")
        assert sentence == f"{weights}: there is no such checkpoint"
    for key, what in (("train_list", "file"), ("val_list", "file"), ("train_root", "folder"), ("val_root", "folder")):
        sentence = training_refusal(tiny, tmp_path / "run", f"data.{key}={tmp_path / 'absent'}")
        assert sentence == f"data.{key}: there is no {what} {tmp_path / 'absent'}"
    assert "absent.yaml" in training_refusal(tmp_path / "absent.yaml", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (" 8 2", " 8 4", "label 4 is outside 0..3"),
        (" 8 2", " 2", "needs `path num_frames label`"),
        (" 8 2", " 8 two", "the label must be a whole number, not 'two'"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_rows_are_named(tiny: Path, tiny_data: Path, tmp_path: Path, split: str, old: str, new: str, sentence: str):
    rows = rewritten(tiny_data / f"{split}.txt", tmp_path / "rows.txt", 7, old, new)
    found = training_refusal(tiny, tmp_path / "run", f"data.{split}_list={rows}")
    assert found.startswith(f"{rows}, line 7: {sentence}") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_fewer_frames_than_the_list_says(tiny: Path, tiny_data: Path, tmp_path: Path, split: str):
    rows = rewritten(tiny_data / f"{split}.txt", tmp_path / "rows.txt", 7, " 8 2", " 9 2")
    sentence = training_refusal(tiny, tmp_path / "run", f"data.{split}_list={rows}")
    assert "000009.jpg is missing" in sentence and "declares 9 frames" in sentence
    assert sentence.endswith(f"({rows}, line 7)")
    assert " ERROR " in (tmp_path / "run" / "log.txt").read_text()


def test_a_truncated_image(tiny: Path, tiny_data: Path, tmp_path: Path):
    shutil.copytree(tiny_data / "frames", tmp_path / "frames")
    broken = []
    for split, line in (("train", 6), ("val", 2)):
        image = (
            tmp_path
            / "frames"
            / (tiny_data / f"{split}.txt").read_text().splitlines()[line - 1].split()[0]
            / "000003.jpg"
        )
        image.write_bytes(image.read_bytes()[:-100])
        broken.append(
            (
                image,
                f"{image}: is not a readable image (Premature end of JPEG file) ({tiny_data / split}.txt, line {line})",
            )
        )
    chosen = (f"data.train_root={tmp_path / 'frames'}", f"data.val_root={tmp_path / 'frames'}", "solver.epochs=1")
    assert training_refusal(tiny, tmp_path / "raised", *chosen) == broken[0][1]
    folder = train(tiny, tmp_path / "skipped", *chosen, "data.on_error=skip")
    (row,) = metrics(folder)
    assert (row["skipped_videos"], row["step"]) == (1, 8)
    log = (folder / "log.txt").read_text()
    assert log.count(f"skipped: {broken[0][1]}") == 1 and log.count(f"skipped: {broken[1][1]}") == 1
    assert "over 10 videos, 1 more skipped" in log
    result = evaluated(tiny, folder / "last_model.pt", tmp_path / "results.json", chosen[1], "data.on_error=skip")
    assert (result["videos"], result["skipped"]) == (10, 1) and 1 not in dict(result["predicted"])


def test_a_bad_configuration_ends_in_one_sentence(tiny: Path, tmp_path: Path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(tiny.read_text().replace("batch_size:", "batchsize:"))
    line = next(n for n, text in enumerate(bad.read_text().splitlines(), 1) if "batchsize" in text)
    done = script(sys.executable, "train_vision.py", "--config", bad)
    assert done.returncode == 1 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    expected = rf"\S+ \S+ ERROR {re.escape(str(bad))}, line {line}: data\.batchsize: unknown key; did you mean data\.batch_size\?"
    assert re.fullmatch(expected, sentence)
