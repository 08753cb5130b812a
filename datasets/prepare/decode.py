"""The frames of one video, as a worker process extracts them, and quick looks at a video that is not extracted."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from datasets.decoders import LARGEST_LOSS, DecodeError, Decoder, VideoFile, open_video
from datasets.packed_frames import packed_path, write_packed

SAMPLED_FRAMES = 8


@dataclass(frozen=True)
class FrameSettings:
    """How frames are extracted; the names are those of prepare.json."""

    short_side: int = 256  # pixels; 0 keeps the video's size
    quality: int = 90  # of the JPEGs, 1 to 100
    decoder: Decoder = "pyav"
    storage: Literal["folders", "zips"] = "folders"  # one a video


@dataclass(frozen=True)
class FrameStore:
    """The frames of an output folder."""

    out: Path
    settings: FrameSettings

    @property
    def root(self) -> Path:
        return self.out / "frames"

    @property
    def unfinished(self) -> Path:
        """Folder of unfinished work, on the same disk."""
        return self.out / "partial"

    @property
    def records(self) -> Path:
        """File with one line for each finished video."""
        return self.out / "frames.jsonl"

    def name_of(self, video: str) -> str:
        """The path of a video's frames below `root`, as it stands in a list row."""
        return os.path.splitext(video)[0]

    def path_of(self, video: str) -> Path:
        """The folder or zip of a video's frames."""
        folder = self.root / self.name_of(video)
        return Path(packed_path(str(folder))) if self.settings.storage == "zips" else folder

    def jpegs(self, video: VideoFile) -> Iterator[bytes]:
        """All frames as JPEGs."""
        for frame in video.frames():
            yield encode_jpeg(frame, self.settings.short_side, self.settings.quality)


@dataclass(frozen=True)
class Outcome:
    """What became of one video."""

    declared: int = 0  # frames that the file says it holds
    frames: int = 0  # that decode
    bytes: int = 0  # of what training reads: the JPEGs, the zip or the video
    error: str | None = None  # why the video cannot be used

    def checked(self) -> Outcome:
        """The same, with an error if more than LARGEST_LOSS of the declared frames do not decode."""
        if self.error is None and self.declared - self.frames > LARGEST_LOSS * self.declared:
            return replace(self, error=f"only {self.frames} of {self.declared} frames decode")
        return self


@dataclass(frozen=True)
class FileStamp:
    """Size and time of change of a video; both are equal if it is still the file that was extracted."""

    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, video: Path) -> FileStamp:
        """Raises OSError."""
        status = video.stat()
        return cls(status.st_size, status.st_mtime_ns)


def encode_jpeg(frame: np.ndarray, short_side: int, quality: int) -> bytes:
    """uint8 (H, W, 3) -> a JPEG whose short side has `short_side` pixels; 0 keeps the size."""
    image = Image.fromarray(frame)
    if short_side and short_side != min(image.size):
        scale = short_side / min(image.size)
        size = (math.floor(image.width * scale + 0.5), math.floor(image.height * scale + 0.5))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def extract(store: FrameStore, videos: Path, video: str) -> Outcome:
    """Extract the frames of `videos / video`; they are complete or absent.

    A video that cannot be read gives an outcome with an error. Raises OSError if frames cannot be written.
    """
    source, target = videos / video, store.path_of(video)
    unfinished = Path(tempfile.mkdtemp(dir=store.unfinished))
    declared = 0
    try:
        stamp = FileStamp.of(source)  # before decoding, so that a video that changes meanwhile is extracted again
        opened = open_video(str(source), store.settings.decoder)
        declared = opened.declared_frames
        written = unfinished / target.name
        write = _write_zip if store.settings.storage == "zips" else _write_folder
        frames, size = write(written, store.jpegs(opened))
        if frames == 0:
            return Outcome(declared, error="no frame decodes")
        outcome = Outcome(max(declared, frames), frames, size).checked()
        if outcome.error:
            return outcome
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # of a video that has changed since
        append_record(store.records, video, stamp, outcome)
        os.replace(written, target)  # last: frames in their place are complete and have a record
        return outcome
    except DecodeError as error:
        return Outcome(declared, error=_reason(error, source))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_folder(folder: Path, jpegs: Iterator[bytes]) -> tuple[int, int]:
    """Write 000001.jpg, ...; returns the number of frames and their bytes."""
    folder.mkdir()
    frames = size = 0
    for frames, jpeg in enumerate(jpegs, 1):
        size += (folder / f"{frames:06d}.jpg").write_bytes(jpeg)
    return frames, size


def _write_zip(path: Path, jpegs: Iterator[bytes]) -> tuple[int, int]:
    """Write one stored zip of the same files; returns the number of frames and the bytes of the zip."""
    frames = 0

    def named() -> Iterator[tuple[str, bytes]]:
        nonlocal frames
        for frames, jpeg in enumerate(jpegs, 1):
            yield f"{frames:06d}.jpg", jpeg

    write_packed(path, named())
    return frames, path.stat().st_size


def probe(source: Path, decoder: Decoder = "pyav") -> Outcome:
    """Open a video and decode its first, middle and last frame."""
    try:
        video = open_video(str(source), decoder)
        count = video.num_frames
        declared = max(video.declared_frames, count)
        video.read(np.array([0, count // 2, count - 1]))
        return Outcome(declared, count, source.stat().st_size).checked()
    except DecodeError as error:
        return Outcome(error=_reason(error, source))


def sample(store: FrameStore, videos: Path, video: str) -> tuple[int, float] | None:
    """The frames a video declares and the mean bytes of its first JPEGs, which are not written; None if unreadable."""
    try:
        opened = open_video(str(videos / video), store.settings.decoder)
        sizes = [len(jpeg) for jpeg in itertools.islice(store.jpegs(opened), SAMPLED_FRAMES)]
    except DecodeError:
        return None
    return (opened.declared_frames, sum(sizes) / len(sizes)) if sizes else None


def append_record(records: Path, video: str, stamp: FileStamp, outcome: Outcome) -> None:
    """Record a finished video in one write, so that lines of several processes do not mix.

    The line break comes first, so that a record that a full disk cut off spoils no other.
    """
    record = {"video": video, "source_bytes": stamp.bytes, "source_mtime_ns": stamp.mtime_ns}
    record |= {"declared": outcome.declared, "frames": outcome.frames, "bytes": outcome.bytes}
    data = ("\n" + json.dumps(record)).encode()
    handle = os.open(records, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(handle, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(records))
    finally:
        os.close(handle)


def _reason(error: Exception, source: Path) -> str:
    """The first line of an error without the file, which the report names."""
    return str(error).splitlines()[0].removeprefix(f"{source}: ")
