"""Frame folder, packed frames or video file -> uint8 frames, and every way in which stored pixels can be broken.

There is one reader for frames and one for video files behind one small interface:
`Reader.open(...) -> Clip`, `Clip.fetch(indices) -> Frames`, `Frames.decode(box) -> pixels`.
Frames know their size before they are decoded, so a crop can be drawn first and only the crop is kept.

T frames of H x W pixels.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from datasets.box import Box
from datasets.decoders import DecodeError, Decoder, open_video
from datasets.frame_names import FrameNames
from datasets.images import ImageError, JpegImage, PixelImage, open_image
from datasets.limits import SizeError, check_file_size
from datasets.packed_frames import PackedVideo, PackError, packed_path


class ReadError(RuntimeError):
    """A video that cannot be read as the list promises; the message names the file or folder."""


class Frames(Protocol):
    """T frames of one size, fetched but not necessarily decoded."""

    height: int
    width: int

    def decode(self, box: Box | None = None, fast: bool = False) -> np.ndarray:
        """This part of all frames, or all of it: (T, h, w, 3) uint8 RGB. Raises ReadError.

        `fast` allows what is faster and hardly visible (see jpeg.decode); without it pixels are exact.
        """
        ...

    def reduced(self, least_height: int, least_width: int) -> Frames:
        """The same frames at 1/2, 1/4 or 1/8 of their size where that costs nothing, but not below these sides."""
        ...


class Clip(ABC):
    """An opened video of `num_frames` frames, `fps` a second if that is known. It belongs to the process that opened it."""

    num_frames: int
    fps: float | None = None

    @property
    def declared_frames(self) -> int:
        """Frames that the file itself says it holds; more than `num_frames` if it is damaged or cut."""
        return self.num_frames

    @abstractmethod
    def fetch(self, indices: np.ndarray) -> Frames:
        """The frames at `indices`, from 0, in that order; indices may repeat. Raises ReadError."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The same as complete pixels: (T, H, W, 3) uint8 RGB."""
        return self.fetch(indices).decode()


class Reader(Protocol):
    def open(self, path: str, declared_frames: int | None) -> Clip:
        """Open the video at `path`, of which the list says that it has `declared_frames`. Raises ReadError."""
        ...

    def stored_at(self, path: str) -> str:
        """The file or folder that changes when the video at `path` does."""
        ...


class FrameFolderReader:
    """One image a frame, in a folder a video or, where `<folder>.zip` is there, in that zip (packed_frames.py).

    Frames are named by `image_tmpl` and numbered from `index_base`. Their number is the list's: other files do not
    count, and fewer frames are an error. `fps` is that of all videos, as their frames do not say.
    """

    def __init__(self, image_tmpl: str, index_base: int = 1, fps: float | None = None):
        self.names = FrameNames(image_tmpl, index_base)
        self.fps = fps

    def open(self, path: str, declared_frames: int | None) -> ImageClip:
        if declared_frames is None:
            raise ReadError(f"{path}: the list must say how many frames a folder holds")
        packed = packed_path(path)
        if os.path.isfile(packed):
            clip = _PackedFrames(packed, self, declared_frames)
        elif os.path.isdir(path):
            clip = _FrameFolder(path, self, declared_frames)
        else:
            reason = f"there is no such folder, and no {os.path.basename(packed)}"
            if os.path.isfile(path):
                reason = "is a file; data.modality: video reads video files"
            raise ReadError(f"{path}: {reason}")
        for index in (declared_frames - 1, 0):  # the first, too: with another numbering it alone may be missing
            name = self.names.name(index)
            if name not in clip:
                raise clip.missing(name)
        return clip

    def stored_at(self, path: str) -> str:
        """The video's zip, or its folder."""
        packed = packed_path(path)
        return packed if os.path.isfile(packed) else path


class VideoReader:
    """Any file that the decoder can decode, on one thread.

    A list's number of frames is a promise only: a file with fewer is an error, a file with more is used completely.
    """

    def __init__(self, decoder: Decoder = "pyav"):
        self.decoder = decoder

    def stored_at(self, path: str) -> str:
        """The video's file."""
        return path

    def open(self, path: str, declared_frames: int | None) -> Clip:
        clip = _VideoClip(path, self.decoder)
        if declared_frames is not None and clip.num_frames < declared_frames:
            raise ReadError(f"{path}: holds {clip.num_frames} frames, the list declares {declared_frames}")
        return clip


class ImageClip(Clip):
    """A video whose frames are image files, in a folder or in a zip."""

    def __init__(self, path: str, reader: FrameFolderReader, num_frames: int):
        self.path, self.reader, self.num_frames = path, reader, num_frames
        self.fps = reader.fps

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether there is a frame of this name."""

    @abstractmethod
    def files(self) -> list[str]:
        """The names of all that is there."""

    @abstractmethod
    def load(self, index: int) -> tuple[str, bytes]:
        """The path of frame `index`, for messages, and the bytes of its file. Raises ReadError, SizeError."""

    def fetch(self, indices: np.ndarray) -> Frames:
        wanted, order = np.unique(indices, return_inverse=True)
        try:
            images = [open_image(*self.load(index)) for index in wanted.tolist()]
        except (ImageError, SizeError) as error:
            raise ReadError(str(error)) from error
        first = images[0]
        for image in images:
            if (image.height, image.width) != (first.height, first.width):
                raise ReadError(
                    f"{image.path}: is {image.width}x{image.height} pixels, "
                    f"but {first.path} is {first.width}x{first.height}"
                )
        return _ImageFrames(images, order)

    def missing(self, name: str) -> ReadError:
        files = self.files()
        counts = f"there are {len(files)} files, the list declares {self.num_frames} frames"
        return ReadError(f"{self.path}: {name} is missing; {counts}{self.reader.names.advice(files)}")


class _FrameFolder(ImageClip):
    def __contains__(self, name: str) -> bool:
        return os.path.isfile(os.path.join(self.path, name))

    def files(self) -> list[str]:
        inner = os.path.dirname(self.reader.names.image_tmpl)  # a template may name a folder too
        try:
            return [os.path.join(inner, file) for file in os.listdir(os.path.join(self.path, inner))]
        except OSError:
            return []

    def load(self, index: int) -> tuple[str, bytes]:
        name = self.reader.names.name(index)
        path = os.path.join(self.path, name)
        try:
            with open(path, "rb", buffering=0) as file:
                check_file_size(path, os.fstat(file.fileno()).st_size)
                return path, file.read()
        except FileNotFoundError:
            raise self.missing(name) from None
        except OSError as error:
            raise ReadError(f"{path}: cannot be read ({error.strerror})") from error


class _PackedFrames(ImageClip):
    def __init__(self, path: str, reader: FrameFolderReader, num_frames: int):
        super().__init__(path, reader, num_frames)
        try:
            self._video = PackedVideo(path)
        except PackError as error:
            raise ReadError(str(error)) from None

    def __contains__(self, name: str) -> bool:
        return name in self._video

    def files(self) -> list[str]:
        return list(self._video.sizes())

    def load(self, index: int) -> tuple[str, bytes]:
        name = self.reader.names.name(index)
        if name not in self:
            raise self.missing(name)
        try:
            return f"{self.path}: {name}", self._video.read(name)
        except PackError as error:
            raise ReadError(str(error)) from None


class _ImageFrames:
    """Images, each of which may be shown several times: frame t is images[order[t]]."""

    def __init__(self, images: Sequence[JpegImage | PixelImage], order: np.ndarray):
        self.images, self.order = images, order  # order: (T,)
        self.height, self.width = images[0].height, images[0].width

    def decode(self, box: Box | None = None, fast: bool = False) -> np.ndarray:
        box = box or Box(0, 0, self.height, self.width)
        try:
            frames = np.stack([image.decode(box, fast) for image in self.images])  # (unique, h, w, 3)
        except ImageError as error:
            raise ReadError(str(error)) from error
        in_order = np.array_equal(self.order, np.arange(len(frames)))
        return frames if in_order else frames[self.order]

    def reduced(self, least_height: int, least_width: int) -> Frames:
        return _ImageFrames([image.reduced(least_height, least_width) for image in self.images], self.order)


class _VideoClip(Clip):
    def __init__(self, path: str, decoder: Decoder):
        try:
            self._video = open_video(path, decoder)
            self.num_frames, self.fps = self._video.num_frames, self._video.fps
        except DecodeError as error:
            raise ReadError(str(error)) from error

    @property
    def declared_frames(self) -> int:
        return self._video.declared_frames

    def fetch(self, indices: np.ndarray) -> Frames:
        try:
            return DecodedFrames(self._video.read(indices))
        except DecodeError as error:
            raise ReadError(str(error)) from error


class DecodedFrames:
    """Frames that are decoded already: (T, H, W, 3) uint8 RGB."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels  # (T, H, W, 3)
        _, self.height, self.width, _ = pixels.shape

    def decode(self, box: Box | None = None, fast: bool = False) -> np.ndarray:
        return self.pixels if box is None else self.pixels[:, box.top : box.bottom, box.left : box.right]

    def reduced(self, least_height: int, least_width: int) -> Frames:
        return self
