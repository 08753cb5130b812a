"""Frame folder, pack or video file -> uint8 frames: how pixels are stored, and every way in which they can be broken.

Lives here: one reader for each kind of storage behind one small protocol,
`Reader.open(...) -> Clip`, `Clip.fetch(indices) -> Frames`, `Frames.decode(box) -> pixels`.
Frames know their size before they are decoded, so that a crop can be drawn first and no more than it is kept.
Does not live here: which frames are wanted (sampling.py), what happens to them (transforms.py), how a JPEG or a video
is decoded (jpeg.py, decoders/) and how packs are made (pack/).

T frames of H x W pixels.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
from PIL import Image

from datasets import jpeg
from datasets.box import Box
from datasets.decoders import DecodeError, Decoder, open_video
from datasets.pack.format import HEADER, Pack, PackError


class ReadError(RuntimeError):
    """A video that cannot be read as the list promises; the message names the file or folder."""


class Frames(Protocol):
    """T frames of one size, fetched but not necessarily decoded."""

    height: int
    width: int

    def decode(self, box: Box | None = None, fast: bool = False) -> np.ndarray:
        """This part of all frames, or the whole: (T, h, w, 3) uint8 RGB. Raises ReadError.

        `fast` allows what is faster and hardly visible (jpeg.decode says what); without it pixels are exact.
        """
        ...

    def reduced(self, least_height: int, least_width: int) -> Frames:
        """The same frames at 1/2, 1/4 or 1/8 of their size where that costs nothing, but not below these sides."""
        ...


class Clip(ABC):
    """An opened video of `num_frames` frames."""

    num_frames: int

    @abstractmethod
    def fetch(self, indices: np.ndarray) -> Frames:
        """The frames at `indices`, from 0, in that order, repeated ones too. Raises ReadError."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The same as whole pixels: (T, H, W, 3) uint8 RGB."""
        return self.fetch(indices).decode()


class Reader(Protocol):
    def open(self, path: str, declared_frames: int | None) -> Clip:
        """Look at the video at `path`, of which the list says that it has `declared_frames`. Raises ReadError."""
        ...

    def stamped(self, path: str) -> str:
        """The file or folder that changes when the video at `path` does."""
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
        if not os.path.isfile(clip.name(declared_frames - 1)):
            raise clip.missing(declared_frames - 1)
        return clip

    def stamped(self, path: str) -> str:
        """The video's folder."""
        return path


class PackReader:
    """The frame folders of a pack (pack/format.py); `path` begins with the pack's own.

    A list's number of frames is a promise: a pack with fewer is an error, of one with more the first ones count.
    """

    def __init__(self, root: str):
        try:
            self.pack = Pack(root)
        except PackError as error:
            raise ReadError(str(error)) from None
        self.root = os.path.join(root, "")

    def stamped(self, path: str) -> str:
        """The pack's head, which is written anew with the pack."""
        return os.path.join(self.root, HEADER)

    def open(self, path: str, declared_frames: int | None) -> Clip:
        video = path.removeprefix(self.root)
        try:
            frames = self.pack.num_frames(video)
        except PackError as error:
            raise ReadError(str(error)) from None
        if declared_frames is not None and frames < declared_frames:
            raise ReadError(f"{path}: the pack holds {frames} frames, the list declares {declared_frames}")
        return _PackedClip(self.pack, video, path, declared_frames or frames)


class VideoReader:
    """Any file that the decoder can decode, on one thread.

    A list's number of frames is a promise only: a file with fewer is an error, a file with more is used whole.
    """

    def __init__(self, decoder: Decoder = "decord"):
        self.decoder = decoder

    def stamped(self, path: str) -> str:
        """The video's file."""
        return path

    def open(self, path: str, declared_frames: int | None) -> Clip:
        clip = _VideoClip(path, self.decoder)
        if declared_frames is not None and clip.num_frames < declared_frames:
            raise ReadError(f"{path}: holds {clip.num_frames} frames, the list declares {declared_frames}")
        return clip


class _ImageClip(Clip):
    """A video whose frames are image files, wherever these are."""

    @abstractmethod
    def load(self, index: int) -> tuple[str, bytes]:
        """The name of a frame, for messages, and its file, whole. Raises ReadError."""

    def fetch(self, indices: np.ndarray) -> Frames:
        wanted, places = np.unique(indices, return_inverse=True)
        frames = [_image(*self.load(index)) for index in wanted.tolist()]
        first = frames[0]
        for frame in frames:
            if (frame.height, frame.width) != (first.height, first.width):
                raise ReadError(
                    f"{frame.name}: is {frame.width}x{frame.height} pixels, "
                    f"but {first.name} is {first.width}x{first.height}"
                )
        return _ImageFrames(frames, places)


class _FrameFolder(_ImageClip):
    def __init__(self, folder: str, image_tmpl: str, index_base: int, num_frames: int):
        self.folder, self.image_tmpl, self.index_base, self.num_frames = folder, image_tmpl, index_base, num_frames

    def name(self, index: int) -> str:
        return f"{self.folder}{os.sep}{self.image_tmpl.format(index + self.index_base)}"

    def load(self, index: int) -> tuple[str, bytes]:
        name = self.name(index)
        try:
            with open(name, "rb", buffering=0) as file:
                return name, file.read()
        except FileNotFoundError:
            raise self.missing(index) from None
        except OSError as error:
            raise ReadError(f"{name}: cannot be read ({error.strerror})") from error

    def missing(self, index: int) -> ReadError:
        name = os.path.basename(self.name(index))
        return ReadError(
            f"{self.folder}: {name} is missing; the folder holds {len(os.listdir(self.folder))} files, "
            f"the list declares {self.num_frames} frames"
        )


class _PackedClip(_ImageClip):
    def __init__(self, pack: Pack, video: str, path: str, num_frames: int):
        self.pack, self.video, self.path, self.num_frames = pack, video, path, num_frames

    def fetch(self, indices: np.ndarray) -> Frames:
        try:
            self.pack.prefetch(self.video, indices.tolist())
        except PackError as error:
            raise ReadError(str(error)) from None
        return super().fetch(indices)

    def load(self, index: int) -> tuple[str, bytes]:
        try:
            return self.pack.where(self.video, index), self.pack.read(self.video, index)
        except PackError as error:
            raise ReadError(str(error)) from None


class _Jpeg:
    """A JPEG that is not decoded yet, perhaps to be decoded at a fraction of its size."""

    def __init__(self, name: str, data: bytes, factor: int = 1):
        self.name, self.data, self.factor = name, data, factor
        height, width = jpeg.size(data)
        self.height, self.width = -(-height // factor), -(-width // factor)

    def decode(self, box: Box, fast: bool) -> np.ndarray:
        try:
            pixels = jpeg.decode_reduced(self.data, self.factor) if self.factor > 1 else jpeg.decode(self.data, fast)
        except jpeg.JpegError as error:
            raise _not_readable(self.name, error) from error
        return pixels[box.top : box.bottom, box.left : box.right]

    def reduced(self, least_height: int, least_width: int) -> _Jpeg:
        factor = jpeg.reduction(self.height, self.width, least_height, least_width)
        return self if factor == 1 else _Jpeg(self.name, self.data, factor)


class _Pixels:
    """An image that is decoded already."""

    def __init__(self, name: str, pixels: np.ndarray):
        self.name, self.pixels = name, pixels  # (H, W, 3)
        self.height, self.width, _ = pixels.shape

    def decode(self, box: Box, fast: bool) -> np.ndarray:
        return self.pixels[box.top : box.bottom, box.left : box.right]

    def reduced(self, least_height: int, least_width: int) -> _Pixels:
        return self


def _image(name: str, data: bytes) -> _Jpeg | _Pixels:
    """JPEGs wait to be decoded; whatever else Pillow reads is decoded at once. Raises ReadError."""
    if jpeg.is_jpeg(data):
        with suppress(jpeg.JpegError):  # an unusual one, which Pillow may know, or a damaged one
            return _Jpeg(name, data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _Pixels(name, np.asarray(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged images
        raise _not_readable(name, error) from error


def _not_readable(name: str, error: Exception) -> ReadError:
    reason = str(error) if isinstance(error, jpeg.JpegError) else type(error).__name__
    return ReadError(f"{name}: is not a readable image ({reason})")


class _ImageFrames:
    """Images, each of which may be shown several times."""

    def __init__(self, images: Sequence[_Jpeg | _Pixels], places: np.ndarray):
        self.images, self.places = images, places
        self.height, self.width = images[0].height, images[0].width

    def decode(self, box: Box | None = None, fast: bool = False) -> np.ndarray:
        box = box or Box(0, 0, self.height, self.width)
        frames = np.stack([image.decode(box, fast) for image in self.images])  # (unique, h, w, 3)
        return frames if len(frames) == len(self.places) else frames[self.places]

    def reduced(self, least_height: int, least_width: int) -> Frames:
        return _ImageFrames([image.reduced(least_height, least_width) for image in self.images], self.places)


class _VideoClip(Clip):
    def __init__(self, path: str, decoder: Decoder):
        try:
            self._video = open_video(path, decoder)
        except DecodeError as error:
            raise ReadError(str(error)) from error
        self.num_frames = self._video.num_frames

    def fetch(self, indices: np.ndarray) -> Frames:
        try:
            return DecodedFrames(self._video.read(indices))
        except DecodeError as error:
            raise ReadError(str(error)) from error


class DecodedFrames:
    """Frames that are pixels already: (T, H, W, 3) uint8 RGB."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels  # (T, H, W, 3)
        _, self.height, self.width, _ = pixels.shape

    def decode(self, box: Box | None = None, fast: bool = False) -> np.ndarray:
        return self.pixels if box is None else self.pixels[:, box.top : box.bottom, box.left : box.right]

    def reduced(self, least_height: int, least_width: int) -> Frames:
        return self
