"""What is known of a run at its start, and what of it a resumed run checks."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import run_info as record
from engine.run_info import DataChangedError, check_same_lists, describe_list, run_info, source_revision, versions


def test_revision_of_a_tree_clean_dirty_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = {"revision": "unknown", "dirty": None}
    assert source_revision(tmp_path) == unknown
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    clean = source_revision(tmp_path)
    assert len(clean["revision"]) == 40 and clean["dirty"] is False
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "new.py").write_text("")
    assert source_revision(tmp_path) == {**clean, "dirty": True}
    assert source_revision(tmp_path / "inner")["revision"] == "unknown"  # another tree's revision says nothing
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_revision(tmp_path) == unknown


def test_a_record_is_plain_values(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"a 8 0\n\nb 8 1")
    meta = run_info({"train_list": tmp_path / "train.txt", "val_list": None, "test_list": "nowhere.txt"}, seed=7)
    assert json.loads(json.dumps(meta)) == meta
    torch.save(meta, tmp_path / "meta.pt")
    assert torch.load(tmp_path / "meta.pt", weights_only=True) == meta
    digest = hashlib.sha256(b"a 8 0\n\nb 8 1").hexdigest()
    assert meta["lists"] == {
        "train_list": {"path": str(tmp_path / "train.txt"), "sha256": digest, "rows": 2},
        "val_list": None,
        "test_list": None,
    }
    assert {"git", "versions", "gpu", "command", "world_size", "started", "host", "platform"} <= meta.keys()
    assert meta["seed"] == 7 and torch.__version__.startswith(meta["versions"]["torch"])
    machine = meta["hardware"]
    assert machine["cpu"] and machine["cores"] >= 1 and machine["memory_gib"] > 0
    assert describe_list(tmp_path) is None  # a folder is no list


def test_versions_with_requirements_and_without(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("# pytest\n\npyyaml>=6.0\nnot-a-package-of-anyone==1\n-r other.txt\n")
    found = versions(tmp_path / "requirements.txt")
    assert found.keys() - versions(tmp_path / "missing.txt").keys() == {"pyyaml"} and found["pyyaml"][0].isdigit()
    assert {"python", "torch", "torchvision", "timm", "open_clip_torch", "numpy"} <= found.keys()


def test_the_machine_with_gpus_and_with_nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    assert record.hardware()["gpus"] == [{"name": "NVIDIA H200", "memory_gib": 140.0}] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.delattr("os.sysconf", raising=False)
    machine = record.hardware()
    assert machine["gpus"] == [] and machine["nccl"] is machine["memory_gib"] is None and machine["cores"] >= 1


def test_only_other_content_is_another_list(tmp_path: Path) -> None:
    for name, text in (("one.txt", "a 0\n"), ("moved.txt", "a 0\n"), ("other.txt", "a 0\nb 1\n")):
        (tmp_path / name).write_text(text)
    original, moved, other, gone = (
        {"lists": {"train_list": describe_list(tmp_path / name)}}
        for name in ("one.txt", "moved.txt", "other.txt", "gone.txt")
    )
    for accepted in ((original, moved), (original, gone), (gone, other), ({}, other), ({"lists": None}, other)):
        check_same_lists(*accepted, path="run")
    with pytest.raises(DataChangedError) as caught:
        check_same_lists(original, other, "exp/run")
    message = str(caught.value)
    assert message.startswith("exp/run: began with another train_list (") and "\n" not in message
    for start, rows in ((original, "1 rows"), (other, "2 rows")):
        assert start["lists"]["train_list"]["sha256"][:12] in message and rows in message
