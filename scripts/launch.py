"""torchrun for runs that are asked to stop: its arguments, its workers, but other manners at the end.

Lives here: what signals mean before there are workers, and nothing else; agent.py has the rest. launch.sh calls it.
"""

from __future__ import annotations

import os
import signal
import sys

STOP = {
    signal.SIGTERM: 75,
    signal.SIGUSR1: 75,
    signal.SIGHUP: 75,
    signal.SIGINT: 130,
}  # and what the launcher exits with


def main(arguments: list[str]) -> int:
    """Run the workers; the status to exit with, see agent.launch."""
    for number, status in STOP.items():  # importing torch takes seconds, and other machines may have to be waited for
        signal.signal(number, lambda *_, status=status: os._exit(status))
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"  # a machine that leaves would be a page of C++ addresses
    from scripts.agent import launch

    if level is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the workers' own affair
    return launch(arguments, STOP)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
