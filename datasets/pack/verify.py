"""What is done to a pack that is written: comparing it with its checksums, making its index again from the zips.

Does not live here: the format and reading it (format.py), writing (writer.py), the command line (__main__.py).
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.pack.format import FORMAT, FRAME, UNFINISHED, VERSION, Pack, PackError, Settings, shard_name
from datasets.pack.workers import Work, progress_bar, raise_problems, run_tasks
from datasets.pack.writer import write_index

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and of the extra field that follow it
PROGRESS_STEP = 1 << 24  # bytes

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Listing:
    """What a shard holds: its videos in order, the frames of each, FRAME rows and CRCs of all frames, its comment."""

    names: list[str]
    counts: list[int]
    rows: np.ndarray
    crcs: np.ndarray
    comment: dict[str, Any]


def reindex(root: Path, jobs: int = 1) -> None:
    """Make names.txt, videos.npy, frames.npy and pack.json again from the shards alone.

    Raises:
        PackError: no shards, one is missing, damaged, of another pack, or not written by `write_pack`.
    """
    files = sorted(root.glob("frames-*.zip"))
    if not files or (root / UNFINISHED).exists():
        raise PackError(f"{root}: holds {'an unfinished pack' if files else 'no shards frames-00000.zip ...'}")
    with progress_bar("reindex", "iB", sum(file.stat().st_size for file in files)) as bar:
        listings: list[Listing] = run_tasks(_list_shard, {str(file): (file,) for file in files}, jobs, bar)
    packs = [(listing.comment["shards"], Settings(**listing.comment["settings"])) for listing in listings]
    (shards, settings), _ = Counter(packs).most_common(1)[0]  # what most say
    for file, listing, pack in zip(files, listings, packs, strict=True):
        if pack != (shards, settings):
            raise PackError(f"{file}: is a shard of another pack than {files[packs.index((shards, settings))].name}")
        if file.name != (own := shard_name(listing.comment["shard"])):
            raise PackError(f"{file}: is no {file.name} but the pack's {own}, copied or renamed")
    for number in range(shards):
        if not (root / shard_name(number)).is_file():
            raise PackError(f"{root / shard_name(number)}: is missing, the pack has {shards} shards")
    names = [name for listing in listings for name in listing.names]
    if any(one >= other for one, other in itertools.pairwise(names)):
        raise PackError(f"{root}: the videos of the shards are not in order: not written by this program")
    counts = [count for listing in listings for count in listing.counts]
    rows = np.concatenate([listing.rows for listing in listings])
    write_index(root, names, counts, [len(listing.names) for listing in listings], rows, settings)
    logger.info("%s: indexed %d videos, %d frames in %d shards", root, len(names), len(rows), len(files))


def verify(root: Path, jobs: int = 1) -> None:
    """Read every frame as training would, through the index, and compare it with the checksum that its zip holds.

    Raises:
        PackError: the pack does not open, or a frame differs; up to 20 of them are logged.
    """
    pack = Pack(root)
    with progress_bar("verify", "iB", int(pack.frames["length"].sum(dtype=np.int64))) as bar:
        tasks = {pack.shard(number): (root, number) for number in range(pack.num_shards)}
        found = run_tasks(_verify_shard, tasks, jobs, bar)
    problems = [problem for shard in found for problem in shard]
    raise_problems(problems, f"{root}: {len(problems)} problems in {len(pack.frames)} frames")
    logger.info("%s: %d videos, %d frames, all as written", root, len(pack), len(pack.frames))


def _verify_shard(root: Path, number: int) -> Work:
    """Returns a sentence for each frame that differs; yields the bytes read."""
    pack, problems = Pack(root), []
    try:
        listing = yield from _list_shard(Path(pack.shard(number)), progress=False)
    except PackError as error:
        return [str(error)]
    wanted = [pack.name(row) for row in np.flatnonzero(pack.videos["shard"] == number).tolist()]
    if wanted != listing.names or [pack.num_frames(name) for name in wanted] != listing.counts:
        return [f"{pack.shard(number)}: holds other videos than the index says; --reindex makes a new index"]
    crcs = iter(listing.crcs.tolist())
    for name, count in zip(listing.names, listing.counts, strict=True):
        frames = [pack.read(name, index) for index in range(count)]
        for index, (frame, crc) in enumerate(zip(frames, crcs, strict=False)):
            if zlib.crc32(frame) != crc:
                problems.append(f"{pack.where(name, index)}: does not have the checksum that the zip gives it")
        yield sum(map(len, frames))
    return problems


def _list_shard(path: Path, progress: bool = True) -> Work:
    """Returns the Listing of a shard from the zip alone; yields the bytes passed. Raises PackError."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            comment = _comment(path, archive.comment)
            settings, members = Settings(**comment["settings"]), archive.infolist()
            names, counts, rows, passed = [], [], np.empty(len(members), dtype=FRAME), 0
            for row, member in enumerate(members):
                video, _, frame = member.filename.rpartition("/")
                if not names or names[-1] != video:
                    names.append(video)
                    counts.append(0)
                if frame != settings.frame_name(counts[-1]) or member.compress_type != zipfile.ZIP_STORED:
                    raise PackError(f"{path}: {member.filename} is not in its place: not written by this program")
                counts[-1] += 1
                header = os.pread(file.fileno(), LOCAL_HEADER.size, member.header_offset)
                signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
                if signature != b"PK\3\4":
                    raise PackError(f"{path}: is damaged at {member.filename}")
                offset = member.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
                rows[row] = offset, member.file_size
                if progress and offset - passed >= PROGRESS_STEP:
                    yield offset - passed
                    passed = offset
            crcs = np.array([member.CRC for member in members], dtype="<u4")
            if progress:
                yield path.stat().st_size - passed
            return Listing(names, counts, rows, crcs, comment)
    except OSError as error:
        raise PackError(f"{path}: cannot be read ({error.strerror})") from None
    except (zipfile.BadZipFile, struct.error) as error:
        raise PackError(f"{path}: is no whole zip file ({error})") from None


def _comment(path: Path, text: bytes) -> dict[str, Any]:
    try:
        comment = json.loads(text)
        is_ours = (comment["format"], comment["version"]) == (FORMAT, VERSION)
    except (ValueError, LookupError, TypeError):
        is_ours = False
    if not is_ours:
        raise PackError(f"{path}: is no shard of a pack of version {VERSION}")
    return comment
