"""Processes: the environment, BatchNorm over two processes, and failure that does not hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from engine.distributed import (
    DistributedError,
    Process,
    all_reduce_max,
    cpu_group,
    gather,
    gradient_sync,
    start,
    sync_buffers,
    unwrap,
    wrap,
)
from engine.rng import seed_everything
from engine.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm
from tests.helpers.processes import run_in_two

ROOT = Path(__file__).resolve().parents[2]


class Tiny(nn.Module):
    """(B, 3, T, H, W) to (B, 4), with a BatchNorm of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.norm3 = nn.Conv3d(3, 5, 1), nn.BatchNorm3d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6, momentum=None)
        self.norm1, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm3(self.conv3(x))).mean(2)
        x = torch.relu(self.norm2(self.conv2(x))).mean((2, 3))
        return self.head(self.norm1(x))


def _batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(8, 3, 2, 5, 5, generator=generator, dtype=torch.float64),
            torch.randint(4, (8,), generator=generator),
        )
        for _ in range(3)
    ]


def _train(model: nn.Module, rows: slice) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for video, label in _batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(video[rows]), label[rows]).backward()
        optimizer.step()
    return unwrap(model).state_dict()


def _model() -> Tiny:
    torch.manual_seed(3)
    return Tiny().double()


def _two_processes(rank: int, folder: str) -> None:
    process = start("cpu")
    assert process == Process(rank, 2, rank, torch.device("cpu"))
    assert gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    seed_everything(10, process)
    draws = gather(torch.rand(1).item())
    assert draws[0] != draws[1]

    frozen = nn.BatchNorm1d(4).eval()
    frozen.register_buffer("rank", torch.tensor([float(rank)]))
    assert torch.equal(convert_sync_batchnorm(nn.Sequential(frozen))(torch.ones(2, 4)), frozen(torch.ones(2, 4)))
    sync_buffers(frozen)
    assert frozen.rank.item() == 0

    model = wrap(_model(), process, sync_bn=True)
    weights = _train(model, slice(4 * rank, 4 * rank + 4))
    torch.save(weights, Path(folder) / f"{rank}.pt")

    with gradient_sync(model, enabled=False):
        model(_batches()[rank][0]).sum().backward()
    apart = gather(unwrap(model).head.weight.grad.clone())
    assert not torch.equal(*apart)


def test_two_processes_of_four_clips_equal_one_of_eight(tmp_path: Path) -> None:
    run_in_two(_two_processes, str(tmp_path))
    expected = _train(_model(), slice(0, 8))
    for rank in range(2):
        weights = torch.load(tmp_path / f"{rank}.pt")
        assert list(weights) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-12, msg=f"rank {rank}: {name}")


def test_conversion_keeps_names_parameters_and_mode() -> None:
    model = _model()
    model.norm2.eval()
    parameters = dict(model.named_parameters())
    names = list(model.state_dict())
    converted = convert_sync_batchnorm(model)
    assert isinstance(converted.norm3, SyncBatchNorm) and list(converted.state_dict()) == names
    assert all(parameters[name] is value for name, value in converted.named_parameters())
    assert converted.norm1.training and not converted.norm2.training


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    process = start("cpu")
    model = nn.Linear(2, 2)
    assert process.is_main and not dist.is_initialized() and wrap(model, process, sync_bn=True) is model
    assert gather("x") == ["x"]


def test_broken_environment_and_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(DistributedError, match="must be cuda or cpu, not 'tpu'"):
        monkeypatch.delenv("RANK", raising=False)
        start("tpu")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DistributedError, match="RANK but not WORLD_SIZE, LOCAL_RANK"):
        start("cpu")


_FAILING = """
from engine.distributed import barrier, start
from engine.entry import run

def main():
    process = start("cpu")
    if process.rank == process.world_size - 1:
        raise {error}
    barrier()

run(main, (ValueError,))
"""


def test_one_failing_process_ends_all_with_one_sentence(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_FAILING.format(error="ValueError('no such video')"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "no such video" in ended.stderr.splitlines()
    assert "ValueError" not in ended.stderr


def test_a_fault_of_the_code_keeps_its_traceback() -> None:
    command = [sys.executable, "-c", _FAILING.format(error="KeyError('bug')")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "KeyError: 'bug'" in ended.stderr


def test_the_maximum_over_one_process() -> None:
    assert all_reduce_max([True, 0, 15], cpu_group()) == [1, 0, 15]


def _maximum(rank: int) -> None:
    start("cpu")
    assert all_reduce_max([rank == 1, 15 * (rank == 0), 0], cpu_group()) == [1, 15, 0]


def test_the_maximum_over_two_processes() -> None:
    run_in_two(_maximum)
