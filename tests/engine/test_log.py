"""The logger: who says what, where, and how a line of progress looks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.distributed import Process
from engine.log import Eta, close_logging, progress_line, setup_logging

logger = logging.getLogger("td4v")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # setup_logging puts its own there
    level = logger.level
    yield
    close_logging()
    logger.setLevel(level)


def test_console_and_file_say_the_same_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for _ in range(2):  # the second time replaces both
        setup_logging(Process(), tmp_path)
    logger.info("hello")
    logger.debug("too much")
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_text()):
        assert text.count("INFO hello") == 1 and "too much" not in text and "rank" not in text
    setup_logging(Process())
    logger.info("only here")
    assert "only here" in capsys.readouterr().err and "only here" not in (tmp_path / "log.txt").read_text()
    close_logging()
    logger.warning("nowhere of ours")
    assert "nowhere of ours" not in (tmp_path / "log.txt").read_text()


def test_a_log_goes_on_in_its_file(tmp_path: Path):
    for text in ("first", "second"):
        setup_logging(Process(), tmp_path)
        logger.info(text)
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]


def test_other_ranks_warn_and_say_who_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    setup_logging(Process(rank=1, world_size=2), tmp_path)
    logger.info("chatter")
    logger.warning("trouble")
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_text()):
        assert "[rank 1] trouble" in text and "chatter" not in text


def test_warnings_are_one_line_of_the_log(capsys: pytest.CaptureFixture[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        setup_logging(Process())
        warnings.warn("mind this", stacklevel=1)
        warnings.warn("developers only", DeprecationWarning, stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("WARNING mind this")


def test_progress_line_and_eta(monkeypatch: pytest.MonkeyPatch):
    line = progress_line(2, 30, 7, 120, loss=1.23456, lr=0.00095, clips_per_second=33.33, seconds_left=3725.4)
    assert line == "epoch 2/30 step   7/120 loss 1.2346 lr 9.500e-04 33.3 clips/s eta 1:02:05"
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("engine.log.time.perf_counter", lambda: next(clock))
    assert Eta(done=50, total=100).seconds(done=55) == pytest.approx(90.0)
