"""Files of weights from anywhere: their content without running code from them, and the named tensors in it.

Everything that is read as weights (`--weights`, `pretrain`, `network.weights`) is read here.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import logging
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from common.torchscript import TorchScriptError, is_torchscript, read_tensors

logger = logging.getLogger("td4v")

# Where files keep a model's weights, and their moving average.
_PLACES = ("model_state_dict", "state_dict", "model", "module", "model_state", "net", "network", "weights", "params")
_AVERAGED = ("ema_state_dict", "state_dict_ema", "model_ema", "model_state_dict_ema", "ema", "ema_model", "ema_model_state_dict")  # fmt: skip
# Modules that torch puts around others, wherever they are: torch.compile, FSDP, recomputation.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIXES = ("module.", "model.")  # of DistributedDataParallel, DeepSpeed and torch's averages; of Lightning
_DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip
# NumPy's numbers, which OpenMMLab's runners leave in their checkpoints (`meta`), by the names that files have for them.
_NUMBER = numpy.float64(0).__reduce__()[0]
_HARMLESS = [
    *((_NUMBER, f"numpy.{package}.multiarray.scalar") for package in ("core", "_core")), numpy.dtype, codecs.encode,
    *(type(numpy.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    argparse.Namespace,  # the options of DINO's, MAE's, DeiT's and timm's trainings
]  # fmt: skip
_REFUSED = r"[Uu]nsupported (global|GLOBAL|class)|add_safe_globals"  # the unpickler's words for what would run code
_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"}
# How files begin that are not what their name says.
_STRANGERS = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file: run git lfs pull in its repository"),
    (rb"\s*<(!doctype|html|\?xml|head|!--)", "is a web page, not the file: download it again"),
    (
        rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!",
        "is a compressed file: unpack it and name what is in it",
    ),
    (rb"\x89HDF", "is an HDF5 file, which is not PyTorch's"),
    (rb"GGUF", "is a GGUF file, which is not PyTorch's"),
)
_LIMIT = 16  # times the size of the file that its parts may have in memory; torch does not compress them
_ALWAYS_ALLOWED = 1 << 26  # bytes


class WeightsFileError(ValueError):
    """A file that cannot be used as weights; the message is one sentence that begins with the file."""


@dataclass(frozen=True)
class WeightsFile:
    """What a file holds.

    Attributes:
        path: the file.
        content: tensors and plain values; the named tensors of a safetensors file or of a TorchScript archive.
        metadata: the texts in a safetensors file.
        is_torchscript: whether it is a TorchScript archive.
    """

    path: Path
    content: dict[str, Any] = field(repr=False)
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    is_torchscript: bool = False


def read(path: str | Path) -> WeightsFile:
    """Read a file of weights onto the CPU: safetensors, PyTorch's formats or TorchScript, whatever its name is.

    The checksums of an archive are compared. No code from the file is run.

    Raises:
        WeightsFileError: it holds code, is damaged, or is something else.
        OSError: the system cannot read it.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise WeightsFileError(f"{path}: is empty: truncated or never written")
    for beginning, sentence in _STRANGERS:
        if re.match(beginning, head, re.IGNORECASE):
            raise WeightsFileError(f"{path}: {sentence}")
    if head[8:9] == b"{" and head[5:8] == bytes(3):  # the header, behind its length
        return _read_safetensors(path)
    data = path.read_bytes()
    if head.lstrip().startswith(b"{"):
        raise WeightsFileError(f"{path}: {_about_json(data)}")
    return _read_archive(path, data) if head.startswith(b"PK\x03\x04") else WeightsFile(path, _load(path, data))


def named_tensors(path: str | Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's weights in the content of a file, under the file's names, dense and of a plain dtype.

    They are the content itself or stand in one of _PLACES. Averaged weights (_AVERAGED) replace others of their names.

    Raises:
        WeightsFileError: there are none, or strange ones.
    """
    place, weights = ("the others", content) if _is_state_dict(content) else _find(content, _PLACES)
    average, averaged = _find(content, _AVERAGED)
    odd = [key for key in _AVERAGED if averaged is None and isinstance(content.get(key), dict) and content[key]]
    if odd:
        raise WeightsFileError(f"{path}: its averaged weights ({odd[0]}) are no named tensors")
    if weights is None and averaged is None:
        raise WeightsFileError(f"{path}: no model weights in this file, which holds {_held(content)}")
    if weights is not None and averaged is not None:
        weights, averaged = _beside_each_other(weights, averaged)
        if odd := [name for name in averaged if name not in weights]:
            raise WeightsFileError(f"{path}: its averaged weights ({average}) have {odd[0]}, which {place} has not")
        logger.info("%s: its averaged weights (%s) are used in place of %s", path, average, place)
    found = {**(weights or {}), **(averaged or {})}
    for name, value in found.items():
        if strange := _what_is_strange(value):
            raise WeightsFileError(f"{path}: its {name} is {strange}: save it as a dense tensor of a usual dtype")
    return {name: value.detach() for name, value in found.items()}


def _beside_each_other(
    weights: dict[str, Tensor], averaged: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's weights and their averages under the same names, where only wrappers make them differ."""
    averaged = {name: value for name, value in averaged.items() if name != "n_averaged"}  # torch's AveragedModel's
    if averaged.keys() <= weights.keys():
        return weights, averaged
    return without_wrappers(weights), without_wrappers(averaged)


def without_wrappers(values: Mapping[str, Tensor], prefixes: Iterable[str] = PREFIXES) -> dict[str, Tensor]:
    """The values without what wrappers around the model put into their names.

    Args:
        prefixes: are taken off, in any nesting, where every name has them.
    """
    renamed = {_WRAPPERS.sub("", name): value for name, value in values.items()}
    renamed = renamed if len(renamed) == len(values) else dict(values)
    while prefix := next(
        (each for each in prefixes if renamed and all(name.startswith(each) for name in renamed)), None
    ):
        renamed = {name.removeprefix(prefix): value for name, value in renamed.items()}
    return renamed


def unusable(values: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> str | None:
    """Why values cannot replace those that a model has under the same names and in the same shapes; None if they can.

    A dtype of another kind would be cut to it silently, and NaN would spread. Counters (of BatchNorm) may have any.
    """
    for name, own in model.items():
        if name not in values or (own.ndim == 0 and not own.is_floating_point()):
            continue
        value = values[name]
        if value.is_floating_point() != own.is_floating_point():
            return f"its {name} holds {_name(value.dtype)}, and the model's is {_name(own.dtype)}: save it as that"
        if value.is_floating_point() and not value.to(own.dtype).isfinite().all() and own.isfinite().all():
            return f"its {name} holds NaN or infinite values"
    return None


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            return WeightsFile(path, tensors, file.metadata() or {})
    except (SafetensorError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsFileError(f"{path}: truncated, or not a safetensors file ({reason})") from None


def _read_archive(path: Path, data: bytes) -> WeightsFile:
    """Read a zip archive, which torch writes, and compare its checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(part.file_size for part in archive.infolist())
            if size > max(_LIMIT * len(data), _ALWAYS_ALLOWED):
                raise WeightsFileError(
                    f"{path}: its parts are compressed and would become {size / 2**30:.1f} GiB, refused: "
                    "load it once where you trust it and save it again with torch.save"
                )
            damaged = archive.testzip()
            # If the bit that marks a folder is flipped, zipfile finds no fault, and torch reads uninitialised memory.
            damaged = damaged or next((part.filename for part in archive.infolist() if part.external_attr & 0x10), None)
            if damaged is None and is_torchscript(archive):
                return WeightsFile(path, read_tensors(archive), is_torchscript=True)
    except WeightsFileError:
        raise
    except TorchScriptError as error:
        raise WeightsFileError(f"{path}: {error}, refused: load it once where you trust it and save its weights alone") from None  # fmt: skip
    except Exception:  # zipfile answers a damaged archive with any kind of error
        raise WeightsFileError(f"{path}: truncated or damaged") from None
    if damaged is not None:
        raise WeightsFileError(f"{path}: damaged, its part {damaged} is not what was written")
    return WeightsFile(path, _load(path, data))


def _load(path: Path, data: bytes) -> dict[str, Any]:
    """What torch.save wrote, in any of its formats. Raises WeightsFileError."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler answers garbage with any kind of error
        raise WeightsFileError(f"{path}: {_why_unreadable(error, data)}") from None
    if not isinstance(content, dict):
        raise WeightsFileError(f"{path}: not a checkpoint but a {type(content).__name__}")
    return content


def _why_unreadable(error: Exception, data: bytes) -> str:
    """What a file is that torch does not read; its own words advise to run the code in it."""
    if isinstance(error, pickle.UnpicklingError) and (re.search(_REFUSED, str(error)) or _calls_something(data)):
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        advice = "load it once where you trust it and save its weights alone"
        if what.endswith("multiarray._reconstruct)"):
            advice = "save its NumPy arrays as tensors"
        return f"holds pickled code besides tensors and plain values{what}, refused: {advice}"
    if data[257:262] == b"ustar":
        return "is a tar archive: unpack it, or, if PyTorch wrote it, save it again with a PyTorch that reads it"
    if data.startswith(b"PK"):
        return "is a zip archive without PyTorch's weights, or damaged: unpack it, or get it again"
    return "truncated, damaged or not a file of weights"


def _calls_something(data: bytes) -> bool:
    """Whether a plain pickle calls something when it is read; nothing in it is run to find out."""
    with contextlib.suppress(Exception):
        return any(word.name in _CALLS for word, _, _ in list(pickletools.genops(data)))
    return False


def _about_json(data: bytes) -> str:
    with contextlib.suppress(Exception):
        names = sorted(set(json.loads(data)["weight_map"].values()))
        return (
            f"is the index of a model in {len(names)} files ({names[0]} ...), which must be one: save it again, with "
            "transformers by save_pretrained(..., max_shard_size='100GB')"
        )
    return "is a JSON file, not weights"


def _find(content: Mapping[str, Any], places: Iterable[str]) -> tuple[str | None, dict[str, Tensor] | None]:
    """The first of `places` that holds named tensors, itself or in one of _PLACES, and those."""
    for place in places:
        value = content.get(place)
        if _is_state_dict(value):
            return place, value
        if isinstance(value, dict) and (
            inner := next((key for key in _PLACES if _is_state_dict(value.get(key))), None)
        ):
            return f"{place}.{inner}", value[inner]
    return None, None


def _held(content: Mapping[str, Any]) -> str:
    """What is in a file without named tensors, or what stands among them and is none."""
    for place in (key for key in _PLACES if isinstance(content.get(key), dict)):
        values = content[place]
        if odd := [key for key, value in values.items() if not isinstance(value, Tensor)]:
            return f"{odd[0]}, which is no tensor but a {type(values[odd[0]]).__name__}, in {place}"
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in list(content.items())[:5]) or "nothing"


def _is_state_dict(values: Any) -> bool:
    return isinstance(values, dict) and bool(values) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
    )  # fmt: skip


def _what_is_strange(value: Tensor) -> str | None:
    """What keeps a tensor from being used as it is."""
    if value.is_meta:
        return "without values (on the meta device)"
    if value.is_quantized:
        return "quantized"
    if value.is_nested or type(value) not in (Tensor, nn.Parameter):
        return f"a {'nested tensor' if value.is_nested else type(value).__name__}"
    if value.layout != torch.strided:
        return f"sparse ({_name(value.layout)})"
    if value.dtype not in _DTYPES:
        return f"of {_name(value.dtype)}"
    size = value.numel() * value.itemsize
    if size > max(_LIMIT * value.untyped_storage().nbytes(), _ALWAYS_ALLOWED):
        return f"a few values repeated to {size / 2**30:.1f} GiB"
    return None


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
