"""A step on the device: the host waits for none and reads each result in time; all processes skip the same steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.checkpoint_file import load
from engine.distributed import Process, start, unwrap, wrap
from engine.ema import ModelEma
from engine.errors import EngineError
from engine.evaluation import DataError
from engine.log import close_logging
from engine.normalize import Normalizer
from engine.optim import ClipMixup, build_criterion, build_optimizer, resolve_precision
from engine.run_dir import RunDir
from engine.train_step import PendingStep, TrainingState
from engine.trainer import Trainer, TrainerSettings
from models.loading import load_run_weights
from models.parameters import Origin
from tests.helpers.processes import run_in_two

CLASSES = 4


@pytest.fixture(autouse=True)
def _quiet():
    yield
    close_logging()


class Net(nn.Module):
    """A pixel's colours -> BatchNorm -> classes; `odd` adds NaN to what is returned, without any gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head, self.odd = nn.BatchNorm1d(3), nn.Linear(3, CLASSES), 0.0
        self.origin = Origin("net", "random weights")

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(video.mean((1, 3, 4)))) + self.odd  # (B, K)


def _training(device: str = "cpu", process: Process | None = None, **changed: Any) -> TrainingState:
    torch.manual_seed(0)
    process = process or Process(device=torch.device(device))
    model = wrap(Net(), process)
    optimizer = build_optimizer([{"name": "all", "params": list(model.parameters()), "lr": 0.1}])
    parts = {"ema": ModelEma(model, 0.9), "criterion": build_criterion(0.1, mixing=False)} | changed
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    return TrainingState(model, optimizer, LambdaLR(optimizer, lambda step: 1.0), scaler, **parts)


def _batches(count: int, broken: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(count):
        video = torch.randn(4, 2, 3, 4, 4, generator=generator)
        batches.append({
            "video": video * math.nan if number in broken else video, "label": torch.arange(4), "index": torch.arange(4),
            "path": [f"{number}.avi"], "skipped": [], "error": None,
        })  # fmt: skip
    return batches


@contextmanager
def _trainer(folder: Path, training: TrainingState, batches: list, **settings: Any) -> Iterator[Trainer]:
    device = next(training.model.parameters()).device
    with RunDir(folder, {}, {}, Process(), clips=0) as run:
        yield Trainer(training, batches, [], 0, Process(device=device), TrainerSettings(1, **settings), run)


class Waiting(TorchDispatchMode):
    """Operations that must know a tensor's value, or a tensor that leaves its device, are errors."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = operation.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"), name
        return operation(*args, **(kwargs or {}))


class ReadsOfValues(TorchFunctionMode):
    """So are Python's ways to a tensor's value."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        reads = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
        assert name not in reads, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixing", [False, True])
def test_the_host_waits_for_no_step_before_the_next_is_issued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixing: bool
) -> None:
    known, read = [], PendingStep.read

    def reading(issued: PendingStep) -> Any:
        with torch._C.DisableTorchFunction():  # ReadsOfValues does not see it
            known.append(trainer.progress.step - 1)  # steps counted from 0, of which the last has just been issued
            return read(issued)

    monkeypatch.setattr(PendingStep, "read", reading)
    changed = {"mixup": ClipMixup(0.8, 1.0, 0.1, CLASSES), "criterion": build_criterion(0.1, True)} if mixing else {}
    training = _training(precision=resolve_precision("bf16", torch.device("cpu")), **changed)
    with _trainer(tmp_path, training, _batches(6), accumulation=2, clip_grad=0.1, print_freq=1) as trainer:
        for number, group in enumerate(trainer.step_batches(0)):
            with Waiting(), ReadsOfValues():
                trainer.step(group)
            assert known == list(range(number)), "the outcome of each step is read once, when the next is out"
        trainer.finish_pending_step()
        assert known == [0, 1, 2] and trainer.meter.epoch.steps == 3


def test_the_guards_see_a_host_that_waits() -> None:
    value = torch.ones(())
    for read in (torch.Tensor.item, torch.Tensor.tolist, bool, float, torch.nonzero):
        with pytest.raises(AssertionError), Waiting(), ReadsOfValues():
            read(value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_never_waited_for(tmp_path: Path) -> None:
    changed = {"precision": resolve_precision("fp16", torch.device("cuda")), "normalizer": Normalizer((0.5,) * 3)}
    batches = [{**b, "video": b["video"].clamp(0, 1).mul(255).byte()} for b in _batches(4)]
    with _trainer(tmp_path, _training("cuda", **changed), batches, clip_grad=0.1, print_freq=1) as trainer:
        for group in trainer.step_batches(0):
            if trainer.progress.step:
                torch.cuda.set_sync_debug_mode("error")
            try:
                trainer.step(group)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        trainer.finish_pending_step()
        assert trainer.meter.epoch.steps + trainer.meter.left_out == 4


def test_the_result_of_the_last_step_is_logged_before_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = _batches(3, broken=(1,))
    batches[2]["error"] = "a.avi: cannot be decoded"
    with (
        _trainer(tmp_path, _training(), batches, print_freq=1) as trainer,
        caplog.at_level(logging.INFO, "td4v"),
        pytest.raises(DataError, match="cannot be decoded"),
    ):
        trainer.train_epoch()
    assert "epoch 0, step 2 of 3: the loss is nan" in caplog.text and "epoch 0/1 step 2/3" in caplog.text


@pytest.mark.parametrize("allowed", [1, 2])
def test_a_run_ends_with_the_last_bad_step_that_it_may_make(tmp_path: Path, allowed: int) -> None:
    training = _training()
    with (
        _trainer(tmp_path, training, _batches(6, broken=(1, 2, 3)), max_bad_steps=allowed) as trainer,
        pytest.raises(
            EngineError, match=rf"step {1 + allowed} of 6, {allowed} steps in a row.*last one: {allowed}\.avi"
        ),
    ):
        trainer.train_epoch()
    content = load(tmp_path / "failed_model.pt").content
    assert content["failed"] == {"epoch": 0, "step": 1 + allowed, "videos": [f"{allowed}.avi"]}
    assert content["step"] == content["step_in_epoch"] == content["scheduler"]["last_epoch"] == 1 + allowed
    assert content["loss_monitor"]["skipped_steps"] == allowed
    assert all(value.isfinite().all() for value in content["model_state_dict"].values())
    assert {int(state["step"]) for state in content["optimizer_state_dict"]["state"].values()} == {1}


@pytest.mark.parametrize("bad", [1, 3])
def test_every_file_has_the_scheduler_at_its_step(tmp_path: Path, bad: int) -> None:
    """And a failed run resumes from there, in the next epoch if it was the last step of one."""
    with _trainer(tmp_path / "whole", _training(), _batches(4, broken=(bad,)), save_steps=1, keep=9) as trainer:
        trainer.train_epoch()
        trainer.checkpointer.save(trainer.progress, trainer.meter)
    with (
        _trainer(tmp_path / "failed", _training(), _batches(4, broken=(bad,)), max_bad_steps=1) as trainer,
        pytest.raises(EngineError, match="1 steps in a row"),
    ):
        trainer.train_epoch()
    found = {path.name: load(path).content for path in tmp_path.glob("*/*.pt")}
    assert len(found) >= 4 and {"last_model.pt", "failed_model.pt"} < found.keys()
    assert {name: content["step"] for name, content in found.items()} == {
        name: content["scheduler"]["last_epoch"] for name, content in found.items()
    }
    with _trainer(tmp_path / "next", _training(), _batches(4)) as trainer:
        trainer.restore(load(tmp_path / "failed/failed_model.pt"), load_run_weights)
        trainer.train_epoch()
        assert trainer.progress.step == trainer.state.scheduler.last_epoch == 4 and trainer.progress.epoch == 1
        assert trainer.progress.unevaluated_epoch["skipped_steps"] == 1 and math.isfinite(
            trainer.progress.unevaluated_epoch["train_loss"]
        )


def test_an_optimizer_that_cannot_skip_a_step_is_refused(tmp_path: Path) -> None:
    training = _training()
    plain = torch.optim.SGD(training.model.parameters(), lr=0.1)
    training = TrainingState(**{**vars(training), "optimizer": plain})
    with pytest.raises(EngineError, match="must be a fused one"), _trainer(tmp_path, training, _batches(1)):
        pass


def _two_processes(rank: int, folder: str) -> None:
    process = start("cpu")
    training = _training(process=process)
    model = unwrap(training.model)
    with RunDir(folder, {}, {}, process, clips=0) as run:
        trainer = Trainer(training, _batches(4), [], 0, process, TrainerSettings(1), run)
        training.model.train()
        for number, group in enumerate(trainer.step_batches(0)):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            model.odd = math.nan if (rank, number) == (1, 2) else 0.0  # the loss of one process, and no gradient
            trainer.step(group)
            same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            assert same == (number == 2), (rank, number)
        trainer.finish_pending_step()
    assert trainer.progress.loss_monitor.skipped_steps == 1 and trainer.meter.epoch.steps == 3
    assert math.isfinite(trainer.meter.epoch.loss)


def test_a_loss_that_is_not_finite_on_one_process_counts_on_all(tmp_path: Path) -> None:
    run_in_two(_two_processes, str(tmp_path))
