"""The loop: exact continuation, accumulation, evaluation on any number of processes, and every reason to stop."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from engine.checkpoint import CheckpointError, load
from engine.distributed import Process, gather, seed_everything, start, unwrap, wrap
from engine.log import Eta, RunFolder, close_logging
from engine.loop import (
    DataError,
    LoopSettings,
    Trainee,
    TrainingError,
    TrainState,
    evaluate,
    fit,
    steps_per_epoch,
    train_one_epoch,
)
from engine.metrics import Accuracy, MetricsError
from engine.optim import ClipMixup, build_criterion, build_optimizer, resolve_precision, warmup_cosine
from tests.processes import run_in_two

CPU = torch.device("cpu")
CLASSES = 4


@pytest.fixture(autouse=True)
def _quiet():
    yield
    close_logging()


class Clips(Dataset):
    """(T, C, H, W) = (2, 3, 4, 4) clips with noise drawn anew each time; `views` > 0 gives (V, T, C, H, W), no noise."""

    def __init__(self, size: int, views: int = 0) -> None:
        generator = torch.Generator().manual_seed(5)
        self.video = torch.randn(size, max(views, 1), 2, 3, 4, 4, generator=generator)
        self.label, self.views = torch.randint(CLASSES, (size,), generator=generator), views

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        noise = 0.0 if self.views else 0.1 * torch.randn(()) + 0.1 * float(numpy.random.rand())
        video = self.video[index] if self.views else self.video[index, 0]
        return video + noise, int(self.label[index]), index


def _collate(samples: list) -> dict[str, Any]:
    video, label, index = zip(*samples, strict=True)
    return {
        "video": torch.stack(video),
        "label": torch.tensor(label),
        "index": torch.tensor(index),
        "skipped": [],
        "error": None,
    }


def _loader(data: Dataset, batch_size: int, sampler: Any = None) -> DataLoader:
    return DataLoader(data, batch_size, sampler=sampler, collate_fn=_collate)


class Net(nn.Module):
    """A convolution, optionally a BatchNorm and dropout, and a head; `body` can be frozen in eval mode."""

    def __init__(self, norm: bool = True, frozen: bool = False) -> None:
        super().__init__()
        self.frozen = frozen
        self.body = nn.Conv3d(3, 6, 1).requires_grad_(not frozen)
        self.norm = nn.BatchNorm3d(6) if norm else nn.Identity()
        self.drop = nn.Dropout(0.3 if norm else 0.0)
        self.head = nn.Linear(6, CLASSES)

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.body.train(mode and not self.frozen)
        return self

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.body(video.transpose(1, 2))))  # (B, 6, T, H, W)
        return self.head(self.drop(x.mean((2, 3, 4))))  # (B, K)


def _trainee(
    model: nn.Module, steps: int = 4, epochs: int = 4, optim: str = "adamw", lr: float = 0.05, mixing: bool = False
) -> Trainee:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer([{"name": "all", "params": parameters, "lr": lr}], optim, momentum=0.0, weight_decay=0)
    precision = resolve_precision("fp32", CPU)
    return Trainee(
        model,
        build_criterion(0.1, mixing),
        optimizer,
        warmup_cosine(optimizer, steps, epochs, 1 if optim == "adamw" else 0),
        precision.scaler(CPU),
        precision,
        ClipMixup(0.8, 1.0, 0.1, CLASSES) if mixing else None,
    )


class Interrupted(RuntimeError):
    pass


class PowerCut(RandomSampler):
    """Ends a run at the start of one epoch."""

    def __init__(self, data: Dataset, epoch: int | None) -> None:
        super().__init__(data)
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            raise Interrupted


class DistributedPowerCut(DistributedSampler):
    """The same for several processes."""

    def __init__(self, data: Dataset, process: Process, cut: int | None) -> None:
        super().__init__(data, process.world_size, process.rank, shuffle=True)
        self.cut = cut

    def set_epoch(self, epoch: int) -> None:
        if epoch == self.cut:
            raise Interrupted
        super().set_epoch(epoch)


def _run(
    folder: Path, process: Process, seed: int, cut: int | None = None, resume: bool = False
) -> tuple[TrainState, Net]:
    """Four epochs of sixteen clips with mixup, dropout and random draws, from `seed`, or from last_model.pt."""
    seed_everything(seed, process)
    data, val = Clips(16), Clips(9, views=2)
    if process.world_size > 1:
        sampler: Any = DistributedPowerCut(data, process, cut)
        val_sampler: Any = range(process.rank, len(val), process.world_size)
    else:
        sampler, val_sampler = PowerCut(data, cut), None
    trainee = _trainee(wrap(Net(), process), mixing=True, steps=4 // process.world_size)
    with RunFolder(folder, {"seed": 1}, process, resume=resume, clips=1) as run:
        state = fit(
            trainee,
            _loader(data, 4, sampler),
            _loader(val, 2, val_sampler),
            len(val),
            process,
            LoopSettings(epochs=4, print_freq=3),
            run,
            folder / "last_model.pt" if resume else None,
        )
    return state, unwrap(trainee.model)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _without_meta(path: Path) -> dict[str, Any]:
    return {key: value for key, value in load(path).items() if key != "meta"}


def _straight_and_resumed(folder: Path, process: Process) -> None:
    """Four epochs in one go, and cut after two then resumed, end in the same checkpoint, bit for bit."""
    straight, model = _run(folder / "straight", process, seed=1)
    for buffers in gather(dict(model.named_buffers())):  # else processes would evaluate different models
        assert _same(buffers, dict(model.named_buffers()))
    with pytest.raises(Interrupted):
        _run(folder / "cut", process, seed=1, cut=2)
    if process.is_main:
        half = load(folder / "cut" / "last_model.pt")
        assert half["epoch"] == 2 and len(half["rng"]) == process.world_size
        with open(folder / "cut" / "metrics.jsonl", "a") as lines:
            lines.write('{"epoch": 2, "step": 12}\n')  # as if cut between the line and the checkpoint
    gather(None)
    resumed, _ = _run(folder / "cut", process, seed=99, resume=True)
    assert straight == resumed and straight.epoch == 4
    if process.is_main:
        for name in ("last_model.pt", "model_best.pt"):
            one, other = (_without_meta(folder / run / name) for run in ("straight", "cut"))
            assert [key for key in one if not _same(one[key], other[key])] == [], name


def test_a_resumed_run_ends_bit_for_bit_as_one_in_one_go(tmp_path: Path) -> None:
    _straight_and_resumed(tmp_path, Process())
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "cut")
    ]
    for one, other in zip(*lines, strict=True):
        for name in ("epoch", "step", "train_loss", "lr", "top1", "top5", "mean_class", "skipped", "overflows"):
            assert one[name] == other[name], name
        assert one["clips_per_s"] > 0 and 0 <= one["data_wait"] <= 1 and one["memory_gib"] is None
    best = load(tmp_path / "cut" / "model_best.pt")
    assert best["best"] == max(row["top1"] for row in lines[0]) and best["config"] == {"seed": 1}
    assert lines[0][best["epoch"] - 1]["top1"] == best["best"]
    assert "epoch 3/4 step 4/4" in (tmp_path / "cut" / "log.txt").read_text()


def _two_processes(rank: int, folder: str) -> None:
    process = start("cpu")
    _straight_and_resumed(Path(folder), process)

    model, precision = wrap(_evaluated(), process), resolve_precision("fp32", CPU)
    data = Clips(9, views=3)
    accuracy = evaluate(model, _loader(data, 2, range(rank, 9, 2)), process, precision, 9)
    assert gather(accuracy) == [accuracy, accuracy]
    torch.save(accuracy.to_dict(), Path(folder) / f"accuracy{rank}.pt")
    # padded to an even number, as torch's DistributedSampler does it, video 0 counts twice: refused
    with pytest.raises(MetricsError, match="video 0 was evaluated more than once"):
        evaluate(model, _loader(data, 2, DistributedSampler(data, shuffle=False)), process, precision, 9)
    # one process has nothing at all
    everything = evaluate(model, _loader(data, 2, range(0, 9 * (1 - rank))), process, precision, 9)
    assert everything == accuracy


def _evaluated() -> Net:
    torch.manual_seed(2)
    return Net().eval()


def test_two_processes_resume_exactly_and_evaluate_as_one(tmp_path: Path) -> None:
    run_in_two(_two_processes, str(tmp_path))
    loader = _loader(Clips(9, views=3), 4)
    alone = evaluate(_evaluated(), loader, Process(), resolve_precision("fp32", CPU), 9)
    for rank in range(2):
        assert Accuracy(**torch.load(tmp_path / f"accuracy{rank}.pt")) == alone


def _epoch(model: nn.Module, data: list[dict[str, Any]], tmp_path: Path, **settings: Any) -> tuple[Trainee, dict]:
    """One epoch of plain SGD over given batches."""
    loader = DataLoader(data, batch_size=None)
    loop = LoopSettings(epochs=1, **settings)
    steps = steps_per_epoch(loader, loop.accumulation)
    trainee = _trainee(model, steps, 1, optim="sgd", lr=1.0)
    with RunFolder(tmp_path, {}, Process(), resume=True, clips=0) as run:
        row = train_one_epoch(trainee, loader, Process(), TrainState(), loop, run, Eta(0, steps))
    return trainee, row


def _batches(*sizes: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(8)
    video = torch.randn(sum(sizes), 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    label = torch.randint(CLASSES, (sum(sizes),), generator=generator)
    return [
        {"video": clips, "label": labels, "index": torch.arange(len(labels)), "skipped": [], "error": None}
        for clips, labels in zip(video.split(sizes), label.split(sizes), strict=True)
    ]


@pytest.mark.parametrize(("small", "large"), [((2, 2, 2, 2, 2), (4, 4, 2)), ((3, 1, 2), (4, 2))])
def test_accumulating_two_batches_equals_the_double_batch(tmp_path: Path, small: tuple, large: tuple) -> None:
    results = []
    for sizes, accumulation in ((small, 2), (large, 1)):
        torch.manual_seed(4)
        trainee, row = _epoch(Net(norm=False).double(), _batches(*sizes), tmp_path, accumulation=accumulation)
        results.append((trainee.model.state_dict(), row))
    (one, one_row), (other, other_row) = results
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-14, msg=name)
    assert one_row["train_loss"] == pytest.approx(other_row["train_loss"], rel=1e-12)
    assert one_row["step"] == other_row["step"] == len(large)


def test_gradients_are_clipped_by_their_norm(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = Net(norm=False).double()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    _epoch(model, _batches(4), tmp_path, clip_grad=1e-3)
    change = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert change.norm() == pytest.approx(1e-3, rel=1e-2)  # plain SGD with learning rate 1


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path: Path) -> None:
    data = _batches(2, 2, 2, 2, 2, 2)
    data[3]["video"][0] = math.inf
    with pytest.raises(TrainingError, match="not finite at epoch 0, step 4 of 6"):
        _epoch(Net().double(), data, tmp_path, print_freq=6)


def test_steps_with_overflowing_gradients_are_left_out_and_counted(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model, data = Net(norm=False), _batches(4, 4, 4, 4)
    for batch in data:
        batch["video"] = batch["video"].float()
    data[0]["video"] *= 100
    trainee = _trainee(model, 4, 1, optim="sgd", lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    trainee = Trainee(**{**vars(trainee), "scaler": scaler})
    before = model.head.bias.detach().clone()
    with RunFolder(tmp_path, {}, Process(), clips=0) as run:
        state, loader = TrainState(), DataLoader(data[:1], batch_size=None)
        one_step = train_one_epoch(trainee, loader, Process(), state, LoopSettings(1), run, Eta(0, 4))
        assert one_step["overflows"] == 1 and torch.equal(before, model.head.bias)
        assert trainee.scheduler.last_epoch == 0 and state.step == 1
        loader = DataLoader(data[1:], batch_size=None)
        row = train_one_epoch(trainee, loader, Process(), state, LoopSettings(1), run, Eta(0, 4))
    assert row["overflows"] == 0 and trainee.scheduler.last_epoch == 3 and not torch.equal(before, model.head.bias)
    assert "gradients overflowed in fp16" in (tmp_path / "log.txt").read_text()


def test_what_the_loader_reports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"^a\.avi: cannot be decoded$"):
        _epoch(Net().double(), [{**_batches(2)[0], "error": "a.avi: cannot be decoded"}], tmp_path)
    with pytest.raises(DataError, match="none of the videos of training batch 2 could be read"):
        data = _batches(2, 2)
        _epoch(Net().double(), [data[0], {**data[1], "video": None, "skipped": ["a", "b"]}], tmp_path)
    with caplog.at_level(logging.WARNING, "td4v"):
        _, row = _epoch(Net().double(), [{**_batches(2)[0], "skipped": ["b.avi"]}], tmp_path)
    assert row["skipped"] == 1 and "skipped: b.avi" in caplog.text
    with pytest.raises(DataError, match="gives no full batch"):
        steps_per_epoch(DataLoader([], batch_size=2), 1)


def test_a_run_is_not_resumed_with_another_batch_size(tmp_path: Path) -> None:
    _run(tmp_path, Process(), seed=1)
    trainee = _trainee(Net(), mixing=True)
    with (
        RunFolder(tmp_path, {}, Process(), resume=True) as run,
        pytest.raises(CheckpointError, match=r"made 16 steps in 4 epochs, where an epoch now has 8"),
    ):
        val = _loader(Clips(9, views=2), 2)
        settings = LoopSettings(epochs=8)
        fit(trainee, _loader(Clips(16), 2), val, 9, Process(), settings, run, tmp_path / "last_model.pt")


def test_which_epochs_are_evaluated() -> None:
    settings = LoopSettings(epochs=8, eval_freq=2, skip_epoch=(3, 7))
    assert [epoch for epoch in range(8) if settings.evaluates(epoch)] == [1, 5, 7]


def test_evaluation_folds_views_in_bounded_chunks_and_restores_the_mode() -> None:
    seen: list[int] = []
    model = Net(frozen=True)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    model.train()
    data, precision = Clips(5, views=3), resolve_precision("fp32", CPU)
    chunked = evaluate(model, _loader(data, 2), Process(), precision, 5, max_clips=4)
    assert seen == [4, 2, 4, 2, 3]
    assert model.training and model.norm.training and not model.body.training
    whole = evaluate(model, _loader(data, 5), Process(), precision, 5)
    assert chunked == whole
    logits = model.eval()(data.video.flatten(0, 1)).unflatten(0, (5, 3))
    predicted = logits.double().softmax(-1).mean(1).argmax(1)
    assert whole.top1 == pytest.approx(100 * (predicted == data.label).double().mean().item())


def test_evaluation_counts_skipped_videos_and_stops_on_errors() -> None:
    model, precision = Net(), resolve_precision("bf16", CPU)
    data = Clips(4, views=1)
    read = _collate([data[0], data[2]])
    nothing = {"video": None, "label": torch.empty(0), "index": torch.empty(0), "skipped": ["b.avi"], "error": None}
    loader = DataLoader([{**read, "skipped": ["d.avi"]}, nothing], batch_size=None)
    accuracy = evaluate(model, loader, Process(), precision, 4)
    assert (accuracy.videos, accuracy.skipped) == (2, 2) and model.training
    with pytest.raises(MetricsError, match="2 videos were evaluated and 2 skipped, but the list has 5"):
        evaluate(model, loader, Process(), precision, 5)
    with pytest.raises(DataError, match="broken"):
        evaluate(model, DataLoader([{**nothing, "error": "broken"}], batch_size=None), Process(), precision, 1)
    assert model.training


def test_wrapping_one_process_leaves_the_model_alone() -> None:
    model = Net()
    assert unwrap(wrap(model, Process())) is model
