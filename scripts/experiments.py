"""Runs many small experiments for one table: each is trained by train_vision.py and tested by test_vision.py."""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from configs.compare import difference
from configs.schema import Config, load_config
from engine.errors import EngineError
from engine.run_info import DataChangedError, check_same_lists, describe_list
from engine.signals import ending_in_order
from scripts.cli import ROOT

logger = logging.getLogger("td4v")

LISTS = ("train_list", "val_list", "label_list")


class ExperimentError(EngineError):
    """A run failed, or its folder holds another; the message is one sentence."""


@dataclass(frozen=True)
class Experiment:
    """One run: a configuration file with `settings` (KEY=VALUE) over it, in `folder`.

    Args:
        title: its name in progress lines.
        kind: runs of one kind take about as long as each other.
    """

    title: str
    kind: str
    path: str
    settings: tuple[str, ...]
    folder: Path

    @functools.cached_property
    def config(self) -> Config:
        """Raises ConfigError."""
        return load_config(self.path, self.settings)

    @property
    def log(self) -> Path:
        """The output of both commands."""
        return self.folder.parent / f"{self.folder.name}.txt"

    @property
    def results(self) -> Path:
        """The results of test_vision.py; the file is there once the experiment is finished."""
        return self.folder / "results.json"

    def finished_results(self) -> dict[str, Any] | None:
        """The results of an earlier call, or None if it did not finish.

        Raises:
            ExperimentError: the folder holds a run with other settings or data.
        """
        written = self.folder / "config.yaml"
        if not written.is_file():
            return None
        reason = difference(yaml.safe_load(written.read_text()), self.config, more_epochs=False, same_start=True)
        if reason is not None:
            raise ExperimentError(f"{self.folder}: holds another run: {reason}; remove it or choose another --output")
        if not self.results.is_file():
            return None
        (*_, start) = json.loads((self.folder / "run.json").read_text())
        now = {name: describe_list(getattr(self.config.data, name)) for name in LISTS}
        try:
            check_same_lists(start, {"lists": now}, self.folder)
        except DataChangedError as error:
            raise ExperimentError(str(error)) from None
        return json.loads(self.results.read_text())

    def epochs(self) -> list[dict[str, Any]]:
        """The epochs that the run has written so far."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def run_experiments(experiments: Sequence[Experiment], jobs: int, device: str | None = None) -> list[dict[str, Any]]:
    """Train and test those that are not finished yet, `jobs` at a time, and return all results in their order.

    The last epoch's checkpoint is tested, not the best: choosing by the test videos would flatter the result. If a run
    fails or this process is asked to stop, the others save and stop too; the same call continues.

    Args:
        device: of both commands; None leaves it to them.

    Raises:
        ConfigError, ExperimentError: before any run is started, or when one fails.
        KeyboardInterrupt: on SIGTERM, SIGUSR1 and Ctrl-C.
    """
    results = {experiment: experiment.finished_results() for experiment in experiments}
    todo = [experiment for experiment in experiments if results[experiment] is None]
    if len(todo) < len(experiments):
        logger.info("%d of %d runs are already finished", len(experiments) - len(todo), len(experiments))
    commands = _Commands(threads=max(1, (os.cpu_count() or 1) // jobs), device=device)
    progress = _Progress(todo, jobs)
    with ending_in_order(), ThreadPoolExecutor(jobs) as pool:
        futures = {experiment: pool.submit(_run, experiment, commands, progress) for experiment in todo}
        try:
            while True:
                all_done = all(future.done() for future in futures.values())
                progress.log()
                for experiment, future in futures.items():
                    if future.done():
                        results[experiment] = future.result()
                if all_done:
                    return [results[experiment] for experiment in experiments]
                time.sleep(0.5)
        finally:
            for future in futures.values():
                future.cancel()
            commands.stop()


def _run(experiment: Experiment, commands: _Commands, progress: _Progress) -> dict[str, Any]:
    experiment.log.parent.mkdir(parents=True, exist_ok=True)
    progress.started[experiment] = time.monotonic()
    words = ["--config", experiment.path, *(word for setting in experiment.settings for word in ("--set", setting))]
    commands.run(experiment, "train_vision.py", "--output", str(experiment.folder), *words)
    weights = str(experiment.folder / "last_model.pt")
    commands.run(experiment, "test_vision.py", "--weights", weights, "--json", str(experiment.results), *words)
    progress.ended[experiment] = time.monotonic()
    return json.loads(experiment.results.read_text())


class _Commands:
    """The running commands, which all stop together. Each has `threads` threads."""

    def __init__(self, threads: int, device: str | None) -> None:
        self.words = ["--device", device] if device else []
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if device == "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        self._running: set[subprocess.Popen] = set()
        self._stopped, self._lock = False, threading.Lock()

    def run(self, experiment: Experiment, script: str, *words: str) -> None:
        """Run a script to its end, with its output in the experiment's log. Raises ExperimentError."""
        command = [sys.executable, str(ROOT / script), *words, *self.words]
        with experiment.log.open("a") as file:
            with self._lock:
                if self._stopped:
                    raise ExperimentError(f"{experiment.title}: not started, because another run failed")
                process = subprocess.Popen(command, env=self.environment, stdout=file, stderr=subprocess.STDOUT)
                self._running.add(process)
            status = process.wait()
        with self._lock:
            self._running.discard(process)
        if status:
            last = (experiment.log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            reason = last.split(" ERROR ", 1)[-1].rstrip(".")
            raise ExperimentError(
                f"{experiment.title}: {script} ended with status {status}: {reason} (full output: {experiment.log})"
            )

    def stop(self) -> None:
        """Ask the running commands to save and stop, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


class _Progress:
    """Logs each epoch when it is done, with an estimate of the time left."""

    def __init__(self, experiments: Sequence[Experiment], jobs: int) -> None:
        self.experiments, self.jobs, self.start = experiments, jobs, time.monotonic()
        self.started: dict[Experiment, float] = {}
        self.ended: dict[Experiment, float] = {}
        self._before = {experiment: len(experiment.epochs()) for experiment in experiments}  # of an interrupted call
        self._logged = dict(self._before)

    def log(self) -> None:
        """Log the epochs that are new."""
        for experiment in self.experiments:
            epochs = experiment.epochs()
            for line in epochs[self._logged[experiment] :]:
                top1 = "" if line.get("top1") is None else f", top-1 {line['top1']:.1f} %"
                logger.info(
                    "[%4.0f s, %d of %d runs done%s] %s, epoch %d/%d: loss %.3f%s",
                    time.monotonic() - self.start,
                    len(self.ended),
                    len(self.experiments),
                    self._time_left(),
                    experiment.title,
                    line["epoch"] + 1,
                    experiment.config.solver.epochs,
                    line["train_loss"],
                    top1,
                )
            self._logged[experiment] = len(epochs)

    def _time_left(self) -> str:
        now, work = time.monotonic(), []
        for experiment in self.experiments:
            started = self.started.get(experiment)
            seconds = 0.0 if started is None else self.ended.get(experiment, now) - started
            done = len(experiment.epochs())
            left = 0 if experiment in self.ended else experiment.config.solver.epochs - done
            work.append(Work(experiment.kind, seconds, done - self._before[experiment], left))
        left = seconds_left(work, self.jobs)
        return "" if left is None else f", about {left / 60:.1f} min left"


class Work(NamedTuple):
    """What a run has done and has to do."""

    kind: str
    seconds: float
    epochs_done: int
    epochs_left: int


def seconds_left(work: Sequence[Work], jobs: int) -> float | None:
    """An estimate for `jobs` runs at a time; None as long as no epoch is done.

    It takes the pace of each kind of run, and the mean pace for a kind that has none yet.
    """
    paces = {}
    for kind in {run.kind for run in work}:
        same = [run for run in work if run.kind == kind]
        if epochs := sum(run.epochs_done for run in same):
            paces[kind] = sum(run.seconds for run in same) / epochs
    if not paces:
        return None
    mean_pace = sum(paces.values()) / len(paces)
    seconds = [run.epochs_left * paces.get(run.kind, mean_pace) for run in work]
    return max(max(seconds), sum(seconds) / jobs)
