"""Stop requests: signals that end a run between two steps, after it was saved, also while it waits for data."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

logger = logging.getLogger("td4v")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
START_AGAIN = 75  # exit status of a run that was saved because a scheduler requested it: sysexits' EX_TEMPFAIL
INTERRUPTED = 130  # after Ctrl-C
_SECOND_CTRL_C_S = 2.0  # a second Ctrl-C after this time ends at once; torchrun repeats the first one within it
_LAUNCHER_CHECK_S = 1.0  # how often a process checks that its launcher is alive
_END = object()
Item = TypeVar("Item")


class Stopped(Exception):
    """A run ended on request, with everything saved; `status` is the exit status of its process."""

    def __init__(self, number: int, where: str) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} {where}; rerun the same command to resume (without --fresh)")
        self.status = INTERRUPTED if number == signal.SIGINT else START_AGAIN


class WaitInterrupted(BaseException):
    """A stop was requested while data was waited for. No Exception, or it would pass for a video that cannot be read."""


class StopSignals:
    """Inside this context SIGTERM, SIGUSR1 and Ctrl-C only set `requested` to their number (0: none).

    While `interruptible` waits they also end that wait.

    A second Ctrl-C some seconds later raises KeyboardInterrupt. Outside the main thread nothing changes. If the context
    is left without an exception the run is finished and must not be started again, so later signals do nothing, even
    inside `leaving_at_once`.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._requested_at, self._waits = 0.0, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, self._note if kind is None and handler is _leave else handler)
        self._previous = {}

    def interruptible(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items on; raises WaitInterrupted in place of the next one once a stop is requested.

        A run may wait for a disk that does not answer, and its state is the one between two steps meanwhile.
        """
        iterator = iter(items)
        while True:
            self._waits = True
            try:
                if self.requested:
                    raise WaitInterrupted
                item = next(iterator, _END)
            finally:
                self._waits = False
            if item is _END:
                return
            yield item

    def _note(self, number: int, frame: FrameType | None) -> None:
        repeated = number == signal.SIGINT and self.requested == number
        if repeated and time.monotonic() - self._requested_at > _SECOND_CTRL_C_S:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._requested_at = int(number), time.monotonic()
        if self._waits:
            raise WaitInterrupted


def leaving_at_once() -> contextlib.AbstractContextManager[None]:
    """Inside this context SIGTERM and SIGUSR1 end the process at once with START_AGAIN.

    It is for a run that is being built: that takes minutes and has nothing to save. StopSignals inside it take
    precedence. Outside the main thread nothing changes.
    """
    return _handled_by(_leave)


def ending_in_order() -> contextlib.AbstractContextManager[None]:
    """Inside this context SIGTERM and SIGUSR1 end the process as Ctrl-C does, with its cleanup, for work that cannot be
    resumed. Outside the main thread nothing changes."""
    return _handled_by(signal.default_int_handler)


def end_after_launcher(grace: float) -> None:
    """Kill this process when its parent, the launcher, has been gone for `grace` seconds.

    die_with_parent.py has the system send SIGTERM when the launcher is killed, and a run then saves and ends. A process
    that waits inside a library, for a disk or for another process, does not hear that signal. A thread needs neither
    the main thread nor a handler.
    """
    threading.Thread(target=_watch, args=(os.getppid(), grace), daemon=True).start()


def _watch(launcher: int, grace: float) -> None:
    while os.getppid() == launcher:
        time.sleep(_LAUNCHER_CHECK_S)
    time.sleep(grace)
    logger.error("the launcher was killed, and this process could not end within %g s (TD4V_GRACE)", grace)
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _leave(number: int, frame: FrameType | None) -> None:
    logger.warning("stopped by %s with nothing to save; rerun the same command to start", signal.Signals(number).name)
    os._exit(START_AGAIN)
