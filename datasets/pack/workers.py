"""What writing and checking a pack share: tasks in processes of their own, a progress bar, whole-or-not-there files.

Does not live here: what the tasks do (scan.py, writer.py, verify.py).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, BinaryIO

from datasets.pack.format import PackError

SHOWN_PROBLEMS = 20

logger = logging.getLogger("td4v")
Work = Generator[int, None, Any]  # yields progress, returns a result


def run_tasks(function: Callable[..., Work], tasks: Mapping[str, tuple[Any, ...]], jobs: int, bar: Any) -> list[Any]:
    """The results of `function(*task)` in the order of the tasks, each in a new process, `jobs` at once.

    What a task yields moves the bar. The processes end with this one, however it ends: at the latest when they yield.
    A task whose process dies is begun once more.

    Args:
        tasks: by what they work on, for messages.
    Raises:
        PackError: a task's own, or its process died twice; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")
    waiting, results = deque(tasks), dict.fromkeys(tasks)
    running: dict[Connection, tuple[str, Any]] = {}
    moved = dict.fromkeys(tasks, 0)  # of the bar
    died: set[str] = set()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.popleft()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run_task, args=(sender, function, tasks[name]), daemon=True)
                with _deaf_to_ctrl_c():
                    process.start()
                sender.close()
                running[receiver] = name, process
            for receiver in wait(list(running)):
                name, process = running[receiver]
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    process.join()
                    kind, value = "death", process.exitcode
                if kind == "progress":
                    bar.update(value)
                    moved[name] += value
                elif kind == "death" and name not in died:
                    logger.warning("%s: the process at work on it died (%s); once more", name, _reason(value))
                    bar.update(-moved[name])
                    moved[name] = 0
                    died.add(name)
                    waiting.append(name)
                    del running[receiver]
                    receiver.close()
                elif kind == "death":
                    raise PackError(
                        f"{name}: the process at work on it died twice ({_reason(value)}); what is finished is kept, "
                        "the same command goes on from there, with fewer --jobs if memory ran out"
                    )
                elif kind == "error":
                    raise PackError(value)
                else:
                    results[name] = value
                    process.join()
                    running.pop(receiver)
                    receiver.close()
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return list(results.values())


def _reason(exit_code: int) -> str:
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"


def _run_task(sender: Connection, function: Callable[..., Work], task: tuple[Any, ...]) -> None:
    work = function(*task)
    try:
        try:
            while True:
                sender.send(("progress", next(work)))
        except StopIteration as end:
            sender.send(("result", end.value))
        except PackError as error:
            sender.send(("error", str(error)))
    except BrokenPipeError:  # the command was killed
        work.close()


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: the one that started them stops them, without their tracebacks."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def progress_bar(what: str, unit: str, total: int, done: int = 0) -> Any:
    """A bar on stderr with the time that is left; `unit` iB shows KiB, MiB and so on."""
    from tqdm import tqdm

    return tqdm(
        desc=what, total=total, initial=done, unit=unit, unit_scale=unit == "iB", unit_divisor=1024, mininterval=0.5
    )


def raise_problems(problems: Sequence[str], verdict: str) -> None:
    """Raise PackError if there are any: the only one, or `verdict` after up to 20 of them in the log."""
    if len(problems) == 1:
        raise PackError(problems[0])
    for problem in problems[:SHOWN_PROBLEMS]:
        logger.error("%s", problem)
    if problems:
        raise PackError(verdict + (f"; the first {SHOWN_PROBLEMS} are above" if len(problems) > SHOWN_PROBLEMS else ""))


def readable(size: float) -> str:
    """Bytes for people, e.g. 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
