"""train_vision.py and test_vision.py from the command line to the files they leave, on made data and a tiny model.

Lives here: what only shows when all rooms work together. Does not live here: what one room can show alone.
`command` runs a script in this process, `if __name__ == "__main__"` included, for starting one takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import engine.checkpoint
import engine.loop
from clip.build import build_model
from configs.schema import load_config
from datasets.build import val_loader
from datasets.prepare.frame_order import CLASSES, make
from engine.evaluation import DataError
from engine.log import close_logging
from engine.pixels import Normalizer
from scripts import export
from tests.test_authors import authors_shapes

ROOT = Path(__file__).parents[1]
VIDEOS = 11  # to test on: not a multiple of two processes
METHODS = ("td4v_side", "td4v_finetune")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made dataset, its validation list one video shorter."""
    folder = tmp_path_factory.mktemp("entry") / "data"
    make(folder, train=32, val=12, seed=3, size=32)
    rows = (folder / "val.txt").read_text().splitlines()[:VIDEOS]
    (folder / "val.txt").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def config(data: Path) -> Path:
    """A tiny configuration of two epochs of eight steps."""
    values = {
        "seed": 5,
        "data": {
            "dataset": "frame_order", "style": "kinetics", "num_classes": 4, "num_segments": 8, "batch_size": 4,
            "workers": 0, "train_root": str(data / "frames"), "val_root": str(data / "frames"),
            "train_list": str(data / "train.txt"), "val_list": str(data / "val.txt"),
            "label_list": str(data / "labels.csv"), "input_size": 32, "random_shift": False, "flip": False,
            "crop_scale": [0.6, 1.0],
        },
        "network": {
            "arch": "custom", "init": False, "pyramid": {"n_embs": [16, 32]},
            "vision": {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32},
        },
        "solver": {"epochs": 2, "lr_warmup_step": 0},
    }  # fmt: skip
    path = data.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def trained(config: Path) -> Path:
    """A run folder of one epoch of side-tuning that no test changes."""
    return train(config, config.parent / "trained", "solver.epochs=1")


@pytest.fixture(scope="session")
def varied(config: Path, trained: Path) -> Path:
    """The checkpoint of `trained` with a classifier that tells the videos apart, if not rightly: so short a training
    gives all of them one class, on which any number of views and processes would agree."""
    chosen = load_config(config)
    saved = content(trained / "last_model.pt")
    model = build_model(chosen).eval()
    model.load_state_dict(saved["model_state_dict"], strict=False)  # the frozen tower follows from the seed
    with torch.inference_mode():
        normalizer = Normalizer(chosen.data.mean, chosen.data.std)
        videos = [normalizer(batch["video"]).flatten(0, 1) for batch in val_loader(chosen.data)]
        features = torch.cat([model.features(video) for video in videos])
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)) / features.std()
    saved["model_state_dict"] |= {"head.weight": weight, "head.bias": -weight @ features.mean(0)}
    path = config.parent / "varied.pt"
    torch.save(saved, path)
    return path


def command(script: str, *arguments: str | Path) -> tuple[int, str]:
    """Run one of the two scripts on the CPU; its exit status and what it wrote to stderr."""
    level = logging.getLogger("td4v").level
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # setup_logging puts its own there
        patch.setattr(sys, "argv", [script, *map(str, arguments), "--device", "cpu"])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            return 0, stderr.getvalue()
        except SystemExit as end:
            return int(end.code or 0), stderr.getvalue()
        finally:
            close_logging()
            logging.getLogger("td4v").setLevel(level)


def settings(overrides: tuple[str, ...]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def train(config: Path, folder: Path, *overrides: str) -> Path:
    """Train into `folder`, which must work."""
    status, text = command("train_vision.py", "--config", config, "--output", folder, *settings(overrides))
    assert status == 0, text
    return folder


def evaluated(config: Path, weights: Path, path: Path, *overrides: str, views: tuple[int, int] = (1, 1)) -> dict:
    """The results of testing `weights`, which must work."""
    crops, clips = map(str, views)
    chosen = ("--test_crops", crops, "--test_clips", clips, "--json", path, *settings(overrides))
    status, text = command("test_vision.py", "--config", config, "--weights", weights, *chosen)
    assert status == 0, text
    return json.loads(path.read_text())


def refusal(script: str, *arguments: str | Path) -> str:
    """The one sentence with which a script refuses."""
    status, text = command(script, *arguments)
    errors = [line for line in text.splitlines() if " ERROR " in line]
    assert status == 1 and len(errors) == 1 and "Traceback" not in text, text
    assert text.splitlines()[-1] == errors[0]
    return errors[0].split(" ERROR ", 1)[1]


def training_refusal(config: Path, folder: Path, *overrides: str) -> str:
    return refusal("train_vision.py", "--config", config, "--output", folder, *settings(overrides))


def content(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested dicts and lists with its place."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(inner, f"{name}/{key}")
    else:
        yield name, value


def assert_same(one: object, other: object) -> None:
    """Bit for bit."""
    one, other = dict(tensors(one)), dict(tensors(other))
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        equal = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert equal, name


def rewritten(source: Path, target: Path, line: int, old: str, new: str) -> Path:
    """A copy of a list with `old` replaced in one line, counted from 1."""
    rows = source.read_text().splitlines()
    assert old in rows[line - 1]
    rows[line - 1] = rows[line - 1].replace(old, new)
    target.write_text("\n".join(rows) + "\n")
    return target


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_leaves(config: Path, tmp_path: Path, method: str):
    folder = train(config, tmp_path / "run", f"network.method={method}", "solver.epochs=1")
    names = {path.name for path in folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1 and (folder / events.pop()).stat().st_size > 1000
    assert names - {name for name in names if name.startswith("events")} == {
        "last_model.pt", "model_best.pt", "step_00000008.pt", "config.yaml", "run.json", "metrics.jsonl", "log.txt",
        ".lock",
    }  # fmt: skip
    (row,) = metrics(folder)
    assert (row["epoch"], row["step"], row["skipped"]) == (0, 8, 0) and row["top1"] is not None
    saved = content(folder / "last_model.pt")
    assert set(saved) == {
        "epoch", "place", "step", "best", "stale", "pending", "history", "health", "model_state_dict",
        "ema_state_dict", "backbone", "full", "optimizer_state_dict", "scheduler", "scaler", "rng", "meters", "config",
        "meta",
    }  # fmt: skip
    assert (saved["epoch"], saved["place"], saved["step"], saved["best"]) == (1, 0, 8, row["top1"])
    assert saved["history"] == [row] and saved["backbone"]["weights"] == "random weights of seed 5"
    assert set(content(folder / "model_best.pt")) == {
        "epoch", "step", "best", "model_state_dict", "backbone", "full", "config", "meta",
    }  # fmt: skip
    assert not [name for name in saved["model_state_dict"] if name.startswith("tower.")]
    assert not any(name.startswith("module.") for name in saved["model_state_dict"])
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written == saved["config"] and written["network"]["method"] == method
    (start,) = json.loads((folder / "run.json").read_text())
    assert torch.__version__.startswith(start["versions"]["torch"]) and "train_vision.py" in start["command"][1]
    assert start["lists"]["train_list"]["rows"] == 32 and start["finished"] and start["seed"] == 5
    log = (folder / "log.txt").read_text()
    assert "32 training and 11 validation videos, 4 classes, T = 8" in log and "finished: best top-1" in log
    assert "tuned" in log


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_is_as_one_go(config: Path, tmp_path: Path, monkeypatch, method: str):
    # Mixup and dropout draw from generators that go on from epoch to epoch; 8 batches in steps of 3 leave a short one.
    chosen = (
        f"network.method={method}",
        "solver.mixup=true",
        "network.drop_fc=0.3",
        "solver.grad_accumulation_steps=3",
    )
    whole = train(config, tmp_path / "whole", *chosen)
    save = engine.checkpoint.save

    def interrupted(path: Path, saved: dict) -> None:
        if saved["epoch"] == 2:
            raise KeyboardInterrupt
        save(path, saved)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(engine.checkpoint, "save", interrupted)
        status, text = command("train_vision.py", "--config", config, "--output", parts, *settings(chosen))
    assert status == 130 and "interrupted: last_model.pt" in text and "Traceback" not in text
    assert content(parts / "last_model.pt")["epoch"] == 1
    train(config, parts, *chosen)  # the same command
    for name in ("last_model.pt", "model_best.pt"):
        one, other = content(whole / name), content(parts / name)
        untimed = one.keys() - {"meta", "meters", "history"}
        assert_same({key: one[key] for key in untimed}, {key: other[key] for key in untimed})
    timed = ("clips_per_s", "data_wait")
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in metrics(folder)] for folder in (whole, parts)]
    assert rows[0] == rows[1] and [row["epoch"] for row in rows[0]] == [0, 1]
    assert len(json.loads((parts / "run.json").read_text())) == 2


def test_a_failing_evaluation_does_not_cost_the_epoch(config: Path, trained: Path, tmp_path: Path, monkeypatch):
    folder = tmp_path / "run"

    def broken(*arguments, **options):
        raise DataError("a validation video is broken")

    with monkeypatch.context() as patched:
        patched.setattr(engine.loop, "evaluate", broken)
        assert training_refusal(config, folder, "solver.epochs=1") == "a validation video is broken"
    assert content(folder / "last_model.pt")["pending"]["epoch"] == 0 and not metrics(folder)
    resume = f"resume={folder / 'last_model.pt'}"  # which stands for the folder
    status, text = command("train_vision.py", "--config", config, *settings((resume, "solver.epochs=1")))
    assert status == 0, text
    assert [line["top1"] for line in metrics(folder)] == [line["top1"] for line in metrics(trained)]
    ours, theirs = (content(place / "last_model.pt") for place in (folder, trained))
    for key in ("model_state_dict", "optimizer_state_dict", "rng", "best", "pending"):
        assert_same(ours[key], theirs[key])


def test_a_folder_of_another_run_is_left_alone(config: Path, trained: Path):
    before = files(trained)
    sentence = training_refusal(config, trained, "solver.epochs=1", "solver.lr=0.5")
    assert sentence == f"{trained}: already holds another run: solver.lr was 0.001 and is now 0.5"
    status, text = command("train_vision.py", "--config", config, "--output", trained, "--fresh")
    assert status == 1 and "already holds a run (last_model.pt), and --fresh was asked" in text
    assert files(trained) == before


def test_the_same_command_finds_its_run(config: Path, tmp_path: Path):
    """Without a folder: an unfinished run of the same settings, data and processes is the one."""
    chosen = settings((f"logging.output_dir={tmp_path}", "solver.epochs=1"))
    home = tmp_path / "frame_order" / "custom"

    def again(*more: str) -> set[str]:
        status, text = command("train_vision.py", "--config", config, *chosen, *more)
        assert status == 0, text
        return {folder.name for folder in home.iterdir()}

    (first,) = again()
    record = home / first / "run.json"
    (start,) = json.loads(record.read_text())
    del start["finished"]
    record.write_text(json.dumps([start]))
    assert again() == {first} and len(json.loads(record.read_text())) == 2  # which finishes it
    assert len(again()) == 2
    starts = json.loads(record.read_text())
    del starts[-1]["finished"]
    record.write_text(json.dumps(starts))
    assert len(again("--set", "seed=6")) == 3
    assert len(again("--fresh")) == 4
    starts[-1]["world_size"] = 2
    record.write_text(json.dumps(starts))
    assert len(again()) == 5


def test_a_changed_list_is_another_run(config: Path, data: Path, trained: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    changed = tmp_path / "train.txt"
    changed.write_text("\n".join((data / "train.txt").read_text().splitlines()[::-1]) + "\n")
    sentence = training_refusal(config, folder, "solver.epochs=1", f"data.train_list={changed}")
    assert "began with another train_list" in sentence and "32 rows" in sentence


def test_a_dry_run_tells_and_keeps_nothing(config: Path, tmp_path: Path):
    chosen = settings((f"logging.output_dir={tmp_path / 'exp'}",))
    status, text = command("train_vision.py", "--config", config, *chosen, "--dry-run")
    assert status == 0, text
    assert re.search(
        r"dry run: [\d.]+ s a step, .* a checkpoint, peak memory [\d.]+ GiB; the whole run takes 0:00:", text
    )
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ("solver.mixup=true",),
        ("data.num_sample=2",),
        ("solver.grad_accumulation_steps=3",),
        ("data.shot=2",),
        ("solver.precision=bf16",),
        ("solver.precision=bf16", "network.method=td4v_finetune"),
        ("solver.mixup=true", "data.num_sample=2", "data.rand_aug=true", "data.rand_erase=true"),
        ("solver.optim=sgd", "solver.clip_grad=1.0", "solver.clip_ratio=0.1", "data.dense=true"),
        ("network.sample_mode=FC", "network.sync_bn=true", "data.flip=true", "data.flip_pairs=[[0, 3], [1, 2]]"),
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_settings_train_an_epoch(config: Path, tmp_path: Path, overrides: tuple[str, ...]):
    (row,) = metrics(train(config, tmp_path / "run", "solver.epochs=1", *overrides))
    assert row["step"] == (3 if "solver.grad_accumulation_steps=3" in overrides else 8)
    assert 0 < row["train_loss"] < 10 and row["skipped"] == row["left_out"] == 0


def test_results_of_many_views(config: Path, varied: Path, tmp_path: Path):
    weights = Path(shutil.copy(varied, tmp_path))
    beside = tmp_path / "varied_3crops_2clips.json"
    arguments = ("--config", config, "--weights", weights, "--test_crops", "3", "--test_clips", "2")
    status, text = command("test_vision.py", *arguments)
    assert status == 0 and "testing 11 videos, 6 views each" in text, text
    result = json.loads(beside.read_text())
    labels = [int(row.split()[-1]) for row in (config.parent / "data" / "val.txt").read_text().splitlines()]
    predicted = dict(result["predicted"])
    assert sorted(predicted) == list(range(VIDEOS)) and result["videos"] == VIDEOS and result["skipped"] == 0
    assert len(set(predicted.values())) > 2
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    for place, label in enumerate(labels):
        confusion[label, predicted[place]] += 1
    assert result["confusion"] == confusion.tolist() and confusion.sum() == VIDEOS
    assert result["top1"] == pytest.approx(100 * confusion.diagonal().sum().item() / VIDEOS)
    per_class = 100 * confusion.diagonal() / confusion.sum(1)
    assert result["mean_class"] == pytest.approx(per_class.mean().item()) and result["top5"] == 100
    assert (result["crops"], result["clips"], result["dense"], result["epoch"]) == (3, 2, False, 1)
    assert tuple(result["class_names"]) == CLASSES and result["weights"] == str(weights)
    assert result["parameters"]["tuned"] == sum(result["parameters"]["by_module"].values()) > 0


def test_one_view_gives_the_validation_of_training(config: Path, varied: Path, tmp_path: Path):
    result = evaluated(config, varied, tmp_path / "results.json")
    chosen = settings(("solver.evaluate=true", f"pretrain={varied}"))
    status, text = command("train_vision.py", "--config", config, "--output", tmp_path / "run", *chosen)
    shown = "top-1 {top1:.2f} top-5 {top5:.2f} mean class {mean_class:.2f} over 11 videos".format(**result)
    assert status == 0 and text.rstrip().endswith(f"validation: {shown}")
    assert len({label for _, label in result["predicted"]}) > 2


@pytest.mark.parametrize("key", ["pretrain", "resume"])
def test_evaluate_only_evaluates(config: Path, varied: Path, trained: Path, tmp_path: Path, key: str):
    """The weights it is given, which score otherwise than those of the start, and changes nothing."""
    before = files(trained)
    chosen = settings(("solver.evaluate=true", f"{key}={varied}", "solver.epochs=1"))
    status, text = command("train_vision.py", "--config", config, "--output", tmp_path / "run", *chosen)
    tested = evaluated(config, varied, tmp_path / "results.json")
    assert status == 0 and f"validation: top-1 {tested['top1']:.2f} top-5 {tested['top5']:.2f}" in text
    assert f"mean class {tested['mean_class']:.2f} " in text
    assert len(set(dict(tested["predicted"]).values())) > 2
    assert not (tmp_path / "run").exists() and files(trained) == before


def test_a_restart_goes_on_with_a_fresh_run(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = train(config, tmp_path / "run", "solver.epochs=1")
    call = ("train_vision.py", "--config", config, "--output", folder, "--fresh", *settings(("solver.epochs=1",)))
    assert "--fresh was asked" in refusal(*call)
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert command(*call)[0] == 0


def test_more_and_fewer_epochs(config: Path, tmp_path: Path):
    """More of them follow the longer schedule from their first step on; fewer than were made are refused."""
    chosen = ("logging.print_freq=1",)
    folder = train(config, tmp_path / "run", "solver.epochs=1", *chosen)
    train(config, folder, "solver.epochs=2", *chosen)
    rates = [float(rate) for rate in re.findall(r"epoch 1/2 step .* lr (\S+) ", (folder / "log.txt").read_text())]
    assert len(rates) == 8 and rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(5e-4, rel=0.01)
    assert "2 epochs were trained already" in training_refusal(config, folder, "solver.epochs=1", *chosen)


def test_other_code_is_told_when_a_run_goes_on(config: Path, trained: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    saved = content(folder / "last_model.pt")
    saved["meta"]["versions"]["torch"] = "1.0"
    torch.save(saved, folder / "last_model.pt")
    status, text = command("train_vision.py", "--config", config, "--output", folder, *settings(("solver.epochs=1",)))
    assert status == 0 and "this run goes on with other code or machines: versions torch was 1.0 and is now" in text


def test_another_number_of_classes_needs_a_new_classifier(config: Path, trained: Path, tmp_path: Path):
    # A learning rate of nothing keeps the weights as the pretraining left them.
    chosen = (f"pretrain={trained / 'last_model.pt'}", "data.num_classes=5", "data.label_list=", "solver.epochs=1",
              "solver.lr=1e-15", "solver.weight_decay=0")  # fmt: skip
    sentence = training_refusal(config, tmp_path / "run", *chosen)
    assert str(trained / "last_model.pt") in sentence and "pretrain_head: drop" in sentence
    assert "4 classes" in sentence and "5" in sentence and not (tmp_path / "run").exists()
    folder = train(config, tmp_path / "run", *chosen, "pretrain_head=drop")
    before, after = (content(place / "last_model.pt")["model_state_dict"] for place in (trained, folder))
    assert after["head.weight"].shape == (5, 32)
    for name, value in before.items():
        if not name.startswith("head.") and "running" not in name and "num_batches" not in name:
            assert torch.allclose(after[name], value, rtol=0, atol=1e-9), name


def test_frozen_weights_that_only_the_file_has_stay_with_the_run(config: Path, trained: Path, tmp_path: Path):
    """Begun from a full checkpoint on another tower, a run must not need what nothing else can give."""
    other, full = train(config, tmp_path / "other", "seed=9", "solver.epochs=1"), tmp_path / "full.pt"
    assert export.main([str(other / "model_best.pt"), "--full", "--out", str(full)]) == 0
    chosen = (f"pretrain={full}", "solver.epochs=1")
    folder = train(config, tmp_path / "run", *chosen)
    train(config, folder, *chosen)
    saved = content(folder / "last_model.pt")
    tower = {name for name in saved["model_state_dict"] if name.startswith("tower.")}
    assert saved["full"] and saved["backbone"]["weights"] == f"those in {full}" and tower
    (row,) = metrics(folder)
    assert evaluated(config, folder / "model_best.pt", tmp_path / "results.json")["top1"] == row["top1"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("network.method=td4v_finetune", "holds another method's weights or another network"),
        ("data.num_segments=4", "was made for T = 8 frames, data.num_segments is 4"),
    ],
)
def test_weights_that_do_not_fit_are_refused(config: Path, trained: Path, tmp_path: Path, override: str, sentence: str):
    weights = trained / "last_model.pt"
    of_test = refusal("test_vision.py", "--config", config, "--weights", weights, "--set", override)
    assert of_test.startswith(f"{weights}: {sentence}")
    assert training_refusal(config, tmp_path / "run", f"pretrain={weights}", override) == of_test
    assert " in this run and is now " in training_refusal(config, tmp_path / "run", f"resume={weights}", override)
    assert not (tmp_path / "run").exists()


def test_resuming_from_bare_weights_starts_a_run_of_its_own(config: Path, trained: Path, tmp_path: Path, monkeypatch):
    """The folder of somebody's weights is not a run folder of ours: nothing in it may change."""
    theirs = tmp_path / "theirs" / "last_model.pt"
    theirs.parent.mkdir()
    saved, output = content(trained / "last_model.pt"), f"logging.output_dir={tmp_path / 'exp'}"
    torch.save({"model_state_dict": saved["model_state_dict"], "epoch": 7}, theirs)
    sentence = refusal("train_vision.py", "--config", config, *settings((f"resume={theirs}", output)))
    assert "lacks the frozen backbone" in sentence
    torch.save({key: saved[key] for key in ("model_state_dict", "backbone", "epoch")}, theirs)
    before = files(theirs.parent)
    status, said = command(
        "train_vision.py", "--config", config, *settings((f"resume={theirs}", output, "solver.epochs=1"))
    )
    assert status == 0 and "no run of ours to go on with" in said
    assert files(theirs.parent) == before and len(list((tmp_path / "exp").rglob("last_model.pt"))) == 1


def test_going_on_from_an_older_checkpoint_leaves_its_run_alone(config: Path, trained: Path, tmp_path: Path):
    before, older = files(trained), trained / "step_00000008.pt"
    assert content(older)["pending"]["epoch"] == 0  # trained, not validated
    said = training_refusal(config, trained, f"resume={older}")
    assert "already holds another run: resume was None" in said and files(trained) == before
    folder = train(config, tmp_path / "run", f"resume={older}")
    assert files(trained) == before and content(folder / "last_model.pt")["epoch"] == 2
    assert train(config, folder, f"resume={older}") == folder  # the same command: it is finished
    assert len(json.loads((folder / "run.json").read_text())) == 2


@pytest.mark.parametrize("override", ["solver.lr=7e-3", "solver.optim=sgd", "seed=77"])
def test_another_run_is_not_resumed(config: Path, trained: Path, override: str):
    before = files(trained)
    said = training_refusal(config, trained, f"resume={trained / 'last_model.pt'}", override)
    assert f"{override.split('=')[0]} was" in said and files(trained) == before


def test_what_testing_needs_is_checked_before_it_starts(config: Path, trained: Path, tmp_path: Path):
    weights = trained / "last_model.pt"
    call = ("test_vision.py", "--config", config, "--weights", weights)
    assert "nope.csv" in refusal(*call, "--set", f"data.label_list={tmp_path / 'nope.csv'}")
    assert "there is no folder" in refusal(*call, "--json", tmp_path / "nowhere" / "x.json")


def test_missing_files_are_named(config: Path, tmp_path: Path):
    weights = tmp_path / "absent.pt"
    arguments = ("--config", config, "--weights", weights)
    assert refusal("test_vision.py", *arguments) == f"{weights}: there is no such checkpoint"
    for key in ("pretrain", "resume"):
        sentence = training_refusal(config, tmp_path / "run", f"{key}={weights}")
        assert sentence == f"{weights}: there is no such checkpoint"
    for key, what in (("train_list", "file"), ("val_list", "file"), ("train_root", "folder"), ("val_root", "folder")):
        sentence = training_refusal(config, tmp_path / "run", f"data.{key}={tmp_path / 'absent'}")
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
def test_bad_rows_are_named(config: Path, data: Path, tmp_path: Path, split: str, old: str, new: str, sentence: str):
    rows = rewritten(data / f"{split}.txt", tmp_path / "rows.txt", 7, old, new)
    found = training_refusal(config, tmp_path / "run", f"data.{split}_list={rows}")
    assert found.startswith(f"{rows}, line 7: {sentence}") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_fewer_frames_than_the_list_says(config: Path, data: Path, tmp_path: Path, split: str):
    rows = rewritten(data / f"{split}.txt", tmp_path / "rows.txt", 7, " 8 2", " 9 2")
    sentence = training_refusal(config, tmp_path / "run", f"data.{split}_list={rows}")
    assert "000009.jpg is missing" in sentence and "declares 9 frames" in sentence
    assert sentence.endswith(f"({rows}, line 7)")
    assert " ERROR " in (tmp_path / "run" / "log.txt").read_text()


def test_a_truncated_image(config: Path, data: Path, tmp_path: Path):
    shutil.copytree(data / "frames", tmp_path / "frames")
    broken = []
    for split, line in (("train", 6), ("val", 2)):
        image = (
            tmp_path / "frames" / (data / f"{split}.txt").read_text().splitlines()[line - 1].split()[0] / "000003.jpg"
        )
        image.write_bytes(image.read_bytes()[:-100])
        broken.append(
            (image, f"{image}: is not a readable image (Premature end of JPEG file) ({data / split}.txt, line {line})")
        )
    chosen = (f"data.train_root={tmp_path / 'frames'}", f"data.val_root={tmp_path / 'frames'}", "solver.epochs=1")
    assert training_refusal(config, tmp_path / "raised", *chosen) == broken[0][1]
    folder = train(config, tmp_path / "skipped", *chosen, "data.on_error=skip")
    (row,) = metrics(folder)
    assert (row["skipped"], row["step"]) == (1, 8)
    log = (folder / "log.txt").read_text()
    assert log.count(f"skipped: {broken[0][1]}") == 1 and log.count(f"skipped: {broken[1][1]}") == 1
    assert "over 10 videos, 1 more skipped" in log
    result = evaluated(config, folder / "last_model.pt", tmp_path / "results.json", chosen[1], "data.on_error=skip")
    assert (result["videos"], result["skipped"]) == (10, 1) and 1 not in dict(result["predicted"])


def test_weights_in_the_authors_layout(config: Path, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    shapes = authors_shapes(widths=(16, 32), D=32, patch=8, T=8, K=4)
    theirs = {
        f"module.{name}": torch.rand(shape, generator=generator) if shape else torch.zeros((), dtype=torch.int64)
        for name, shape in shapes.items()
    }
    torch.save({"epoch": 29, "model_state_dict": theirs}, tmp_path / "theirs.pt")
    result = evaluated(config, tmp_path / "theirs.pt", tmp_path / "results.json")
    assert (result["videos"], result["epoch"]) == (VIDEOS, 29)
    theirs["module.fc_proj.weight"].zero_()
    theirs["module.fc_proj.bias"][2] = 2  # above the others: the classifier that counts is theirs
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pt")
    result = evaluated(config, tmp_path / "theirs.pt", tmp_path / "results.json")
    assert {label for _, label in result["predicted"]} == {2}


def script(*words: str | Path, processes: int = 1) -> subprocess.CompletedProcess:
    """A real start, with one thread a process."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PORT")}  # fmt: skip
    environment |= {"NPROC": str(processes), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_test_every_video_once(config: Path, varied: Path, tmp_path: Path):
    folder = tmp_path / "run"
    words = ("--output", folder, "--device", "cpu", *settings(("solver.epochs=1", "network.sync_bn=true")))
    done = script("bash", "scripts/run_train_vision.sh", config, *words, processes=2)
    assert done.returncode == 0, done.stderr
    saved = content(folder / "last_model.pt")
    assert (saved["step"], len(saved["rng"]), saved["meta"]["world_size"]) == (4, 2, 2)
    assert not any(name.startswith("module.") for name in saved["model_state_dict"])
    (row,) = metrics(folder)
    ours = evaluated(config, folder / "last_model.pt", tmp_path / "ours.json")
    assert [row[name] for name in ("top1", "top5", "mean_class")] == [ours[n] for n in ("top1", "top5", "mean_class")]

    results = tmp_path / "two.json"
    words = ("--test_crops", "3", "--test_clips", "2", "--json", results, "--device", "cpu")
    done = script("bash", "scripts/run_test_vision.sh", config, varied, *words, processes=2)
    assert done.returncode == 0, done.stderr
    two, one = json.loads(results.read_text()), evaluated(config, varied, tmp_path / "one.json", views=(3, 2))
    assert two["meta"]["world_size"] == 2 and one["meta"]["world_size"] == 1
    for name in ("top1", "top5", "mean_class", "videos", "confusion", "predicted"):
        assert two[name] == one[name]
    assert two["videos"] == VIDEOS and len({label for _, label in two["predicted"]}) > 2


def test_a_bad_configuration_ends_in_one_sentence(config: Path, tmp_path: Path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(config.read_text().replace("batch_size:", "batchsize:"))
    line = next(n for n, text in enumerate(bad.read_text().splitlines(), 1) if "batchsize" in text)
    done = script(sys.executable, "train_vision.py", "--config", bad)
    assert done.returncode == 1 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    expected = rf"\S+ \S+ ERROR {re.escape(str(bad))}, line {line}: data\.batchsize: unknown key; did you mean data\.batch_size\?"
    assert re.fullmatch(expected, sentence)
