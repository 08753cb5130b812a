"""For tests from the command line: synthetic data, a tiny configuration, and the two scripts run in this process."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from configs.schema import load_config
from datasets.build import val_loader
from datasets.prepare.synthetic import make
from engine.log import close_logging
from engine.normalize import Normalizer
from models.registry import build_model, with_pixel_statistics

ROOT = Path(__file__).parents[2]
VIDEOS = 11  # to test on: not a multiple of two processes


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic dataset, its validation list one video shorter."""
    folder = tmp_path_factory.mktemp("entry") / "data"
    make(folder, train=32, val=12, seed=3, size=32)
    rows = (folder / "val.txt").read_text().splitlines()[:VIDEOS]
    (folder / "val.txt").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_data: Path) -> Path:
    """A tiny configuration of two epochs of eight steps."""
    values = {
        "seed": 5,
        "data": {
            "dataset": "frame_order", "style": "kinetics", "num_classes": 4, "num_segments": 8, "batch_size": 4,
            "workers": 0, "train_root": str(tiny_data / "frames"), "val_root": str(tiny_data / "frames"),
            "train_list": str(tiny_data / "train.txt"), "val_list": str(tiny_data / "val.txt"),
            "label_list": str(tiny_data / "labels.csv"), "input_size": 32, "random_shift": False, "flip": False,
            "crop_scale": [0.6, 1.0],
        },
        "network": {
            "arch": "custom", "init": False, "pyramid": {"n_embs": [16, 32]},
            "vision": {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32},
        },
        "solver": {"epochs": 2, "lr_warmup_step": 0},
    }  # fmt: skip
    path = tiny_data.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def trained(tiny: Path) -> Path:
    """A run folder of one epoch of side-tuning that no test changes."""
    return train(tiny, tiny.parent / "trained", "solver.epochs=1")


@pytest.fixture(scope="session")
def varied(tiny: Path, trained: Path) -> Path:
    """The checkpoint of `trained` with a classifier that gives different videos different classes.

    After so short a training all get one class, and tests of views and processes would pass whatever they compute.
    """
    chosen = load_config(tiny)
    saved = content(trained / "last_model.pt")
    model = build_model(chosen).eval()
    model.load_state_dict(saved["model_state_dict"], strict=False)  # the frozen tower follows from the seed
    with torch.inference_mode():
        pixels = with_pixel_statistics(chosen, model).data
        normalizer = Normalizer(pixels.mean, pixels.std)
        videos = [normalizer(batch["video"]).flatten(0, 1) for batch in val_loader(chosen.data)]
        features = torch.cat([model.features(video) for video in videos])
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)) / features.std()
    saved["model_state_dict"] |= {"head.weight": weight, "head.bias": -weight @ features.mean(0)}
    path = tiny.parent / "varied.pt"
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
    """The one error message of a script that refuses."""
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
    """Every leaf of nested dicts and lists with its path."""
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


def script(*words: str | Path, processes: int = 1) -> subprocess.CompletedProcess:
    """A real start, with one thread a process."""
    of_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PORT")
    environment = {name: value for name, value in os.environ.items() if name not in of_torchrun}
    environment |= {"NPROC": str(processes), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
