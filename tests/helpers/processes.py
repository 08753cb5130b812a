"""Starts a function in two gloo processes on this machine, for tests of distributed code.

They are forked by a server that has imported everything once: a new interpreter would take seconds to do so.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

from engine.distributed import barrier
from engine.entry import leave

PRELOADED = ["train_vision", "test_vision", "torch._dynamo", "pytest", "tests.helpers.cli_harness"]


def run_in_two(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in two new processes with torchrun's environment; any failure is raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(_enter, (port, function, arguments), nprocs=2, start_method="forkserver")


def _enter(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    function(rank, *arguments)
    barrier()
    leave(0)
