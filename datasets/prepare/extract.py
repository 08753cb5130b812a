"""All videos of a plan: extracted, opened or counted in parallel, going on where an earlier run stopped.

    OUT/frames/<video without suffix>/000001.jpg ...   in place only when whole
    OUT/frames.jsonl                                   a line a finished video: its source, frames declared and written
    OUT/partial/                                       unfinished work, removed at the next start

A finished video is one with a folder, a line, and the JPEGs and bytes that the line says, whose source has kept its size
and time of change.
Does not live here: what happens to one video (decode.py), and the processes (workers.py).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from common.workers import Workers, progress
from datasets.decoders import Decoder
from datasets.prepare.decode import Job, Outcome, Source, count_frames, extract, probe, sample
from datasets.prepare.lists import PrepareError
from datasets.prepare.space import require_space

CRASH = Outcome(error="the decoder crashes on it")
SAMPLES = 8  # videos that the estimate of the space is made from
BLOCK = 4096  # bytes; a file takes half of one more than it holds, on the mean

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class FrameStore:
    """Where the frames of a run go."""

    out: Path
    short_side: int
    quality: int
    decoder: Decoder = "decord"

    @property
    def root(self) -> Path:
        return self.out / "frames"

    def folder_of(self, video: str) -> str:
        """Relative to `root`."""
        return os.path.splitext(video)[0]

    def job(self, videos: Path, video: str) -> Job:
        folder = self.root / self.folder_of(video)
        unfinished, records = self.out / "partial", self.out / "frames.jsonl"
        return Job(video, videos / video, folder, unfinished, records, self.short_side, self.quality, self.decoder)

    def check_apart(self, videos: Path, paths: Sequence[str]) -> None:
        """Raises PrepareError where one video's frame folder is, or holds, another's: redoing one would remove both."""
        owner: dict[str, str] = {}
        for path in paths:
            other = owner.setdefault(self.folder_of(path), path)
            if other != path:
                raise PrepareError(f"{videos}: {other} and {path} would share a folder of frames; rename one of them")
        for path in paths:
            for parent in PurePosixPath(self.folder_of(path)).parents:
                if other := owner.get(str(parent)):
                    raise PrepareError(
                        f"{videos}: the frames of {path} would lie inside the folder of those of {other}; rename one of "
                        "them, or use --videos-only"
                    )

    def read_records(self) -> dict[str, tuple[Source, Outcome]]:
        """Video -> (its source then, outcome), the last line of each; a line that was cut off is passed over."""
        records: dict[str, tuple[Source, Outcome]] = {}
        file = self.out / "frames.jsonl"
        for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
            if not line:
                continue
            try:
                row = json.loads(line)
                outcome = Outcome(row["declared"], row["frames"], row["bytes"])
                records[row["video"]] = Source(row["source_bytes"], row["source_mtime_ns"]), outcome
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: passes over a damaged line", file)
        return records


def extract_all(store: FrameStore, videos: Path, paths: Sequence[str], jobs: int) -> tuple[dict[str, Outcome], int]:
    """Extracts the videos at `paths` below `videos`; returns an outcome for each, and how many were there before.

    Raises PrepareError where the disk has too little space, OSError where it is full or cannot be written.
    """
    shutil.rmtree(store.out / "partial", ignore_errors=True)
    (store.out / "partial").mkdir()
    store.root.mkdir(exist_ok=True)
    records = store.read_records()
    outcomes: dict[str, Outcome] = {}
    pending = []
    for path in paths:
        job = store.job(videos, path)
        source, outcome = records.get(path, (None, None))
        if outcome and source == Source.of(job.source) and _holds(job.folder, outcome):
            outcomes[path] = outcome
        else:
            pending.append(job)
    before = len(outcomes)
    if before:
        logger.info("%d of %d videos were extracted by an earlier run", before, len(paths))
    if pending:
        with Workers(jobs) as workers:
            _require_space(store, workers, pending)
            for job, outcome in progress(workers.run(extract, pending), len(pending), "extracting"):
                outcomes[job.video] = outcome or CRASH
    shutil.rmtree(store.out / "partial")
    return outcomes, before


def look_at_all(videos: Path, paths: Sequence[str], decoder: Decoder | None, jobs: int) -> dict[str, Outcome]:
    """Decodes three frames of each video, or, without a decoder, counts the JPEGs of each frame folder."""
    look: Callable[[Path], Outcome] = partial(probe, decoder=decoder) if decoder else count_frames
    files = {videos / path: path for path in paths}
    with Workers(jobs) as workers:
        results: Iterable[tuple[Path, Outcome | None]] = progress(workers.run(look, files), len(files), "opening")
        return {files[file]: outcome or CRASH for file, outcome in results}


def _holds(folder: Path, outcome: Outcome) -> bool:
    """Whether the folder has just so many JPEGs of just so many bytes."""
    if not folder.is_dir():
        return False
    sizes = [entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".jpg")]
    return (len(sizes), sum(sizes)) == (outcome.frames, outcome.bytes)


def _require_space(store: FrameStore, workers: Workers, pending: Sequence[Job]) -> None:
    """Estimates from a few videos, evenly spread, what the pending ones need, and requires it."""
    chosen = [pending[number * len(pending) // SAMPLES] for number in range(SAMPLES)]
    samples = [result for _, result in workers.run(sample, dict.fromkeys(chosen)) if result]
    if samples:
        files = sum(each.declared for each in samples) / len(samples) * len(pending)
        size = sum(each.declared * (each.frame_bytes + BLOCK / 2) for each in samples) / len(samples) * len(pending)
        require_space(store.out, int(size), f"extracting {len(pending)} videos", files=int(files))
