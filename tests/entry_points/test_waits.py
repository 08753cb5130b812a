"""Runs whose disk does not answer: they say which video they wait for, save on request and end, alone and as ranks."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fault_harness import FaultHarness, content, differences, wait_until


class SlowDisk:
    """A copy of the harness's frames, of which one video can stop to answer."""

    def __init__(self, source: Path, root: Path) -> None:
        shutil.copytree(source / "frames", root, copy_function=os.link)
        self.lists, self.root = source, root
        self.overrides = (f"data.train_root={root}", f"data.val_root={root}")
        self.blocked: list[Path] = []

    def block(self, split: str) -> str:
        """All frames of a video but the first and the last become pipes that nobody writes to; returns its name."""
        names = [row.split()[0] for row in (self.lists / f"{split}.txt").read_text().splitlines()]
        order = np.random.default_rng([5, 0]).permutation(len(names))  # of epoch 0 with the harness's seed
        name = names[order[13] if split == "train" else 1]
        for path in sorted((self.root / name).iterdir())[1:-1]:
            path.unlink()
            os.mkfifo(path)
            self.blocked.append(path.relative_to(self.root))
        return name

    def answer(self) -> None:
        for path in self.blocked:
            (self.root / path).unlink()
            os.link(self.lists / "frames" / path, self.root / path)


@pytest.fixture
def disk(harness: FaultHarness) -> SlowDisk:
    return SlowDisk(harness.config.parent / "data", harness.path("frames"))


@pytest.mark.parametrize(
    ("processes", "workers", "split", "number"),
    [
        (1, 0, "train", signal.SIGTERM),
        (2, 2, "train", signal.SIGINT),
        pytest.param(1, 2, "train", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(2, 0, "train", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, 1, "val", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_waits_for_a_disk_saves_and_ends(
    harness: FaultHarness, disk: SlowDisk, processes: int, workers: int, split: str, number: signal.Signals
) -> None:
    overrides = (*disk.overrides, f"data.workers={workers}", f"data.batch_size={4 // processes}")
    folder, straight = harness.path(), harness.path()
    name = disk.block(split)
    ranks = harness.ranks(processes, folder, *overrides, first={"notice": {"seconds": 0.2}})
    wait_until(lambda: any("waiting for" in rank.printed or rank.poll() is not None for rank in ranks))
    for rank in ranks:
        rank.kill(number)
    assert [rank.wait() for rank in ranks] == [75 if number == signal.SIGTERM else 130] * processes, ranks[0].printed
    waiting = next(line for rank in ranks for line in rank.printed.splitlines() if "waiting for 0.2 s for" in line)
    assert f"{disk.root}/{name} ({disk.lists}/{split}.txt, line" in waiting and "the disk may not answer" in waiting
    assert content(folder / "last_model.pt")["step"] == (3 if split == "train" else 8)
    disk.answer()
    for target in (folder, straight):
        again = harness.ranks(processes, target, *overrides)
        assert [rank.wait() for rank in again] == [0] * processes, again[0].printed
    assert not (found := differences(straight, folder)), found
