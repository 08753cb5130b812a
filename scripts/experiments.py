"""Trials: many small runs for one table, each trained by train_vision.py and tested by test_vision.py, several at a time.

Lives here: starting the two commands with a share of the cores, keeping what is finished, progress with the time that
is left, an end in order. Does not live here: which runs and which table (quickstart.py, compare_methods.py), training
and testing themselves.
"""

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
from typing import Any

import yaml

from configs.schema import Config, difference, load_config
from engine.run_info import DataChangedError, check_same_lists, describe_list
from engine.signals import ending_in_order

logger = logging.getLogger("td4v")

ROOT = Path(__file__).parents[1]
USUAL_JOBS = max(1, min(4, os.cpu_count() or 1))
LISTS = ("train_list", "val_list", "label_list")


class ExperimentError(RuntimeError):
    """A run failed, or its folder holds another; the message is one sentence."""


@dataclass(frozen=True)
class Experiment:
    """One run: a configuration file with `settings` (KEY=VALUE) over it, in `folder`.

    `title` is what progress calls it; runs of one `kind` take about as long as each other.
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
        """All that the two commands say."""
        return self.folder.parent / f"{self.folder.name}.txt"

    @property
    def results(self) -> Path:
        """What test_vision.py found, there when the trial is finished."""
        return self.folder / "results.json"

    def kept(self) -> dict[str, Any] | None:
        """The results of an earlier call, or None where it was not finished.

        Raises:
            ExperimentError: the folder holds a run of other settings or data.
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

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs that the run has written so far."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def run_experiments(trials: Sequence[Experiment], jobs: int, device: str | None = None) -> list[dict[str, Any]]:
    """Train and test those that are not finished yet, `jobs` at a time; the results of test_vision.py, in their order.

    What is tested is the last epoch's checkpoint, not the best: choosing by the test videos would flatter the result.
    Where a run fails, or this process is asked to end, the others save and end too: the same call goes on with them.

    Args:
        device: of both commands; None leaves it to them.

    Raises:
        ConfigError, ExperimentError: before any run is started, or where one fails.
        KeyboardInterrupt: on SIGTERM, SIGUSR1 and Ctrl-C.
    """
    found = {trial: trial.kept() for trial in trials}
    todo = [trial for trial in trials if found[trial] is None]
    if len(todo) < len(trials):
        logger.info("%d of %d runs are finished already and kept", len(trials) - len(todo), len(trials))
    commands = _Commands(max(1, (os.cpu_count() or 1) // jobs), device)
    watch = _Watch(todo, jobs)
    with ending_in_order(), ThreadPoolExecutor(jobs) as pool:
        futures = {trial: pool.submit(_run, trial, commands, watch) for trial in todo}
        try:
            while True:
                over = all(future.done() for future in futures.values())
                watch.tell()
                for trial, future in futures.items():
                    if future.done():
                        found[trial] = future.result()
                if over:
                    return [found[trial] for trial in trials]
                time.sleep(0.5)
        finally:
            for future in futures.values():
                future.cancel()
            commands.end()


def _run(trial: Experiment, commands: _Commands, watch: _Watch) -> dict[str, Any]:
    trial.log.parent.mkdir(parents=True, exist_ok=True)
    watch.begun[trial] = time.monotonic()
    words = ["--config", trial.path, *(word for setting in trial.settings for word in ("--set", setting))]
    commands.call(trial, "train_vision.py", "--output", str(trial.folder), *words)
    weights = str(trial.folder / "last_model.pt")
    commands.call(trial, "test_vision.py", "--weights", weights, "--json", str(trial.results), *words)
    watch.ended[trial] = time.monotonic()
    return json.loads(trial.results.read_text())


class _Commands:
    """Processes of the two commands, each with so many threads, all of which end together."""

    def __init__(self, threads: int, device: str | None) -> None:
        self.words = ["--device", device] if device else []
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if device == "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        self._running: set[subprocess.Popen] = set()
        self._over, self._lock = False, threading.Lock()

    def call(self, trial: Experiment, script: str, *words: str) -> None:
        """Run one of them, its output into the trial's log. Raises ExperimentError."""
        with trial.log.open("a") as file:
            with self._lock:
                if self._over:
                    raise ExperimentError(f"{trial.title}: not started, for another run failed")
                process = subprocess.Popen([sys.executable, str(ROOT / script), *words, *self.words],
                                           env=self.environment, stdout=file, stderr=subprocess.STDOUT)  # fmt: skip
                self._running.add(process)
            status = process.wait()
        with self._lock:
            self._running.discard(process)
        if status:
            last = (trial.log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            reason = last.split(" ERROR ", 1)[-1].rstrip(".")
            raise ExperimentError(
                f"{trial.title}: {script} ended with status {status}: {reason} (all of it: {trial.log})"
            )

    def end(self) -> None:
        """Ask those that still run to save and end; no other is started."""
        with self._lock:
            self._over = True
            for process in self._running:
                process.terminate()


class _Watch:
    """Says each epoch when it is done, and how much time all of it will still take."""

    def __init__(self, trials: Sequence[Experiment], jobs: int) -> None:
        self.trials, self.jobs, self.since = trials, jobs, time.monotonic()
        self.begun: dict[Experiment, float] = {}
        self.ended: dict[Experiment, float] = {}
        self._first = {trial: len(trial.metrics()) for trial in trials}  # epochs of an interrupted call
        self._told = dict(self._first)

    def tell(self) -> None:
        """Log the epochs that are new."""
        new = {trial: epochs for trial in self.trials if len(epochs := trial.metrics()) > self._told[trial]}
        for trial, epochs in new.items():
            for line in epochs[self._told[trial] :]:
                top1 = "" if line.get("top1") is None else f", top-1 {line['top1']:.1f} %"
                logger.info(
                    "[%4.0f s, %d of %d runs done%s] %s, epoch %d/%d: loss %.3f%s",
                    *(time.monotonic() - self.since, len(self.ended), len(self.trials), self._left_text(), trial.title),
                    *(line["epoch"] + 1, trial.config.solver.epochs, line["train_loss"], top1),
                )
            self._told[trial] = len(epochs)

    def _left_text(self) -> str:
        now, work = time.monotonic(), []
        for trial in self.trials:
            begun = self.begun.get(trial)
            seconds = 0.0 if begun is None else self.ended.get(trial, now) - begun
            done, epochs = len(trial.metrics()), trial.config.solver.epochs
            work.append((trial.kind, seconds, done - self._first[trial], 0 if trial in self.ended else epochs - done))
        left = seconds_left(work, self.jobs)
        return "" if left is None else f", about {left / 60:.1f} min left"


def seconds_left(work: Sequence[tuple[str, float, int, int]], jobs: int) -> float | None:
    """An estimate from the pace of each kind of run, or of all where a kind has none yet; None where nothing has.

    Args:
        work: of each run its kind, seconds so far, epochs made in them, epochs left.
        jobs: runs at a time.
    """
    spent: dict[str, tuple[float, int]] = {}
    for kind, seconds, made, _ in work:
        before = spent.get(kind, (0.0, 0))
        spent[kind] = (before[0] + seconds, before[1] + made)
    paces = {kind: seconds / made for kind, (seconds, made) in spent.items() if made}
    if not paces:
        return None
    usual = sum(paces.values()) / len(paces)
    each = [left * paces.get(kind, usual) for kind, _, _, left in work]
    return max(max(each), sum(each) / jobs)
