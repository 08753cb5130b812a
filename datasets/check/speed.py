"""How many clips a second the training loader feeds, and how many workers training would need.

Lives here: running the loader of training for some seconds, reading the CPU time of its workers, the need of a former
run, and the advice that follows.
Does not live here: the loader itself (datasets/build.py); comparing ways of reading (the benchmark).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from configs.schema import ConfigError, DataConfig
from datasets.build import train_loader
from datasets.loader import VideoLoader

HEADROOM = 1.15  # workers are suggested for so much more than is needed
ROUGH = 8  # batches below which a rate is called rough


@dataclass(frozen=True)
class Rate:
    """What a loader gave between the end of the warm-up and the end of the measurement.

    `cpu_ms` is the CPU time of a clip in milliseconds, all threads together, None where the system does not tell.
    `first_batch` is the time from asking for an epoch to its first batch, in seconds.
    """

    workers: int
    videos_per_s: float
    clips_per_s: float
    cpu_ms: float | None
    batches: int
    seconds: float
    first_batch: float

    @property
    def rough(self) -> bool:
        return self.batches < ROUGH


def _endless(loader: VideoLoader) -> Iterator[dict[str, Any]]:
    """The batches of epoch 0, 1, 2, ..., so that a short list measures more than one epoch's beginning."""
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


def measure(data: DataConfig, seed: int, workers: int, seconds: float) -> Rate:
    """Run the training loader with so many workers.

    The warm-up lasts until what the workers prepare ahead has gone through: a quarter of `seconds` at the least, all
    of it at the most. Three quarters of `seconds` are measured. Videos that cannot be read are left out.

    Raises:
        ConfigError, AnnotationError, ValueError: as datasets.build.train_loader, or no video can be read.
    """
    loader = train_loader(replace(data, workers=workers, on_error="skip"), seed)
    ahead = workers * (loader.prefetch_factor or 0)
    others = set(multiprocessing.active_children())
    started = time.perf_counter()
    batches = _endless(loader)
    next(batches)
    first_batch = time.perf_counter() - started
    own = [process.pid for process in multiprocessing.active_children() if process not in others]
    clips = measured = 0
    warm = cpu_before = None
    for number, batch in enumerate(batches):
        now = time.perf_counter()
        if warm is None:
            if now - started >= seconds or (number > ahead and now - started >= seconds / 4):
                warm, cpu_before = now, _cpu_seconds(own)
            continue
        clips += len(batch["label"])
        measured += 1
        if now - warm >= seconds * 3 / 4:
            break
    cpu = _cpu_seconds(own)
    batches.close()
    del loader, batches  # ends the workers
    if clips == 0:
        raise ValueError("not one of the training videos could be read: there is nothing to measure")
    span = now - warm
    cpu_ms = None if cpu is None or cpu_before is None else 1000 * (cpu - cpu_before) / clips
    rate = clips / span
    return Rate(workers, rate / data.num_sample, rate, cpu_ms, measured, span, first_batch)


def _cpu_seconds(workers: list[int]) -> float | None:
    """CPU time of these processes so far, or of this one where there are none. None where /proc is missing."""
    if not workers:
        return time.process_time()
    total = 0
    for pid in workers:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        total += int(fields[11]) + int(fields[12])  # user and system time, in ticks
    return total / os.sysconf("SC_CLK_TCK")


def need_of_run(folder: Path) -> tuple[float, str]:
    """Clips a second that each process of a former run could have taken, and how that follows from its files.

    An epoch's rate is divided by the share of time that it did not wait for data, and by the number of processes; the
    median of all epochs but the first counts.

    Raises:
        ConfigError: no metrics.jsonl there, or one without finished epochs.
    """
    file = folder / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        rates = [row["clips_per_s"] / max(0.01, 1 - row.get("data_wait", 0)) for row in rows]
        starts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        processes = starts[-1].get("world_size", 1)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"--run {folder}: does not hold the metrics.jsonl and run.json of a run ({error})") from None
    if not rates:
        raise ConfigError(f"--run {folder}: {file.name} has no finished epoch yet")
    rate = statistics.median(rates[1:] or rates)
    wait = statistics.median([row.get("data_wait", 0) for row in rows][1:] or [rows[0].get("data_wait", 0)])
    how = f"{folder}: {len(rows)} epochs on {processes} process(es), {wait:.0%} of the time waiting for data"
    return rate / processes, how


def advice(rates: list[Rate], need: float | None, cores: int) -> tuple[str, dict[str, float | int]]:
    """What to set data.workers to, in sentences and numbers.

    Args:
        rates: as configured first, then of one worker (the same where one is configured).
        need: clips a second and process; None: unknown.
        cores: of this machine.
    """
    configured, one = rates[0], rates[-1]
    per_worker = one.clips_per_s
    if 1 < configured.workers <= cores:
        per_worker = min(per_worker, configured.clips_per_s / configured.workers)
    most = cores * per_worker
    numbers: dict[str, float | int] = {"clips_per_s": configured.clips_per_s, "one_worker": one.clips_per_s}
    text = [f"data.workers: {configured.workers} feeds {configured.clips_per_s:.1f} clips/s to each process."]
    expected = one.clips_per_s * min(configured.workers, cores)
    if configured.workers > 1 and configured.clips_per_s < 0.7 * expected:
        text.append(f"That is {configured.clips_per_s / one.clips_per_s:.1f} times one worker's rate: it does not scale "
                    "(other work on this machine, slow storage, or memory).")  # fmt: skip
    if configured.workers > cores:
        text.append(f"More workers than this machine has cores ({cores}) gain little.")
    if need is None:
        text.append(f"All cores together ({cores}) would feed about {most:.0f} clips/s, shared by its processes. "
                    "Compare with --need CLIPS_PER_S, or with --run RUNFOLDER of a former run.")  # fmt: skip
        return " ".join(text), numbers
    workers = math.ceil(need * HEADROOM / per_worker)
    share = configured.clips_per_s / need
    numbers |= {"need": need, "suggested_workers": min(workers, cores), "enough": int(share >= 1)}
    verdict = "enough" if share >= 1 else f"{share:.0%} of it: training would wait for data"
    has = f"this machine has {cores} core{'' if cores == 1 else 's'}"
    if workers <= cores:
        advised = f". Suggested: data.workers: {workers} a process (with {HEADROOM - 1:.0%} to spare)."
    elif share >= 1:
        advised = f", with little to spare: {workers} workers would give {HEADROOM - 1:.0%} headroom, {has}."
    else:
        advised = (f". It would take {workers} workers; {has}, about {most:.0f} clips/s at most. Set data.workers: {cores}; "
                   "beyond that, smaller frames on disk or a larger num_sample help.")  # fmt: skip
    text.append(f"Training needs {need:.1f} clips/s: {verdict}{advised}")
    return " ".join(text), numbers
