"""Frame folders -> pack: planning the shards, writing these in parallel, the index last.

A pack is written shard by shard, each in a process of its own: under a temporary name, synced to disk, then renamed.
Killed at any moment, the same command goes on: finished shards stay, half-written ones are thrown away, shards whose
frames changed since (names, sizes, times) are made again. So are, later, shards that a finished pack has lost.
The same frames give the same bytes, with any number of jobs.

Does not live here: the format and reading it (format.py), looking at frame folders (scan.py), making frames
(prepare/), the command line (__main__.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from datasets.pack.format import (
    FORMAT,
    FRAME,
    FRAMES,
    HEADER,
    NAMES,
    UNFINISHED,
    VERSION,
    VIDEO,
    VIDEOS,
    Header,
    Pack,
    PackError,
    Settings,
    shard_name,
)
from datasets.pack.scan import Video, scan
from datasets.pack.workers import Work, progress_bar, readable, replacing, run_tasks, sync_folder

PLAN = "plan.json"
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the first that zip knows: dates would make equal frames unequal packs
MEMBER_OVERHEAD = 30 + 46  # bytes of the two headers of a member, beside its name in both

logger = logging.getLogger("td4v")


@dataclass(frozen=True, eq=False)
class Shard:
    """One zip as planned; `digest` stands for all that decides its bytes, and for the times of its frames."""

    number: int
    videos: tuple[Video, ...]
    comment: bytes
    digest: str

    @property
    def frame_bytes(self) -> int:
        return sum(int(video.sizes.sum()) for video in self.videos)

    def file(self, out: Path) -> Path:
        return out / shard_name(self.number)

    def part(self, out: Path) -> Path:
        """Its rows of frames.npy until the pack is whole; with the zip beside pack.json, the sign that it is done."""
        return out / UNFINISHED / f"{self.number:05d}-{self.digest}.npy"

    def is_done(self, out: Path) -> bool:
        return self.part(out).is_file() and self.file(out).is_file()


def write_pack(
    frames: Path, out: Path, lists: Sequence[str] = (), settings: Settings | None = None, jobs: int = 1
) -> None:
    """Pack all frame folders below `frames`, or those that the list files name, into `out`; or go on where it stopped.

    A list may declare fewer frames than a folder holds, as for frame folders; all frames are packed.

    Raises:
        PackError: a folder that is missing, empty, has a gap, another file or fewer frames than declared; `out` holds
            something else; too little space; a file cannot be read or written. Finished shards are kept.
        AnnotationError: a bad list.
    """
    settings = settings or Settings()
    if not frames.is_dir():
        raise PackError(f"{frames}: no such folder")
    if out.resolve().is_relative_to(frames.resolve()):
        raise PackError(f"{out}: the pack must not lie inside the frames, {frames}")
    _check_out(out, settings)
    videos = scan(frames, lists, settings, jobs)
    shards = _plan(videos, settings)
    if (out / HEADER).is_file():
        _check_same(out, videos, shards)
        _reopen_if_lost(out, shards, settings)
    if (out / HEADER).is_file():
        logger.info("%s: is complete already", out)
    else:
        _write_shards(frames, out, shards, settings, jobs)
        names, counts = [video.name for video in videos], [len(video.sizes) for video in videos]
        rows = np.concatenate([np.load(shard.part(out)) for shard in shards])
        write_index(out, names, counts, [len(shard.videos) for shard in shards], rows, settings)
        size = readable(sum(shard.file(out).stat().st_size for shard in shards))
        logger.info("%s: %d videos, %d frames, %s in %d shards", out, len(names), len(rows), size, len(shards))
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def _check_out(out: Path, settings: Settings) -> None:
    """Refuse an `out` that this command cannot have left."""
    if not out.exists():
        return
    if not out.is_dir():
        raise PackError(f"{out}: is no folder")
    plan = out / UNFINISHED / PLAN
    if (out / HEADER).is_file():
        found = asdict(Pack(out, check_shards=False).settings)
    elif plan.is_file():
        found = json.loads(plan.read_text(encoding="utf-8"))
    elif any(entry.name != UNFINISHED for entry in out.iterdir()):
        raise PackError(f"{out}: holds files that are no pack; choose another --out or delete it")
    else:
        return
    for key, value in asdict(settings).items():
        if found[key] != value:
            what = f"has {key} {found[key]!r}, not {value!r}"
            raise PackError(f"{out}: the pack there {what}; choose another --out or delete it")


def _check_same(out: Path, videos: Sequence[Video], shards: Sequence[Shard]) -> None:
    pack = Pack(out, check_shards=False)
    sizes = np.concatenate([video.sizes for video in videos])
    numbers = np.repeat(np.arange(len(shards)), [len(shard.videos) for shard in shards])
    same = list(pack) == [video.name for video in videos] and np.array_equal(pack.frames["length"], sizes)
    if not same or not np.array_equal(pack.videos["shard"], numbers):
        raise PackError(f"{out}: the pack there holds other videos or frames; choose another --out or delete it")


def _reopen_if_lost(out: Path, shards: Sequence[Shard], settings: Settings) -> None:
    """Make a pack that lost shards an unfinished one, in which the other shards are done."""
    pack = Pack(out, check_shards=False)
    lost = pack.lost()
    if not lost:
        return
    for error in lost.values():
        logger.warning("%s", error)
    work, first = out / UNFINISHED, 0
    work.mkdir(exist_ok=True)
    for shard in shards:
        rows = pack.frames[first : first + sum(len(video.sizes) for video in shard.videos)]
        first += len(rows)
        if shard.number in lost:
            shard.part(out).unlink(missing_ok=True)
        else:
            with replacing(shard.part(out)) as file:
                np.save(file, rows)
    _write_settings(out, settings)  # before what else tells them goes
    (out / HEADER).unlink()


def _plan(videos: Sequence[Video], settings: Settings) -> list[Shard]:
    """Videos in order of their paths, as many to a shard as fit; one that is larger has a shard alone."""
    groups: list[list[Video]] = []
    room = 0
    for video in videos:
        size = _zip_bytes(video, settings)
        if size > room or not groups:
            groups.append([])
            room = settings.shard_size
        groups[-1].append(video)
        room -= size
    shards = []
    for number, group in enumerate(groups):
        comment = shard_comment(settings, number, len(groups))
        stamps = json.dumps([(video.name, video.stamp) for video in group]).encode()
        shards.append(Shard(number, tuple(group), comment, hashlib.sha256(comment + stamps).hexdigest()))
    return shards


def _zip_bytes(video: Video, settings: Settings) -> int:
    name = len(f"{video.name}/{settings.frame_name(0)}".encode())
    return int(video.sizes.sum(dtype=np.int64)) + len(video.sizes) * (MEMBER_OVERHEAD + 2 * name)


def shard_comment(settings: Settings, number: int, shards: int) -> bytes:
    """What a zip's comment says, so that the shards alone make the pack again."""
    fields = {"format": FORMAT, "version": VERSION, "settings": asdict(settings), "shard": number, "shards": shards}
    return json.dumps(fields).encode()


# ---- writing


def _write_shards(frames: Path, out: Path, shards: Sequence[Shard], settings: Settings, jobs: int) -> None:
    work = out / UNFINISHED
    _check_space(out, [shard for shard in shards if not shard.is_done(out)], settings)
    work.mkdir(parents=True, exist_ok=True)
    _write_settings(out, settings)
    done = [shard for shard in shards if shard.is_done(out)]
    keep = {work / PLAN, *(shard.part(out) for shard in done), *(shard.file(out) for shard in done)}
    for file in [*work.iterdir(), *out.glob("frames-*.zip")]:
        if file not in keep:
            file.unlink()
    todo = [shard for shard in shards if not shard.is_done(out)]
    done_bytes, todo_bytes = (sum(shard.frame_bytes for shard in group) for group in (done, todo))
    if done:
        logger.info("%s: going on, %d of %d shards are done", out, len(done), len(shards))
    try:
        with progress_bar("pack", "iB", done_bytes + todo_bytes, done_bytes) as bar:
            tasks = {str(shard.file(out)): (frames, out, shard, settings) for shard in todo}
            run_tasks(_write_shard, tasks, jobs, bar)
    finally:
        for file in work.glob("*.zip"):  # of processes that were stopped: a full disk should not stay full
            file.unlink(missing_ok=True)


def _write_settings(out: Path, settings: Settings) -> None:
    with replacing(out / UNFINISHED / PLAN) as file:
        file.write(json.dumps(asdict(settings)).encode())


def _check_space(out: Path, todo: Sequence[Shard], settings: Settings) -> None:
    folder = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.exists())
    videos = [video for shard in todo for video in shard.videos]
    index = sum(VIDEO.itemsize + len(video.name) + 2 * FRAME.itemsize * len(video.sizes) for video in videos)
    needed = index + sum(_zip_bytes(video, settings) for video in videos)
    stale = sum(file.stat().st_size for file in (out / UNFINISHED).glob("*.zip"))  # goes before anything is written
    free = shutil.disk_usage(folder).free + stale
    if needed > free:
        raise PackError(f"{out}: needs {readable(needed)}, but the disk has {readable(free)} free")


def _write_shard(frames: Path, out: Path, shard: Shard, settings: Settings) -> Work:
    """Writes the zip and its rows of frames.npy; yields the bytes of frames written."""
    partial = (
        out / UNFINISHED / f"{uuid.uuid4().hex}.zip"
    )  # a name of its own: an orphan of a killed run may still live
    rows = []
    try:
        with open(partial, "xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.comment = shard.comment
                for video in shard.videos:
                    for index, size in enumerate(video.sizes.tolist()):
                        name = f"{video.name}/{settings.frame_name(index)}"
                        data = _read_frame(frames / name, size)
                        member = zipfile.ZipInfo(name, ZIP_TIME)
                        member.create_system, member.external_attr = 3, (stat.S_IFREG | 0o644) << 16  # Unix, rw-r--r--
                        archive.writestr(member, data)
                        rows.append((member.header_offset + len(member.FileHeader()), size))
                    yield int(video.sizes.sum(dtype=np.int64))
            file.flush()
            os.fsync(file.fileno())
        with replacing(shard.part(out)) as file:
            np.save(file, np.array(rows, dtype=FRAME))
        yield 0  # ends here if the command was killed meanwhile
        os.replace(partial, shard.file(out))
        sync_folder(out)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise PackError(
            f"{shard.file(out)}: cannot be written ({error.strerror}); "
            "finished shards are kept, the same command goes on from there"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _read_frame(path: Path, size: int) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError as error:
        raise PackError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) != size:
        raise PackError(f"{path}: changed while it was packed; run the same command again")
    return data


def write_index(
    out: Path,
    names: Sequence[str],
    counts: Sequence[int],
    shard_videos: Sequence[int],
    rows: np.ndarray,
    settings: Settings,
) -> None:
    """Write names.txt, videos.npy, frames.npy and, last, pack.json; the shards must be in place.

    Args:
        names, counts: path and number of frames of each video, sorted by the paths' UTF-8 bytes.
        shard_videos: number of videos in each shard.
        rows: (frames,) FRAME.
    """
    lines = [name.encode() + b"\n" for name in names]
    videos = np.zeros(len(names), dtype=VIDEO)
    videos["shard"] = np.repeat(np.arange(len(shard_videos)), shard_videos)
    videos["frames"] = counts
    videos["first"] = np.cumsum([0, *counts[:-1]])
    videos["name_end"] = np.cumsum([len(line) for line in lines]) - 1
    shard_bytes = tuple((out / shard_name(number)).stat().st_size for number in range(len(shard_videos)))
    with replacing(out / NAMES) as file:
        file.write(b"".join(lines))
    for name, array in ((VIDEOS, videos), (FRAMES, rows)):
        with replacing(out / name) as file:
            np.save(file, array)
    with replacing(out / HEADER) as file:
        file.write(Header(settings, len(names), len(rows), shard_bytes).text().encode())
