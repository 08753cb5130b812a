"""How many clips a second the training loader feeds, and how many workers training needs."""

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

HEADROOM = 1.15  # workers are suggested for this many times the need
FEWEST_BATCHES = 8  # a rate of fewer is called rough


@dataclass(frozen=True)
class Rate:
    """What a loader fed between the end of the warm-up and the end of the measurement."""

    workers: int
    videos_per_s: float
    clips_per_s: float
    cpu_ms: float | None  # CPU time of a clip, of all threads together; None if the system does not report it
    batches: int
    seconds: float
    first_batch: float  # seconds from the start of the epoch

    @property
    def is_rough(self) -> bool:
        return self.batches < FEWEST_BATCHES


def _endless(loader: VideoLoader) -> Iterator[dict[str, Any]]:
    """The batches of epoch 0, 1, 2, ..., so that a short list is measured beyond the beginning of an epoch."""
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


def measure(data: DataConfig, seed: int, workers: int, seconds: float) -> Rate:
    """Run the training loader with this number of workers.

    The warm-up lasts until the batches that workers prepare ahead are consumed: at least a quarter of `seconds`, at most
    all of it. Three quarters of `seconds` are measured. Videos that cannot be read are skipped.

    Raises:
        ConfigError, AnnotationError, ValueError: as datasets.build.train_loader, or no video can be read.
    """
    alone = replace(data, workers=workers, on_error="skip")
    loader = train_loader(alone, seed, frames_per_segment=data.seg_length or 1)
    ahead = workers * (loader.prefetch_factor or 0)
    others = set(multiprocessing.active_children())
    started = time.perf_counter()
    batches = _endless(loader)
    next(batches)
    first_batch = time.perf_counter() - started
    worker_ids = [process.pid for process in multiprocessing.active_children() if process not in others]
    clips = num_measured = 0
    warm = cpu_before = None
    for number, batch in enumerate(batches):
        now = time.perf_counter()
        if warm is None:
            if now - started >= seconds or (number > ahead and now - started >= seconds / 4):
                warm, cpu_before = now, _cpu_seconds(worker_ids)
            continue
        clips += len(batch["label"])
        num_measured += 1
        if now - warm >= seconds * 3 / 4:
            break
    cpu = _cpu_seconds(worker_ids)
    batches.close()
    del loader, batches  # ends the workers
    if clips == 0:
        raise ValueError("no training video can be read: there is nothing to measure")
    span = now - warm
    return Rate(
        workers=workers,
        videos_per_s=clips / span / data.clips_per_video,
        clips_per_s=clips / span,
        cpu_ms=None if cpu is None or cpu_before is None else 1000 * (cpu - cpu_before) / clips,
        batches=num_measured,
        seconds=span,
        first_batch=first_batch,
    )


def _cpu_seconds(process_ids: list[int]) -> float | None:
    """CPU time of these processes, or of this one if there are none; None without /proc."""
    if not process_ids:
        return time.process_time()
    ticks = 0
    for pid in process_ids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        ticks += int(fields[11]) + int(fields[12])  # user and system time
    return ticks / os.sysconf("SC_CLK_TCK")


def need_of_run(folder: Path) -> tuple[float, str]:
    """Clips a second that each process of a previous run would have used without waiting for data, and the source.

    An epoch's rate is divided by the share of time that it did not wait for data, and by the number of processes. The
    median of all epochs but the first counts.

    Raises:
        ConfigError: the folder has no metrics.jsonl, or one without finished epochs.
    """
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        waits = [row.get("data_wait", 0) for row in rows]
        rates = [row["clips_per_s"] / max(0.01, 1 - wait) for row, wait in zip(rows, waits, strict=True)]
        starts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        processes = starts[-1].get("world_size", 1)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"--run {folder}: does not hold the metrics.jsonl and run.json of a run ({error})") from None
    if not rates:
        raise ConfigError(f"--run {folder}: metrics.jsonl has no finished epoch yet")
    rate, wait = (statistics.median(values[1:] or values) for values in (rates, waits))
    source = f"{folder}: {len(rows)} epochs on {processes} process(es), {wait:.0%} of the time waiting for data"
    return rate / processes, source


def advise(rates: list[Rate], need: float | None, cores: int) -> tuple[str, dict[str, float | int]]:
    """Sentences and numbers about data.workers.

    Args:
        rates: with the configured workers, then with one worker; only one rate if one is configured.
        need: clips a second that a training process needs; None: unknown.
        cores: of this machine.
    """
    configured, one = rates[0], rates[-1]
    per_worker = one.clips_per_s
    if 1 < configured.workers <= cores:
        per_worker = min(per_worker, configured.clips_per_s / configured.workers)
    highest = cores * per_worker
    numbers: dict[str, float | int] = {"clips_per_s": configured.clips_per_s, "one_worker": one.clips_per_s}
    text = [f"data.workers: {configured.workers} feeds {configured.clips_per_s:.1f} clips/s to each process."]
    expected = one.clips_per_s * min(configured.workers, cores)
    if configured.workers > 1 and configured.clips_per_s < 0.7 * expected:
        text.append(
            f"That is {configured.clips_per_s / one.clips_per_s:.1f} times one worker's rate: it does not scale "
            "(other work on this machine, slow storage, or memory)."
        )
    if configured.workers > cores:
        text.append(f"More workers than this machine has cores ({cores}) gain little.")
    if need is None:
        text.append(
            f"All cores together ({cores}) would feed about {highest:.0f} clips/s, shared by its processes. "
            "Compare with --need CLIPS_PER_S, or with --run RUN_DIR of a previous run."
        )
        return " ".join(text), numbers
    workers = math.ceil(need * HEADROOM / per_worker)
    share = configured.clips_per_s / need
    numbers |= {"need": need, "suggested_workers": min(workers, cores), "enough": int(share >= 1)}
    verdict = "enough" if share >= 1 else f"{share:.0%} of it: training would wait for data"
    has = f"this machine has {cores} core{'' if cores == 1 else 's'}"
    if workers <= cores:
        suggestion = f". Suggested: data.workers: {workers} a process (with {HEADROOM - 1:.0%} to spare)."
    elif share >= 1:
        suggestion = f", with little to spare: {workers} workers would give {HEADROOM - 1:.0%} headroom, {has}."
    else:
        suggestion = (
            f". It would take {workers} workers; {has}, about {highest:.0f} clips/s at most. Set data.workers: {cores}; "
            "beyond that, smaller frames on disk or a larger num_sample help."
        )
    text.append(f"Training needs {need:.1f} clips/s: the loader feeds {verdict}{suggestion}")
    return " ".join(text), numbers
