"""For the fault tests: starts real training runs of a second, waits for a moment of them, kills them, and compares what
they leave in their folders."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from datasets.prepare.synthetic import make

ROOT = Path(__file__).parents[2]
VIDEOS = 11  # of validation: not a multiple of two or three processes
TIMINGS = ("clips_per_s", "data_wait", "seconds")  # may differ between two equal runs
LONGEST = 120.0  # seconds that anything here may take

# Overrides of the tiny configuration.
PLAIN = ()
UNSAVED = ("checkpoint.every_steps=",)
RICH = (  # all that is random, kept over steps or averaged; with three batches a step the last step is short
    "solver.mixup=true", "network.drop_fc=0.3", "solver.grad_accumulation_steps=3", "solver.ema_decay=0.9",
    "data.num_sample=2", "data.rand_aug=true", "data.rand_erase=true", "data.flip=true", "solver.epochs=4",
    "checkpoint.every_steps=2",
)  # fmt: skip
WORKERS = (*RICH, "data.workers=2")
CLOCK = ("checkpoint.every_steps=", "checkpoint.every_minutes=0.001", "checkpoint.keep=1")
FINETUNE = (
    "network.model=td4v_finetune",
    "checkpoint.full=true",
    "checkpoint.keep=4",
    "solver.clip_grad=1.0",
    "network.drop_fc=0.3",
    "data.workers=2",
)
KINDS = {
    "plain": PLAIN,
    "saved each epoch": UNSAVED,
    "by the clock": CLOCK,
    "rich": RICH,
    "rich, workers": WORKERS,
    "finetune": FINETUNE,
}
SHARED = ("data.batch_size=2", "network.drop_fc=0.3", "solver.mixup=true")  # for several processes
SHARED_RICH = (*SHARED, "solver.ema_decay=0.9", "solver.grad_accumulation_steps=2", "network.sync_bn=true",
               "data.workers=1", "data.num_sample=2")  # fmt: skip
_FIRST = 1000 * int(os.environ.get("FAULT_SEED", 0))
ROUNDS = range(_FIRST, _FIRST + int(os.environ.get("FAULT_ROUNDS", 1)))  # seeds; see fault_runs.py
each_round = pytest.mark.parametrize("seed", ROUNDS)


def make_config(folder: Path) -> Path:
    """A synthetic dataset, and a configuration of three epochs of eight steps that saves each third step."""
    data = folder / "data"
    make(data, train=32, val=12, seed=3, size=32)
    rows = (data / "val.txt").read_text().splitlines()[:VIDEOS]
    (data / "val.txt").write_text("\n".join(rows) + "\n")
    values = {
        "seed": 5,
        "data": {
            "dataset": "frame_order", "style": "kinetics", "num_classes": 4, "num_segments": 4, "batch_size": 4,
            "workers": 0, "train_root": str(data / "frames"), "val_root": str(data / "frames"),
            "train_list": str(data / "train.txt"), "val_list": str(data / "val.txt"),
            "label_list": str(data / "labels.csv"), "input_size": 32, "flip": False, "crop_scale": [0.6, 1.0],
        },
        "network": {
            "arch": "custom", "init": False, "pyramid": {"n_embs": [16, 32]},
            "vision": {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32},
        },
        "solver": {"epochs": 3, "lr_warmup_step": 0, "lr": 0.01},
        "logging": {"print_freq": 1, "output_dir": str(folder / "exp")},
        "checkpoint": {"every_steps": 3},
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def settings(overrides: tuple[str, ...]) -> list[str]:
    """The words of a command line that set them."""
    return [word for override in overrides for word in ("--set", override)]


def environment(**more: str) -> dict[str, str]:
    """The variables of a new process: one thread, and nothing of torchrun's."""
    of_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in of_torchrun}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | more


def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ChildProcess:
    """A started script. `output` is the file that it prints into; `poll` returns its status, None while it runs."""

    def __init__(self, pid: int, output: Path, poll: Callable[[], int | None]) -> None:
        self.pid, self.output, self.poll = pid, output, poll

    @property
    def printed(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    @property
    def errors(self) -> list[str]:
        """Its error messages."""
        return [line.split(" ERROR ", 1)[1] for line in self.printed.splitlines() if " ERROR " in line]

    def kill(self, number: int = signal.SIGKILL, group: bool = False) -> None:
        """Send it, or its process group, a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.pid, number)

    def wait(self) -> int:
        """Its exit status, negative for the signal that ended it; AssertionError if it does not end."""
        until = time.monotonic() + LONGEST
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"did not end in {LONGEST:g} s:\n{self.printed}")
            time.sleep(0.002)
        return status

    def refusal(self) -> str:
        """The one error message with which it ended, with status 1 and without a traceback."""
        status = self.wait()
        assert status == 1 and len(self.errors) == 1 and "Traceback" not in self.printed, self.printed
        return self.errors[0]


class FaultHarness:
    """Starts scripts that share one configuration.

    Args:
        folder: for everything that the runs write.
        config: see make_config.
    """

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config, self.count = folder, config, 0
        self._fork_server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fork_server"],
            **{"cwd": ROOT, "env": environment(), "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
        )
        assert json.loads(self._fork_server.stdout.readline()) == {"threads": 1}

    def close(self) -> None:
        """End the fork server."""
        self._fork_server.stdin.close()
        self._fork_server.wait(LONGEST)

    def path(self, name: str = "run") -> Path:
        """A new name in the folder."""
        self.count += 1
        return self.folder / f"{name}{self.count:03d}"

    def script(
        self, *words: str | Path, first: dict[str, dict[str, Any]] | None = None, **variables: str
    ) -> ChildProcess:
        """Start `words` (a script and its arguments) after calling the functions `first` of fork_server.py."""
        output = self.path("output")
        request = {"words": [*map(str, words)], "environment": variables, "output": str(output), "first": first or {}}
        pid = self._ask(request)
        status: list[int] = []

        def poll() -> int | None:
            if not status and (found := self._ask({"pid": pid})) is not None:
                status.append(found)
            return status[0] if status else None

        return ChildProcess(pid, output, poll)

    def train(
        self, folder: Path | None, *overrides: str, first: dict[str, dict[str, Any]] | None = None
    ) -> ChildProcess:
        """Start a training run; without a folder it finds its own."""
        return self.script(*self.words(folder, *overrides), first=first)

    def ranks(
        self, world_size: int, folder: Path, *overrides: str, first: dict[str, dict[str, Any]] | None = None
    ) -> list[ChildProcess]:
        """Start one training run of several processes, without a launcher."""
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        words = self.words(folder, *overrides)
        return [
            self.script(*words, first=first, RANK=str(r), LOCAL_RANK=str(r), **variables) for r in range(world_size)
        ]

    def words(self, folder: Path | None, *overrides: str) -> list[str]:
        """The command of a training run."""
        target = [] if folder is None else ["--output", str(folder)]
        return ["train_vision.py", "--config", str(self.config), "--device", "cpu", *target, *settings(overrides)]

    def launch(self, processes: int, folder: Path, *overrides: str, **variables: str) -> ChildProcess:
        """Start a training run as people do, by scripts/run_train_vision.sh, in a process group of its own."""
        output = self.path("output")
        script, config, *words = "scripts/run_train_vision.sh", str(self.config), *self.words(folder, *overrides)[3:]
        with open(output, "w") as file:
            process = subprocess.Popen(
                ["bash", script, config, *words],
                **{"cwd": ROOT, "env": environment(NPROC=str(processes), **variables), "stdin": subprocess.DEVNULL},
                **{"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True},
            )
        return ChildProcess(process.pid, output, process.poll)

    def _ask(self, request: dict[str, Any]) -> Any:
        self._fork_server.stdin.write(json.dumps(request) + "\n")
        self._fork_server.stdin.flush()
        return json.loads(self._fork_server.stdout.readline())


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that run now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it may have ended meanwhile
            state, parent = (folder / "stat").read_text().rsplit(") ", 1)[1].split()[:2]
            found += [int(folder.name)] if int(parent) == pid and state != "Z" else []
    return found


def workers_of(launcher: ChildProcess) -> list[int]:
    """The training processes that a launcher has started, by rank; they must be there soon."""

    def ranks() -> dict[int, int]:
        found = {}
        for pid in children_of(launcher.pid):
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {int(value[5:]): pid for value in variables if value.startswith(b"RANK=")}
        return found

    wait_until(lambda: ranks() or launcher.poll() is not None)
    assert launcher.poll() is None, launcher.printed
    return [pid for _, pid in sorted(ranks().items())]


def step_of(folder: Path) -> int:
    """How far a run is: its log lines of progress and evaluation, with those that were made twice."""
    try:
        return len(re.findall(r" step +\d+/\d+ loss | evaluating: batch ", (folder / "log.txt").read_text()))
    except OSError:
        return 0


def wait_for(folder: Path, moment: int, *processes: ChildProcess, since: int = 0) -> bool:
    """Wait for the `moment`-th line (see step_of) after the first `since`; False if the processes ended before it."""

    def ended() -> bool:
        return all(process.poll() is not None for process in processes)

    wait_until(lambda: step_of(folder) >= since + moment or ended())
    return step_of(folder) >= since + moment


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait until it is true; AssertionError if that takes too long."""
    until = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < until, "waited for too long"
        time.sleep(0.001)


def content(path: Path) -> dict[str, Any]:
    """A checkpoint."""
    return torch.load(path, weights_only=True)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """All files of a run but those that every start adds to."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".pt"}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts and lists with its path, except timings and what differs between two starts."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in TIMINGS and (name or key != "meta"):
                yield from leaves(inner, f"{name}/{key}")
    else:
        yield name, value


def curves(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """(step, value) of every record of each tag, in the order of the files; without the values of timings."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: (path.stat().st_mtime, path.name)):
        for record in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(record)
            for value in event.summary.value:
                timed = value.tag.endswith(TIMINGS)
                found.setdefault(value.tag, []).append((event.step, None if timed else value.SerializeToString()))
    return found


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: in checkpoints bit for bit, in metrics and curves except timings."""
    found = []
    for name in ("last_model.pt", "model_best.pt"):
        first, second = (dict(leaves(content(folder / name))) for folder in (one, other))
        if first.keys() != second.keys():
            found.append(f"{name}: {sorted(first.keys() ^ second.keys())[:5]}")
        found += [f"{name}: {key}" for key in first.keys() & second.keys() if not _same(first[key], second[key])]
    rows = [[dict(leaves(row)) for row in metrics(folder)] for folder in (one, other)]
    found += ["metrics.jsonl"] if rows[0] != rows[1] else []
    first, second = curves(one), curves(other)
    found += [f"curve {tag}" for tag in first.keys() | second.keys() if first.get(tag) != second.get(tag)]
    for tag, points in second.items():
        steps = [step for step, _ in points]
        found += [f"curve {tag} has steps twice or in disorder: {steps}"] if steps != sorted(set(steps)) else []
    if len(files(other)) - len(files(one)) not in (0, 1):  # one may be left by a kill in the last save of all
        found.append(f"holds {sorted(files(other))}, not {sorted(files(one))}")
    left = [path.name for path in other.iterdir() if path.name.endswith(".partial") or path.name == ".second_name.pt"]
    return found + [f"{name} is left over" for name in left]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and (one == other or (isinstance(one, float) and math.isnan(one + other)))


def seeded_random(seed: int, what: str) -> random.Random:
    """The random generator of one test in one round."""
    return random.Random(f"{what} {seed}")


def finish(harness: FaultHarness, folder: Path, reference: Path, *overrides: str) -> ChildProcess:
    """Rerun the command: it must finish the run, equal to the reference."""
    run = harness.train(folder, *overrides)
    assert run.wait() == 0, run.printed
    assert not (found := differences(reference, folder)), found
    return run


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultHarness]:
    """One for all tests."""
    folder = tmp_path_factory.mktemp("faults")
    harness = FaultHarness(folder, make_config(folder))
    yield harness
    harness.close()


@pytest.fixture(scope="session")
def reference(harness: FaultHarness) -> Callable[..., Path]:
    """A run that was not disturbed, by its settings and number of processes; each is made once."""
    made: dict[tuple, Path] = {}

    def get(*overrides: str, processes: int = 1) -> Path:
        key = (processes, *overrides)
        if key not in made:
            folder = harness.path("reference")
            run = (
                [harness.train(folder, *overrides)] if processes == 1 else harness.ranks(processes, folder, *overrides)
            )
            assert [process.wait() for process in run] == [0] * processes, run[0].printed
            made[key] = folder
        return made[key]

    return get
