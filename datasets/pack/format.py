"""A pack on disk: large zip files in place of millions of frame files, and an index to read them at random.

Why not a streaming format: a pack is map-style, any frame costs one read at a known place, as with folders, so exact
epochs, shuffling and a resume in mid-epoch stay those of the samplers.

    frames-00000.zip ...   stored, not compressed; members `<video>/<frame file>`, a video is never split. Unzipping all
                           of them gives the frame folders back byte for byte. The zip comment repeats the settings.
    names.txt              the videos' paths, sorted by their UTF-8 bytes, one a line
    videos.npy             (videos,) VIDEO: one row a line of names.txt
    frames.npy             (frames,) FRAME: where the bytes of each frame are in its shard
    pack.json              version, settings, sizes; written last
    pack.unfinished/       only while a pack is being written

The index files are memory-mapped: opening reads none of them, and all processes of a machine share one copy.

Lives here: the format, and reading it. Does not live here: writing (writer.py), decoding frames (datasets/readers.py).
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import posixpath
import string
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FORMAT, VERSION = "frame pack", 1
HEADER, NAMES, VIDEOS, FRAMES, UNFINISHED = "pack.json", "names.txt", "videos.npy", "frames.npy", "pack.unfinished"
# shard number; first row in frames.npy; number of frames; where the line in names.txt ends
VIDEO = np.dtype([("shard", "<u4"), ("first", "<u8"), ("frames", "<u4"), ("name_end", "<u8")])
FRAME = np.dtype([("offset", "<u8"), ("length", "<u4")])  # bytes


class PackError(RuntimeError):
    """A pack that cannot be read or written as asked; the message is one sentence that names the file or folder."""


@dataclass(frozen=True)
class Settings:
    """How frames are named (`image_tmpl`, numbered from `index_base`) and about how many bytes a shard holds.

    Raises:
        PackError: `image_tmpl` is not a plain file name with one place for the number.
    """

    image_tmpl: str = "{:06d}.jpg"
    index_base: int = 1
    shard_size: int = 1 << 30

    def __post_init__(self) -> None:
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(self.image_tmpl) if field is not None]
            names = {self.frame_name(0), self.frame_name(1)}
        except (ValueError, LookupError, AttributeError) as error:
            raise PackError(f"image template {self.image_tmpl!r} does not format a frame number ({error})") from None
        if len(fields) != 1 or len(names) != 2 or "/" in self.image_tmpl or self.image_tmpl.startswith("."):
            raise PackError(
                f"image template {self.image_tmpl!r} must be a file name with one place for the number, e.g. '{{:06d}}.jpg'"
            )

    def frame_name(self, index: int) -> str:
        """The file name of frame `index`, from 0."""
        return self.image_tmpl.format(index + self.index_base)


@dataclass(frozen=True)
class Header:
    """What pack.json says: settings, numbers of videos and of frames, and the size of each shard in bytes."""

    settings: Settings
    videos: int
    frames: int
    shard_bytes: tuple[int, ...]

    def text(self) -> str:
        fields = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(fields, indent=1) + "\n"


def shard_name(number: int) -> str:
    return f"frames-{number:05d}.zip"


def is_pack(root: str | os.PathLike[str]) -> bool:
    """Whether `root` is a pack, even one that `Pack` refuses because it is unfinished or has lost its pack.json."""
    return any(os.path.exists(os.path.join(root, name)) for name in (HEADER, UNFINISHED, shard_name(0)))


class Pack:
    """An opened pack. Safe to share among threads and across fork; pickles as its path and opens itself anew.

    Attributes:
        root: the pack's folder, as given.
        settings: how frames are named.
        videos, frames: the index, (videos,) VIDEO and (frames,) FRAME, read-only and memory-mapped.
        names: the bytes of names.txt, (bytes,) uint8, read-only and memory-mapped.

    Args:
        max_open: shards that are kept open at once in each process; they are opened when first read.
        check_shards: False opens a pack whose index is whole though shards are `lost`.
    Raises:
        PackError: not a pack, an unfinished or damaged one, another version, or a shard is missing or of another size.
    """

    def __init__(self, root: str | os.PathLike[str], max_open: int = 128, check_shards: bool = True):
        self.root, self._max_open = os.fspath(root), max_open
        header = _read_header(self.root)
        self.settings = header.settings
        self._shards = [os.path.join(self.root, shard_name(number)) for number in range(len(header.shard_bytes))]
        self._shard_bytes = header.shard_bytes
        if check_shards and (lost := self.lost()):
            raise next(iter(lost.values()))
        self.videos, self.frames = self._load(VIDEOS, VIDEO), self._load(FRAMES, FRAME)
        self.names = self._load(NAMES, np.dtype("u1"))
        self._name_ends = self.videos["name_end"]
        found = len(self.videos), len(self.frames), len(self.names)
        if found != (header.videos, header.frames, int(self._name_ends[-1]) + 1):
            raise self._bad_index(HEADER)
        self._descriptor = functools.lru_cache(max_open)(_Descriptor)
        self._last: tuple[str | None, int] = (None, -1)  # the last path looked up and its row

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self._max_open)

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.videos)

    def __iter__(self) -> Iterator[str]:
        """The videos' paths, sorted by their UTF-8 bytes."""
        return map(self.name, range(len(self)))

    def __contains__(self, path: str) -> bool:
        return self._find(path) >= 0

    def num_frames(self, path: str) -> int:
        """Frames of the video at `path`, relative to the root that was packed. PackError if it is not in the pack."""
        return int(self.videos[self._row(path)]["frames"])

    def num_bytes(self, path: str, frames: int) -> int:
        """The files of the first `frames` frames of the video at `path`. PackError if it is not in the pack."""
        first = int(self.videos[self._row(path)]["first"])
        return int(self.frames["length"][first : first + frames].sum(dtype=np.int64))

    def read(self, path: str, index: int) -> bytes:
        """The file of frame `index`, from 0, of the video at `path`.

        Raises:
            PackError: no such video or frame, or the shard cannot be read or ends early.
        """
        shard, offset, length = self._place(path, index)
        try:
            descriptor = self._descriptor(shard)  # held until the bytes are here
            data = os.pread(descriptor.number, length, offset)
        except OSError as error:
            raise PackError(f"{self.where(path, index)} cannot be read ({error.strerror})") from None
        if len(data) != length:
            raise PackError(f"{self.where(path, index)} ends after {len(data)} of {length} bytes: the shard is damaged")
        return data

    def prefetch(self, path: str, indices: Iterable[int]) -> None:
        """Let the system load these frames at once while the caller goes on; `read` then waits about once, not T times.

        A hint that costs about a microsecond a frame. Raises PackError: no such video, frame or shard.
        """
        for index in indices:
            shard, offset, length = self._place(path, index)
            try:
                descriptor = self._descriptor(shard)
                os.posix_fadvise(descriptor.number, offset, max(length, 1), os.POSIX_FADV_WILLNEED)  # 0: all of it
            except OSError as error:
                raise PackError(f"{self.where(path, index)} cannot be read ({error.strerror})") from None

    def where(self, path: str, index: int) -> str:
        """Shard and member of frame `index`, from 0, of the video at `path`, for messages."""
        shard = self._shards[self.videos[self._row(path)]["shard"]]
        return f"{shard}: {path}/{self.settings.frame_name(index)}"

    def name(self, row: int) -> str:
        """The path of the video in row `row` of `videos`."""
        return self._name(row).decode()

    def shard(self, number: int) -> str:
        """The path of shard `number`."""
        return self._shards[number]

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def lost(self) -> dict[int, PackError]:
        """The shards that are missing or of another size than pack.json says."""
        sizes = enumerate(zip(self._shards, self._shard_bytes, strict=True))
        return {number: error for number, (path, size) in sizes if (error := _size_error(path, size))}

    def close(self) -> None:
        """Close this process's descriptors of shards; the next read opens what it needs."""
        self._descriptor.cache_clear()

    def _place(self, path: str, index: int) -> tuple[str, int, int]:
        """Shard, offset and length of a frame."""
        shard, first, frames, _ = self.videos[self._row(path)].item()
        if not 0 <= index < frames:
            raise PackError(f"{self.root}: {path} holds {frames} frames, there is no frame {index} (from 0)")
        return self._shards[shard], *self.frames[first + index].item()

    def _row(self, path: str) -> int:
        row = self._find(path)
        if row < 0:
            raise PackError(f"{self.root}: the pack holds no video {path}")
        return row

    def _find(self, path: str) -> int:
        last, row = self._last
        if path != last:
            key = posixpath.normpath(path).encode("utf-8", "surrogateescape")
            row = bisect.bisect_left(range(len(self)), key, key=self._name)
            row = row if row < len(self) and self._name(row) == key else -1
            self._last = path, row
        return row

    def _name(self, row: int) -> bytes:
        start = int(self._name_ends[row - 1]) + 1 if row else 0
        return self.names[start : self._name_ends[row]].tobytes()

    def _load(self, name: str, dtype: np.dtype) -> np.ndarray:
        """A mapped file of the index as a plain array: slicing np.memmap itself is several times slower."""
        path = os.path.join(self.root, name)
        try:
            array = np.load(path, mmap_mode="r") if name.endswith(".npy") else np.memmap(path, dtype, "r")
        except (OSError, ValueError, EOFError):
            raise self._bad_index(name) from None
        if array.dtype != dtype or array.ndim != 1 or not len(array):
            raise self._bad_index(name)
        return array.view(np.ndarray)

    def _bad_index(self, name: str) -> PackError:
        path = os.path.join(self.root, name)
        return PackError(
            f"{path}: is missing, damaged or of another pack; `python -m datasets.pack --reindex {self.root}` mends it"
        )


class _Descriptor:
    """An open file that closes when nobody holds it: a thread may still read a shard that another one pushed out."""

    number = -1

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _read_header(root: str) -> Header:
    path = os.path.join(root, HEADER)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if found.pop("format") != FORMAT:
            raise ValueError("another format")
        version = found.pop("version")
        if version == VERSION:
            settings, shard_bytes = Settings(**found.pop("settings")), tuple(map(int, found.pop("shard_bytes")))
            return Header(settings, int(found.pop("videos")), int(found.pop("frames")), shard_bytes)
    except FileNotFoundError:
        if os.path.exists(os.path.join(root, UNFINISHED)):
            raise PackError(f"{root}: the pack is unfinished; run the command that writes it again") from None
        advice = f"; `python -m datasets.pack --reindex {root}` makes it" if is_pack(root) else ": this is no pack"
        raise PackError(f"{path}: is missing{advice}") from None
    except OSError as error:
        raise PackError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError):  # ValueError: no JSON, no UTF-8
        raise PackError(f"{path}: is not the header of a pack; `--reindex {root}` makes it again") from None
    raise PackError(f"{path}: the pack is of version {version}, this program reads version {VERSION}")


def _size_error(path: str, size: int) -> PackError | None:
    advice = "copy it again, or run the command that wrote the pack, which makes it again from the frames"
    try:
        found = os.stat(path).st_size
    except OSError as error:
        return PackError(f"{path}: cannot be opened ({error.strerror}); {advice}")
    if found != size:
        return PackError(f"{path}: holds {found} bytes, {HEADER} says {size}; {advice}")
    return None
