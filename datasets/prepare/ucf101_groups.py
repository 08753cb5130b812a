"""UCF101's class folders -> lists split by whole groups and, on request, extracted frames.

    python -m datasets.prepare.ucf101_groups --videos UCF-101 --out data/ucf101 [--test-groups 8-12] [--frames]

UCF101 (Soomro et al. 2012) cuts several clips of a group (`gNN` of v_<Class>_gNN_cMM.avi) from one long video, so a
group goes to one side as a whole. Labels are the class folders' order by name, letter case ignored, which for all 101
classes is the order of the owners' classInd.txt.

Lives here: the split, the extraction, and what is wrong with the videos found. Does not live here: the owners' own
splits, and reading frames or videos for training (datasets/readers.py).

    DIR/train.txt  DIR/val.txt   rows `<Class>/<video>.avi label`, data root: the videos folder; with --frames
                                 rows `<Class>/<video> num_frames label`, data root: DIR/frames
    DIR/labels.csv
    DIR/frames/<Class>/<video>/000001.jpg ..., DIR/frames.json (how they were extracted)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np
from PIL import Image

from datasets.prepare.lists import PrepareError, write_labels, write_rows, write_text

FILE_NAME = re.compile(r"v_(?P<name>\w+)_g(?P<group>\d+)_c\d+\.avi")
# A share of frames that rounds to none: decord then raises at the first frame it would replace by the one before.
NO_REPLACED_FRAME = 1e-9
PROGRESS_SECONDS = 5.0

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Video:
    """One clip: its file, class folder, label and group number."""

    path: Path
    class_name: str
    label: int
    group: int


@dataclass(frozen=True)
class Decoded:
    """What decoding a video gave: frames its header declares and frames that decode (0 unless all were read)."""

    declared: int = 0
    frames: int = 0
    error: str | None = None


def find_videos(root: Path) -> tuple[list[Video], list[str]]:
    """Lists the clips of the class folders in `root` and the class names by label; hidden files are passed over.

    Raises PrepareError for a file whose name does not fit, a clip in another class's folder, and no clip at all.
    """
    if not root.is_dir():
        raise PrepareError(f"{root} is not a folder of UCF101's class folders")
    folders = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    folders.sort(key=lambda folder: folder.name.casefold())
    videos = []
    for label, folder in enumerate(folders):
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            fit = FILE_NAME.fullmatch(path.name)
            if fit is None:
                raise PrepareError(f"{path}: the name does not fit v_<Class>_gNN_cMM.avi")
            if fit["name"].casefold() != folder.name.casefold():  # UCF101 has HandstandPushups/v_HandStandPushups_*
                raise PrepareError(f"{path}: the clip's class is {fit['name']}, its folder's is {folder.name}")
            videos.append(Video(path, folder.name, label, int(fit["group"])))
    if not videos:
        raise PrepareError(f"{root} holds no <Class>/v_<Class>_gNN_cMM.avi")
    return videos, [folder.name for folder in folders]


def parse_groups(text: str) -> frozenset[int]:
    """`8-12` or `1,3,8-12` -> the group numbers, ends included; raises PrepareError."""
    groups: set[int] = set()
    for part in text.split(","):
        fit = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if fit is None or int(fit[2] or fit[1]) < int(fit[1]):
            raise PrepareError(f"--test-groups: {text!r} is not of the form 8-12 or 1,3,8-12")
        groups.update(range(int(fit[1]), int(fit[2] or fit[1]) + 1))
    return frozenset(groups)


def identical_across_sides(train: Sequence[Video], val: Sequence[Video]) -> list[tuple[Video, Video]]:
    """Pairs (training clip, validation clip) of byte-identical files; only files of equal size are read."""
    by_size: dict[int, tuple[list[Video], list[Video]]] = defaultdict(lambda: ([], []))
    for side, videos in enumerate((train, val)):
        for video in videos:
            by_size[video.path.stat().st_size][side].append(video)
    pairs = []
    for ours, theirs in by_size.values():
        if ours and theirs:
            digests = {video: _digest(video.path) for video in (*ours, *theirs)}
            pairs += [(a, b) for a in ours for b in theirs if digests[a] == digests[b]]
    return pairs


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def prepare(
    videos: Path,
    out: Path,
    test_groups: frozenset[int] = frozenset(range(8, 13)),
    frames: bool = False,
    short_side: int = 128,
    quality: int = 90,
    jobs: int = 2,
    allow_missing: bool = False,
) -> tuple[int, int]:
    """Writes lists and labels and, with `frames`, the frames; a video extracted by an earlier run is not read again.

    Clips that decode to fewer frames than declared, classes missing on a side and files identical across the sides
    are reported as warnings of the logger "td4v".

    Args:
        videos: folder of the class folders.
        out: folder to write to.
        test_groups: groups that go to val.txt; all others go to train.txt.
        frames: extract frames; without it each video's first frame is decoded, to know that it can be read.
        short_side: of the extracted frames, pixels.
        quality: of the JPEGs, 1 to 100.
        jobs: processes.
        allow_missing: leave unreadable videos out of the lists instead of raising.

    Returns:
        Rows of train.txt and of val.txt.

    Raises:
        PrepareError: arguments, file names or the folder do not fit, a side is empty, or videos cannot be read; no
            list is written then, extracted frames stay.
        OSError: the folder cannot be written.
    """
    if jobs < 1 or short_side < 1 or not 1 <= quality <= 100:
        raise PrepareError("--jobs and --short-side must be positive and --quality between 1 and 100")
    found, names = find_videos(videos)
    out.mkdir(parents=True, exist_ok=True)
    if frames:
        _remember(out, {"short_side": short_side, "quality": quality})
    decoded = _decode_all(found, out / "frames" if frames else None, short_side, quality, jobs)
    missing = [video for video in found if decoded[video].error]
    for video in found:
        if (result := decoded[video]).frames < result.declared:
            logger.warning("%s declares %d frames, %d decode", video.path, result.declared, result.frames)
    for video in missing:
        logger.error("%s cannot be read: %s", video.path, decoded[video].error)
    if missing and not allow_missing:
        raise PrepareError(
            f"{len(missing)} of {len(found)} videos cannot be read, so no list is written; "
            "--allow-missing leaves them out"
        )
    kept = [video for video in found if not decoded[video].error]
    sides = {
        "train": [video for video in kept if video.group not in test_groups],
        "val": [video for video in kept if video.group in test_groups],
    }
    for side, members in sides.items():
        if not members:
            raise PrepareError(f"{videos}: no video falls on the {side} side of --test-groups")
        if absent := sorted(set(names) - {video.class_name for video in members}):
            logger.warning("%s.txt has no video of %s", side, ", ".join(absent))
    for train, val in identical_across_sides(sides["train"], sides["val"]):
        logger.warning("%s (train) and %s (val) are byte-identical", train.path, val.path)
    for side, members in sides.items():
        write_rows(out / f"{side}.txt", [_row(video, decoded[video].frames if frames else None) for video in members])
    write_labels(out / "labels.csv", names)
    return len(sides["train"]), len(sides["val"])


def _row(video: Video, frames: int | None) -> tuple[object, ...]:
    if frames is None:
        return f"{video.class_name}/{video.path.name}", video.label
    return f"{video.class_name}/{video.path.stem}", frames, video.label


def _remember(out: Path, settings: dict[str, int]) -> None:
    """Writes the settings of the extraction; raises PrepareError where frames of other settings are in `out`."""
    record, text = out / "frames.json", json.dumps(settings) + "\n"
    there = record.read_text(encoding="utf-8") if record.exists() else None
    if there is None and (out / "frames").exists():
        raise PrepareError(f"{out / 'frames'} is there but not an output of this command; choose another --out")
    if there not in (None, text):
        raise PrepareError(f"{record}: frames were extracted with {there.strip()}, not {text.strip()}")
    write_text(record, text)


def _decode_all(
    videos: Sequence[Video], root: Path | None, short_side: int, quality: int, jobs: int
) -> dict[Video, Decoded]:
    """Extracts (or, without `root`, opens) every video in `jobs` processes and logs the progress."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    decoded: dict[Video, Decoded] = {}
    start = reported = time.monotonic()
    try:
        pending = {}
        for video in videos:
            folder = root / video.class_name / video.path.stem if root else None
            pending[pool.submit(_decode_one, video.path, folder, short_side, quality)] = video
        for future in as_completed(pending):
            decoded[pending[future]] = future.result()
            now = time.monotonic()
            if now - reported >= PROGRESS_SECONDS:
                left = (now - start) / len(decoded) * (len(videos) - len(decoded))
                logger.info("%d of %d videos, about %.0f s left", len(decoded), len(videos), left)
                reported = now
    except BrokenProcessPool:
        raise PrepareError("a process died while decoding videos; what is finished stays, run again to go on") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return decoded


def _decode_one(path: Path, folder: Path | None, short_side: int, quality: int) -> Decoded:
    """Extracts one video to `folder` under a temporary name, or, without one, decodes its first frame."""
    if folder is not None and folder.is_dir():
        count = len(list(folder.glob("*.jpg")))
        return Decoded(frames=count, error=None if count else f"its frame folder {folder} is empty")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=NO_REPLACED_FRAME)
        if folder is None:
            reader.next()
            return Decoded()
        count = _write_frames(reader, folder, short_side, quality)
    except (RuntimeError, StopIteration, decord.DECORDError, decord.DECORDLimitReachedError) as error:
        return Decoded(error=_first_line(error))
    if count == 0:
        return Decoded(error="no frame decodes")
    return Decoded(declared=len(reader), frames=count)


def _write_frames(reader: decord.VideoReader, folder: Path, short_side: int, quality: int) -> int:
    """Writes the frames as 000001.jpg ...; returns their number, and makes no folder where it is 0."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count = 0
    try:
        for count, frame in enumerate(_frames(reader), start=1):
            image = Image.fromarray(frame)
            scale = short_side / min(image.size)
            size = (math.floor(image.width * scale + 0.5), math.floor(image.height * scale + 0.5))
            image.resize(size, Image.Resampling.BICUBIC).save(partial / f"{count:06d}.jpg", quality=quality)
        if count:
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def _frames(reader: decord.VideoReader) -> Iterator[np.ndarray]:
    """Yields uint8 (H, W, 3) frames in order, up to the first that does not decode."""
    for _ in range(len(reader)):
        try:
            yield reader.next().asnumpy()
        except (StopIteration, decord.DECORDLimitReachedError):
            return


def _first_line(error: Exception) -> str:
    """The first line of an error, without decord's C++ stack."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.prepare.ucf101_groups", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--videos", type=Path, required=True, help="folder of the class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--test-groups", default="8-12", help="groups of val.txt, e.g. 1,3,8-12 (default 8-12)")
    parser.add_argument("--frames", action="store_true", help="extract frames; the lists are then of frame folders")
    parser.add_argument("--short-side", type=int, default=128, help="of the frames, pixels (default 128)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (default 90)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--allow-missing", action="store_true", help="leave unreadable videos out of the lists")
    options = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        train, val = prepare(**{**options, "test_groups": parse_groups(options["test_groups"])})
    except (PrepareError, OSError) as error:
        logger.error("%s", error)
        return 1
    logger.info("%s: %d training and %d validation videos", options["out"], train, val)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
