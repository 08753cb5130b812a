"""Stop requests: signals that end a run between two steps, after it was saved."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger("td4v")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
START_AGAIN = 75  # exit status of a run that was saved because a scheduler requested it: sysexits' EX_TEMPFAIL
INTERRUPTED = 130  # after Ctrl-C
_SECOND_CTRL_C_S = 2.0  # a second Ctrl-C after this time ends at once; torchrun repeats the first one within it


class Stopped(Exception):
    """A run ended on request, with everything saved; `status` is the exit status of its process."""

    def __init__(self, number: int, where: str) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} {where}; rerun the same command to resume (without --fresh)")
        self.status = INTERRUPTED if number == signal.SIGINT else START_AGAIN


class StopSignals:
    """Inside this context SIGTERM, SIGUSR1 and Ctrl-C only set `requested` to their number (0: none).

    A second Ctrl-C some seconds later raises KeyboardInterrupt. Outside the main thread nothing changes. If the context
    is left without an exception the run is finished and must not be started again, so later signals do nothing, even
    inside `leaving_at_once`.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._requested_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, self._note if kind is None and handler is _leave else handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        repeated = number == signal.SIGINT and self.requested == number
        if repeated and time.monotonic() - self._requested_at > _SECOND_CTRL_C_S:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._requested_at = int(number), time.monotonic()


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
