"""The run folder: what is written, what is refused, what a resumed run takes back."""

from __future__ import annotations

import io
import json
import logging
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.distributed import Process
from engine.log import Eta, RunFolder, RunFolderError, close_logging, progress_line

CONFIG = {"solver": {"lr": 0.001, "betas": [0.9, 0.999]}, "resume": None}


@pytest.fixture(autouse=True)
def _quiet():
    yield
    close_logging()


def test_a_run_folder_says_what_ran(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with RunFolder(path, CONFIG, Process()) as run:
        logging.getLogger("td4v").info("hello")
        logging.getLogger("td4v").debug("too much")
    assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG
    (start,) = json.loads((path / "run.json").read_text())
    assert start == run.meta and start["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(start["git"]) == {"revision", "dirty"} and start["command"]
    log = (path / "log.txt").read_text()
    assert log.count("hello") == 1 and "too much" not in log


@pytest.mark.parametrize("name", ["last_model.pt", "config.yaml", "log.txt"])
def test_a_taken_folder_is_refused_unless_resumed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(RunFolderError, match=rf"already holds a run \({name}\)"):
        RunFolder(tmp_path, CONFIG, Process())
    assert (tmp_path / name).read_text() == "old"
    RunFolder(tmp_path, CONFIG, Process(), resume=True)
    assert (tmp_path / name).read_text() == "old"  # the checkpoint may still turn out not to fit
    for _ in range(2):
        RunFolder(tmp_path, CONFIG, Process(), resume=True).rewind(0, 0)
    assert len(json.loads((tmp_path / "run.json").read_text())) == 2


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match="run: cannot be used as a run folder"):
        RunFolder(tmp_path / "run", CONFIG, Process())


def test_lines_curves_and_pictures(tmp_path: Path) -> None:
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.5, 1.0)
    with RunFolder(tmp_path, CONFIG, Process(), mean=mean, std=std, clips=2) as run:
        run.scalars({"train/loss": 2.5}, step=3)
        run.record_epoch({"epoch": 0, "train_loss": 2.0, "top1": None}, step=4)
        run.show_clips(torch.zeros(3, 4, 3, 8, 8))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"epoch": 0, "train_loss": 2.0, "top1": None}
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("epoch/train_loss")] == [(4, 2.0)]
    assert events.Tags()["images"] == ["input/0", "input/1"] and "epoch/top1" not in events.Tags()["scalars"]
    picture = events.Images("input/0")[0]
    assert picture.width > 4 * 8 > picture.height  # four frames in a row
    pixel = Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB").getpixel((4, 4))
    assert pixel == pytest.approx((127.5, 63.75, 0), abs=1)  # zeros were the mean


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG, Process()) as run:
        for epoch in range(3):
            run.record_epoch({"epoch": epoch, "train_loss": 1.0}, step=10 * (epoch + 1))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "tra')  # power went off here
    time.sleep(1.1)  # TensorBoard orders files by the second in their names
    with RunFolder(tmp_path, CONFIG, Process(), resume=True) as run:
        run.rewind(epoch=1, step=10)
        run.record_epoch({"epoch": 1, "train_loss": 0.5}, step=20)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"epoch": 0, "train_loss": 1.0}, {"epoch": 1, "train_loss": 0.5}]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("epoch/train_loss")] == [(10, 1.0), (20, 0.5)]


def test_other_ranks_write_nothing_but_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(tmp_path, CONFIG, Process(rank=1, world_size=2)) as run:
        run.scalars({"a": 1.0}, 1)
        run.record_epoch({"epoch": 0}, 1)
        run.show_clips(torch.zeros(1, 2, 3, 4, 4))
        logging.getLogger("td4v").info("chatter")
        logging.getLogger("td4v").warning("trouble")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_text()):
        assert "[rank 1] trouble" in text and "chatter" not in text


def test_progress_line_and_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    line = progress_line(2, 30, 7, 120, 1.23456, 0.00095, 33.33, 3725.4)
    assert line == "epoch 2/30 step   7/120 loss 1.2346 lr 9.500e-04 33.3 clips/s eta 1:02:05"
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("engine.log.time.perf_counter", lambda: next(clock))
    assert Eta(done=50, total=100).seconds(done=55) == pytest.approx(90.0)
