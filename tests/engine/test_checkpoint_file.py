"""Checkpoint files: complete or absent, harmless to read, checked to the bit, and older ones to fall back on."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import resource
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch

from engine import checkpoint_file
from engine.checkpoint_file import Checkpoint, CheckpointError

WRITERS = [("a.pt", checkpoint_file.save), ("a.safetensors", checkpoint_file.save_safetensors)]
both_formats = pytest.mark.parametrize(("name", "write"), WRITERS)


def content(step: int = 4) -> dict:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "body.weight": torch.randn(30, 5, generator=generator),
        "head": torch.randn(7, generator=generator).half(),
        "norm.seen": torch.tensor(step),
        "empty": torch.zeros(0, 3),
    }
    return {"step": step, "best": 12.5, "config": {"solver": {"lr": 0.1}}, "notes": ["a", None], "model_state_dict": weights}  # fmt: skip


def same(one: dict, other: dict) -> bool:
    weights, others = one["model_state_dict"], other["model_state_dict"]
    rest = [{key: value for key, value in each.items() if key != "model_state_dict"} for each in (one, other)]
    equal = all(
        torch.equal(value, others[name]) and value.dtype == others[name].dtype for name, value in weights.items()
    )
    return rest[0] == rest[1] and weights.keys() == others.keys() and equal


@both_formats
def test_everything_comes_back_and_others_may_read_it(tmp_path: Path, name: str, write: Callable):
    write(tmp_path / name, content())
    assert same(checkpoint_file.load(tmp_path / name).content, content())
    assert os.listdir(tmp_path) == [name] and stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@both_formats
def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path: Path, name: str, write: Callable):
    base = torch.arange(12.0).view(3, 4)
    weights = {"tied": base, "too": base, "part": base[1:], "turned": base.T, "grad": torch.nn.Parameter(base)}
    write(tmp_path / name, {"model_state_dict": weights})
    found = checkpoint_file.load(tmp_path / name).content["model_state_dict"]
    assert found.keys() == weights.keys() and all(torch.equal(found[key], value) for key, value in weights.items())


# Writing: all or nothing.


class Power(BaseException):
    """The moment at which the power goes off: nothing catches it."""


@contextmanager
def _fails(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        yield


@both_formats
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), Power()])
def test_a_save_that_is_interrupted_keeps_the_previous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable, step: str, error: BaseException
):
    write(tmp_path / name, content(1))
    with (
        _fails(monkeypatch, step, error),
        pytest.raises(CheckpointError if isinstance(error, OSError) else Power) as caught,
    ):
        write(tmp_path / name, content(2))
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"{tmp_path / name}: cannot write") and "Input/output" in str(caught.value)
    assert os.listdir(tmp_path) == [name] and same(checkpoint_file.load(tmp_path / name).content, content(1))


@both_formats
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_keeps_the_previous(tmp_path: Path, name: str, write: Callable, size: int):
    write(tmp_path / name, content(1))
    os.symlink("/dev/full", tmp_path / f".{name}.partial")  # every byte written there gets ENOSPC
    with pytest.raises(CheckpointError, match=rf"{name}: cannot write .*No space left on device"):
        write(tmp_path / name, {"model_state_dict": {"a": torch.ones(size)}})
    assert os.listdir(tmp_path) == [name] and same(checkpoint_file.load(tmp_path / name).content, content(1))


@both_formats
def test_a_quota_that_is_reached_in_the_middle_keeps_the_previous(tmp_path: Path, name: str, write: Callable):
    write(tmp_path / name, content(1))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=f"{name}: cannot write"):
            write(tmp_path / name, {"model_state_dict": {"a": torch.ones(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == [name] and same(checkpoint_file.load(tmp_path / name).content, content(1))


@both_formats
def test_what_a_kill_left_is_written_over(tmp_path: Path, name: str, write: Callable):
    (tmp_path / f".{name}.partial").write_bytes(b"x" * 10**6)
    write(tmp_path / name, content())
    assert os.listdir(tmp_path) == [name] and same(checkpoint_file.load(tmp_path / name).content, content())


def test_what_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere/x.pt: cannot write"):
        checkpoint_file.save(tmp_path / "nowhere" / "x.pt", {})
    with pytest.raises(CheckpointError, match=r"x.safetensors: holds more than weights and plain values"):
        checkpoint_file.save_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1), "model_state_dict": {}})
    assert not os.listdir(tmp_path)


# Reading: what was written, or a sentence.


@both_formats
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str, write: Callable):
    path = tmp_path / name
    write(path, content())
    whole, found = path.read_bytes(), 0
    tensor = content()["model_state_dict"]["body.weight"].numpy().tobytes()
    place = whole.index(tensor)
    inside = {8 * byte + bit for byte in range(place, place + len(tensor), 7) for bit in (0, 5)}
    directory = range(whole.find(b"PK\x01\x02") if name == "a.pt" else len(whole), len(whole))  # zip's, at its end
    for bit in sorted({*inside, *range(3, 8 * len(whole), 13), *(8 * byte + 4 for byte in directory)}):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert same(checkpoint_file.load(path).content, content()) and bit not in inside, (
                bit
            )  # between the parts, nobody reads
        except CheckpointError as error:
            found += 1
            assert "\n" not in str(error) and str(error).startswith(f"{path}: "), bit
    assert found > len(inside)


@both_formats
def test_a_truncated_file_is_found_at_any_length(tmp_path: Path, name: str, write: Callable):
    path = tmp_path / name
    write(path, content())
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 17), *range(len(whole) - 40, len(whole)), 1, 4, 8}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            checkpoint_file.load(path)
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))  # of full length, but not written
    with pytest.raises(CheckpointError, match="truncated|damaged"):
        checkpoint_file.load(path)


class Evil:
    """Unpickled, it calls `function`."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def _evils(trace: Path) -> list[Evil]:
    code = f"open({str(trace)!r}, 'w')"
    return [
        Evil(os.system, f"touch {trace}"), Evil(eval, code), Evil(exec, code), Evil(Path.touch, trace),
        Evil(subprocess.Popen, ["touch", str(trace)]), Evil(open, str(trace), "w"), Evil(torch.hub.load, "a", "b"),
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "legacy", 0, 1, 2, 3, 4, 5])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path: Path, form: str | int):
    path, trace = tmp_path / "model_best.pt", tmp_path / "trace"
    for number, evil in enumerate(_evils(trace)):
        for whole in (evil, {"model_state_dict": {"a": torch.ones(2), "b": evil}}, {"rng": [{"python": (1, evil)}]}):
            if isinstance(form, int):
                path.write_bytes(pickle.dumps(whole, protocol=form))
            else:
                torch.save(whole, path, _use_new_zipfile_serialization=form == "zip")
            with pytest.raises(CheckpointError) as caught:
                checkpoint_file.load(path)
            sentence = re.escape(f"{path}: holds pickled code besides tensors and plain values")
            assert re.fullmatch(
                rf"{sentence}( \([\w.]+\))?, refused: load it once where you trust it and save .*", str(caught.value)
            ), str(caught.value)
            assert not trace.exists(), number
    for raw in (pickle.dumps({"a": evil}, 2), b"cposix\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR."):
        for suffix in (".safetensors", ".pth"):
            path.with_suffix(suffix).write_bytes(raw)
            with pytest.raises(CheckpointError):
                checkpoint_file.load(path.with_suffix(suffix))
    assert not trace.exists()


def test_the_evil_ones_of_these_tests_are(tmp_path: Path):
    pickle.loads(pickle.dumps(_evils(tmp_path / "trace")[0]))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("form", [True, False], ids=["zip", "legacy"])
def test_numbers_of_numpy_are_plain_values(tmp_path: Path, form: bool):
    """As mmcv's runners leave them: torch alone would refuse the file. Arrays and classes stay refused, by name."""
    path = tmp_path / "best_top1_acc.pth"
    numbers = {"best_score": numpy.float64(0.8125), "iter": numpy.int64(7), "lr": numpy.float32(0.5)}
    torch.save({"meta": numbers, "state_dict": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=form)
    found = checkpoint_file.load(path).content
    assert found["meta"] == numbers and torch.equal(Checkpoint(path, found).weights["a"], torch.ones(2))
    for other, name, advice in (
        (numpy.zeros(2), "_reconstruct", "save its NumPy arrays as tensors"), (Twice(), "Twice", "load it once .*")
    ):  # fmt: skip
        torch.save({"meta": {"a": other}}, path, _use_new_zipfile_serialization=form)
        with pytest.raises(CheckpointError, match=rf"holds pickled code .* \([\w.]*{name}\), refused: {advice}$"):
            checkpoint_file.load(path)


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def _program(path: Path) -> None:
    torch.jit.save(torch.jit.script(Twice()), path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pt", lambda path: None, "there is no such checkpoint"),
        ("b.pt", lambda path: path.mkdir(), "is a folder; name a checkpoint in it"),
        ("c.pt", lambda path: path.write_text("a recipe for soup\n"), "truncated, damaged or not a file of weights"),
        ("d.pt", lambda path: path.write_bytes(b""), "is empty: truncated or never written"),
        ("e.pt", lambda path: torch.save(torch.ones(2), path), "not a checkpoint but a Tensor"),
        ("f.pt", lambda path: torch.save({"model": Twice()}, path), "holds pickled code .*, refused"),
        ("g.pt", _program, "a TorchScript program, refused"),
        ("h.safetensors", lambda path: path.write_text("soup"), "truncated, damaged or not a file of weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_unusable_files_are_refused_by_name(tmp_path: Path, name: str, write: Callable, message: str):
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: .*{message}") as caught:
        checkpoint_file.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_best_model_names_the_last(tmp_path: Path):
    last = tmp_path / "last_model.pt"
    torch.save(content(), last)
    with pytest.raises(CheckpointError, match="model_best.pt: there is no such checkpoint; .*last_model.pt is there"):
        checkpoint_file.load_weights_file(tmp_path)
    with pytest.raises(CheckpointError, match=f"is a folder; name a checkpoint in it, such as {last}"):
        checkpoint_file.load(tmp_path)


def test_torchs_older_format_is_read(tmp_path: Path):
    torch.save(content(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(checkpoint_file.load(tmp_path / "old.pth").content, content())


# The row of a run's files.


def _row(folder: Path, keep: int, steps: int) -> list[str]:
    previous = None
    for step in range(1, steps + 1):
        checkpoint_file.save_last(folder, content(step), keep, previous)
        previous = step
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_files_are_kept(tmp_path: Path, keep: int):
    names = _row(tmp_path, keep, 5)
    assert names == ["last_model.pt", *[f"step_{step:08d}.pt" for step in range(6 - keep, 5)]]
    assert [checkpoint_file.load(tmp_path / name).content["step"] for name in names] == [5, *range(6 - keep, 5)]
    assert checkpoint_file.newest(tmp_path).path == tmp_path / "last_model.pt"


def test_fewer_are_kept_from_now_on(tmp_path: Path):
    _row(tmp_path, 3, 5)
    checkpoint_file.save_last(tmp_path, content(6), 1, 5)
    assert os.listdir(tmp_path) == ["last_model.pt"]


def test_a_step_is_saved_twice_before_and_after_its_evaluation(tmp_path: Path):
    checkpoint_file.save_last(tmp_path, content(1) | {"pending": True}, 2, None)
    checkpoint_file.save_last(tmp_path, content(1), 2, 1)
    assert "pending" in checkpoint_file.load(tmp_path / "step_00000001.pt").content
    checkpoint_file.save_last(tmp_path, content(2), 2, 1)
    assert sorted(os.listdir(tmp_path)) == ["last_model.pt", "step_00000001.pt"]
    assert same(checkpoint_file.load(tmp_path / "step_00000001.pt").content, content(1))


def test_where_a_file_has_one_name_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with _fails(monkeypatch, "link", OSError(errno.EPERM, "Operation not permitted")):
        assert _row(tmp_path, 2, 3) == ["last_model.pt", "step_00000002.pt"]
    assert same(checkpoint_file.load(tmp_path / "step_00000002.pt").content, content(2))


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("operation", ["open", "link", "replace", "unlink", "fsync"])
def test_a_row_survives_a_power_cut_at_any_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, operation: str
):
    """The newest valid one is the previous or the new one, never none; the next save removes what is left over."""
    for cut in range(12):
        folder = tmp_path / str(cut)
        folder.mkdir()
        _row(folder, keep, 3)
        real, calls = getattr(os, operation), 0

        def at(*arguments: object, real: Callable = real, cut: int = cut, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls > cut:
                raise Power  # and nothing that is tidied up on the way out works either
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, operation, at)
            try:
                checkpoint_file.save_last(folder, content(4), keep, 3)
                finished = True
            except Power:
                finished = False
        assert (folder / "last_model.pt").exists()
        found = checkpoint_file.newest(folder).content
        assert found["step"] == 4 if finished else found["step"] in (3, 4)
        assert same(found, content(found["step"]))
        checkpoint_file.save_last(folder, content(5), keep, found["step"])
        left = sorted(name for name in os.listdir(folder) if not name.endswith(".partial"))
        assert (
            left[0] == "last_model.pt"
            and len(left) == keep
            and checkpoint_file.load(folder / left[0]).content["step"] == 5
        )
        if finished:
            return
    raise AssertionError("the save never came through")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def test_going_back_to_the_newest_valid_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    _row(tmp_path, 4, 4)
    _cut(tmp_path / "last_model.pt")
    (tmp_path / "step_00000003.pt").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "td4v"):
        assert checkpoint_file.newest(tmp_path).path == tmp_path / "step_00000002.pt"
    assert [message.split(": ")[0] for message in caplog.messages[:2]] == [
        str(tmp_path / "last_model.pt"), str(tmp_path / "step_00000003.pt"),
    ]  # fmt: skip
    assert (
        caplog.messages[2] == f"going back to {tmp_path / 'step_00000002.pt'}, the newest valid checkpoint of this run"
    )
    # The run resumes from step 2: damaged files do not count among those that are kept.
    checkpoint_file.save_last(tmp_path, content(3), 3, None)
    assert sorted(os.listdir(tmp_path)) == ["last_model.pt", "step_00000001.pt", "step_00000002.pt"]
    checkpoint_file.save_last(tmp_path, content(4), 3, 3)
    assert [checkpoint_file.load(path).content["step"] for path in sorted(tmp_path.iterdir())] == [4, 2, 3]


def test_a_deleted_last_one_and_none_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert checkpoint_file.newest(tmp_path) is None
    _row(tmp_path, 2, 2)
    (tmp_path / "last_model.pt").unlink()
    assert checkpoint_file.newest(tmp_path).path == tmp_path / "step_00000001.pt"
    (tmp_path / "last_model.pt").write_bytes(b"")
    _cut(tmp_path / "step_00000001.pt")
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is valid \(last_model.pt, step_00000001.pt\)"):
        checkpoint_file.newest(tmp_path)


def test_an_evil_last_one_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    _row(tmp_path, 2, 2)
    torch.save({"a": Evil(os.system, f"touch {tmp_path / 'trace'}")}, tmp_path / "last_model.pt")
    assert checkpoint_file.newest(tmp_path).path == tmp_path / "step_00000001.pt"
    assert "holds pickled code" in caplog.text and not (tmp_path / "trace").exists()


# The weights in a file.


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_known_layouts(key: str | None, prefix: str):
    weights = {f"{prefix}body.weight": torch.ones(1), f"{prefix}head.bias": torch.zeros(2)}
    found = Checkpoint(Path("a.pt"), {key: weights, "epoch": 3} if key else weights).weights
    assert list(found) == ["body.weight", "head.bias"]


def test_the_averaged_weights_are_the_ones(tmp_path: Path):
    kept = {"model_state_dict": {"a": torch.zeros(1), "n": torch.tensor(3)}, "ema_state_dict": {"a": torch.ones(1)}}
    assert Checkpoint(Path("a.pt"), kept).weights == {"a": torch.ones(1), "n": torch.tensor(3)}
    assert Checkpoint(Path("a.pt"), kept | {"ema_state_dict": None}).weights["a"] == 0


def test_weights_of_safetensors_and_of_nothing(tmp_path: Path):
    safetensors.torch.save_file({"module.a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert list(checkpoint_file.load(tmp_path / "w.safetensors").weights) == ["a"]
    for nothing in ({"epoch": 3}, {"model": {"a": "b"}}, {}):
        with pytest.raises(CheckpointError, match=r"a\.pt: no model weights"):
            _ = Checkpoint(Path("a.pt"), nothing).weights
