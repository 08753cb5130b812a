"""Frame folder or video file -> uint8 frames: how pixels are stored, and every way in which they can be broken.

Lives here: one reader for each kind of storage behind one small protocol, `Reader.open(...) -> Clip.read(indices)`.
Does not live here: which frames are wanted (sampling.py) or what happens to them (transforms.py).

What decord 0.6.0 does, seen on HMDB51, UCF101 and Kinetics files and on small files of the common encoders:
- It turns rotated phone videos upright, and reads .webm, .mkv and files with metadata in any encoding.
- It counts packets. MPEG-4 AVIs with packed B-frames (many of HMDB51) hold one packet more than frames, and where a
  frame is missing it silently returns another one. With a `fault_tol` close to 0 it raises instead.
- Where packets carry no time stamps (the same AVIs, and a tenth of UCF101) a seek may land elsewhere: in HMDB51 files
  up to 20 frames off, depending on which other frames are asked for. Decoding from the first frame on is right.
- H.264 with open GOPs reads a few frames off after a seek; nothing in the file shows that beforehand.
- A file that is no video prints one line to stderr from native code; everything of FFmpeg's own is silenced here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from PIL import Image

NO_SUBSTITUTES = 1e-9  # decord's fault_tol: the share of frames that it may replace by others


class ReadError(RuntimeError):
    """A video that cannot be read as the list promises; the message names the file or folder."""


class Clip(Protocol):
    """An opened video of `num_frames` frames."""

    num_frames: int

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The frames at `indices`, from 0, in that order, repeated ones too: (T, H, W, 3) uint8 RGB. ReadError."""
        ...


class Reader(Protocol):
    def open(self, path: str, declared_frames: int | None) -> Clip:
        """Look at the video at `path`, of which the list says that it has `declared_frames`. Raises ReadError."""
        ...


class FrameFolderReader:
    """One folder a video, one image a frame, named by `image_tmpl` and numbered from `index_base`.

    The number of frames is the list's: other files in the folder do not count, and fewer frames are an error.
    """

    def __init__(self, image_tmpl: str, index_base: int = 1):
        self.image_tmpl = image_tmpl
        self.index_base = index_base

    def open(self, path: str, declared_frames: int | None) -> Clip:
        if declared_frames is None:
            raise ReadError(f"{path}: the list must say how many frames a folder holds")
        if not os.path.isdir(path):
            raise ReadError(f"{path}: no such folder")
        clip = _FrameFolder(path, self.image_tmpl, self.index_base, declared_frames)
        if not os.path.isfile(clip.file(declared_frames - 1)):
            raise clip.missing(declared_frames - 1)
        return clip


class _FrameFolder:
    def __init__(self, folder: str, image_tmpl: str, index_base: int, num_frames: int):
        self.folder, self.image_tmpl, self.index_base, self.num_frames = folder, image_tmpl, index_base, num_frames

    def file(self, index: int) -> str:
        return os.path.join(self.folder, self.image_tmpl.format(index + self.index_base))

    def missing(self, index: int) -> ReadError:
        name = os.path.basename(self.file(index))
        return ReadError(
            f"{self.folder}: {name} is missing; the folder holds {len(os.listdir(self.folder))} files, "
            f"the list declares {self.num_frames} frames"
        )

    def read(self, indices: np.ndarray) -> np.ndarray:
        wanted, places = np.unique(indices, return_inverse=True)
        frames = [self._frame(int(index)) for index in wanted]
        for index, frame in zip(wanted, frames, strict=True):
            if frame.shape != frames[0].shape:
                (h0, w0, _), (h, w, _) = frames[0].shape, frame.shape
                raise ReadError(
                    f"{self.file(int(index))}: is {w}x{h} pixels, but {self.file(int(wanted[0]))} is {w0}x{h0}"
                )
        return np.stack(frames)[places]  # (T, H, W, 3)

    def _frame(self, index: int) -> np.ndarray:
        file = self.file(index)
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
        except FileNotFoundError:
            raise self.missing(index) from None
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged images
            raise ReadError(f"{file}: is not a readable image ({type(error).__name__})") from error


class VideoReader:
    """Any file that decord can decode, on one thread; only the wanted frames are decoded where seeking is exact.

    A list's number of frames is a promise only: a file with fewer is an error, a file with more is used whole.
    """

    def open(self, path: str, declared_frames: int | None) -> Clip:
        if not os.path.isfile(path):
            raise ReadError(f"{path}: no such file")
        if os.path.getsize(path) == 0:
            raise ReadError(f"{path}: is empty")
        clip = _VideoFile(path)
        if declared_frames is not None and clip.num_frames < declared_frames:
            raise ReadError(f"{path}: holds {clip.num_frames} frames, the list declares {declared_frames}")
        return clip


class _VideoFile:
    def __init__(self, path: str):
        self.path = path
        with _decoding(path):
            self._video = _decord_open(path)
            packets = len(self._video)
            starts = self._video.get_frame_timestamp(range(packets))[:, 0]  # (packets,) seconds
        self._seekable = bool((np.diff(starts) > 0).all()) and starts[0] > -1e9  # a missing time stamp is about -1e17
        self.num_frames = packets if self._seekable else self._count(packets)

    def _count(self, packets: int) -> int:
        """Frames that decode, found by decoding them; packed B-frames leave one or two packets without a frame."""
        import decord

        with _decoding(self.path):
            for frames in range(packets):
                try:
                    self._video.next()
                except decord.DECORDLimitReachedError as error:
                    if frames < max(1, packets - 2):
                        raise ReadError(f"{self.path}: only {frames} of {packets} frames can be decoded") from error
                    return frames
        return packets

    def read(self, indices: np.ndarray) -> np.ndarray:
        import decord

        wanted, places = np.unique(indices, return_inverse=True)
        with _decoding(self.path):
            frames = None
            if self._seekable:
                try:
                    frames = self._video.get_batch(wanted).asnumpy()
                except decord.DECORDLimitReachedError:
                    self._seekable = False  # a frame was not where the key frames promise it: open GOPs, or damage
            if frames is None:
                frames = self._read_from_start(wanted)
        return frames[places]  # (T, H, W, 3)

    def _read_from_start(self, wanted: np.ndarray) -> np.ndarray:
        video, keep = _decord_open(self.path), set(wanted.tolist())
        frames = ((index, video.next()) for index in range(int(wanted[-1]) + 1))
        return np.stack([frame.asnumpy() for index, frame in frames if index in keep])  # (unique, H, W, 3)


def _decord_open(path: str) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader(path, num_threads=1, fault_tol=NO_SUBSTITUTES)


@contextmanager
def _decoding(path: str) -> Iterator[None]:
    """Turn whatever decord raises, several kinds with texts of many lines, into a ReadError that names the file."""
    try:
        yield
    except (ReadError, ImportError):
        raise
    except Exception as error:
        raise ReadError(f"{path}: cannot be decoded ({type(error).__name__})") from error
