"""What the command lines share: types and defaults of options, the device, and files written atomically."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_atomic

if TYPE_CHECKING:
    import torch


ROOT = Path(__file__).parents[1]


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
    import torch  # here, so that --help is quick

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
