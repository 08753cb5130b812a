"""Ending between two steps when somebody asks, and what all processes must agree on to do so.

Lives here: signals that are noted instead of ending the process, the exception that ends a run after it was saved, and
the one exchange a step between processes. Does not live here: what is saved (state.py) and when (loop.py).
"""

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
START_AGAIN = 75  # exit status of a run that was saved because a scheduler asked: sysexits' EX_TEMPFAIL
INTERRUPTED = 130  # after Ctrl-C
_INSIST_S = 2.0  # a second Ctrl-C ends at once; torchrun repeats the first one within this time


class Stopped(Exception):
    """A run ended on request, with everything saved; `status` is what its process exits with."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} {where}; the same command goes on from there (without --fresh)"
        )
        self.status = INTERRUPTED if number == signal.SIGINT else START_AGAIN


def leaving_at_once() -> contextlib.AbstractContextManager[None]:
    """While inside, SIGTERM and SIGUSR1 end this process at once with START_AGAIN: a run that is being built, which
    takes minutes, has nothing to save. StopSignals go before. Outside the main thread it does nothing."""
    return _answered(_leave)


def ending_in_order() -> contextlib.AbstractContextManager[None]:
    """While inside, SIGTERM and SIGUSR1 end this process as Ctrl-C does, for what has to be tidied up and not gone on
    with. Outside the main thread it does nothing."""
    return _answered(signal.default_int_handler)


@contextlib.contextmanager
def _answered(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    former = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def _leave(number: int, frame: FrameType | None) -> None:
    logger.warning("stopped by %s with nothing to save; the same command starts again", signal.Signals(number).name)
    os._exit(START_AGAIN)


class StopSignals:
    """While inside, SIGTERM, SIGUSR1 and Ctrl-C are noted in `asked` (a signal's number, 0: none) and nothing else.

    A second Ctrl-C some seconds later raises KeyboardInterrupt. Outside the main thread it does nothing. Where it is left
    without an exception the run is finished, and nothing of it is to be started again: then `leaving_at_once` is over.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._since = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, self._note if kind is None and handler is _leave else handler)
        self._former = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == number and time.monotonic() - self._since > _INSIST_S:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._since = int(number), time.monotonic()
