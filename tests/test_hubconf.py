"""torch.hub's entry points, in a process where other packages are called clip, datasets and models too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.schema import load_config
from engine import checkpoint_file
from models.registry import build_model

ROOT = Path(__file__).parents[1]
TINY = {
    "data": {"dataset": "hub", "style": "kinetics", "num_classes": 3, "num_segments": 4, "input_size": 32},
    "network": {
        "arch": "custom",
        "init": False,
        "vision": {"width": 64, "layers": 2, "heads": 2, "patch_size": 16, "image_size": 32},
        "pyramid": {"n_embs": [32, 64]},
    },
}


@pytest.fixture
def others(tmp_path):
    """A folder of packages that have the names of this repository's, as pip would install them."""
    for name in ("clip", "datasets", "models", "configs", "common", "engine"):
        (tmp_path / "others" / name).mkdir(parents=True)
        (tmp_path / "others" / name / "__init__.py").write_text("theirs = True\n")
    return tmp_path / "others"


def run(program: str, folder: Path, others: Path) -> subprocess.CompletedProcess:
    """A program in a folder outside the repository, with the other packages first on its path."""
    program = f"import sys, torch\nsys.path.insert(0, {str(others)!r})\nROOT, TINY = {str(ROOT)!r}, {TINY!r}\n{program}"
    arguments = [sys.executable, "-c", program]
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)


def test_loads_beside_installed_packages_of_the_same_names(tmp_path, others):
    done = run(
        """
import datasets                     # Hugging Face's, imported before
path = list(sys.path)
model = torch.hub.load(ROOT, "td4v_finetune", source="local", config=TINY, num_classes=5)
assert type(model).__name__ == "TD4VFinetune" and not model.training
assert model(torch.randn(2, 4, 3, 32, 32)).shape == (2, 5)
assert torch.hub.load(ROOT, "td4v_side", source="local", config=TINY)(torch.randn(2, 4, 3, 32, 32)).shape == (2, 3)
assert type(torch.hub.load(ROOT, "model", "aim", source="local", config=TINY)).__name__ == "AIM"
assert sys.modules["datasets"] is datasets and datasets.theirs and sys.path == path
""",
        tmp_path,
        others,
    )
    assert done.returncode == 0, done.stderr


def test_other_packages_can_be_imported_afterwards(tmp_path, others):
    program = "torch.hub.load(ROOT, 'td4v_side', source='local', config=TINY)\nimport datasets\nassert datasets.theirs"
    done = run(program, tmp_path, others)
    assert done.returncode == 0, done.stderr


def test_another_clip_in_the_same_process_is_one_sentence(tmp_path, others):
    program = "import clip\ntorch.hub.load(ROOT, 'td4v_side', source='local', config=TINY)"
    done = run(program, tmp_path, others)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "own package clip" in last and str(others / "clip") in last
    assert "process of its own" in last


def test_weights_bring_their_configuration(tmp_path, others):
    config = load_config(TINY)
    model = build_model(config).eval()
    video = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        expected = model(video)
    content = {"model_state_dict": model.state_dict(), "config": config.to_dict()}
    checkpoint_file.save(tmp_path / checkpoint_file.BEST, content)
    torch.save((video, expected), tmp_path / "expected.pt")
    program = """
model = torch.hub.load(ROOT, "td4v_side", source="local", weights=".")
video, expected = torch.load("expected.pt")
with torch.no_grad():
    assert torch.equal(model(video), expected)
"""
    done = run(program, tmp_path, others)
    assert done.returncode == 0, done.stderr


def test_pixel_statistics_are_those_of_the_training(tmp_path, others):
    config = load_config(TINY, ["data.mean=[0.5,0.4,0.3]", "data.std=[0.2,0.2,0.2]"])
    content = {"model_state_dict": build_model(config).state_dict(), "config": config.to_dict()}
    checkpoint_file.save(tmp_path / checkpoint_file.BEST, content)
    program = """
model = torch.hub.load(ROOT, "td4v_side", source="local", weights=".")
assert (model.mean, model.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
"""
    done = run(program, tmp_path, others)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["train_vision.py"], ["test_vision.py"], ["-m", "datasets.prepare"]], ids=" ".join)
def test_commands_run_beside_installed_packages_of_the_same_names(command, others):
    for package in others.iterdir():
        (package / "__init__.py").write_text("raise ImportError('another package')\n")
    environment = os.environ | {"PYTHONPATH": str(others)}
    arguments = [sys.executable, *command, "--help"]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
