"""The run folder: one process at a time, what is written, and what a resumed run takes back."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine.resume
import engine.run_dir
from common import files
from engine.checkpoint_file import save
from engine.distributed import Process
from engine.log import close_logging
from engine.normalize import Normalizer
from engine.resume import choose_folder
from engine.run_dir import RunDir, RunDirError

CONFIG = {"solver": {"lr": 0.001, "betas": [0.9, 0.999]}, "resume": None, "pretrain": "a.pt"}
META = {"seed": 5, "world_size": 1}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    close_logging()


class Killed(BaseException):
    """The moment of a kill: nothing catches it."""


def begin(path: Path, resume: bool = False, config: dict = CONFIG, meta: dict = META, **options: object) -> RunDir:
    return RunDir(path, config, meta, Process(), resume=resume, **options).open()


def made(path: Path, config: dict = CONFIG, age_s: float = 0, finished: bool = False) -> Path:
    """A run's folder as it is left behind."""
    with closing(begin(path, config=config)) as run:
        if finished:
            run.finish()
    then = time.time() - age_s
    os.utime(path / "run.json", (then, then))
    return path


def chosen(tmp_path: Path, named: Path | None = None, fresh: bool = False, differs: Callable | None = None) -> tuple:
    differs = differs or (lambda config, start: None if config == CONFIG else "solver.lr is another")
    return choose_folder(Process(), named, tmp_path / "new", differs, fresh)


# One process at a time.


@contextmanager
def another_process(work: Callable[[], None]) -> Iterator[int]:
    """A copy of this process that has done `work` and lives on; killed with -9 at the end.

    It waits for the signal, not with time.sleep: a test that replaces that function would let it end early.
    """
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(tell, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"x", "the other process failed"
        yield child
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_processes_cannot_have_one_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine.resume, "PATIENCE_S", 1)
    path = tmp_path / "run"
    held = []
    with another_process(lambda: held.append(begin(path))) as child:
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        with pytest.raises(RunDirError, match=rf"run: another process is using this run folder \(process {child} on"):
            begin(path, resume=True)
        with caplog.at_level(logging.INFO, "td4v"):
            assert chosen(tmp_path) == (tmp_path / "new", False)
        assert f"{path}: in use by process {child}" in caplog.text
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    # It was killed with -9: the folder is free at once, and the run resumes.
    assert chosen(tmp_path) == (path, True)
    begin(path, resume=True).close()
    assert len(json.loads((path / "run.json").read_text())) == 2


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_folder(tmp_path: Path):
    read_end, write_end = os.pipe()

    def work() -> None:
        held.append(begin(tmp_path / "run"))
        if (worker := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        os.write(write_end, f"{worker}\n".encode())

    held: list[RunDir] = []
    with another_process(work):
        worker = int(os.read(read_end, 100))
    try:
        os.kill(worker, 0)
        begin(tmp_path / "run", resume=True).close()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read_end), os.close(write_end)


def test_a_closed_folder_is_free(tmp_path: Path):
    def work() -> None:
        held.append(begin(tmp_path / "run", resume=True))

    held: list[RunDir] = []
    with (
        closing(begin(tmp_path / "run")),
        pytest.raises(AssertionError, match="the other process failed"),
        another_process(work),
    ):
        pass
    with another_process(work):
        pass


def test_a_start_that_comes_second_says_who_uses_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also one that looked before the folder was made, and while the lock still names the process before."""
    path = made(tmp_path / "run")
    (path / ".lock").write_text(f"process {2**22 + 1} on {socket.gethostname()}\n")  # killed long ago
    monkeypatch.setattr(engine.run_dir.time, "sleep", lambda _: held_by(child))

    def held_by(child: int) -> None:
        (path / ".lock").write_text(f"process {child} on {socket.gethostname()}\n")

    def work() -> None:
        lock = open(path / ".lock", "a+")  # noqa: SIM115, held until the end
        assert files.try_lock(lock)
        held.append(lock)

    held: list = []
    with another_process(work) as child:
        for resume in (False, True):
            sentence = rf"run: another process is using this run folder \(process {child} on"
            with pytest.raises(RunDirError, match=sentence):
                begin(path, resume=resume)
    with pytest.raises(
        RunDirError, match=r"already holds a run \(config.yaml\), which began after this command: rerun it"
    ):
        begin(path)


def test_a_run_that_was_trained_on_meanwhile_is_not_taken_back(tmp_path: Path):
    path = made(tmp_path / "run")
    state = engine.run_dir.state_of(path)
    save(path / "last_model.pt", {"config": CONFIG, "meta": META})
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(RunDirError, match="another process has trained this run meanwhile: rerun the command"):
        begin(path, resume=True, state=state)
    after = {file.name: file.read_bytes() for file in path.iterdir()}
    assert before | {".lock": after[".lock"]} == after
    begin(path, resume=True, state=engine.run_dir.state_of(path)).close()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "log.txt", "model_best.pt", "step_00000001.pt", ".lock", "events.out.tfevents.1"]
)
def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_written(tmp_path: Path, name: str):
    path = made(tmp_path / "run")
    (path / name).unlink(missing_ok=True)
    (path / name).mkdir()
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    with pytest.raises(RunDirError, match=f"{name}: is a folder"):
        begin(path, resume=True)
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == before


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    begin(tmp_path / "run").close()
    assert "this file system has no locks" in caplog.text


# What is written.


def test_nothing_is_written_before_it_is_opened(tmp_path: Path):
    run = RunDir(tmp_path / "run", CONFIG, META, Process())
    assert not (tmp_path / "run").exists()
    with run:
        assert (tmp_path / "run" / "config.yaml").exists()


def test_a_folder_named_after_the_time_is_nobody_elses(tmp_path: Path):
    (tmp_path / "new_1").write_text("")
    folders = [begin(tmp_path / "new", auto_named=True) for _ in range(3)]
    assert [run.path.name for run in folders] == ["new", "new_2", "new_3"]
    for run in folders:
        run.close()


def test_a_run_folder_says_what_ran(tmp_path: Path):
    path = tmp_path / "deep" / "run"
    with closing(begin(path)) as run:
        logging.getLogger("td4v").info("hello")
        logging.getLogger("td4v").debug("too much")
    assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG
    assert json.loads((path / "run.json").read_text()) == [META] == [run.meta]
    log = (path / "log.txt").read_text()
    assert log.count("hello") == 1 and "too much" not in log


def test_each_start_is_an_entry_and_how_it_began_stays(tmp_path: Path):
    begin(tmp_path).close()
    with closing(
        begin(tmp_path, resume=True, config=CONFIG | {"pretrain": None, "resume": "b.pt"}, meta=META | {"seed": 7})
    ) as run:
        run.finish()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG
    first, second = json.loads((tmp_path / "run.json").read_text())
    assert first == META and second.pop("finished") > "2020" and second == META | {"seed": 7}


def test_a_start_that_is_killed_at_any_operation_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed_at(place: int, path: Path, resume: bool) -> bool:
        calls = iter(range(100))

        def at(real: Callable) -> Callable:
            def operation(*arguments: object, **options: object) -> object:
                if next(calls) == place:
                    raise Killed
                return real(*arguments, **options)

            return operation

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", at(os.replace))
            patch.setattr(os, "fsync", at(os.fsync))
            patch.setattr(Path, "mkdir", at(Path.mkdir))
            try:
                begin(path, resume=resume).close()
            except Killed:
                return True
        return False

    for resume in (False, True):
        for place in range(20):
            path = tmp_path / f"{resume}{place}"
            if resume:
                made(path)
            cut = killed_at(place, path, resume)
            found, in_place = chosen(tmp_path / "none", path)
            begin(found, resume=in_place).close()
            assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG
            assert json.loads((path / "run.json").read_text())[-1] == META
            if not cut:
                break
        assert not cut and place > 3


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirError, match="run: cannot be used as a run folder"):
        begin(tmp_path / "run")


def test_lines_curves_and_images(tmp_path: Path):
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.5, 1.0)
    row = {"epoch": 0, "step": 4, "train_loss": 2.0, "top1": None}
    with closing(begin(tmp_path, normalizer=Normalizer(mean, std), clips=2)) as run:
        run.scalars({"train/loss": 2.5}, step=3)
        run.record_epoch(row)
        run.show_clips(torch.zeros(3, 4, 3, 8, 8))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == row
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("epoch/train_loss")] == [(4, 2.0)]
    assert events.Tags()["images"] == ["input/0", "input/1"] and "epoch/top1" not in events.Tags()["scalars"]
    picture = events.Images("input/0")[0]
    assert picture.width > 4 * 8 > picture.height  # four frames in a row
    pixel = Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB").getpixel((4, 4))
    assert pixel == pytest.approx((127.5, 63.75, 0), abs=1)  # zeros were the mean


def test_other_ranks_write_nothing_but_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with RunDir(tmp_path, CONFIG, META, Process(rank=1, world_size=2)) as run:
        run.rewind([{"epoch": 0, "step": 1}], 1)
        run.scalars({"a": 1.0}, 1)
        run.record_epoch({"epoch": 0, "step": 1})
        run.show_clips(torch.zeros(1, 2, 3, 4, 4))
        run.finish()
        logging.getLogger("td4v").info("chatter")
        logging.getLogger("td4v").warning("trouble")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_text()):
        assert "[rank 1] trouble" in text and "chatter" not in text


# What a resumed run takes back.


def row(epoch: int, loss: float = 1.0) -> dict:
    return {"epoch": epoch, "step": 10 * (epoch + 1), "train_loss": loss, "top1": None}


def trained(path: Path, epochs: int = 3) -> list[dict]:
    """A run of so many epochs of ten steps, as it is left behind by a kill: points each five steps, in two files."""
    history, seen = [row(epoch) for epoch in range(epochs)], set()
    for start, part in enumerate((history[:1], history[1:])):
        with closing(begin(path, resume=start > 0)) as run:
            if start == 0:
                run.show_clips(torch.zeros(1, 2, 3, 4, 4))
            for done in part:
                for step in (done["step"] - 5, done["step"]):
                    run.scalars({"train/loss": step / 100}, step)
                run.record_epoch(done)
        for file in set(path.glob("events.*")) - seen:
            os.utime(file, (time.time() - 10 + start,) * 2)
        seen = set(path.glob("events.*"))
    assert len(list(path.glob("events.*"))) == 2
    return history


def points(path: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(path)).Reload()
    found = events.Scalars(name) if name in events.Tags()["scalars"] else []
    return sorted((event.step, round(event.value, 4)) for event in found)


def test_what_came_after_the_checkpoint_is_dropped(tmp_path: Path):
    history = trained(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "tra')  # killed here
    with closing(begin(tmp_path, resume=True)) as run:
        run.rewind(history[:1], step=15)  # the checkpoint was made in the middle of the second epoch
        run.scalars({"train/loss": 0.5}, 20)
        run.record_epoch(row(1, loss=0.5))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [row(0), row(1, loss=0.5)]
    assert points(tmp_path, "train/loss") == [(5, 0.05), (10, 0.1), (15, 0.15), (20, 0.5)]
    assert points(tmp_path, "epoch/train_loss") == [(10, 1.0), (20, 0.5)]
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"] == ["input/0"]


def test_a_row_that_was_saved_but_not_written_down_is(tmp_path: Path):
    """The checkpoint comes before the line and the curve of its epoch: a kill between them loses neither."""
    history = trained(tmp_path)
    with closing(begin(tmp_path, resume=True)) as run:
        run.rewind([*history, row(3, loss=0.25)], step=40)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*history, row(3, loss=0.25)]
    assert points(tmp_path, "epoch/train_loss") == [(10, 1.0), (20, 1.0), (30, 1.0), (40, 0.25)]


def test_an_epoch_that_was_trained_but_not_evaluated_has_no_point_yet(tmp_path: Path):
    history = trained(tmp_path)
    with closing(begin(tmp_path, resume=True)) as run:
        run.rewind(history[:2], step=30)  # the checkpoint before the evaluation of the third
    assert points(tmp_path, "epoch/train_loss") == [(10, 1.0), (20, 1.0)]
    assert points(tmp_path, "train/loss")[-1] == (30, 0.3)


def test_from_the_start_again(tmp_path: Path):
    trained(tmp_path)
    with closing(begin(tmp_path, resume=True)) as run:
        run.rewind([], step=-1)
    assert (tmp_path / "metrics.jsonl").read_text() == "" and points(tmp_path, "train/loss") == []


@pytest.mark.parametrize("cut", [1, 3, 20, 45])
def test_a_cut_last_record_costs_that_record_alone(tmp_path: Path, cut: int):
    history = trained(tmp_path)
    newest = max(tmp_path.glob("events.*"), key=lambda file: file.stat().st_mtime)
    newest.write_bytes(newest.read_bytes()[:-cut])  # of the last point, epoch/train_loss at 30
    with closing(begin(tmp_path, resume=True)) as run:
        run.rewind(history, step=30)
    assert points(tmp_path, "epoch/train_loss") == [(10, 1.0), (20, 1.0), (30, 1.0)]
    assert points(tmp_path, "train/loss") == [(step, step / 100) for step in range(5, 35, 5)]


@pytest.mark.parametrize("place", [3, 9, 30, 120, -40, -5])
def test_damage_in_an_event_file_costs_one_record_and_is_logged(tmp_path: Path, place: int, caplog):
    history = trained(tmp_path, epochs=4)
    file = max(tmp_path.glob("events.*"), key=lambda file: file.stat().st_mtime)
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)
    with closing(begin(tmp_path, resume=True)) as run:
        run.rewind(history, step=40)
    assert f"{file}: damaged in 1 place: the points of curves there are lost" in caplog.text
    assert points(tmp_path, "epoch/train_loss") == [(10, 1.0), (20, 1.0), (30, 1.0), (40, 1.0)]
    assert len(points(tmp_path, "train/loss")) >= 7


def test_lost_event_files_and_metrics_are_logged_and_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    history = trained(tmp_path)
    for file in (*tmp_path.glob("events.*"), tmp_path / "metrics.jsonl"):
        file.unlink()
    with closing(begin(tmp_path, resume=True)) as run:
        run.rewind(history, step=30)
    assert f"{tmp_path}: the event files miss points of 2 epochs" in caplog.text
    assert f"{tmp_path / 'metrics.jsonl'}: 2 rows missing or damaged" in caplog.text
    assert points(tmp_path, "epoch/train_loss") == [(10, 1.0), (20, 1.0), (30, 1.0)]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history
    caplog.clear()
    with closing(begin(tmp_path, resume=True)) as run:
        run.rewind(history, step=30)
    assert not caplog.records


def test_rewinding_again_changes_nothing(tmp_path: Path):
    history = trained(tmp_path)
    for _ in range(2):
        with closing(begin(tmp_path, resume=True)) as run:
            run.rewind(history[:2], step=20)
    (file,) = tmp_path.glob("events.*")
    once = file.read_bytes()
    with closing(begin(tmp_path, resume=True)) as run:
        run.rewind(history[:2], step=20)
    assert file.read_bytes() == once and len(list(tmp_path.glob("events.*"))) == 1


def test_a_rewind_that_is_killed_at_any_step_loses_nothing_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = ("replace", "fsync", "unlink")
    for place in range(10):
        path = tmp_path / str(place)
        history = trained(path)
        calls, done = iter(range(100)), []

        def at(real: Callable, name: str, calls: Iterator = calls, place: int = place, done: list = done) -> Callable:
            def operation(*arguments: object, **options: object) -> object:
                if next(calls) == place:
                    raise Killed
                done.append(name)
                return real(*arguments, **options)

            return operation

        with closing(begin(path, resume=True)) as run, monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, at(getattr(os, name), name))
            patch.setattr(Path, "unlink", at(Path.unlink, "unlink"))
            try:
                run.rewind(history[:2], step=20)
                killed = False
            except Killed:
                killed = True
        kept = set(points(path, "train/loss"))  # of all files, in what order ever
        assert {(5, 0.05), (10, 0.1), (15, 0.15), (20, 0.2)} <= kept
        assert {(10, 1.0), (20, 1.0)} <= set(points(path, "epoch/train_loss"))
        with closing(begin(path, resume=True)) as run:
            run.rewind(history[:2], step=20)
            run.record_epoch(row(2, loss=0.5))
        assert points(path, "train/loss") == [(5, 0.05), (10, 0.1), (15, 0.15), (20, 0.2)]
        assert points(path, "epoch/train_loss") == [(10, 1.0), (20, 1.0), (30, 0.5)]
        lines = (path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [*history[:2], row(2, loss=0.5)]
        if not killed:
            break
    assert not killed and {"replace", "fsync", "unlink"} <= set(done)
