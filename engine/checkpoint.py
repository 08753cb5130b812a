"""Checkpoint files: written all or nothing, checked when read, read without running code from them.

Lives here: one file at a time (save, load, the weights in it), and the row of files of a run: the newest one, those
before it, and which of them is whole. Does not live here: what a run consists of (state.py) and when it is saved
(loop.py).

A run folder holds last_model.pt and, as `keep` says, what was last_model.pt before as step_00000123.pt.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.distributed import EngineError

logger = logging.getLogger("td4v")

METADATA = "td4v"  # the key of what a safetensors file of ours tells besides its tensors
LAST, BEST, FAILED = "last_model.pt", "model_best.pt", "failed_model.pt"


class CheckpointError(EngineError):
    """A checkpoint that cannot be written, read, or used for what is asked; the message names the file."""


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` always holds a whole file: the old one until the new one is on the disk.

    Raises:
        CheckpointError: it cannot be written (no folder, no space, no permission).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")  # left behind by a kill, it is written over by the next
    try:
        try:
            with open(partial, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot write this checkpoint ({_first_line(error)})") from error


def save_last(folder: Path, content: dict[str, Any], keep: int, former: int | None) -> None:
    """Write last_model.pt; what it was before stays beside it as step_*.pt, so that `keep` files are there in all.

    Args:
        former: the step of the present last_model.pt, None where there is none or it is not whole.

    Raises CheckpointError as `save` does; whatever was there before then still is.
    """
    last = folder / LAST
    if keep > 1 and former is not None and last.exists():
        kept, second = folder / f"step_{former:08d}.pt", folder / ".second_name.pt"
        try:
            second.unlink(missing_ok=True)
            os.link(last, second)  # so last_model.pt is there at any moment
            os.replace(second, kept)
        except OSError:  # a file system where a file has one name
            save(kept, load(last))
        finally:
            second.unlink(missing_ok=True)
    save(last, content)
    for old in _formers(folder)[max(0, keep - 1) :]:
        old.unlink(missing_ok=True)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where it has none at all; what is passed over is said.

    Raises:
        CheckpointError: there are files, and none of them is whole.
    """
    found = [path for path in (folder / LAST, *_formers(folder)) if path.exists()]
    for path in found:
        try:
            load(path)
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        if path != found[0]:
            logger.warning("going back to %s, the newest whole checkpoint of this run", path)
        return path
    if found:
        raise CheckpointError(f"{folder}: none of its checkpoints is whole ({', '.join(path.name for path in found)})")
    return None


def _formers(folder: Path) -> list[Path]:
    """The former last_model.pt, newest first."""
    return sorted(folder.glob("step_????????.pt"), reverse=True)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours or of others (.pt, .pth, .safetensors) onto the CPU, refusing pickled code.

    The sums that torch keeps of every part of a file are compared, so a single flipped bit is found. A safetensors
    file that scripts.export wrote has the keys of a checkpoint; any other is a dict of its tensors.

    Raises:
        CheckpointError: missing, truncated, damaged, holding code, or no checkpoint at all.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (part := archive.testzip()) is not None:
                    raise CheckpointError(f"{path}: damaged, its part {part} is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
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


def _load_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    if METADATA not in metadata:
        return tensors
    return {**json.loads(metadata[METADATA]), "model_state_dict": tensors}


def save_safetensors(path: str | Path, content: dict[str, Any]) -> None:
    """Write `model_state_dict` as safetensors, and the rest, which must be plain values, as JSON into its metadata.

    Raises CheckpointError as `save` does.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    rest = {key: value for key, value in content.items() if key != "model_state_dict"}
    tensors = {name: value.contiguous() for name, value in content["model_state_dict"].items()}
    try:
        try:
            safetensors.torch.save_file(tensors, partial, metadata={METADATA: json.dumps(rest), "format": "pt"})
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot write this file ({_first_line(error)})") from error


def weights_of(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The model's state dict in a checkpoint of ours or another layout.

    Looks under `model_state_dict`, `state_dict` and `model`, else takes the dict itself; strips "module." where every
    name has it. Where a run of ours averaged its weights (`ema_state_dict`), these are the ones: they were validated.
    Raises CheckpointError, naming `path`, where that gives anything but named tensors.
    """
    found = next((checkpoint[key] for key in ("model_state_dict", "state_dict", "model") if key in checkpoint), None)
    weights = checkpoint if found is None else found
    if not isinstance(weights, dict) or not weights or not _is_state_dict(weights):
        keys = ", ".join(map(str, list(checkpoint)[:5]))
        raise CheckpointError(f"{path}: no model weights in this checkpoint, which holds {keys or 'nothing'}")
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return {**weights, **(checkpoint.get("ema_state_dict") or {})}


def lacks_backbone(checkpoint: dict[str, Any]) -> bool:
    """Whether the frozen weights were left out of a checkpoint, and only their origin and hash are in it."""
    return isinstance(checkpoint.get("backbone"), dict) and not checkpoint.get("full", False)


def _is_state_dict(weights: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items())


def _sync_folder(folder: Path) -> None:
    """Make a rename last, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
