"""What a run survives: damaged files, lost data, full disks, batches of NaN and malicious pickles. See test_faults.py."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.fault_harness import (
    RICH,
    WORKERS,
    FaultHarness,
    children_of,
    content,
    each_round,
    files,
    finish,
    free_port,
    leaves,
    metrics,
    seeded_random,
    wait_for,
)


def _interrupted_run(harness: FaultHarness) -> Path:
    """A run killed in its second epoch, two steps after a save: with two checkpoints to resume from, and the best."""
    folder = harness.path()
    run = harness.train(folder, first={"kill_at_step": {"number": 14}})
    assert run.wait() == -signal.SIGKILL, run.printed
    assert len(files(folder)) == 3
    return folder


def _bit(path: Path, rng) -> None:
    """Flip a bit inside a tensor, which only the file's checksums show."""
    with zipfile.ZipFile(path) as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda part: part.file_size))
    data = bytearray(path.read_bytes())
    data[data.index(tensor) + rng.randrange(len(tensor))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGES: dict[str, Callable] = {
    "truncated": lambda path, rng: os.truncate(path, rng.randrange(1, path.stat().st_size)),
    "one bit flipped": _bit,
    "garbage": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
    "zeros": lambda path, rng: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path, rng: path.write_bytes(b""),
    "deleted": lambda path, rng: path.unlink(),
    "weights only": lambda path, rng: shutil.copy(path.with_name("model_best.pt"), path),
}


@each_round
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_last_model(harness: FaultHarness, reference, damage: str, seed: int):
    """last_model.pt truncated, a bit flipped, garbage, zeros, empty, deleted, weights only: goes back to the one before, logs that, ends equal"""
    folder = _interrupted_run(harness)
    DAMAGES[damage](folder / "last_model.pt", seeded_random(seed, damage))
    run = finish(harness, folder, reference())
    if damage != "deleted":
        assert f"WARNING {folder / 'last_model.pt'}: " in run.printed and f"going back to {folder}/step_" in run.printed
    assert f"resumed from {folder}/step_" in run.printed


@each_round
def test_no_checkpoint_is_valid(harness: FaultHarness, reference, seed: int):
    """All checkpoints of a run damaged: one sentence, status 1, nothing overwritten; one put back: ends equal"""
    folder, rng = _interrupted_run(harness), seeded_random(seed, "all")
    good = (folder / "last_model.pt").read_bytes()
    for path in (folder / "last_model.pt", *folder.glob("step_*.pt")):
        _bit(path, rng) if rng.random() < 0.5 else DAMAGES["truncated"](path, rng)
    before = files(folder)
    sentence = harness.train(folder).refusal()
    assert "none of its checkpoints is valid" in sentence and str(folder) in sentence
    assert files(folder) == before
    (folder / "last_model.pt").write_bytes(good)
    finish(harness, folder, reference())


@each_round
def test_any_bit_and_any_length(reference, tmp_path: Path, seed: int, record_property):
    """A checkpoint with one bit flipped anywhere, or cut at any length: refused by name, or read with every value right"""
    from engine import checkpoint_file

    rng, valid = seeded_random(seed, "bits"), reference() / "last_model.pt"
    data, right, path = valid.read_bytes(), dict(leaves(content(valid))), tmp_path / "x.pt"
    tries = 150
    record_property("tried", 2 * tries)
    for _ in range(tries):
        flipped = bytearray(data)
        position = rng.choice((rng.randrange(len(data)), rng.randrange(4096), len(data) - rng.randrange(1, 4096)))
        flipped[position] ^= 1 << rng.randrange(8)
        for damaged in (bytes(flipped), data[: rng.randrange(len(data))]):
            path.write_bytes(damaged)
            try:
                read = dict(leaves(checkpoint_file.load(path).content))
            except checkpoint_file.CheckpointError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                continue
            assert len(damaged) == len(data), "a file cut short was read"
            assert read.keys() == right.keys()
            for key, value in read.items():
                assert torch.equal(value, right[key]) if torch.is_tensor(value) else value == right[key], (
                    position,
                    key,
                )


@pytest.mark.parametrize("damage", ["garbage", "empty", "deleted"])
def test_other_files_are_damaged(harness: FaultHarness, reference, damage: str, record_property):
    """Other files of a run garbage, empty or deleted: mended from last_model.pt, ends equal; the best model alone: made again"""
    folder, rng = _interrupted_run(harness), seeded_random(0, damage)
    record_property("tried", 7)
    names = ("metrics.jsonl", ".lock", "config.yaml", "run.json")
    for path in (*(folder / name for name in names), *folder.glob("step_*.pt")):
        DAMAGES[damage](path, rng)
    best = harness.path()
    shutil.copytree(folder, best)
    printed = finish(harness, folder, reference()).printed
    assert all(f"WARNING {folder / name}: " in printed for name in ("config.yaml", "run.json", "metrics.jsonl"))
    DAMAGES[damage](best / "model_best.pt", rng)
    run = harness.train(best)
    assert run.wait() == 0 and f"WARNING {best / 'model_best.pt'}: " in run.printed, run.printed
    assert "the next evaluation makes another" in run.printed
    assert f"best top-1 {content(best / 'model_best.pt')['best']:.2f}" in run.printed.splitlines()[-2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root (test_a_file_cannot_grow tries the same with a limit)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@each_round
def test_the_disk_is_full(harness: FaultHarness, reference, small_disk: Path, seed: int):
    """No space left on a small tmpfs in the middle of a save: one sentence, status 1, previous checkpoint valid, ends equal"""
    rng, folder, ballast = seeded_random(seed, "disk"), small_disk / "run", small_disk / "ballast"
    run = harness.train(folder, first={"slow_steps": {"seconds": 0.02}})
    wait_for(folder, rng.randint(5, 20), run)
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - rng.randrange(150_000))))
    sentence = run.refusal()
    assert "No space left on device" in sentence and str(folder) in sentence, sentence
    step = content(folder / "last_model.pt")["step"]
    again = harness.train(folder)
    assert again.wait() in (1, 0) and len(again.errors) <= 1 and "Traceback" not in again.printed, again.printed
    assert content(folder / "last_model.pt")["step"] >= step
    ballast.unlink()
    finish(harness, folder, reference())


@each_round
def test_a_file_cannot_grow(harness: FaultHarness, reference, seed: int):
    """A save that fails in the middle (RLIMIT_FSIZE): one sentence, status 1, previous checkpoint valid, ends equal"""
    folder = _interrupted_run(harness)
    before = content(folder / "last_model.pt")["step"]
    largest = seeded_random(seed, "grow").randrange(20_000, (folder / "last_model.pt").stat().st_size)
    sentence = harness.train(folder, first={"no_space": {"largest_file": largest}}).refusal()
    assert sentence.startswith(f"{folder}/last_model.pt: cannot write") and "too large" in sentence
    assert content(folder / "last_model.pt")["step"] == before
    finish(harness, folder, reference())


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_frame_is_lost(harness: FaultHarness, reference, damage: str, workers: int):
    """A frame of a training video deleted or truncated: one sentence with the list's line; put back: ends equal"""
    data, folder = harness.config.parent / "data", harness.path()
    image = data / "frames" / (data / "train.txt").read_text().splitlines()[18].split()[0] / "000003.jpg"
    good = image.read_bytes()
    image.unlink() if damage == "deleted" else image.write_bytes(good[:-200])
    try:
        sentence = harness.train(folder, "data.random_shift=false", f"data.workers={workers}").refusal()
    finally:
        image.write_bytes(good)
    assert str(image.parent) in sentence and image.name in sentence and sentence.endswith(f"{data}/train.txt, line 19)")
    undisturbed = reference("data.random_shift=false", f"data.workers={workers}")
    finish(harness, folder, undisturbed, "data.random_shift=false", f"data.workers={workers}")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_poisoned_batch(harness: FaultHarness, workers: int):
    """One batch of NaN: its step is skipped and counted, all weights stay finite"""
    folder = harness.path()
    chosen = (*RICH, "solver.mixup=false", f"data.workers={workers}")
    run = harness.train(folder, *chosen, first={"poison": {"first": 4, "last": 4}})
    assert run.wait() == 0 and "step skipped (1 in a row, 1 in all)" in run.printed, run.printed
    assert [row["skipped_steps"] for row in metrics(folder)] == [0, 1, 0, 0]
    for name in ("last_model.pt", "model_best.pt"):
        saved = content(folder / name)
        assert all(
            bool(torch.isfinite(v).all()) for _, v in leaves(saved) if torch.is_tensor(v) and v.is_floating_point()
        )
    assert content(folder / "last_model.pt")["step"] == 12


def test_poison_without_end(harness: FaultHarness, reference):
    """Batches of NaN without end: stops with step, videos and failed_model.pt, whose weights are finite; cured: ends equal"""
    folder = harness.path()
    run = harness.train(folder, "solver.max_bad_steps=4", first={"poison": {"first": 10}})
    sentence = run.refusal()
    saved = content(folder / "failed_model.pt")
    assert saved["failed"]["videos"] and all(name in sentence for name in saved["failed"]["videos"])
    assert "epoch 1, step 6 of 8" in sentence and "4 steps in a row" in sentence
    assert (saved["failed"]["epoch"], saved["failed"]["step"]) == (1, 6)
    assert all(torch.isfinite(v).all() for v in saved["model_state_dict"].values())
    assert set(saved["failed"]["videos"]) <= {
        row.split()[0] for row in (harness.config.parent / "data" / "train.txt").read_text().splitlines()
    }
    for path in (folder / "last_model.pt", folder / "model_best.pt", *folder.glob("step_*.pt")):
        assert all(torch.isfinite(v).all() for v in content(path)["model_state_dict"].values())
    # No checkpoint was written while steps were skipped, so resuming repeats them.
    finish(harness, folder, reference("solver.max_bad_steps=4"), "solver.max_bad_steps=4")


class Evil:
    """Pickled, it makes a file where it is read."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


def _zip(path: Path, evil: Evil) -> None:
    torch.save({"model_state_dict": {"a": torch.ones(1)}, "rng": evil}, path)


def _legacy(path: Path, evil: Evil) -> None:
    torch.save({"model_state_dict": evil}, path, _use_new_zipfile_serialization=False)


def _bare(path: Path, evil: Evil) -> None:
    path.write_bytes(pickle.dumps(evil))


@pytest.mark.parametrize("write", [_zip, _legacy, _bare], ids=["zip", "legacy", "pickle"])
@pytest.mark.parametrize("used_as", ["last_model", "weights", "pretrain", "resume", "network.weights"])
def test_malicious_pickles(harness: FaultHarness, tmp_path: Path, used_as: str, write):
    """A pickle that runs a command, as last_model.pt, --weights, pretrain, resume, network.weights: refused, not run"""
    target, path = tmp_path / "owned", tmp_path / "evil.pt"
    write(path, Evil(target))
    if used_as == "last_model":
        folder = _interrupted_run(harness)
        for previous in (folder / "last_model.pt", *folder.glob("step_*.pt")):
            shutil.copy(path, previous)
        run = harness.train(folder)
        sentence, named = run.refusal(), "last_model.pt"
        assert f"{folder}/last_model.pt: holds pickled code" in run.printed or "not a file of weights" in run.printed, (
            run.printed
        )
    elif used_as == "weights":
        words = ("test_vision.py", "--config", harness.config, "--device", "cpu", "--weights", path)
        sentence, named = harness.script(*words).refusal(), str(path)
    else:
        more = ("network.init=true",) if used_as == "network.weights" else ()
        sentence, named = harness.train(harness.path(), *more, f"{used_as}={path}").refusal(), str(path)
    assert named in sentence and not target.exists(), sentence


def test_malicious_scores_and_settings(harness: FaultHarness, tmp_path: Path, record_property):
    """A pickle inside an .npz of scores, a YAML tag that runs a command: refused in one sentence, not run"""
    target, config = tmp_path / "owned", tmp_path / "evil.yaml"
    record_property("tried", 2)
    config.write_text(harness.config.read_text() + f"\npretrain: !!python/object/apply:os.system ['touch {target}']\n")
    words = ("train_vision.py", "--config", config, "--device", "cpu", "--output", tmp_path / "run")
    assert str(config) in harness.script(*words).refusal() and not target.exists()
    ensemble = pytest.importorskip("scripts.ensemble")
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path in paths:
        np.savez(path, score=np.array([Evil(target)], dtype=object), label=np.zeros(1, np.int64))
    assert ensemble.main([*map(str, paths), "--out", str(tmp_path / "both")]) == 1 and not target.exists()


@pytest.mark.parametrize(
    "sizes",
    [{1: [1, 64], 2: [3], 3: [7]}, pytest.param({1: [1, 3, 7], 2: [1, 7, 64], 3: [1, 3, 64]}, marks=pytest.mark.slow)],
    ids=["some", "others"],
)
def test_evaluation_on_any_number(harness: FaultHarness, reference, record_property, sizes: dict[int, list[int]]):
    """Tested by 1, 2 and 3 processes in batches of 1, 3, 7 and 64: the same numbers, the same predictions"""
    weights, found = reference(*RICH) / "model_best.pt", {}
    record_property("tried", sum(map(len, sizes.values())))
    for processes, several in sizes.items():
        for size in several:
            target = harness.path("test").with_suffix(".json")
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
            words = (
                "test_vision.py",
                "--config",
                harness.config,
                "--device",
                "cpu",
                "--weights",
                weights,
                "--json",
                target,
            )
            words += ("--test_crops", "3", "--set", f"data.batch_size={size}")
            environments = [
                variables | {"RANK": str(r), "LOCAL_RANK": str(r)} if processes > 1 else {} for r in range(processes)
            ]
            ranks = [harness.script(*words, **environment) for environment in environments]
            assert [rank.wait() for rank in ranks] == [0] * processes, ranks[0].printed
            result = json.loads(target.read_text())
            scores = np.load(target.with_suffix(".npz"), allow_pickle=False)
            found[processes, size] = (
                {key: result[key] for key in ("top1", "top5", "mean_class", "videos", "predicted", "confusion")},
                scores["score"],
            )
    numbers, score = found[1, 1]
    for case, (other_numbers, other_score) in found.items():
        assert other_numbers == numbers, case
        assert np.abs(other_score - score).max() < 1e-6, case


@pytest.mark.slow
@each_round
def test_a_data_worker_is_killed(harness: FaultHarness, reference, seed: int):
    """kill -9 of a worker of the data loader: one sentence, status 1, ends equal"""
    folder = harness.path()
    run = harness.train(folder, *WORKERS, first={"slow_steps": {"seconds": 0.03}})
    wait_for(folder, seeded_random(seed, "worker").randint(1, 8), run)
    os.kill(seeded_random(seed, "which").choice(children_of(run.pid)), signal.SIGKILL)
    assert run.wait() == 1 and len(run.errors) == 1, run.printed  # torch's handler may print a line too
    assert "a worker of the loader was killed" in run.errors[0]
    finish(harness, folder, reference(*WORKERS), *WORKERS)
