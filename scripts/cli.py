"""What the command lines share: types and defaults of options, the device, and files written atomically."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_atomic

if TYPE_CHECKING:
    import torch


logger = logging.getLogger("td4v")

ROOT = Path(__file__).parents[1]


def run(work: Callable[[], int | None], out_of_memory: str = "out of memory", interrupted: str = "interrupted") -> int:
    """Run a command, and return its exit status: what `work` returns, or that of its error.

    Errors that a user can cause are logged as one sentence, others raised. SIGTERM and SIGUSR1 act as Ctrl-C.
    """
    from engine.errors import EngineError  # here, because it imports torch, and --help should be quick
    from engine.profiling import is_out_of_memory
    from engine.signals import ending_in_order

    try:
        with ending_in_order():
            return work() or 0
    except (EngineError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.error("%s", out_of_memory)
        return 1
    except KeyboardInterrupt:
        logger.error("%s", interrupted)
        return 130


def default_jobs() -> int:
    """Runs at a time, one process each."""
    return max(1, min(4, os.cpu_count() or 1))


def positive_int(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)


def find_device(name: str | None) -> torch.device:
    """The device of --device; by default a GPU if there is one. Raises ValueError for a GPU that is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
