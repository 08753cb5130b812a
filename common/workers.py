"""A pool of processes that survives its tasks' crashes, and its progress on the screen or in a log.

A task that kills its process (native decoders can) costs that task alone. Workers end with the process that started
them, also where that is killed. Commands that look at many videos use it; training has workers of its own.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Literal, TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")
LOG_SECONDS = 5.0
PARENT_SECONDS = 0.5  # between two checks whether the parent is alive

logger = logging.getLogger("td4v")


class Workers:
    """`jobs` processes. Use it as a context: on leaving, waiting tasks are dropped and running ones end.

    Args:
        start: `fork` is faster, `spawn` is safe in a process that has opened videos.
    """

    def __init__(self, jobs: int, start: Literal["spawn", "fork"] = "spawn"):
        self.jobs, self.start = jobs, start
        self._pool = self._new_pool(jobs)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result | None]]:
        """Yield (task, result) as tasks end; the result is None where the task killed its process, twice.

        Raises what `function` raises.
        """
        waiting = deque(tasks)
        running: dict[Future[Result], Task] = {}
        while waiting or running:
            try:
                while waiting and len(running) < 2 * self.jobs:
                    with _ctrl_c_blocked():  # submitting starts processes
                        future = self._pool.submit(function, waiting[0])
                    running[future] = waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
            except BrokenProcessPool:
                suspects = list(running.values())
                running.clear()
                self._pool.shutdown()
                for task in suspects:
                    yield task, self._alone(function, task)
                self._pool = self._new_pool(self.jobs)

    def _new_pool(self, jobs: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context(self.start), initializer=_start_worker)

    def _alone(self, function: Callable[[Task], Result], task: Task) -> Result | None:
        with self._new_pool(1) as pool:
            try:
                with _ctrl_c_blocked():
                    future = pool.submit(function, task)
                return future.result()
            except BrokenProcessPool:
                return None


def num_cores() -> int:
    """The cores that this process may use, if the system knows."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Processes started inside never get Ctrl-C, not even while they start; this one gets it afterwards."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _start_worker() -> None:
    """End when the parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Check repeatedly: forked siblings hold open the pipe that would close with the parent."""
    parent = multiprocessing.parent_process().pid
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def progress(items: Iterable[Task], total: int, what: str) -> Iterator[Task]:
    """Pass items on, and show how many there were and the time left: a bar on a terminal, else a log line at times."""
    terminal = sys.stderr.isatty()
    start = reported = time.monotonic()
    with tqdm(total=total, desc=what, unit="video", disable=not terminal) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.update()
            now = time.monotonic()
            if not terminal and (now - reported >= LOG_SECONDS or done == total):
                left = (now - start) / done * (total - done)
                logger.info("%s: %d of %d videos, about %.0f s left", what, done, total, left)
                reported = now
