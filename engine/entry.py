"""The shell around an entry point's main(): errors become sentences, and no process waits for one that failed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable

import torch.distributed as dist

from common.console import end_at_once
from engine.distributed import barrier, stop
from engine.errors import ANOTHER_ENDED, explain
from engine.signals import INTERRUPTED, Stopped, leaving_at_once

logger = logging.getLogger("td4v")

WORKERS_END_S = 5.0  # for the loaders' workers to end when the run is stopped


def run(main: Callable[[], None], errors: tuple[type[Exception], ...]) -> None:
    """Call `main` and end this process with the right exit status.

    One of `errors`, which a user can cause, is logged as its one sentence, as is what errors.explain knows; any other
    exception with its traceback. The status is then 1. A run that was stopped on request exits with the status of
    signals.Stopped.
    """
    status = 0
    try:
        with leaving_at_once():
            main()
            barrier()
    except KeyboardInterrupt:
        logger.error("interrupted: last_model.pt, if there is one, holds what was saved last")
        status = INTERRUPTED
        _end_workers(status)
    except Stopped as stopped:
        if _rank() == 0:
            logger.warning("%s", stopped)
        status = stopped.status
        _end_workers(status)
    except Exception as error:
        if _rank() > 0:
            time.sleep(2)  # if rank 0 failed alike it has logged that, and torchrun ends this process meanwhile
        sentence = explain(error)
        if sentence == ANOTHER_ENDED:
            logger.warning("%s", sentence)
        elif sentence is not None or isinstance(error, errors):
            logger.error("%s", sentence or error)
        else:
            logger.exception("%s", type(error).__name__)
        status = 1
    leave(status)


def leave(status: int) -> None:
    """End this process at once if there are others; else return, or raise SystemExit if `status` is not 0.

    DistributedDataParallel keeps gloo's threads alive after the group is destroyed. An orderly interpreter exit then
    sometimes aborts, and after a failure it would wait for the other processes, which torchrun ends.
    """
    if dist.is_initialized():
        if status == 0:
            stop()
        end_at_once(status)
    if status != 0:
        raise SystemExit(status)


def _end_workers(status: int) -> None:
    """End the loaders' workers, which may be waiting for a disk; if one cannot be ended, this process ends at once.

    An orderly exit would wait some seconds for each of them, or for ever.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + WORKERS_END_S
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
    if any(worker.is_alive() for worker in workers):
        end_at_once(status)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))
