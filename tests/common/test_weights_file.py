"""A file of weights gives named tensors, whatever is around them, or one sentence; none of its code runs."""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common import torchscript
from common.weights_file import WeightsFileError, named_tensors, read, unusable, without_wrappers

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return without_wrappers(named_tensors(path, read(path).content))


def prefixed(prefix: str, values: dict[str, torch.Tensor] = WEIGHTS) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in values.items()}


def refusal(path: Path) -> str:
    with pytest.raises(WeightsFileError) as caught:
        tensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and not re.search("weights_only|\\n|\\x1b", message)
    return message.removeprefix(f"{path}: ")


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes], **options: int) -> Path:
    """A copy of a zip archive, its parts changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name.replace(source.stem, target.stem, 1), change(name, old.read(name)))
    return target


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"module": WEIGHTS, "ds_version": "0.9"},
        {"state_dict": prefixed("module._orig_mod.")},
        {"state_dict": prefixed("model."), "pytorch-lightning_version": "2.1"},
        {"model": {"state_dict": prefixed("module.model._orig_mod.module.")}},
        {"model_ema": WEIGHTS},
        {"model": {"a._orig_mod.weight": WEIGHTS["a.weight"], "b": WEIGHTS["b"]}, "args": argparse.Namespace(lr=1)},
        {"arch": "vit", "model": "vit", "state_dict": {"a.weight": nn.Parameter(WEIGHTS["a.weight"]), "b": WEIGHTS["b"]}},
    ],
)  # fmt: skip
def test_wrappers_around_the_same_weights(tmp_path: Path, content: dict):
    torch.save(content, tmp_path / "w.pt")
    found = tensors(tmp_path / "w.pt")
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_averaged_weights_are_used_and_that_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str):
    averaged = {"n_averaged": torch.tensor(3)} | prefixed(prefix, {"b": torch.zeros(2)})
    torch.save({"model": WEIGHTS, "state_dict_ema": averaged}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, "td4v"):
        found = tensors(tmp_path / "w.pt")
    assert found["b"].sum() == 0 and torch.equal(found["a.weight"], WEIGHTS["a.weight"])
    assert "its averaged weights (state_dict_ema) are used in place of model" in caplog.text
    torch.save({"model": WEIGHTS, "model_ema": {"c": torch.zeros(2)}}, tmp_path / "w.pt")
    assert refusal(tmp_path / "w.pt") == "its averaged weights (model_ema) have c, which model has not"


def test_a_prefix_that_some_names_lack_is_part_of_the_names():
    assert without_wrappers({"module.a": WEIGHTS["b"], "head": WEIGHTS["b"]}).keys() == {"module.a", "head"}


def test_the_format_is_seen_in_the_file_not_in_its_name(tmp_path: Path):
    torch.save(WEIGHTS, tmp_path / "w.safetensors")
    save_file(WEIGHTS, tmp_path / "w.pt")
    torch.save(WEIGHTS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    rewrite(tmp_path / "w.safetensors", tmp_path / "small.pt", lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    for path in tmp_path.iterdir():
        assert torch.equal(tensors(path)["a.weight"], WEIGHTS["a.weight"])


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "is a Git LFS pointer, .* git lfs"),
        (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "is a web page"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(bytes(1000)), "truncated, damaged or not a file of weights"),
        (lambda path: path.write_bytes(gzip.compress(b"x")), "is a compressed file: unpack it"),
        (_tar, "is a tar archive"),
        (lambda path: path.write_text(json.dumps(INDEX)), "is the index of a model in 2 files .model-00001"),
        (lambda path: path.write_text('{"a":' * 99999), "is a JSON file"),
        (lambda path: path.write_bytes((1 << 39).to_bytes(8, "little") + b"{}"), "truncated, or not a safetensors file"),
        (lambda path: path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f."), "truncated, damaged"),  # a memo of 2^31 places
        (lambda path: path.write_bytes(b"\x80\x02" + b"]" * 99999 + b"a" * 99998 + b"."), "truncated, damaged"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("model.pt", "x"), "is a zip archive without PyTorch's weights"),
        (lambda path: torch.save({"model": {}, "args": argparse.Namespace(a=1)}, path), r"no model .* args \(Namespace\)"),
        (lambda path: torch.save({"model": {"a": torch.ones(1), "lr": 0.1}}, path), "no model weights .* lr, which is no "),
        (lambda path: torch.save({"optimizer_state_dict": {"state": {}}}, path), "no model weights .* optimizer_state_dict"),
        (lambda path: torch.save({"a": torch.ones(1), "f": read}, path), "holds pickled code .*weights_file.read.*, refused"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, write: Callable, message: str):
    write(tmp_path / "w.pt")
    assert re.match(message, refusal(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2).to_sparse(), "its b is sparse"),
        (torch.ones(2, dtype=torch.complex64), "its b is of complex64"),
        (torch.ones(2, device="meta"), "its b is without values"),
        (torch.ones(2).to(torch.float8_e4m3fn), "its b is of float8_e4m3fn"),
        (torch.ones(1).expand(10**6, 10**6), "its b is a few values repeated to 3725.3 GiB"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "its b is a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_strange_tensors_are_refused_by_name(tmp_path: Path, value: torch.Tensor, message: str):
    torch.save({"state_dict": WEIGHTS | {"b": value}}, tmp_path / "w.pt")
    assert refusal(tmp_path / "w.pt").startswith(message)


def test_parts_that_become_huge_are_refused_before_they_are_unpacked(tmp_path: Path):
    torch.save({"a": torch.zeros(20_000_000)}, tmp_path / "w.pt")
    bomb = rewrite(tmp_path / "w.pt", tmp_path / "bomb.pt", lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    assert refusal(bomb).startswith("its parts are compressed and would become 0.1 GiB, refused")


@pytest.mark.parametrize("own", ["floats", "integers"])
def test_a_dtype_of_another_kind_is_unusable(own: str):
    floats, integers = {"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.int32)}
    model, other = (floats, integers) if own == "floats" else (integers, floats)
    assert "its a holds" in unusable(other, model)
    assert unusable(model, model) is None and unusable({"a": torch.ones(2).double()}, floats) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_not_finite_are_unusable(value: float):
    values = {"a": torch.tensor([1.0, value], dtype=torch.float64)}
    assert unusable(values, {"a": torch.ones(2)}) == "its a holds NaN or infinite values"
    assert unusable({"mask": torch.tensor([0, -torch.inf])}, {"mask": torch.tensor([0, -torch.inf])}) is None
    assert unusable({"count": torch.tensor(3.0)}, {"count": torch.tensor(0)}) is None  # of BatchNorm, exported in half


# TorchScript archives.


class Stateful(nn.Module):
    """Its archive restores it by code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.w = state[0]
        self.training = state[1]


@pytest.mark.filterwarnings("ignore")
def test_code_of_an_archive_does_not_run(tmp_path: Path):
    trace = tmp_path / "trace"
    torch.jit.script(Stateful()).save(tmp_path / "a.pt")
    line = b"    self.training = (s)[1]\n".replace(b"(s)", b"(state)")

    def poison(name: str, data: bytes) -> bytes:
        return data.replace(line, line + f'    torch.save((state)[0], "{trace}")\n'.encode())

    evil = rewrite(tmp_path / "a.pt", tmp_path / "b.pt", lambda name, data: poison(name, data))
    assert refusal(evil).startswith("holds TorchScript objects that only its own code can read, refused")
    assert not trace.exists()
    torch.jit.load(evil)
    assert trace.exists(), "the archive of this test is harmless"


@pytest.mark.filterwarnings("ignore")
def test_storages_of_an_archive_are_not_read_beyond_their_end(tmp_path: Path):
    model = nn.Linear(7, 3, bias=False)
    torch.jit.trace(model, torch.zeros(1, 7)).save(tmp_path / "a.pt")
    assert torch.equal(tensors(tmp_path / "a.pt")["weight"], model.weight)

    def enlarge(name: str, data: bytes) -> bytes:
        return data.replace(b"K\x15", b"K\x7f") if name.endswith("data.pkl") else data

    def as_big_endian(name: str, data: bytes) -> bytes:
        return b"big" if name.endswith("byteorder") else data

    assert refusal(rewrite(tmp_path / "a.pt", tmp_path / "b.pt", enlarge)) == "truncated or damaged"
    turned = tensors(rewrite(tmp_path / "a.pt", tmp_path / "c.pt", as_big_endian))["weight"]
    assert torch.equal(torch.from_numpy(turned.numpy().byteswap()), model.weight)


def test_objects_that_contain_themselves_end():
    one = torchscript._Object()
    one.__setstate__({"a": one})
    with pytest.raises(torchscript.TorchScriptError):
        torchscript._named_tensors(one)
