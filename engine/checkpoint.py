"""Checkpoint files: written all or nothing, read without running code from them, complete enough to go on exactly.

Lives here: the file and its content, which is plain values and tensors under these keys:
    epoch              epochs finished, so also the number of the next one
    step               optimizer steps so far
    best               best top-1 so far, in percent
    pending            the record of an epoch that was trained, but not evaluated yet, or None
    model_state_dict   names as in the model alone, without DistributedDataParallel's "module."
    optimizer_state_dict, scheduler, scaler
    rng                one entry a process: the states of Python's, NumPy's, torch's and the GPU's generators
    config             the resolved configuration
    meta               versions and git revision
Does not live here: when to save (loop.py), and what a frozen tower's weights look like elsewhere.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engine.distributed import EngineError, Process, gather, unwrap

logger = logging.getLogger("td4v")

_RESUMABLE = (
    "epoch",
    "step",
    "best",
    "pending",
    "model_state_dict",
    "optimizer_state_dict",
    "scheduler",
    "scaler",
    "rng",
)


class CheckpointError(EngineError):
    """A checkpoint that cannot be written, read, or used for what is asked; the message names the file."""


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` always holds a whole file: the old one until the new one is on the disk.

    Raises:
        CheckpointError: it cannot be written (no folder, no space, no permission).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot write this checkpoint ({_first_line(error)})") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours or of others (.pt, .pth, .safetensors) onto the CPU, refusing pickled code.

    Raises:
        CheckpointError: missing, truncated, holding code, or no checkpoint at all.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({_first_line(error)})") from None
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(f"{path}: holds pickled code besides tensors and plain values, refused") from None
        raise CheckpointError(f"{path}: not a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({_first_line(error)})") from None
    except Exception as error:  # the unpickler answers garbage with whatever it runs into
        what = f"cannot be read ({_first_line(error)})" if zipfile.is_zipfile(path) else "truncated or not a checkpoint"
        raise CheckpointError(f"{path}: {what}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint but a {type(content).__name__}")
    return content


def weights_of(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The model's state dict in a checkpoint of ours or another layout.

    Looks under `model_state_dict`, `state_dict` and `model`, else takes the dict itself; strips "module." where every
    name has it. Raises CheckpointError, naming `path`, where that gives anything but named tensors.
    """
    found = next((checkpoint[key] for key in ("model_state_dict", "state_dict", "model") if key in checkpoint), None)
    weights = checkpoint if found is None else found
    if not isinstance(weights, dict) or not weights or not _is_state_dict(weights):
        keys = ", ".join(map(str, list(checkpoint)[:5]))
        raise CheckpointError(f"{path}: no model weights in this checkpoint, which holds {keys or 'nothing'}")
    if all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): value for name, value in weights.items()}
    return dict(weights)


def _is_state_dict(weights: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items())


def put_weights(model: nn.Module, content: dict[str, Any], path: str | Path) -> None:
    """Give `model` all the weights of a loaded checkpoint; CheckpointError where names or shapes are others."""
    weights = weights_of(content, path)
    target = unwrap(model)
    own = target.state_dict()
    missing = [name for name in own if name not in weights]
    surplus = [name for name in weights if name not in own]
    unlike = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    faults = [f"{len(missing)} weights missing ({missing[0]}, ...)"] if missing else []
    faults += [f"{len(surplus)} unknown ({surplus[0]}, ...)"] if surplus else []
    faults += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}" for name in unlike[:1]
    ]
    if faults:
        raise CheckpointError(f"{path}: does not fit this model: {'; '.join(faults)}")
    target.load_state_dict(weights)


def is_resumable(content: dict[str, Any]) -> bool:
    """Whether a checkpoint holds a whole run, and not weights alone."""
    return all(key in content for key in _RESUMABLE)


def collect(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    process: Process,
    *,
    epoch: int,
    step: int,
    best: float,
    pending: dict[str, Any] | None,
    config: dict[str, Any],
    meta: dict[str, Any],
) -> dict[str, Any]:
    """The content of a checkpoint, by the keys above; every process must call it, for its generators."""
    return {
        "epoch": epoch,
        "step": step,
        "best": best,
        "pending": pending,
        "model_state_dict": unwrap(model).state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": gather(rng_state(process.device)),
        "config": config,
        "meta": meta,
    }


def restore(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    process: Process,
) -> dict[str, Any]:
    """Put model, optimizer, scheduler, scaler and this process's generators back as `collect` found them.

    Returns:
        The whole content, with epoch, step and best.

    Raises:
        CheckpointError: unreadable, weights only, of another model or optimizer, or of another number of processes.
    """
    content = load(path)
    lacking = [key for key in _RESUMABLE if key not in content]
    if lacking:
        raise CheckpointError(f"{path}: holds no run to resume, for it lacks {', '.join(lacking)}")
    if len(content["rng"]) != process.world_size:
        raise CheckpointError(
            f"{path}: was written by {len(content['rng'])} processes and cannot be resumed with {process.world_size}"
        )
    if bool(content["scaler"]) != scaler.is_enabled():
        raise CheckpointError(f"{path}: was written with another precision, and cannot be resumed with this one")
    put_weights(model, content, path)
    try:
        optimizer.load_state_dict(content["optimizer_state_dict"])
    except ValueError as error:
        raise CheckpointError(f"{path}: does not fit this optimizer ({_first_line(error)})") from None
    scheduler.load_state_dict(content["scheduler"])
    scaler.load_state_dict(content["scaler"])
    set_rng_state(content["rng"][process.rank], process.device)
    logger.info("resumed from %s after %d epochs, best top-1 %.2f", path, content["epoch"], content["best"])
    return content


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators of this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(numpy.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back as `rng_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
