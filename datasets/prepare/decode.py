"""One video in, frames out: what a worker process does. Frame folders are whole or absent.

Lives here: a video from its first frame to its last, encoding JPEGs (`write_jpeg`, the only place), and the record of a
finished folder. Does not live here: which videos, how many processes (extract.py), how a video is decoded
(datasets/decoders/), and reading for training (datasets/readers.py).
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.decoders import DecodeError, Decoder, open_video
from datasets.prepare.declared import declared_frames

SAMPLED_FRAMES = 8
LARGEST_LOSS = 0.1  # share of the declared frames that may not decode; with more missing a video counts as unreadable


@dataclass(frozen=True)
class Outcome:
    """What one video gave: frames its header declares, frames that decode (or are there), their bytes, or an error."""

    declared: int = 0
    frames: int = 0
    bytes: int = 0
    error: str | None = None

    def judged(self) -> Outcome:
        """The same, or an error where more than LARGEST_LOSS of the declared frames do not decode."""
        if self.error is None and self.declared - self.frames > LARGEST_LOSS * self.declared:
            return replace(self, error=f"only {self.frames} of {self.declared} frames decode")
        return self


@dataclass(frozen=True)
class Source:
    """What tells whether a video is still the one that was extracted."""

    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, video: Path) -> Source:
        """Raises OSError."""
        status = video.stat()
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Job:
    """One video to extract, and how."""

    video: str  # relative path, the key in the records
    source: Path
    folder: Path
    partial: Path  # folder for unfinished work, on the same disk
    records: Path
    short_side: int  # pixels; 0 keeps the video's size
    quality: int
    decoder: Decoder = "decord"


@dataclass(frozen=True)
class Sample:
    """What a video's first frames tell: frames declared and mean bytes of a JPEG."""

    declared: int
    frame_bytes: float


def write_jpeg(path: Path, frame: np.ndarray, short_side: int, quality: int) -> int:
    """Writes uint8 (H, W, 3) as a JPEG and returns its bytes. The short side becomes `short_side` pixels, unless 0.

    The file is encoded in memory first: a full disk then is an OSError that says so.
    """
    data = encode_jpeg(frame, short_side, quality)
    path.write_bytes(data)
    return len(data)


def encode_jpeg(frame: np.ndarray, short_side: int, quality: int) -> bytes:
    """The bytes that `write_jpeg` writes."""
    image = Image.fromarray(frame)
    if short_side and short_side != min(image.size):
        scale = short_side / min(image.size)
        size = (math.floor(image.width * scale + 0.5), math.floor(image.height * scale + 0.5))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def extract(job: Job) -> Outcome:
    """Extracts one video to its folder. A video that cannot be read is an outcome; OSError where it cannot be written."""
    partial = Path(tempfile.mkdtemp(dir=job.partial))
    partial.chmod(0o755)
    declared = frames = size = 0
    try:
        source = Source.of(job.source)  # before decoding: a video that changes meanwhile is done again
        video = open_video(str(job.source), job.decoder)
        declared = declared_frames(job.source, video)
        for frames, frame in enumerate(video.frames(), 1):
            size += write_jpeg(partial / f"{frames:06d}.jpg", frame, job.short_side, job.quality)
        if frames == 0:
            return Outcome(declared, error="no frame decodes")
        outcome = Outcome(max(declared, frames), frames, size).judged()
        if outcome.error:
            return outcome
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(job.folder, ignore_errors=True)  # of a video that has changed since
        append_record(job.records, job.video, source, outcome)
        os.replace(partial, job.folder)  # last: a folder in place is whole, and there is a record of it
        return outcome
    except DecodeError as error:
        return Outcome(declared, error=_first_line(error, job.source))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def probe(source: Path, decoder: Decoder = "decord") -> Outcome:
    """Opens a video and decodes its first, middle and last frame; `frames` are as many as training will ask for."""
    try:
        video = open_video(str(source), decoder)
        count = video.num_frames
        declared = max(declared_frames(source, video), count)
        video.read(np.array([0, count // 2, count - 1]))
        return Outcome(declared, count, source.stat().st_size).judged()
    except DecodeError as error:
        return Outcome(error=_first_line(error, source))


def count_frames(folder: Path) -> Outcome:
    """Looks at a published frame folder, which must hold 00001.jpg ... without a gap."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".jpg")}
    absent = next((name for name in map("{:05d}.jpg".format, range(1, len(sizes) + 1)) if not sizes.get(name)), None)
    if absent or not sizes:
        return Outcome(error=f"{absent or '00001.jpg'} is missing or empty, the folder holds {len(sizes)} .jpg files")
    return Outcome(len(sizes), len(sizes), sum(sizes.values()))


def sample(job: Job) -> Sample | None:
    """Encodes a video's first frames without writing them; None where it cannot be read."""
    try:
        video = open_video(str(job.source), job.decoder)
        first = itertools.islice(video.frames(), SAMPLED_FRAMES)
        sizes = [len(encode_jpeg(frame, job.short_side, job.quality)) for frame in first]
    except DecodeError:
        return None
    return Sample(video.declared_frames, sum(sizes) / len(sizes)) if sizes else None


def append_record(records: Path, video: str, source: Source, outcome: Outcome) -> None:
    """Notes a finished video in one write, which the system appends as a whole even where several processes write.

    The line break comes first, so that a record that a full disk cut off spoils no other.
    """
    record = {"video": video, "source_bytes": source.bytes, "source_mtime_ns": source.mtime_ns}
    record |= {"declared": outcome.declared, "frames": outcome.frames, "bytes": outcome.bytes}
    data = ("\n" + json.dumps(record)).encode()
    handle = os.open(records, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(handle, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(records))
    finally:
        os.close(handle)


def _first_line(error: Exception, source: Path) -> str:
    """The reason of an error without the file, which the report names, and without what follows the first line."""
    return str(error).splitlines()[0].removeprefix(f"{source}: ")
