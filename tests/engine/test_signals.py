"""Signals that are noted, a second Ctrl-C, exit statuses, and what several processes agree on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import signals as stop
from engine.signals import Stopped, StopSignals, WaitInterrupted


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_nothing_else(number: signal.Signals, status: int) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.requested == 0
        os.kill(os.getpid(), number)
        assert signals.requested == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == number  # the first one counts
    assert signal.getsignal(number) is before
    stopped = Stopped(signals.requested, "after 1 epochs and saved")
    assert (
        stopped.status == status and number.name in str(stopped) and "rerun the same command to resume" in str(stopped)
    )


def test_ctrl_c_insists_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's own, right after the terminal's
        monkeypatch.setattr(stop, "_SECOND_CTRL_C_S", 0.0)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_shell_around_main_exits_with_the_status() -> None:
    code = (
        "import signal\nfrom engine.entry import run\nfrom engine.signals import Stopped\n"
        "def main():\n    raise Stopped(signal.SIGTERM, 'after step 3, saved')\n"
        "run(main, ())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75 and "stopped by SIGTERM after step 3, saved" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_request_ends_a_wait_and_the_next_one() -> None:
    def items() -> Iterator[int]:
        yield 1
        os.kill(os.getpid(), signal.SIGTERM)
        yield 2

    with StopSignals() as signals:
        waited = signals.interruptible(items())
        assert next(waited) == 1
        with pytest.raises(WaitInterrupted):
            next(waited)
        with pytest.raises(WaitInterrupted):
            next(signals.interruptible([3]))
        os.kill(os.getpid(), signal.SIGTERM)  # is noted where nothing is waited for
    assert list(StopSignals().interruptible([1, 2])) == [1, 2]


LAUNCHER = """
import subprocess, sys, time
deaf = '''
import signal, time
from engine.signals import end_after_launcher
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_after_launcher(grace=0.2)
print("up", flush=True)
time.sleep(100)
'''
print(subprocess.Popen([sys.executable, "-c", deaf]).pid, flush=True)
time.sleep(100)
"""


def test_no_process_outlives_its_launcher_by_more_than_its_grace() -> None:
    command, root = [sys.executable, "-c", LAUNCHER], Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        deaf = int(launcher.stdout.readline())
        assert launcher.stdout.readline() == "up\n"
        launcher.kill()
        until = time.monotonic() + 10
        while os.path.exists(f"/proc/{deaf}"):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert "could not end within 0.2 s (TD4V_GRACE)" in launcher.stdout.read()
