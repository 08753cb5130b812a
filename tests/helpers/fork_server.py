"""A process that has imported everything and forks, so that starting a script costs no imports.

It reads requests and writes answers, one JSON a line. Each child runs a script as __main__, after calling the functions
here that the request names: to die at an operation on a file, find no space, or get batches of NaN.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import math
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_DIES_WITH_PARENT = (1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h


def kill_at_file_operation(number: int, folder: str) -> None:
    """kill -9 of this process just before its `number`-th (from 1) opening for writing, renaming, linking or removing
    of a file in `folder`; with 0 they are only counted, in `folder`/../operations."""
    count = 0
    log = os.open(Path(folder).parent / "operations", os.O_CREAT | os.O_WRONLY | os.O_TRUNC) if number == 0 else None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            concerned = isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        else:
            concerned = event in ("os.rename", "os.link", "os.remove")
        if not concerned or isinstance(arguments[0], int) or not os.fsdecode(arguments[0]).startswith(folder):
            return
        count += 1
        if log is not None:
            os.write(log, f"{event} {os.fsdecode(arguments[0])}\n".encode())
        elif count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def no_space(largest_file: int) -> None:
    """No file can grow beyond so many bytes (errno EFBIG), as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))


def poison(first: int, last: int | None = None) -> None:
    """Every pixel of the optimizer steps first..last (counted from 0 over the run; None: for ever) is NaN."""
    import torch

    from engine.trainer import Trainer

    step = Trainer.step

    def poisoned(trainer: Trainer, group: list[dict[str, Any]]) -> Any:
        if first <= trainer.progress.step <= (math.inf if last is None else last):
            for batch in group:
                batch["video"] = torch.full(batch["video"].shape, math.nan)
        return step(trainer, group)

    Trainer.step = poisoned


def kill_at_step(number: int) -> None:
    """kill -9 of this process before the optimizer step `number`, counted from 0 over the run."""
    from engine.trainer import Trainer

    step = Trainer.step

    def killed(trainer: Trainer, group: list[dict[str, Any]]) -> Any:
        if trainer.progress.step == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, group)

    Trainer.step = killed


def slow_steps(seconds: float) -> None:
    """Each optimizer step takes that much longer."""
    from engine.trainer import Trainer

    step = Trainer.step

    def slow(trainer: Trainer, group: list[dict[str, Any]]) -> Any:
        time.sleep(seconds)
        return step(trainer, group)

    Trainer.step = slow


def patience(seconds: float) -> None:
    """Waits no longer than that for another process that uses the run folder."""
    from engine import resume

    resume.PATIENCE_S = seconds


def notice(seconds: float) -> None:
    """Videos that are waited for are named after that time."""
    from datasets import build

    build.VideoLoader = functools.partial(build.VideoLoader, notice_s=seconds)


def _child(request: dict[str, Any]) -> None:
    """Become what the request asks for; never returns."""
    os.setsid()
    ctypes.CDLL(None).prctl(*_DIES_WITH_PARENT)
    output = os.open(request["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False, buffering=1)
    os.chdir(ROOT)
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    status = 0
    try:
        for name, arguments in request["first"].items():
            globals()[name](**arguments)
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    try:
        # What an interpreter does at its end, in its order; the rest of it would only free memory.
        import multiprocessing.util
        import threading

        threading._shutdown()
        multiprocessing.util._exit_function()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def serve() -> None:
    """Answer requests until there are no more."""
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    for name in ("train_vision", "test_vision", "torch.utils.tensorboard", "tensorboard.backend", "torch._dynamo"):
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    print(json.dumps({"threads": len(os.listdir("/proc/self/task"))}), file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        if "words" in request:
            answer = os.fork() or _child(request)
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
