"""Processes that die cost their task alone; progress is logged where there is no terminal."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import workers


def die_on_three(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number * 10


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_a_task_that_kills_its_process_costs_itself_only(start):
    with workers.Workers(2, start) as pool:
        assert dict(pool.run(die_on_three, range(8))) == {n: None if n == 3 else n * 10 for n in range(8)}


def report_and_sleep(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_end_with_a_killed_parent(start, tmp_path):
    """Though another process that the parent forked lives on, with copies of all its pipes."""
    program = f"""
import multiprocessing, os, threading, time
from common.workers import Workers
from tests.common.test_workers import report_and_sleep
folder = {str(tmp_path / "pids")!r}
def fork_another():
    while len(os.listdir(folder)) < 2:
        time.sleep(0.05)
    multiprocessing.get_context("fork").Process(target=report_and_sleep, args=(folder + "/../another",)).start()
if __name__ == "__main__":
    threading.Thread(target=fork_another).start()
    with Workers(2, {start!r}) as pool:
        list(pool.run(report_and_sleep, [folder] * 2))
"""
    for name in ("pids", "another"):
        (tmp_path / name).mkdir()
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment, stderr=subprocess.DEVNULL)
    waited(lambda: os.listdir(tmp_path / "another"))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    (another,) = os.listdir(tmp_path / "another")
    try:
        waited(lambda: not any(is_alive(pid) for pid in os.listdir(tmp_path / "pids")))
        assert is_alive(another)
    finally:
        os.kill(int(another), signal.SIGKILL)


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waited(condition) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("nothing happened for 15 seconds")


INTERRUPTED = """
import time
from common.workers import Workers
if __name__ == "__main__":
    print("begins", flush=True)
    with Workers(2, "spawn") as pool:
        list(pool.run(time.sleep, [0.5] * 40))
"""


@pytest.mark.parametrize("delay", [0.05, 0.3, 1.5])
def test_ctrl_c_reaches_the_parent_alone(delay, tmp_path):
    """Also while the processes start: one traceback, the parent's, and running tasks end."""
    (tmp_path / "program.py").write_text(INTERRUPTED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    options = {"env": environment, "text": True, "start_new_session": True}
    command = [sys.executable, tmp_path / "program.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as parent:
        assert parent.stdout.readline() == "begins\n"
        time.sleep(delay)
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
        errors = parent.stderr.read()
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")


def test_progress_passes_items_on_and_logs(caplog, monkeypatch):
    monkeypatch.setattr(workers, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "td4v"):
        assert list(workers.progress(iter("abc"), 3, "reading")) == ["a", "b", "c"]
    assert "reading: 3 of 3 videos" in caplog.messages[-1] and "reading: 1 of 3 videos" in caplog.messages[0]
