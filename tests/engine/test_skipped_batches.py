"""Batches of which skipping leaves too little: left out on all processes, counted, and no trace in what is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.checkpoint_file import load
from engine.distributed import Process, gather, start, unwrap, wrap
from engine.ema import ModelEma
from engine.evaluation import DataError
from engine.log import close_logging
from engine.rng import seed_everything
from engine.run_dir import RunDir
from engine.train_step import TrainingState
from engine.trainer import Trainer, TrainerSettings
from models.loading import load_run_weights
from tests.engine.test_trainer import Interrupted, Net, _batches, _epoch, _same, _training, _without_times
from tests.helpers.processes import run_in_two


@pytest.fixture(autouse=True)
def _quiet():
    yield
    close_logging()


def _readable(batch: dict[str, Any], clips: int) -> dict[str, Any]:
    """The batch when only its first clips can be read."""
    video = batch["video"][:clips] if clips else None
    first = {key: batch[key][:clips] for key in ("label", "index", "path")}
    return {**batch, **first, "video": video, "skipped": batch["path"][clips:]}


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_a_batch_that_cannot_be_read_leaves_no_trace(tmp_path: Path, caplog, optim: str) -> None:
    """Bit for bit; only the learning rate has moved on."""
    data, results = _batches(2, 2, 2), []
    unread = _readable(data[0], 0)
    for number, batches in enumerate((data, [unread, data[0], unread, *data[1:]])):
        seed_everything(1, Process())
        model = Net().double()
        training = _training(model, optim=optim, lr=0.1)
        constant = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: 1.0)
        training = TrainingState(**{**vars(training), "scheduler": constant, "ema": ModelEma(model, 0.5)})
        with RunDir(tmp_path / str(number), {}, {}, Process()) as run, caplog.at_level(logging.WARNING, "td4v"):
            trainer = Trainer(training, batches, [], 0, Process(), TrainerSettings(1), run)
            trainer.train_epoch()
        assert constant.last_epoch == trainer.progress.step == len(batches)
        parts = model.state_dict(), training.optimizer.state_dict()["state"], training.ema.state_dict()
        results.append((parts, trainer.progress.unevaluated_epoch, trainer.progress.loss_monitor))
    (one, row, _), (other, row_with_unread, monitor) = results
    assert _same(one, other) and row["train_loss"] == row_with_unread["train_loss"]
    counts = [row_with_unread[name] for name in ("videos", "skipped_videos", "skipped_batches", "skipped_steps")]
    assert counts == [10, 4, 2, 0] and (monitor.skipped_batches, monitor.skipped_steps) == (2, 0)
    assert "step 3 of 5: 1 batch left out, of which a process could not read 1 clip (2 left out so far)" in caplog.text
    assert "epoch 0: 4 of 10 videos (40.0%) could not be read, 2 of 5 batches left out" in caplog.text
    assert "lr_scheduler" not in caplog.text


def test_of_an_accumulated_step_the_rest_is_trained(tmp_path: Path) -> None:
    data, weights = _batches(2, 2, 2, 2), []
    for number in range(2):
        torch.manual_seed(4)
        training = _training(Net(norm=False).double(), optim="sgd", lr=0.1)
        with RunDir(tmp_path / str(number), {}, {}, Process()) as run:
            batches = [data[0], _readable(data[1], 0), *data[2:]]
            trainer = Trainer(training, batches, [], 0, Process(), TrainerSettings(1, accumulation=2), run)
            if number:
                trainer.train_epoch()
            else:
                for step in (data[:1], data[2:]):
                    trainer.step(step)
                trainer.finish_pending_step()
        weights.append(training.model.state_dict())
    assert _same(*weights)


@pytest.mark.parametrize("mixing", [False, True])
def test_one_clip_is_too_few_for_mixup_and_for_models_that_need_two(tmp_path: Path, mixing: bool) -> None:
    data = [{**batch, "video": batch["video"].float()} for batch in _batches(4, 4, 4)]
    model = Net()
    model.least_clips = 1 if mixing else 2
    with RunDir(tmp_path, {}, {}, Process()) as run:
        batches = [data[0], _readable(data[1], 1), _readable(data[2], 2)]
        trainer = Trainer(_training(model, mixing=mixing), batches, [], 0, Process(), TrainerSettings(1), run)
        trainer.train_epoch()
    row = trainer.progress.unevaluated_epoch
    assert (row["skipped_batches"], row["skipped_videos"], row["videos"]) == (1, 5, 12) and trainer.meter.clips == 0


def test_an_epoch_without_a_clip_ends_the_run(tmp_path: Path) -> None:
    unread = [_readable(batch, 0) for batch in _batches(2, 2)]
    with pytest.raises(DataError, match=r"epoch 0: no batch .*, because 4 of 4 videos \(100\.0%\) could not be read"):
        _epoch(Net().double(), unread, tmp_path)


class _Cut(list):
    """Batches that end in an interruption; None: they do not."""

    def __init__(self, batches: list, cut: int | None) -> None:
        super().__init__(batches)
        self.cut = cut

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(super().__iter__()):
            if number == self.cut:
                raise Interrupted
            yield batch


def _run(folder: Path, process: Process, seed: int, cut: int | None = None, resume: bool = False) -> nn.Module:
    """An epoch of steps of two batches; the processes cannot read all of the second and the third step."""
    seed_everything(seed, process)
    data = [{**batch, "video": batch["video"].float()} for batch in _batches(*[2] * 10)]
    bad = {2: 0, 4: 1, 5: 0} if process.is_main else {3: 0, 5: 1}
    batches = [_readable(batch, bad[number]) if number in bad else batch for number, batch in enumerate(data)]
    model = wrap(Net(), process)
    model.least_clips = unwrap(model).least_clips = 2
    with RunDir(folder, {}, {}, process, resume=resume, clips=0) as run:
        settings = TrainerSettings(1, accumulation=2, save_steps=1)
        val = [{**data[process.rank], "video": data[process.rank]["video"][:, None]}]
        val[0] |= {"index": val[0]["index"] + 2 * process.rank}
        training = _training(model, steps=5, epochs=1)
        trainer = Trainer(training, _Cut(batches, cut), val, 2 * process.world_size, process, settings, run)
        if resume:
            trainer.restore(load(folder / "last_model.pt"), load_run_weights)
        trainer.fit()
    return unwrap(model)


def _straight_and_resumed(rank: int, folder: str, process: Process | None = None) -> None:
    process, path = process or start("cpu"), Path(folder)
    for weights in gather(dict(_run(path / "straight", process, seed=1).named_parameters())):
        assert all(value.isfinite().all() for value in weights.values())
    for cut in (4, 6, 8):
        run = path / str(cut)
        with pytest.raises(Interrupted):
            _run(run, process, seed=1, cut=cut)
        gather(None)
        _run(run, process, seed=99, resume=True)
        if process.is_main:
            one, other = (_without_times(load(each / "last_model.pt").content) for each in (path / "straight", run))
            assert [key for key in one if not _same(one[key], other[key])] == []
            left_out = {1: 3, 2: 4}[process.world_size]
            assert one["loss_monitor"]["skipped_batches"] == left_out == one["history"][0]["skipped_batches"]
        gather(None)


def test_a_resumed_run_with_batches_left_out_ends_bit_for_bit_as_one_in_one_go(tmp_path: Path) -> None:
    _straight_and_resumed(0, str(tmp_path), Process())


def test_two_processes_leave_out_the_same_batches_and_resume_exactly(tmp_path: Path) -> None:
    run_in_two(_straight_and_resumed, str(tmp_path))
