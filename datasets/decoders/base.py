"""What every decoder offers: the interface of an opened video, its errors, and what the libraries' modules share."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType
from typing import Literal

import numpy as np

Decoder = Literal["pyav", "decord"]

PACKAGES: dict[Decoder, str] = {"pyav": "av", "decord": "decord"}  # the package that each decoder needs
LARGEST_LOSS = 0.1  # share of the declared frames; a video that lacks more of them cannot be used
KEEP_BYTES = 256 << 20  # frames of a file that had to be decoded from its start are kept up to this size


class DecodeError(RuntimeError):
    """A video file that cannot be decoded as requested; one sentence that names the file."""


class DecoderMissing(RuntimeError):
    """The requested library is not installed: the setup is wrong, not the file."""


def library(decoder: Decoder) -> ModuleType:
    """The library of a decoder, imported when it is first needed. Raises DecoderMissing."""
    package = PACKAGES[decoder]
    try:
        return importlib.import_module(package)
    except ImportError:
        raise DecoderMissing(f"data.decoder: {decoder} needs the package {package}: pip install {package}") from None


class VideoFile(ABC):
    """An opened video of frames numbered from 0 in the order of presentation; H and W are those of the display.

    Attributes:
        path: the file.
        num_frames: frames that can be read. Known without decoding where a file's packets can be trusted to hold one
            frame each, otherwise counted by decoding the file once, which raises DecodeError if it is damaged.
        declared_frames: frames that the file says it holds, by their number or by the duration; of a damaged or cut file
            fewer decode.
        fps: frames a second, the average that the file states; None if it states none.
    """

    path: str
    num_frames: int
    declared_frames: int
    fps: float | None

    @abstractmethod
    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames in any order, also repeated, each decoded once: (T,) -> (T, H, W, 3) uint8 RGB. DecodeError."""

    @abstractmethod
    def frames(self) -> Iterator[np.ndarray]:
        """Every frame from the first on, (H, W, 3) uint8 RGB, up to the last that decodes. Do not mix it with `read`.

        Raises DecodeError if not even the first one decodes; damage further on ends the frames early.
        """

    @cached_property
    def _size(self) -> tuple[int, int]:
        return self.read(np.zeros(1, dtype=np.int64)).shape[1:3]

    @property
    def height(self) -> int:
        """Pixels, after rotation; decodes the first frame."""
        return self._size[0]

    @property
    def width(self) -> int:
        """Pixels, after rotation; decodes the first frame."""
        return self._size[1]

    def _wanted(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T,) indices -> the distinct ones in rising order (U,), and which of them each index is (T,)."""
        wanted, inverse = np.unique(indices, return_inverse=True)
        if wanted[0] < 0 or wanted[-1] >= self.num_frames:
            wrong = wanted[0] if wanted[0] < 0 else wanted[-1]
            raise DecodeError(f"{self.path}: frame {wrong} is requested, the file holds {self.num_frames} frames")
        return wanted, inverse

    def _short(self, found: int) -> DecodeError:
        return DecodeError(f"{self.path}: only {found} of {self.declared_frames} frames can be decoded")


@contextmanager
def decoding(path: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors of a library, its own `kinds` and usual ones, into a DecodeError of one sentence."""
    try:
        yield
    except (DecodeError, DecoderMissing):
        raise
    except (*kinds, RuntimeError, ValueError, OSError, StopIteration) as error:
        raise DecodeError(f"{path}: cannot be decoded ({type(error).__name__})") from error
