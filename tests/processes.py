"""Starts a function in two gloo processes on this machine, for the tests of the rooms that spread over processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

from engine.distributed import barrier, leave


def run_in_two(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in two new processes with torchrun's environment; any failure is raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_enter, (port, function, arguments), nprocs=2)


def _enter(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    function(rank, *arguments)
    barrier()
    leave(0)
