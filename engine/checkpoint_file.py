"""Checkpoint files: written all or nothing, checked when read, read without running code from them.

A run folder holds last_model.pt, model_best.pt and, as `keep` says, previous versions of last_model.pt as
step_00000123.pt.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from common import weights_file
from common.files import write_atomic
from common.weights_file import WeightsFile, WeightsFileError
from engine.errors import EngineError

logger = logging.getLogger("td4v")

LAST, BEST, FAILED = "last_model.pt", "model_best.pt", "failed_model.pt"
# What a checkpoint of a run holds besides ema_state_dict and backbone, which may be None.
RUN_KEYS: dict[str, type] = {
    "epoch": int,  # finished epochs
    "step_in_epoch": int,  # optimizer steps in the unfinished epoch
    "step": int,  # optimizer steps in all
    "best": object,  # best top-1 in percent, -1 before the first validation
    "evaluations_since_best": int,
    "unevaluated_epoch": object,  # the row of an epoch that was trained but not evaluated yet, or None
    "history": list,  # one row an epoch
    "loss_monitor": dict,  # skipped steps, loss spikes and the usual loss
    "model_state_dict": dict,  # trainable parameters and all buffers, with `full` the frozen parameters too
    "optimizer_state_dict": dict,
    "scheduler": dict,
    "scaler": dict,
    "rng": list,  # one entry a process: the states of its random generators
    "meters": list,  # one entry a process: its sums over the epoch
    "config": dict,  # as resolved
    "meta": dict,  # versions, git revision, data lists
}
_METADATA, _CHECKSUMS = "td4v", "td4v_crc32"  # keys of the metadata in a safetensors file that save_safetensors wrote


class CheckpointError(EngineError):
    """A checkpoint that cannot be written, read, or used as requested; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: a run's, weights alone, or a file in the authors' layout."""

    path: Path
    content: dict[str, Any] = field(repr=False)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, without "module." if every name has it.

        common.weights_file says where it stands. Averaged weights (`ema_state_dict` of a run) replace the others: they
        are the ones that were validated.

        Raises:
            CheckpointError: there are no named tensors, or strange ones.
        """
        try:
            weights = weights_file.named_tensors(self.path, self.content)
        except WeightsFileError as error:
            raise CheckpointError(str(error)) from None
        return weights_file.without_wrappers(weights, prefixes=("module.",))

    @property
    def has_backbone(self) -> bool:
        """Whether the frozen weights are in the file, and not only their identity."""
        return self.backbone is None or bool(self.content.get("full", False))

    @property
    def backbone(self) -> dict[str, str] | None:
        """Name, source and sha256 of the frozen weights that it was trained on; None if it does not say."""
        backbone = self.content.get("backbone")
        complete = isinstance(backbone, dict) and {"name", "weights", "sha256"} <= backbone.keys()
        return backbone if complete else None

    @property
    def missing_backbone(self) -> dict[str, str] | None:
        """The identity of the frozen weights that a model must have already; None if the file brings them."""
        return None if self.has_backbone else self.backbone

    @property
    def is_run(self) -> bool:
        """Whether it holds a run that can be resumed."""
        return not self.missing_run_keys

    @property
    def missing_run_keys(self) -> list[str]:
        """What it would need to be resumed."""
        content = self.content
        return [key for key, kind in RUN_KEYS.items() if key not in content or not isinstance(content[key], kind)]

    @property
    def config(self) -> dict[str, Any] | None:
        """The configuration that it was trained with, if it holds one."""
        config = self.content.get("config")
        return config if isinstance(config, dict) else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes that it was trained with, if it holds them."""
        meta = self.content.get("meta")
        names = meta.get("class_names") if isinstance(meta, dict) else None
        valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return tuple(names) if valid else None

    @property
    def lists(self) -> dict[str, Any]:
        """What is recorded of the data lists that it was trained with (run_info.describe_list); {} if nothing is."""
        meta = self.content.get("meta")
        lists = meta.get("lists") if isinstance(meta, dict) else None
        return lists if isinstance(lists, dict) else {}

    @property
    def epoch(self) -> int | None:
        """How many epochs it was trained, if it says so."""
        epoch = self.content.get("epoch")
        return epoch if isinstance(epoch, int) else None


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ours or of others (.pt, .pth, .safetensors) onto the CPU; pickled code is refused.

    The file is read once. Checksums of all its parts are compared, so a single flipped bit is found. A safetensors
    file of scripts.export has the keys of a checkpoint; any other is a dict of its tensors.

    Raises:
        CheckpointError: missing, truncated, damaged, holding code, or no checkpoint at all.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a checkpoint in it, such as {path / LAST}")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint{_instead_of(path)}")
    try:
        file = weights_file.read(path)
    except WeightsFileError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({_first_line(error)})") from None
    if file.is_torchscript:
        raise CheckpointError(f"{path}: a TorchScript program, refused: a checkpoint holds tensors and plain values")
    return Checkpoint(path, _with_metadata(file) if {_METADATA, _CHECKSUMS} & file.metadata.keys() else file.content)


def _instead_of(path: Path) -> str:
    """What to name instead of a run's best model, which there is none of before the first validation."""
    last = path.with_name(LAST)
    return f"; {last} is there: name it instead" if path.name == BEST and last.is_file() else ""


def load_weights_file(path: str | Path) -> Checkpoint:
    """As `load`; a run folder stands for its best model."""
    return load(Path(path, BEST) if Path(path).is_dir() else path)


def newest(folder: Path, must_be_run: bool = False) -> Checkpoint | None:
    """The newest valid checkpoint of a run folder, None if it has none at all; each one passed over is logged.

    Args:
        must_be_run: pass over weights that cannot be resumed.

    Raises:
        CheckpointError: there are files, and none of them is valid.
    """
    paths = of_run(folder)
    for path in paths:
        if not os.access(path, os.R_OK):  # it may well be valid, and going back would replace it
            raise CheckpointError(f"{path}: may not be read by this user")
        try:
            checkpoint = load(path)
            if must_be_run and not checkpoint.is_run:
                missing = ", ".join(checkpoint.missing_run_keys)
                raise CheckpointError(f"{path}: holds weights but no run to resume: {missing} missing")
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        if path.name != LAST:
            if not (folder / LAST).exists():
                logger.warning("%s: is missing", folder / LAST)
            logger.warning("going back to %s, the newest valid checkpoint of this run", path)
        return checkpoint
    if paths:
        raise CheckpointError(f"{folder}: none of its checkpoints is valid ({', '.join(path.name for path in paths)})")
    return None


def newest_values(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder whose plain values (config, meta, history, ...) are valid, else None.

    Its tensors are not read, which takes milliseconds whatever the size; only what is in them may be damaged.
    """
    for path in of_run(folder):
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("/data.pkl"):
                        archive.read(name)  # compares its checksum
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception:  # zipfile and the unpickler answer damage with any kind of error
            continue
        if isinstance(content, dict):
            return Checkpoint(path, content)
    return None


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content`. `path` always holds a complete file: the old one until the new one is on the disk.

    Raises:
        CheckpointError: it cannot be written (no folder, no space, no permission).
    """
    _write(Path(path), lambda file: torch.save(content, file))


def save_last(folder: Path, content: dict[str, Any], keep: int, previous_step: int | None) -> None:
    """Write last_model.pt. Its previous version stays as step_*.pt, so that there are `keep` files in all.

    Args:
        previous_step: the step of the present last_model.pt; None if there is none or it is not valid.

    Raises:
        CheckpointError: as `save`; whatever was there before then still is.
    """
    last, kept = folder / LAST, None
    if keep > 1 and previous_step is not None and last.exists():
        kept, link = folder / f"step_{previous_step:08d}.pt", folder / ".second_name.pt"
        try:
            link.unlink(missing_ok=True)
            os.link(last, link)  # a second name for the file, so that last_model.pt exists at any moment
            os.replace(link, kept)
        except OSError:  # a file system without hard links
            _write(kept, lambda file: _copy(last, file))
        finally:
            link.unlink(missing_ok=True)
    save(last, content)
    previous = _previous(folder)
    # Files of later steps are damaged ones, which the run went back from.
    later = [path for path in previous if path.stem >= f"step_{content['step']:08d}" and path != kept]
    for old in [*later, *[path for path in previous if path not in later][max(0, keep - 1) :]]:
        old.unlink(missing_ok=True)


def save_safetensors(path: str | Path, content: dict[str, Any]) -> None:
    """Write `model_state_dict` as safetensors, and the rest, which must be plain values, as JSON into its metadata.

    The format has neither checksums nor tensors that share memory: checksums go into the metadata, and each name gets
    a copy.

    Raises:
        CheckpointError: as `save`, or there is more than weights and plain values.
    """
    try:
        rest = json.dumps({key: value for key, value in content.items() if key != "model_state_dict"})
    except TypeError as error:
        raise CheckpointError(f"{path}: holds more than weights and plain values ({error})") from None
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in content["model_state_dict"].items()
    }
    metadata = {_METADATA: rest, _CHECKSUMS: json.dumps(_checksums(tensors, rest)), "format": "pt"}
    _write(Path(path), lambda file: file.write(safetensors.torch.save(tensors, metadata)))


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    try:
        write_atomic(path, fill)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot write this checkpoint ({_first_line(_system_error(error))})") from error


def _copy(source: Path, target: BinaryIO) -> None:
    with open(source, "rb") as file:
        shutil.copyfileobj(file, target)


def of_run(folder: Path) -> list[Path]:
    """last_model.pt and its previous versions, newest first."""
    return [path for path in (folder / LAST, *_previous(folder)) if path.exists()]


def _previous(folder: Path) -> list[Path]:
    """The previous versions of last_model.pt, newest first."""
    return sorted(folder.glob("step_????????.pt"), reverse=True)


def _with_metadata(file: WeightsFile) -> dict[str, Any]:
    """The content of a file of save_safetensors, whose checksums are compared."""
    tensors, rest = file.content, file.metadata.get(_METADATA, "")
    try:
        content, written = json.loads(rest), json.loads(file.metadata.get(_CHECKSUMS, "{}"))
    except ValueError:
        raise CheckpointError(f"{file.path}: damaged, its metadata is not what was written") from None
    found = _checksums(tensors, rest)
    if unlike := [name for name in sorted(found.keys() | written.keys()) if found.get(name) != written.get(name)]:
        raise CheckpointError(f"{file.path}: damaged, its part {unlike[0]} is not what was written")
    return {**content, "model_state_dict": tensors}


def _checksums(tensors: dict[str, Tensor], rest: str) -> dict[str, int]:
    """CRC-32 of each tensor's type, shape and bytes, and of `rest` under _METADATA."""
    found = {_METADATA: zlib.crc32(rest.encode())}
    for name, value in tensors.items():
        kind = zlib.crc32(f"{value.dtype} {tuple(value.shape)}".encode())
        found[name] = zlib.crc32(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), kind)
    return found


def _system_error(error: BaseException) -> BaseException:
    """The system's error if torch's writer, ending, covered it with one of its own."""
    return error if isinstance(error, OSError) or error.__context__ is None else _system_error(error.__context__)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
