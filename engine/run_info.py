"""Where the numbers of a run come from, for run.json, checkpoints and results: code, versions, machine, data lists.

Nothing here needs git, a GPU or requirements.txt: what cannot be known is None, "unknown" or "absent".
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from engine.errors import EngineError

SOURCE_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")  # recorded as "absent" if not installed
_GIB = 2**30


class DataChangedError(EngineError):
    """A data list that differs from the one that a run began with."""


def run_info(lists: Mapping[str, str | Path | None] = {}, seed: int | None = None) -> dict[str, Any]:
    """What is known of a run at its start.

    Args:
        lists: name and path of each data list, for example {"train_list": "lists/train.txt"}.

    Returns:
        Plain values: git {revision, dirty}, versions {package: version}, gpu (name of the one in use), hardware (see
        `hardware`), host, platform, command, world_size, seed, lists {name: {path, sha256, rows} or None} and started
        (ISO 8601, seconds).
    """
    return {
        "git": source_revision(),
        "versions": versions(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "hardware": hardware(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": [sys.executable, *sys.argv],
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "seed": seed,
        "lists": {name: describe_list(path) for name, path in lists.items()},
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def source_revision(root: Path = SOURCE_ROOT) -> dict[str, Any]:
    """`revision` and `dirty` (uncommitted or untracked files) of the git tree at `root`; "unknown" and None without."""
    unknown: dict[str, Any] = {"revision": "unknown", "dirty": None}
    try:
        top, revision, status = (
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout
            for command in (("rev-parse", "--show-toplevel"), ("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return unknown
    if Path(top.strip()).resolve() != root.resolve():  # sources inside another repository
        return unknown
    return {"revision": revision.strip(), "dirty": bool(status.strip())}


def versions(requirements: Path = SOURCE_ROOT / "requirements.txt") -> dict[str, str]:
    """Versions of Python, of what every run needs, and of what else of `requirements` is installed."""
    found = {"python": platform.python_version(), **dict.fromkeys(_PACKAGES, "absent")}
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    names = [name.group() for line in lines if (name := re.match(r"[A-Za-z0-9][\w.-]*", line))]
    for name in (*_PACKAGES, *names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """cpu (model), cores (usable by this process), memory_gib, gpus [{name, memory_gib}], cuda, cudnn, nccl."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(number) for number in range(count)]
    distributed = torch.distributed
    nccl = torch.cuda.nccl.version() if distributed.is_available() and distributed.is_nccl_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": _memory_gib(),
        "gpus": [{"name": device.name, "memory_gib": round(device.total_memory / _GIB, 1)} for device in devices],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl)) if nccl else None,
    }


def _cpu_model() -> str | None:
    """The processor's name from Linux, else from `platform`."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1).strip() if model else platform.processor() or platform.machine() or None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1)
    except (AttributeError, ValueError, OSError):  # not every system counts its pages
        return None


def describe_list(path: str | Path | None) -> dict[str, Any] | None:
    """{path, sha256, rows} of a data list, without blank rows; None if it cannot be read."""
    if path is None:
        return None
    digest, rows = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            for line in file:
                digest.update(line)
                rows += bool(line.strip())
    except OSError:  # the loader, which needs the list, says what is wrong with it
        return None
    return {"path": str(path), "sha256": digest.hexdigest(), "rows": rows}


def check_same_lists(previous: Mapping[str, Any], now: Mapping[str, Any], path: str | Path) -> None:
    """Refuse to resume a run whose data lists have changed. A list may move, or be missing in one of the two records.

    Args:
        previous, now: `run_info` from when the run began, and from now.
        path: the run, for the message.

    Raises:
        DataChangedError: the content of a list differs.
    """
    for name, before in (previous.get("lists") or {}).items():
        after = (now.get("lists") or {}).get(name)
        if before and after and before["sha256"] != after["sha256"]:
            raise DataChangedError(
                f"{path}: began with another {name} ({before['path']}, {before['rows']} rows, sha256 "
                f"{before['sha256'][:12]}) than {after['path']} is now ({after['rows']} rows, sha256 "
                f"{after['sha256'][:12]}); restore that list or start a new run"
            )
