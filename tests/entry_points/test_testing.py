"""test_vision.py: configuration, views, processes and layouts, and the same numbers as the validation of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from datasets.prepare.synthetic import CLASSES
from engine.results import load_scores
from tests.clip.test_published import authors_shapes
from tests.helpers.cli_harness import (
    VIDEOS,
    command,
    content,
    evaluated,
    files,
    metrics,
    refusal,
    rewritten,
    script,
    settings,
)
from tests.helpers.fault_harness import FaultHarness, free_port


def test_results_of_many_views(tiny: Path, varied: Path, tmp_path: Path):
    weights = Path(shutil.copy(varied, tmp_path))
    beside = tmp_path / "varied_3crops_2clips.json"
    arguments = ("--config", tiny, "--weights", weights, "--test_crops", "3", "--test_clips", "2")
    status, text = command("test_vision.py", *arguments)
    assert status == 0 and "testing 11 videos, 6 views each" in text, text
    result = json.loads(beside.read_text())
    labels = [int(row.split()[-1]) for row in (tiny.parent / "data" / "val.txt").read_text().splitlines()]
    predicted = dict(result["predicted"])
    assert sorted(predicted) == list(range(VIDEOS)) and result["videos"] == VIDEOS and result["skipped"] == 0
    assert len(set(predicted.values())) > 2
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    for index, label in enumerate(labels):
        confusion[label, predicted[index]] += 1
    assert result["confusion"] == confusion.tolist() and confusion.sum() == VIDEOS
    assert result["top1"] == pytest.approx(100 * confusion.diagonal().sum().item() / VIDEOS)
    per_class = 100 * confusion.diagonal() / confusion.sum(1)
    assert result["mean_class"] == pytest.approx(per_class.mean().item()) and result["top5"] == 100
    assert (result["crops"], result["clips"], result["dense"], result["epoch"]) == (3, 2, False, 1)
    assert tuple(result["class_names"]) == CLASSES and result["weights"] == str(weights)
    assert result["parameters"]["trainable"] == sum(result["parameters"]["by_module"].values()) > 0


def test_testing_has_sizes_of_its_own(tiny: Path, varied: Path, tmp_path: Path):
    """They are no other function of the weights; a network of one size refuses others with a sentence."""
    arguments = ("--config", tiny, "--weights", varied, "--set")
    status, text = command("test_vision.py", *arguments, "data.test_scale=64", "--json", tmp_path / "large.json")
    assert status == 0 and "were trained with" not in text, text
    forced = ("data.scale_size=64", "--json", tmp_path / "forced.json")
    status, text = command("test_vision.py", *arguments, *forced)
    assert status == 0 and "were trained with data.scale_size 32 and are used with 64" in text, text
    usual = evaluated(tiny, varied, tmp_path / "usual.json")
    scores = [load_scores(tmp_path / f"{name}.npz").table.score for name in ("large", "forced", "usual")]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2]) and usual["crops"] == 1
    assert json.loads((tmp_path / "large.json").read_text())["config"]["data"]["test_scale"] == 64
    sentence = refusal("test_vision.py", *arguments, "data.test_size=40")
    assert "(data.test_size 40 is not data.input_size 32, and a network with a position for each patch" in sentence


def test_a_run_folder_alone_is_enough(trained: Path, tmp_path: Path):
    """Configuration, roots and lists come from the checkpoint, and --set overrides them."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    status, text = command("test_vision.py", "--weights", folder)
    assert status == 0 and "testing 11 videos, 1 view each" in text and "RANDOM" not in text, text
    result = json.loads((folder / "model_best_1crops_1clips.json").read_text())
    (row,) = metrics(trained)
    assert result["top1"] == row["top1"] and result["weights"] == str(folder / "model_best.pt")
    assert result["config"] == content(folder / "model_best.pt")["config"]
    few = rewritten(trained.parent / "data" / "val.txt", tmp_path / "few.txt", 1, "", "")
    few.write_text("".join(few.read_text().splitlines(keepends=True)[:5]))
    chosen = ("--set", f"data.test_list={few}", "data.batch_size=1", "--json", tmp_path / "few.json")
    status, text = command("test_vision.py", "--weights", folder / "last_model.pt", *chosen)
    assert status == 0 and "testing 5 videos" in text, text
    result = json.loads((tmp_path / "few.json").read_text())
    assert result["config"]["data"]["batch_size"] == 1 and result["config"]["data"]["test_list"] == str(few)


def test_what_the_checkpoint_does_not_hold_must_be_given(tiny: Path, trained: Path, tmp_path: Path):
    saved = content(trained / "model_best.pt")
    path = tmp_path / "theirs.pt"
    torch.save({key: value for key, value in saved.items() if key != "config"}, path)
    sentence = refusal("test_vision.py", "--weights", path)
    assert sentence == f"{path}: holds no configuration: name the one it was trained with by --config"
    assert evaluated(tiny, path, tmp_path / "results.json")["videos"] == VIDEOS
    assert "name a run folder or a checkpoint" in refusal("test_vision.py")
    assert "model_best.pt: there is no such checkpoint" in refusal("test_vision.py", "--weights", tmp_path)
    wrong = refusal("test_vision.py", "--weights", trained, "--set", "data.batchsize=2")
    assert "data.batchsize" in wrong and "batch_size" in wrong


def test_the_script_takes_both_forms(tiny: Path, trained: Path, tmp_path: Path):
    for words in ((trained,), (tiny, trained / "model_best.pt")):
        target = tmp_path / f"{len(words)}.json"
        done = script("bash", "scripts/run_test_vision.sh", *words, "--device", "cpu", "--json", target)
        assert done.returncode == 0, done.stderr
        assert json.loads(target.read_text())["videos"] == VIDEOS
    done = script("bash", "scripts/run_test_vision.sh", tmp_path / "nothing")
    assert done.returncode == 2 and "no run, checkpoint or configuration" in done.stderr


def test_one_view_gives_the_validation_of_training(tiny: Path, varied: Path, tmp_path: Path):
    result = evaluated(tiny, varied, tmp_path / "results.json")
    chosen = settings(("solver.evaluate=true", f"pretrain={varied}"))
    status, text = command("train_vision.py", "--config", tiny, "--output", tmp_path / "run", *chosen)
    shown = "top-1 {top1:.2f} top-5 {top5:.2f} mean class {mean_class:.2f} over 11 videos".format(**result)
    assert status == 0 and text.rstrip().endswith(f"validation: {shown}")
    assert len({label for _, label in result["predicted"]}) > 2


@pytest.mark.parametrize("key", ["pretrain", "resume"])
def test_evaluate_only_evaluates(
    tiny: Path, varied: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
):
    """The weights it is given, which give other scores than those of the start, and changes nothing."""
    before = files(trained)
    chosen = settings(("solver.evaluate=true", f"{key}={varied}", "solver.epochs=1"))
    for name in ("engine.trainer.Trainer", "engine.run_dir.RunDir", "engine.build.build_optimizer"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("an evaluation needs none"))
    status, text = command("train_vision.py", "--config", tiny, "--output", tmp_path / "run", *chosen)
    tested = evaluated(tiny, varied, tmp_path / "results.json")
    assert status == 0 and f"validation: top-1 {tested['top1']:.2f} top-5 {tested['top5']:.2f}" in text
    assert f"mean class {tested['mean_class']:.2f} " in text
    assert len(set(dict(tested["predicted"]).values())) > 2
    assert not (tmp_path / "run").exists() and files(trained) == before


def test_weights_in_the_authors_layout(tiny: Path, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    shapes = authors_shapes(widths=(16, 32), D=32, patch=8, T=8, K=4)
    theirs = {
        f"module.{name}": torch.rand(shape, generator=generator) if shape else torch.zeros((), dtype=torch.int64)
        for name, shape in shapes.items()
    }
    torch.save({"epoch": 29, "model_state_dict": theirs}, tmp_path / "theirs.pt")
    result = evaluated(tiny, tmp_path / "theirs.pt", tmp_path / "results.json")
    assert (result["videos"], result["epoch"]) == (VIDEOS, 29)
    theirs["module.fc_proj.weight"].zero_()
    theirs["module.fc_proj.bias"][2] = 2  # above the others: the classifier that counts is theirs
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pt")
    result = evaluated(tiny, tmp_path / "theirs.pt", tmp_path / "results.json")
    assert {label for _, label in result["predicted"]} == {2}


def test_two_processes_test_every_video_once(tiny: Path, varied: Path, tmp_path: Path, harness: FaultHarness):
    folder = tmp_path / "run"
    words = ("--output", folder, "--device", "cpu", *settings(("solver.epochs=1", "network.sync_bn=true")))
    done = script("bash", "scripts/run_train_vision.sh", tiny, *words, processes=2)
    assert done.returncode == 0, done.stderr
    saved = content(folder / "last_model.pt")
    assert (saved["step"], len(saved["rng"]), saved["meta"]["world_size"]) == (4, 2, 2)
    assert not any(name.startswith("module.") for name in saved["model_state_dict"])
    (row,) = metrics(folder)
    result = evaluated(tiny, folder / "last_model.pt", tmp_path / "results.json")
    assert [row[name] for name in ("top1", "top5", "mean_class")] == [result[n] for n in ("top1", "top5", "mean_class")]

    path, variables = tmp_path / "two.json", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    call = ("test_vision.py", "--config", tiny, "--weights", varied, "--device", "cpu", "--json", path)
    ranks = [
        harness.script(
            *call, "--test_crops", "3", "--test_clips", "2", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", **variables
        )
        for rank in "01"
    ]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].printed
    two, one = json.loads(path.read_text()), evaluated(tiny, varied, tmp_path / "one.json", views=(3, 2))
    assert two["meta"]["world_size"] == 2 and one["meta"]["world_size"] == 1
    for name in ("top1", "top5", "mean_class", "videos", "confusion", "predicted"):
        assert two[name] == one[name]
    assert two["videos"] == VIDEOS and len({label for _, label in two["predicted"]}) > 2
