"""Runs of train_vision.py that succeed at once: the files they write, settings, and pretrained weights."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

import engine.build
import engine.checkpoint_file
import engine.distributed
import engine.feature_cache
import engine.rng
from scripts import export
from tests.helpers.cli_harness import command, content, evaluated, metrics, script, settings, train, training_refusal

MODELS = ("td4v_side", "td4v_finetune", "aim")


@pytest.mark.parametrize("model_name", MODELS)
def test_files_of_a_run(tiny: Path, tmp_path: Path, model_name: str):
    folder = train(tiny, tmp_path / "run", f"network.model={model_name}", "solver.epochs=1")
    names = {path.name for path in folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1 and (folder / events.pop()).stat().st_size > 1000
    assert names - {name for name in names if name.startswith("events")} == {
        "last_model.pt", "model_best.pt", "step_00000008.pt", "config.yaml", "run.json", "metrics.jsonl", "log.txt",
        ".lock",
    }  # fmt: skip
    (row,) = metrics(folder)
    assert (row["epoch"], row["step"], row["skipped_videos"]) == (0, 8, 0) and row["top1"] is not None
    saved = content(folder / "last_model.pt")
    assert set(saved) == {
        "epoch", "step_in_epoch", "step", "best", "evaluations_since_best", "unevaluated_epoch", "history",
        "loss_monitor", "model_state_dict",
        "ema_state_dict", "backbone", "full", "optimizer_state_dict", "scheduler", "scaler", "rng", "meters", "config",
        "meta",
    }  # fmt: skip
    assert (saved["epoch"], saved["step_in_epoch"], saved["step"], saved["best"]) == (1, 0, 8, row["top1"])
    assert saved["history"] == [row] and saved["backbone"]["weights"] == "random weights of seed 5"
    assert set(content(folder / "model_best.pt")) == {
        "epoch", "step", "best", "model_state_dict", "backbone", "full", "config", "meta",
    }  # fmt: skip
    tower = {name.rsplit(".", 1)[0] for name in saved["model_state_dict"] if name.startswith("tower.")}
    assert tower == (
        {"tower.visual.ln_post"} if model_name == "aim" else set()
    )  # frozen weights are not saved, and AIM trains the last norm
    assert not any(name.startswith("module.") for name in saved["model_state_dict"])
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written == saved["config"] and written["network"]["model"] == model_name
    (start,) = json.loads((folder / "run.json").read_text())
    assert torch.__version__.startswith(start["versions"]["torch"]) and "train_vision.py" in start["command"][1]
    assert start["lists"]["train_list"]["rows"] == 32 and start["finished"] and start["seed"] == 5
    log = (folder / "log.txt").read_text()
    assert "32 training and 11 validation videos, 4 classes, T = 8" in log and "finished: best top-1" in log
    assert "trainable" in log


def test_a_dry_run_reports_and_writes_nothing(tiny: Path, tmp_path: Path):
    chosen = settings((f"logging.output_dir={tmp_path / 'exp'}",))
    status, text = command("train_vision.py", "--config", tiny, *chosen, "--dry-run")
    assert status == 0, text
    assert re.search(
        r"dry run: [\d.]+ s a step, .* a checkpoint, peak memory [\d.]+ GiB; the whole run takes 0:00:", text
    )
    assert not (tmp_path / "exp").exists()


def test_the_last_line_is_the_command_that_tests_the_run(tiny: Path, tmp_path: Path):
    chosen = settings(("solver.epochs=1",))
    folder = tmp_path / "my run"
    done = script(sys.executable, "train_vision.py", "--config", tiny, "--output", folder, "--device", "cpu", *chosen)
    assert done.returncode == 0, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line == (folder / "log.txt").read_text().splitlines()[-1]
    python, *words = shlex.split(line.split(" test it with: ")[1])
    assert python == "python"
    tested = script(sys.executable, *words)
    assert tested.returncode == 0 and (folder / "model_best_1crops_1clips.json").exists(), tested.stderr


def test_seeds_come_after_wrapping_and_after_cached_features(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run draws the same numbers, however its features and its model were made."""
    calls: list[str] = []

    def watch(module: object, name: str, label: str) -> None:
        real = getattr(module, name)

        def watched(*arguments: object, **options: object) -> object:
            calls.append(label)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    watch(engine.feature_cache.FeatureCache, "loader", "features")
    watch(engine.distributed, "wrap", "wrap")
    watch(engine.rng, "seed_everything", "seed")
    watch(engine.build, "build_training_state", "state")
    chosen = ("network.model=linear_probe", "network.cache_features=all", "data.augment=false", "data.flip=null")
    chosen += ("data.crop_scale=[0.08,1.0]", "solver.epochs=1", f"logging.output_dir={tmp_path}")
    train(tiny, tmp_path / "run", *chosen)
    assert calls == ["features", "features", "wrap", "seed", "state"]


def test_a_checkpoint_is_read_once_a_start(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = train(tiny, tmp_path / "run", "solver.epochs=1")
    read, load = [], engine.checkpoint_file.load
    for module in (engine.checkpoint_file,):
        monkeypatch.setattr(module, "load", lambda path: read.append(Path(path).name) or load(path))
    opened, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read_bytes(path))
    train(tiny, folder, "solver.epochs=2")
    at_start, before_the_end = read[:2], read[2:]  # a run ends as finished only with files that are valid
    assert at_start == before_the_end == ["last_model.pt", "model_best.pt"]
    assert [name for name in opened if name.endswith(".pt")] == read


@pytest.mark.parametrize("name", ["train_vision.py", "test_vision.py"])
def test_help_is_quick(name: str):
    """torch takes seconds to import; --help does without it."""
    code = f"import runpy, sys; sys.argv = [{name!r}, '--help']; import atexit; "
    code += "atexit.register(lambda: print('torch' in sys.modules)); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = script(sys.executable, "-c", code)
    assert done.returncode == 0 and "--set" in done.stdout and done.stdout.endswith("False\n"), done.stdout


@pytest.mark.parametrize(
    "overrides",
    [
        ("solver.mixup=true",),
        ("data.num_sample=2",),
        ("solver.grad_accumulation_steps=3",),
        ("data.shot=2",),
        ("solver.precision=bf16",),
        ("solver.precision=bf16", "network.model=td4v_finetune"),
        ("solver.mixup=true", "data.num_sample=2", "data.rand_aug=true", "data.rand_erase=true"),
        ("solver.optim=sgd", "solver.clip_grad=1.0", "solver.clip_ratio=0.1", "data.dense=true"),
        ("network.sample_mode=FC", "network.sync_bn=true", "data.flip=true", "data.flip_pairs=[[0, 3], [1, 2]]"),
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_settings_train_an_epoch(tiny: Path, tmp_path: Path, overrides: tuple[str, ...]):
    (row,) = metrics(train(tiny, tmp_path / "run", "solver.epochs=1", *overrides))
    assert row["step"] == (3 if "solver.grad_accumulation_steps=3" in overrides else 8)
    assert 0 < row["train_loss"] < 10 and row["skipped_videos"] == row["skipped_steps"] == 0


def test_another_number_of_classes_needs_a_new_classifier(tiny: Path, trained: Path, tmp_path: Path):
    # A learning rate of nothing keeps the weights as the pretraining left them.
    chosen = (f"pretrain={trained / 'last_model.pt'}", "data.num_classes=5", "data.label_list=", "solver.epochs=1",
              "solver.lr=1e-15", "solver.weight_decay=0")  # fmt: skip
    sentence = training_refusal(tiny, tmp_path / "run", *chosen)
    assert str(trained / "last_model.pt") in sentence and "pretrain_head: drop" in sentence
    assert "4 classes" in sentence and "5" in sentence and not (tmp_path / "run").exists()
    folder = train(tiny, tmp_path / "run", *chosen, "pretrain_head=drop")
    before, after = (content(run / "last_model.pt")["model_state_dict"] for run in (trained, folder))
    assert after["head.weight"].shape == (5, 32)
    for name, value in before.items():
        if not name.startswith("head.") and "running" not in name and "num_batches" not in name:
            assert torch.allclose(after[name], value, rtol=0, atol=1e-9), name


def test_frozen_weights_that_only_the_file_has_stay_with_the_run(tiny: Path, trained: Path, tmp_path: Path):
    """Begun from a full checkpoint on another tower, a run must not need what nothing else can give."""
    other, full = train(tiny, tmp_path / "other", "seed=9", "solver.epochs=1"), tmp_path / "full.pt"
    assert export.main([str(other / "model_best.pt"), "--full", "--out", str(full)]) == 0
    chosen = (f"pretrain={full}", "solver.epochs=1")
    folder = train(tiny, tmp_path / "run", *chosen)
    train(tiny, folder, *chosen)
    saved = content(folder / "last_model.pt")
    tower = {name for name in saved["model_state_dict"] if name.startswith("tower.")}
    assert saved["full"] and saved["backbone"]["weights"] == f"those in {full}" and tower
    (row,) = metrics(folder)
    assert evaluated(tiny, folder / "model_best.pt", tmp_path / "results.json")["top1"] == row["top1"]
