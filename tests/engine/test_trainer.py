"""The loop: exact continuation, accumulation, evaluation on any number of processes, and every reason to stop."""

from __future__ import annotations

import copy
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

from configs.schema import SolverConfig
from engine.checkpoint_file import CheckpointError, load
from engine.checkpointer import Progress
from engine.distributed import Process, gather, start, unwrap, wrap
from engine.ema import ModelEma
from engine.errors import EngineError
from engine.evaluation import DataError, evaluate
from engine.log import close_logging
from engine.meter import LossMonitor
from engine.metrics import Accuracy, MetricsError
from engine.optim import ClipMixup, build_criterion, build_optimizer, build_scheduler, resolve_precision
from engine.rng import rng_state, seed_everything
from engine.run_dir import RunDir
from engine.train_step import TrainingState
from engine.trainer import Trainer, TrainerSettings, TrainingError, steps_per_epoch
from models.loading import load_run_weights
from models.parameters import Origin
from tests.helpers.processes import run_in_two

CPU = torch.device("cpu")
CLASSES = 4


@pytest.fixture(autouse=True)
def _quiet():
    yield
    close_logging()


class Clips(Dataset):
    """(T, C, H, W) = (2, 3, 4, 4) clips with new noise each time; `views` > 0 gives (V, T, C, H, W), no noise."""

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
        "path": [f"{place}.avi" for place in index],
        "skipped": [],
        "error": None,
    }


def _loader(data: Dataset, batch_size: int, sampler: Any = None) -> DataLoader:
    return DataLoader(data, batch_size, sampler=sampler, collate_fn=_collate)


class Net(nn.Module):
    """A convolution, optionally a BatchNorm and dropout, and a head; `body` can be frozen in eval mode."""

    def __init__(self, norm: bool = True, frozen: bool = False) -> None:
        super().__init__()
        self.origin = Origin("net", "random weights")
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


def _training(
    model: nn.Module, steps: int = 4, epochs: int = 4, optim: str = "adamw", lr: float = 0.05, mixing: bool = False
) -> TrainingState:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer([{"name": "all", "params": parameters, "lr": lr}], optim, momentum=0.0, weight_decay=0)
    precision = resolve_precision("fp32", CPU)
    return TrainingState(
        model=model,
        criterion=build_criterion(0.1, mixing),
        optimizer=optimizer,
        scheduler=build_scheduler(
            optimizer, SolverConfig(epochs=epochs, lr_warmup_step=1 if optim == "adamw" else 0), steps
        ),
        scaler=precision.scaler(CPU),
        precision=precision,
        mixup=ClipMixup(0.8, 1.0, 0.1, CLASSES) if mixing else None,
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
) -> tuple[Progress, Net]:
    """Four epochs of sixteen clips with mixup, dropout and random draws, from `seed`, or from last_model.pt."""
    seed_everything(seed, process)
    data, val = Clips(16), Clips(9, views=2)
    if process.world_size > 1:
        sampler: Any = DistributedPowerCut(data, process, cut)
        val_sampler: Any = range(process.rank, len(val), process.world_size)
    else:
        sampler, val_sampler = PowerCut(data, cut), None
    training = _training(wrap(Net(), process), mixing=True, steps=4 // process.world_size)
    with RunDir(folder, {"seed": 1}, {}, process, resume=resume, clips=1) as run:
        loaders = _loader(data, 4, sampler), _loader(val, 2, val_sampler), len(val)
        trainer = Trainer(training, *loaders, process, TrainerSettings(epochs=4, print_freq=3), run)
        if resume:
            trainer.restore(load(folder / "last_model.pt"), load_run_weights)
        progress = trainer.fit()
    return progress, unwrap(training.model)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        times = ("meta", "clips_per_s", "data_wait", "seconds", "waited")
        return {key: _without_times(inner) for key, inner in value.items() if key not in times}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


def _straight_and_resumed(folder: Path, process: Process) -> None:
    """Four epochs in one go, and cut after two then resumed, end in the same checkpoint, bit for bit."""
    straight, model = _run(folder / "straight", process, seed=1)
    for buffers in gather(dict(model.named_buffers())):  # else processes would evaluate different models
        assert _same(buffers, dict(model.named_buffers()))
    with pytest.raises(Interrupted):
        _run(folder / "cut", process, seed=1, cut=2)
    if process.is_main:
        half = load(folder / "cut" / "last_model.pt").content
        assert half["epoch"] == 2 and len(half["rng"]) == process.world_size
        with open(folder / "cut" / "metrics.jsonl", "a") as lines:
            lines.write('{"epoch": 2, "step": 12}\n')  # as if cut between the line and the checkpoint
    gather(None)
    resumed, _ = _run(folder / "cut", process, seed=99, resume=True)
    assert straight.epoch == resumed.epoch == 4 and straight.best == resumed.best
    if process.is_main:
        assert _without_times(vars(straight)) == _without_times(vars(resumed))
        for name in ("last_model.pt", "model_best.pt"):
            one, other = (_without_times(load(folder / run / name).content) for run in ("straight", "cut"))
            assert [key for key in one if not _same(one[key], other[key])] == [], name


def test_a_resumed_run_ends_bit_for_bit_as_one_in_one_go(tmp_path: Path) -> None:
    _straight_and_resumed(tmp_path, Process())
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "cut")
    ]
    for one, other in zip(*lines, strict=True):
        for name in (
            "epoch",
            "step",
            "train_loss",
            "lr",
            "top1",
            "top5",
            "mean_class",
            "skipped_videos",
            "skipped_steps",
            "grad_norm",
        ):
            assert one[name] == other[name], name
        assert one["clips_per_s"] > 0 and 0 <= one["data_wait"] <= 1 and one["memory_gib"] is None
    best = load(tmp_path / "cut" / "model_best.pt").content
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
    with pytest.raises(MetricsError, match=r"video 0 \(0.avi\) was evaluated more than once"):
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


def _trainer(training: TrainingState, data: Any, run: RunDir, settings: TrainerSettings) -> Trainer:
    loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=None)
    return Trainer(training, loader, _loader(Clips(4, views=1), 2), 4, Process(), settings, run)


def _epoch(model: nn.Module, data: list[dict[str, Any]], tmp_path: Path, **settings: Any) -> tuple[TrainingState, dict]:
    """One epoch of plain SGD over given batches."""
    accumulation = settings.get("accumulation", 1)
    training = _training(model, steps_per_epoch(len(data), accumulation), 1, optim="sgd", lr=1.0)
    with RunDir(tmp_path, {}, {}, Process(), resume=True, clips=0) as run:
        trainer = _trainer(training, data, run, TrainerSettings(epochs=1, **settings))
        trainer.train_epoch()
    return training, trainer.progress.unevaluated_epoch


def _batches(*sizes: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(8)
    video = torch.randn(sum(sizes), 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    label = torch.randint(CLASSES, (sum(sizes),), generator=generator)
    return [
        {
            "video": clips,
            "label": labels,
            "index": torch.arange(len(labels)),
            "path": [f"{number}_{place}.avi" for place in range(len(labels))],
            "skipped": [],
            "error": None,
        }
        for number, (clips, labels) in enumerate(zip(video.split(sizes), label.split(sizes), strict=True))
    ]


@pytest.mark.parametrize(("small", "large"), [((2, 2, 2, 2, 2), (4, 4, 2)), ((3, 1, 2), (4, 2))])
def test_accumulating_two_batches_equals_the_double_batch(tmp_path: Path, small: tuple, large: tuple) -> None:
    results = []
    for sizes, accumulation in ((small, 2), (large, 1)):
        torch.manual_seed(4)
        training, row = _epoch(Net(norm=False).double(), _batches(*sizes), tmp_path, accumulation=accumulation)
        results.append((training.model.state_dict(), row))
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


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_a_step_that_is_not_finite_leaves_no_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, optim: str
) -> None:
    """Bit for bit, in weights, buffers, the optimizer's state and the average; only the learning rate has moved on."""
    data = _batches(2, 2, 2)
    nothing = {**data[0], "video": torch.full_like(data[0]["video"], math.nan)}
    poisoned = [nothing, data[0], nothing, *data[1:]]
    results = []
    for number, batches in enumerate((data, poisoned)):
        torch.manual_seed(4)
        model = Net(norm=False).double()
        model.norm = nn.BatchNorm3d(6).double()
        training = _training(model, 3, 1, optim=optim, lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: 1.0)
        training = TrainingState(**{**vars(training), "scheduler": scheduler, "ema": ModelEma(model, 0.5)})
        with (
            RunDir(tmp_path / str(number), {}, {}, Process()) as run,
            caplog.at_level(logging.WARNING, "td4v"),
        ):
            trainer = _trainer(training, batches, run, TrainerSettings(epochs=1, clip_grad=1.0))
            trainer.train_epoch()
        states = training.model.state_dict(), training.optimizer.state_dict()["state"], training.ema.state_dict()
        results.append((states, trainer.progress))
        assert scheduler.last_epoch == len(batches)
    assert _same(results[0][0], results[1][0])
    assert (
        results[1][1].step == 5
        and results[1][1].loss_monitor.skipped_steps == results[1][1].unevaluated_epoch["skipped_steps"] == 2
    )
    assert results[0][1].unevaluated_epoch["train_loss"] == results[1][1].unevaluated_epoch["train_loss"]
    assert results[0][1].unevaluated_epoch["grad_norm"] == results[1][1].unevaluated_epoch["grad_norm"]
    for place in (1, 3):
        assert f"epoch 0, step {place} of 5: the loss is nan" in caplog.text
    assert "step skipped (1 in a row, 2 in all)" in caplog.text


def test_steps_that_stay_not_finite_end_the_run_and_are_named(tmp_path: Path) -> None:
    data = _batches(2, 2, 2, 2, 2, 2)
    for batch in data[2:]:
        batch["video"][0] = math.inf
    sentence = (
        r"the loss is nan, the norm of the gradients nan at epoch 0, step 5 of 6, 3 steps in a row: start a new run, .*"
        r"videos of the last one: 4_0\.avi, 4_1\.avi; the state at these steps is in .*failed_model\.pt"
    )
    with pytest.raises(TrainingError, match=sentence):
        _epoch(Net().double(), data, tmp_path, max_bad_steps=3)
    content = load(tmp_path / "failed_model.pt").content
    assert content["failed"] == {"epoch": 0, "step": 5, "videos": ["4_0.avi", "4_1.avi"]}
    assert content["loss_monitor"]["skipped_steps"] == 3 and content["loss_monitor"]["skipped_in_a_row"] == 0
    assert all(value.isfinite().all() for value in content["model_state_dict"].values())


def test_a_ruined_model_pushes_out_no_checkpoint(tmp_path: Path) -> None:
    """Nothing is saved while steps are skipped, and an evaluation of nothing finite says what to do."""
    data = _batches(2, 2, 2, 2)
    for batch in data[2:]:
        batch["video"][:] = math.nan
    training = _training(Net().double(), 4, 1, optim="sgd", lr=1.0)
    with RunDir(tmp_path, {}, {}, Process()) as run:
        trainer = _trainer(training, data, run, TrainerSettings(1, save_steps=1))
        trainer.train_epoch()
        assert load(tmp_path / "last_model.pt").content["step"] == 2 and trainer.progress.step == 4
        with torch.no_grad():
            training.model.head.bias.fill_(math.nan)
        trainer.val_loader = [{**batch, "video": batch["video"].nan_to_num()[:, None]} for batch in data[:1]]
        trainer.val_videos = 2
        with pytest.raises(
            TrainingError, match=r"not finite: it has diverged after epoch 0: start a new run, .*earlier"
        ):
            trainer.finish_epoch()
    assert load(tmp_path / "last_model.pt").content["step"] == 2 and (tmp_path / "step_00000001.pt").exists()


def test_mixup_of_an_odd_batch_averages_over_the_clips_that_it_mixes(tmp_path: Path) -> None:
    results = []
    for size in (4, 5):
        seed_everything(1, Process())
        batch = _batches(5)[0]
        batch |= {"video": torch.ones_like(batch["video"]).float(), "label": torch.zeros(5, dtype=torch.int64)}
        batch |= {key: batch[key][:size] for key in ("video", "label", "index")}
        with RunDir(tmp_path / str(size), {}, {}, Process()) as run:
            trainer = _trainer(_training(Net(norm=False), mixing=True), [batch], run, TrainerSettings(1))
            trainer.step([batch])
            trainer.finish_pending_step()
            results.append(trainer.meter.epoch.loss_max)
    assert results[0] == pytest.approx(results[1])


def test_steps_with_overflowing_gradients_are_skipped_and_counted(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model, data = Net(norm=False), _batches(4, 4, 4, 4)
    for batch in data:
        batch["video"] = batch["video"].float()
    data[0]["video"] *= 100
    training = _training(model, 4, 1, optim="sgd", lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    training = TrainingState(**{**vars(training), "scaler": scaler})
    before = model.head.bias.detach().clone()
    with RunDir(tmp_path, {}, {}, Process(), clips=0) as run:
        trainer = _trainer(training, data, run, TrainerSettings(1))
        groups = trainer.step_batches(0)
        trainer.step(next(groups))
        trainer.finish_pending_step()
        assert trainer.progress.loss_monitor.skipped_steps == 1 and torch.equal(before, model.head.bias)
        assert training.scheduler.last_epoch == trainer.progress.step == 1 and scaler.get_scale() == 2.0**67
        for group in groups:
            trainer.step(group)
        trainer.finish_pending_step()
    assert trainer.progress.loss_monitor.skipped_steps == 1 and training.scheduler.last_epoch == 4
    assert not torch.equal(before, model.head.bias)
    assert "the loss scale is now 1.47574e+20" in (tmp_path / "log.txt").read_text()


def test_a_loss_that_stands_out_is_noticed() -> None:
    monitor = LossMonitor()
    generator = torch.Generator().manual_seed(0)
    losses = (2 + 0.1 * torch.randn(200, generator=generator)).tolist()
    assert not any(monitor.add(loss) for loss in losses)
    assert monitor.add(4.0) and monitor.spikes == 1
    assert monitor.mean == pytest.approx(2, abs=0.1) and monitor.variance**0.5 < 0.4
    assert not monitor.add(2.1)


class Idle(Net):
    """A network with a trainable layer that takes no part."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.idle = nn.Linear(2, 2)


def _idle(rank: int, folder: str) -> None:
    process = start("cpu")
    training = _training(wrap(Idle(), process))
    with (
        RunDir(folder, {}, {}, process) as run,
        pytest.raises(TrainingError, match=r"2 trainable .*idle\.weight, idle\.bi"),
    ):
        Trainer(training, _loader(Clips(8), 4), _loader(Clips(4, 1), 2), 4, process, TrainerSettings(1), run).fit()


def test_a_parameter_without_gradient_is_named_at_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunDir(tmp_path / "one", {}, {}, Process()) as run, caplog.at_level(logging.WARNING, "td4v"):
        _trainer(_training(Idle()), _loader(Clips(8), 4), run, TrainerSettings(1)).fit()
    assert "2 trainable parameters get no gradient: idle.weight, idle.bias" in caplog.text
    run_in_two(_idle, str(tmp_path / "two"))


def test_the_warm_up_pass_changes_nothing(tmp_path: Path) -> None:
    seed_everything(3, Process())
    training = _training(Net())
    with RunDir(tmp_path, {}, {}, Process()) as run:
        trainer = _trainer(training, _loader(Clips(8), 4), run, TrainerSettings(1))
        before = copy.deepcopy(training.model.state_dict()), rng_state(CPU)
        trainer.warm_up(torch.randn(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert _same(before, (training.model.state_dict(), rng_state(CPU)))
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_early_stop_ends_after_validations_without_a_better_one(tmp_path: Path) -> None:
    seed_everything(3, Process())
    training = _training(Net(), epochs=50, lr=0.0)
    settings = TrainerSettings(50, early_stop=3)
    with RunDir(tmp_path, {}, {}, Process()) as run:
        state = _trainer(training, _loader(Clips(8), 4), run, settings).fit()
    assert state.epoch == 4 and state.evaluations_since_best == 3 and len(state.history) == 4
    with RunDir(tmp_path, {}, {}, Process(), resume=True) as run:  # it stays ended
        trainer = _trainer(training, _loader(Clips(8), 4), run, settings)
        trainer.restore(load(tmp_path / "last_model.pt"), load_run_weights)
        again = trainer.fit()
    assert again.epoch == 4


def test_averaged_weights_are_validated_and_kept(tmp_path: Path) -> None:
    seed_everything(3, Process())
    model = Net(norm=False)
    training = _training(model, steps=2, epochs=2, optim="sgd", lr=0.5)
    training = TrainingState(**{**vars(training), "ema": ModelEma(model, 0.9)})
    with RunDir(tmp_path, {}, {}, Process()) as run:
        trainer = _trainer(training, _loader(Clips(8), 4), run, TrainerSettings(2))
        trainer.fit()
        accuracy = trainer.evaluate()
    last, best = load(tmp_path / "last_model.pt").content, load(tmp_path / "model_best.pt").content
    assert _same(last["model_state_dict"], dict(model.state_dict()))
    assert not torch.equal(last["ema_state_dict"]["head.weight"], last["model_state_dict"]["head.weight"])
    averaged = Net(norm=False)
    averaged.load_state_dict(load(tmp_path / "last_model.pt").weights)
    again = evaluate(averaged, _loader(Clips(4, 1), 2), Process(), resolve_precision("fp32", CPU), 4)
    assert again == accuracy
    assert best["model_state_dict"].keys() == last["ema_state_dict"].keys() and "optimizer_state_dict" not in best


def test_what_the_loader_reports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"^a\.avi: cannot be decoded$"):
        _epoch(Net().double(), [{**_batches(2)[0], "error": "a.avi: cannot be decoded"}], tmp_path)
    with caplog.at_level(logging.WARNING, "td4v"):
        _, row = _epoch(Net().double(), [{**_batches(2)[0], "skipped": ["b.avi"]}], tmp_path)
    assert row["skipped_videos"] == 1 and "skipped: b.avi" in caplog.text
    with pytest.raises(DataError, match="gives no full batch"):
        steps_per_epoch(0, 1)


def test_a_run_is_not_resumed_with_another_batch_size(tmp_path: Path) -> None:
    _run(tmp_path, Process(), seed=1)
    training = _training(Net(), mixing=True)
    with (
        RunDir(tmp_path, {}, {}, Process(), resume=True) as run,
        pytest.raises(CheckpointError, match=r"made 16 steps in 4 epochs and 0 steps, but an epoch now has 8"),
    ):
        _trainer(training, _loader(Clips(16), 2), run, TrainerSettings(epochs=8)).restore(
            load(tmp_path / "last_model.pt"), load_run_weights
        )


def test_which_epochs_are_evaluated() -> None:
    settings = TrainerSettings(epochs=8, eval_freq=2, skip_epoch=(3, 7))
    assert [epoch for epoch in range(8) if settings.evaluates(epoch)] == [1, 5, 7]


def test_evaluation_folds_views_in_bounded_chunks_and_restores_the_mode() -> None:
    seen: list[int] = []
    model = Net(frozen=True)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    model.train()
    data, precision = Clips(5, views=3), resolve_precision("fp32", CPU)
    chunked = evaluate(model, _loader(data, 2), Process(), precision, 5, pass_clips=4)
    assert seen == [4] * 4  # 15 clips, the last pass filled up
    assert model.training and model.norm.training and not model.body.training
    whole = evaluate(model, _loader(data, 5), Process(), precision, 5, pass_clips=4)
    assert chunked == whole and torch.equal(chunked.table.score, whole.table.score)
    assert evaluate(model, _loader(data, 5), Process(), precision, 5, pass_clips=64) == whole
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


def test_a_gpu_out_of_memory_is_explained_with_its_numbers(tmp_path: Path) -> None:
    class Greedy(Net):
        def forward(self, video: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with (
        RunDir(tmp_path, {}, {}, Process()) as run,
        pytest.raises(
            EngineError, match=r"the GPU is out of memory with 4 clips a batch, 2 frames a clip.*data\.batch_size=2"
        ),
    ):
        _trainer(_training(Greedy()), _loader(Clips(8), 4), run, TrainerSettings(1)).fit()
