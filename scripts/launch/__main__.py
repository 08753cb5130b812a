"""Starts a script in several processes on one machine or more: torchrun, set by the variables that launch.sh lists.

bash scripts/launch.sh SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping

from common.console import log_to_console

STOP = {  # signals that stop the run, and the launcher's exit status
    signal.SIGTERM: 75,
    signal.SIGUSR1: 75,
    signal.SIGHUP: 75,
    signal.SIGINT: 130,
}
logger = logging.getLogger("td4v")


class LaunchError(ValueError):
    """A variable is wrong; the message is one sentence."""


def main(command: list[str]) -> int:
    """Run `command`, a script and its arguments; returns the exit status, see elastic_agent.launch."""
    for number, status in STOP.items():  # importing torch and waiting for other machines take time
        signal.signal(number, lambda *_, status=status: os._exit(status))
    log_to_console(logging.WARNING)
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"  # a machine that leaves would log a page of C++ addresses
    import torch

    from scripts.launch.elastic_agent import launch

    if level is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the workers keep their default
    try:
        processes = whole_number("NPROC", os.environ, 1) if "NPROC" in os.environ else max(1, torch.cuda.device_count())
        arguments = torchrun_arguments(os.environ, processes)
        grace = whole_number("TD4V_GRACE", os.environ, 0, default=120)
        node = (
            whole_number("NODE_RANK", os.environ, 0) if whole_number("NNODES", os.environ, 1, default=1) > 1 else None
        )
    except LaunchError as error:
        logger.error("%s", error)
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ["TD4V_GRACE"] = str(grace)  # workers end themselves so long after a launcher that is killed
    # A store that outlives a restart holds the addresses of dead processes, and new ones would use them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return launch([*arguments, *command], STOP, grace, node)


def torchrun_arguments(variables: Mapping[str, str], processes: int) -> list[str]:
    """torchrun's arguments before the script: the number of workers, and where they meet.

    Raises:
        LaunchError: a variable is not a number or is missing, or RDZV's machine cannot be reached.
    """
    nodes = whole_number("NNODES", variables, 1, default=1)
    restarts = whole_number("MAX_RESTARTS", variables, 0, default=0)
    arguments = ["--nnodes", str(nodes), "--nproc_per_node", str(processes), "--max_restarts", str(restarts)]
    if nodes == 1 and variables.get("PORT"):
        return [*arguments, "--master_port", str(whole_number("PORT", variables, 1))]
    if nodes == 1:
        return [*arguments, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    meeting = variables.get("RDZV", "")
    host, _, port = meeting.rpartition(":")
    if not (host and port.isdecimal() and variables.get("NODE_RANK")):
        raise LaunchError(
            f"NNODES={nodes} needs NODE_RANK=0 to {nodes - 1}, and RDZV=HOST:PORT of machine 0, the same on all"
        )
    if (node := whole_number("NODE_RANK", variables, 0)) >= nodes:
        raise LaunchError(f"NODE_RANK={node} is too large: NNODES={nodes} machines count from 0")
    address = host if node == 0 else _address_towards(host)  # the others may not know its name
    arguments += ["--rdzv_backend", "c10d", "--rdzv_endpoint", meeting, "--rdzv_id", "td4v", "--local_addr", address]
    return [*arguments, "--rdzv_conf", f"is_host={int(node == 0)}"]


def whole_number(name: str, variables: Mapping[str, str], least: int, default: int | None = None) -> int:
    """The value of a variable, or `default` if it is not set. Raises LaunchError."""
    text = variables.get(name) or ("" if default is None else str(default))
    if not text.isdecimal() or int(text) < least:
        raise LaunchError(f"{name} must be a whole number of at least {least}, not {text!r}")
    return int(text)


def _address_towards(host: str) -> str:
    """This machine's own address on the network that leads to `host`."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # with UDP this sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise LaunchError(f"RDZV: the machine {host} cannot be reached from here ({error.strerror})") from None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
