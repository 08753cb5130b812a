"""All videos of a plan in parallel: extracted, opened or counted.

    OUT/frames/<video without suffix>/000001.jpg ...   in place only if complete; with --pack OUT/frames/<...>.zip
    OUT/frames.jsonl                                   one line a finished video: its file, frames declared and written
    OUT/partial/                                       unfinished work, removed at the next start

A rerun skips a video that has frames and a line, if the frames have the number and bytes of the line and the video has
kept its size and time of change.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from common.workers import Workers, progress
from datasets.prepare.decode import FileStamp, FrameStore, Outcome, extract, sample
from datasets.prepare.output_dir import ignores_case, require_space
from datasets.prepare.plan import PrepareError

CRASH = Outcome(error="the decoder crashes on it")
SAMPLES = 8  # videos that the estimate of the needed space is made from
HALF_BLOCK = 2048  # bytes; what a file of a folder takes on average beyond its size
ZIP_OVERHEAD = 120  # bytes; what a member of a zip takes beyond its size

logger = logging.getLogger("td4v")


def extract_all(store: FrameStore, videos: Path, paths: Sequence[str], jobs: int) -> tuple[dict[str, Outcome], int]:
    """Extract the videos at `paths` below `videos`.

    Returns:
        An outcome for each path, and the number of videos that an earlier run had extracted.

    Raises:
        PrepareError: too little space, or the paths of two videos' frames clash.
        OSError: the disk is full or cannot be written.
    """
    shutil.rmtree(store.unfinished, ignore_errors=True)
    store.unfinished.mkdir()
    store.root.mkdir(exist_ok=True)
    records = _read_records(store)
    outcomes: dict[str, Outcome] = {}
    for path in paths:
        stamp, outcome = records.get(path, (None, None))
        if outcome and stamp == FileStamp.of(videos / path) and _is_complete(store.path_of(path), outcome):
            outcomes[path] = outcome
    num_before = len(outcomes)
    if num_before:
        logger.info("%d of %d videos were extracted by an earlier run", num_before, len(paths))
    pending = [path for path in paths if path not in outcomes]
    if pending:
        with Workers(jobs) as workers:
            _require_space(store, workers, videos, pending)
            results = workers.run(partial(extract, store, videos), pending)
            for path, outcome in progress(results, len(pending), "extracting"):
                outcomes[path] = outcome or CRASH
    shutil.rmtree(store.unfinished)
    return outcomes, num_before


def inspect_all(
    videos: Path, paths: Sequence[str], inspect: Callable[[Path], Outcome], jobs: int
) -> dict[str, Outcome]:
    """`inspect` each of the videos, or folders of frames, at `paths` below `videos`."""
    files = {videos / path: path for path in paths}
    with Workers(jobs) as workers:
        results: Iterable[tuple[Path, Outcome | None]] = progress(workers.run(inspect, files), len(files), "opening")
        return {files[file]: outcome or CRASH for file, outcome in results}


def check_names(store: FrameStore, videos: Path, paths: Sequence[str]) -> None:
    """Raises PrepareError if two videos share a frame folder or zip, or one's folder would lie in another's."""
    packed = store.settings.storage == "zips"
    kind = "zip" if packed else "folder"
    key = str.casefold if ignores_case(store.out) else str
    video_of: dict[str, str] = {}
    for path in paths:
        other = video_of.setdefault(key(store.name_of(path)), path)
        if other != path:
            raise PrepareError(f"{videos}: {other} and {path} would share one {kind} of frames; rename one of them")
    for path in () if packed else paths:
        for parent in PurePosixPath(store.name_of(path)).parents:
            if other := video_of.get(key(str(parent))):
                raise PrepareError(
                    f"{videos}: the frames of {path} would lie inside the folder of those of {other}; rename one of them, "
                    "or use --pack or --videos-only"
                )


def _read_records(store: FrameStore) -> dict[str, tuple[FileStamp, Outcome]]:
    """Video -> (its file when it was extracted, outcome), from the last line of each; damaged lines are skipped."""
    records: dict[str, tuple[FileStamp, Outcome]] = {}
    lines = store.records.read_text(encoding="utf-8").split("\n") if store.records.exists() else []
    for line in filter(None, lines):
        try:
            row = json.loads(line)
            stamp = FileStamp(row["source_bytes"], row["source_mtime_ns"])
            records[row["video"]] = stamp, Outcome(row["declared"], row["frames"], row["bytes"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a damaged line is skipped", store.records)
    return records


def _is_complete(path: Path, outcome: Outcome) -> bool:
    """Whether a zip has the recorded bytes, or a folder the recorded number of JPEGs and their bytes."""
    if path.is_file():
        return path.stat().st_size == outcome.bytes
    if not path.is_dir():
        return False
    sizes = [entry.stat().st_size for entry in os.scandir(path) if entry.name.endswith(".jpg")]
    return (len(sizes), sum(sizes)) == (outcome.frames, outcome.bytes)


def _require_space(store: FrameStore, workers: Workers, videos: Path, pending: Sequence[str]) -> None:
    """Estimate from a few videos, evenly spread, what the pending ones need, and require it."""
    chosen = dict.fromkeys(pending[number * len(pending) // SAMPLES] for number in range(SAMPLES))
    samples = [result for _, result in workers.run(partial(sample, store, videos), chosen) if result]
    if not samples:
        return
    packed = store.settings.storage == "zips"
    scale = len(pending) / len(samples)
    overhead = ZIP_OVERHEAD if packed else HALF_BLOCK
    size = scale * sum(frames * (frame_bytes + overhead) for frames, frame_bytes in samples)
    files = len(pending) if packed else scale * sum(frames for frames, _ in samples)
    require_space(store.out, int(size), f"extracting {len(pending)} videos", files=int(files))
