"""Checkpoint files: written all or nothing, checked when read, read without running code from them.

Lives here: one file at a time (save, load, the weights in it), and the row of files of a run: the newest one, those
before it, and which of them is whole. Does not live here: what a run consists of (state.py) and when it is saved
(loop.py).

A run folder holds last_model.pt and, as `keep` says, what was last_model.pt before as step_00000123.pt.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import os
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from common.files import write_atomic
from engine.errors import EngineError

logger = logging.getLogger("td4v")

METADATA, SUMS = "td4v", "td4v_crc32"  # keys of what a safetensors file of ours tells besides its tensors
_REFUSED = r"[Uu]nsupported (global|GLOBAL|class)|add_safe_globals"  # the unpickler's words for what would run code
_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"}
# NumPy's numbers, which OpenMMLab's runners leave in their checkpoints (`meta`), by the names that files have for them.
_NUMBER = numpy.float64(0).__reduce__()[0]
_NUMBERS = [
    *((_NUMBER, f"numpy.{room}.multiarray.scalar") for room in ("core", "_core")), numpy.dtype, codecs.encode,
    *(type(numpy.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
]  # fmt: skip
LAST, BEST, FAILED = "last_model.pt", "model_best.pt", "failed_model.pt"


class CheckpointError(EngineError):
    """A checkpoint that cannot be written, read, or used for what is asked; the message names the file."""


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` always holds a whole file: the old one until the new one is on the disk.

    Raises:
        CheckpointError: it cannot be written (no folder, no space, no permission).
    """
    _write(Path(path), lambda file: torch.save(content, file))


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    try:
        write_atomic(path, fill)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot write this checkpoint ({_first_line(_of_system(error))})") from error


def save_last(folder: Path, content: dict[str, Any], keep: int, former: int | None) -> None:
    """Write last_model.pt; what it was before stays beside it as step_*.pt, so that `keep` files are there in all.

    Args:
        former: the step of the present last_model.pt, None where there is none or it is not whole.

    Raises CheckpointError as `save` does; whatever was there before then still is.
    """
    last, kept = folder / LAST, None
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
    formers = _formers(folder)
    # Damaged ones that were gone back from are of a step that is yet to come.
    undone = [path for path in formers if path.stem >= f"step_{content['step']:08d}" and path != kept]
    for old in [*undone, *[path for path in formers if path not in undone][max(0, keep - 1) :]]:
        old.unlink(missing_ok=True)


def newest(folder: Path, is_run: Callable[[dict[str, Any]], bool] = bool) -> Path | None:
    """The newest whole checkpoint of a run, None where it has none at all; what is passed over is said.

    Args:
        is_run: whether the content of one that can be read is a run to go on with.

    Raises:
        CheckpointError: there are files, and none of them is whole.
    """
    found = [path for path in (folder / LAST, *_formers(folder)) if path.exists()]
    for path in found:
        try:
            if not is_run(load(path)):
                raise CheckpointError(f"{path}: holds weights but no run to go on with")
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

    The sums that are kept of every part of a file, torch's or ours, are compared, so a single flipped bit is found. A
    safetensors file that scripts.export wrote has the keys of a checkpoint; any other is a dict of its tensors.

    Raises:
        CheckpointError: missing, truncated, damaged, holding code, or no checkpoint at all.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        _check_zip(path)
        with torch.serialization.safe_globals(_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({_first_line(error)})") from None
    except Exception as error:  # the unpickler answers garbage with whatever it runs into
        if isinstance(error, pickle.UnpicklingError) and (re.search(_REFUSED, str(error)) or _is_code(path)):
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f" ({found[1]})" if found else ""
            advice = "; save its NumPy arrays as tensors" if what.endswith("multiarray._reconstruct)") else ""
            raise CheckpointError(
                f"{path}: holds pickled code besides tensors and plain values{what}, refused{advice}"
            ) from None
        raise CheckpointError(f"{path}: truncated, damaged or not a checkpoint") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint but a {type(content).__name__}")
    return content


def _check_zip(path: Path) -> None:
    """Compare the sums of a zip archive, which torch writes; its older format has none and passes."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
            # A part whose bit for a folder is flipped is whole to zipfile, and to torch it is whatever memory held.
            part = part or next((info.filename for info in archive.infolist() if info.external_attr & 0x10), None)
            program = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # what zipfile answers to a damaged archive has no end
        raise CheckpointError(f"{path}: truncated or damaged") from None
    if part is not None:
        raise CheckpointError(f"{path}: damaged, its part {part} is not what was written")
    if program:
        raise CheckpointError(f"{path}: a TorchScript program, refused: a checkpoint holds tensors and plain values")


def _is_code(path: Path) -> bool:
    """Whether a file is a plain pickle that calls something when it is read; nothing in it is run to find out."""
    with open(path, "rb") as file, contextlib.suppress(Exception):
        return any(word.name in _CALLS for word, _, _ in list(pickletools.genops(file)))
    return False


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({_first_line(error)})") from None
    if not {METADATA, SUMS} & metadata.keys():
        return tensors  # of others
    sums = _sums(tensors, metadata.get(METADATA, ""))
    written = json.loads(metadata.get(SUMS, "{}"))
    if unlike := [name for name in sorted(sums.keys() | written.keys()) if sums.get(name) != written.get(name)]:
        raise CheckpointError(f"{path}: damaged, its part {unlike[0]} is not what was written")
    return {**json.loads(metadata[METADATA]), "model_state_dict": tensors}


def save_safetensors(path: str | Path, content: dict[str, Any]) -> None:
    """Write `model_state_dict` as safetensors, and the rest, which must be plain values, as JSON into its metadata.

    The format knows neither sums nor tensors that share memory: sums go into the metadata, and each name gets a copy.
    Raises CheckpointError as `save` does.
    """
    try:
        rest = json.dumps({key: value for key, value in content.items() if key != "model_state_dict"})
    except TypeError as error:
        raise CheckpointError(f"{path}: holds more than weights and plain values ({error})") from None
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in content["model_state_dict"].items()
    }
    metadata = {METADATA: rest, SUMS: json.dumps(_sums(tensors, rest)), "format": "pt"}
    _write(Path(path), lambda file: file.write(safetensors.torch.save(tensors, metadata)))


def _sums(tensors: dict[str, Tensor], rest: str) -> dict[str, int]:
    """CRC-32 of each tensor's type, shape and bytes, and of `rest` under METADATA."""
    sums = {METADATA: zlib.crc32(rest.encode())}
    for name, value in tensors.items():
        kind = zlib.crc32(f"{value.dtype} {tuple(value.shape)}".encode())
        sums[name] = zlib.crc32(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), kind)
    return sums


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
    averaged = checkpoint.get("ema_state_dict") or {}
    if not isinstance(averaged, dict) or not _is_state_dict(averaged):
        raise CheckpointError(f"{path}: its averaged weights are no named tensors")
    return {**weights, **averaged}


def lacks_backbone(checkpoint: dict[str, Any]) -> bool:
    """Whether the frozen weights were left out of a checkpoint, and only their origin and hash are in it."""
    backbone = checkpoint.get("backbone")
    named = isinstance(backbone, dict) and {"name", "weights", "sha256"} <= backbone.keys()
    return named and not checkpoint.get("full", False)


def _is_state_dict(weights: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items())


def _of_system(error: BaseException) -> BaseException:
    """The system's error where torch's writer, ending, covered it with one of its own."""
    return error if isinstance(error, OSError) or error.__context__ is None else _of_system(error.__context__)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
