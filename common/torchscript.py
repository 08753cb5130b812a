"""TorchScript archives, such as OpenAI's CLIPs, as named tensors; the code in them is not run.

`torch.jit.load` runs code of the archive while it reads (`__setstate__` of its classes), which may write files or never
end, and `torch.load(weights_only=True)` refuses such archives. But their values are an ordinary pickle with ordinary
storages. So this gives torch's restricted unpickler a copy of the archive without the code, in which the archive's
classes stand for objects that only keep what they are given.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from typing import Any

import torch
from torch import Tensor

_LISTS = [(list, f"torch.jit._pickle.build_{kind}list") for kind in ("int", "double", "bool", "tensor")]
_MOST_OBJECTS = 100_000  # objects may contain each other, and some so often that walking through them never ends


class TorchScriptError(ValueError):
    """An archive whose tensors have no names without its code; the message is the end of a sentence."""


class _Object:
    """An object of one of the archive's classes: its attributes by name, or whatever else its class would take."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether it is a TorchScript archive: those hold code and constants beside the tensors."""
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())


def read_tensors(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The parameters and buffers of the archive's module on the CPU, under the names of its state dict.

    Raises:
        TorchScriptError: objects of its classes are not saved by their attributes.
        Exception: whatever zipfile and torch raise for a damaged archive.
    """
    values = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
    folder = values.removesuffix("data.pkl")
    names = [
        arg.replace(" ", ".") for word, arg, _ in pickletools.genops(archive.read(values)) if word.name == "GLOBAL"
    ]
    objects = [(_Object, name) for name in set(names) if name.startswith("__torch__.")]
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as target:
        for part in archive.infolist():
            name = part.filename.removeprefix(folder)
            if name in ("data.pkl", "version", "byteorder") or name.startswith("data/"):
                target.writestr(f"archive/{name}", archive.read(part))
    copy.seek(0)
    with torch.serialization.safe_globals([*objects, *_LISTS]):
        return _named_tensors(torch.load(copy, map_location="cpu", weights_only=True))


def _named_tensors(root: Any) -> dict[str, Tensor]:
    """All tensors among the attributes of `root` and of the objects in it, by path."""
    found: dict[str, Tensor] = {}
    waiting, seen = [("", root)], 0
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Tensor):
            found[path[1:]] = value
        elif isinstance(value, _Object):
            seen += 1
            if not isinstance(value.state, dict) or seen > _MOST_OBJECTS:
                raise TorchScriptError("holds TorchScript objects that only its own code can read")
            waiting += [(f"{path}.{name}", inner) for name, inner in value.state.items()]
    return found
