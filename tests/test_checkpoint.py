"""Checkpoint files: whole or not there, harmless to read, and everything in them comes back."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.distributed import Process
from engine.optim import warmup_cosine

CPU = torch.device("cpu")


def _parts(width: int = 3) -> tuple:
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    optimizer = torch.optim.AdamW([{"name": "all", "params": list(model.parameters()), "lr": 0.1}])
    return model, optimizer, warmup_cosine(optimizer, 4, 2, 1), torch.amp.GradScaler("cpu", enabled=False)


def _content(parts: tuple, epoch: int = 1) -> dict:
    return checkpoint.collect(
        *parts,
        Process(),
        epoch=epoch,
        step=4,
        best=12.5,
        pending=None,
        config={"solver": {"lr": 0.1}},
        meta={"torch": "x"},
    )


def _step(parts: tuple) -> None:
    model, optimizer, scheduler, _ = parts
    optimizer.zero_grad()
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    scheduler.step()


def test_everything_comes_back(tmp_path: Path) -> None:
    parts, path = _parts(), tmp_path / "last_model.pt"
    _step(parts)
    random.gauss(0, 1), numpy.random.randn()  # leaves half a pair in both generators
    checkpoint.save(path, _content(parts))
    draws = [random.gauss(0, 1), random.random(), numpy.random.randn(), torch.rand(2).tolist()]
    _step(parts)

    fresh = _parts()
    content = checkpoint.restore(path, *fresh, Process())
    assert (content["epoch"], content["step"], content["best"]) == (1, 4, 12.5)
    assert content["config"] == {"solver": {"lr": 0.1}} and content["meta"] == {"torch": "x"}
    assert draws == [random.gauss(0, 1), random.random(), numpy.random.randn(), torch.rand(2).tolist()]
    _step(fresh)
    for one, other in zip(parts[:3], fresh[:3], strict=True):
        assert str(one.state_dict()) == str(other.state_dict())
    assert all(torch.equal(v, fresh[0].state_dict()[k]) for k, v in parts[0].state_dict().items())


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last_model.pt"
    checkpoint.save(path, {"model": {"a": torch.ones(1)}})

    def full(content: dict, file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"last_model.pt: cannot write .*No space left"):
        checkpoint.save(path, {"model": {}})
    assert os.listdir(tmp_path) == ["last_model.pt"] and checkpoint.load(path)["model"]["a"] == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/x.pt: cannot write"):
        checkpoint.save(tmp_path / "nowhere" / "x.pt", {})


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/never",)


def _truncated(path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def _spoilt(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pt", lambda path: None, "there is no such checkpoint"),
        ("b.pt", _truncated, "truncated"),
        ("c.safetensors", _spoilt, "truncated, or not a safetensors file"),
        ("d.pt", lambda path: path.write_text("a recipe for soup\n"), "not a checkpoint"),
        ("e.pt", lambda path: path.write_bytes(b""), "not a checkpoint"),
        ("f.pt", lambda path: torch.save({"model": _Evil()}, path), "holds pickled code"),
        ("g.pt", lambda path: torch.save(torch.ones(2), path), "not a checkpoint but a Tensor"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path: Path, name: str, write, message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: .*{message}") as caught:
        checkpoint.load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_known_layouts(key: str | None, prefix: str) -> None:
    weights = {f"{prefix}body.weight": torch.ones(1), f"{prefix}head.bias": torch.zeros(2)}
    found = checkpoint.weights_of({key: weights, "epoch": 3} if key else weights, "a.pt")
    assert list(found) == ["body.weight", "head.bias"]


def test_weights_of_safetensors_and_of_nothing(tmp_path: Path) -> None:
    safetensors.torch.save_file({"module.a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert list(checkpoint.weights_of(checkpoint.load(tmp_path / "w.safetensors"), "w.safetensors")) == ["a"]
    for content in ({"epoch": 3}, {"model": {"a": "b"}}, {}):
        with pytest.raises(CheckpointError, match=r"a\.pt: no model weights"):
            checkpoint.weights_of(content, "a.pt")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"0.weight": torch.ones(4, 2), "0.bias": torch.ones(3), "extra": torch.ones(1)}, path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.put_weights(_parts()[0], checkpoint.load(path), path)
    for part in ("w.pt", "5 weights missing (1.weight", "1 unknown (extra", "0.weight has shape (4, 2) instead of (3"):
        assert part in str(caught.value)


def test_a_run_that_cannot_go_on_exactly_is_refused(tmp_path: Path) -> None:
    path, parts = tmp_path / "w.pt", _parts()
    content = _content(parts)
    checkpoint.save(path, {"model_state_dict": content["model_state_dict"]})
    with pytest.raises(CheckpointError, match=r"w.pt: holds no run to resume, for it lacks epoch, step"):
        checkpoint.restore(path, *parts, Process())
    checkpoint.save(path, content)
    with pytest.raises(CheckpointError, match="written by 1 processes and cannot be resumed with 2"):
        checkpoint.restore(path, *parts, Process(world_size=2))
    with pytest.raises(CheckpointError, match="another precision"):
        checkpoint.restore(path, *parts[:3], torch.amp.GradScaler("cpu"), Process())
    split = torch.optim.AdamW([{"params": [p]} for p in parts[0].parameters()])
    with pytest.raises(CheckpointError, match="does not fit this optimizer"):
        checkpoint.restore(path, parts[0], split, *parts[2:], Process())
