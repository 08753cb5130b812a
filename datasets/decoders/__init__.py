"""Video file -> uint8 RGB frames: one small interface, `open_video`, over the libraries that can decode.

Lives here: the choice of a library and what is refused before any library looks at the file.
Does not live here: the interface itself (base.py), what each library does (decord_file.py, pyav_file.py), which frames
are wanted (sampling.py), what a list promises about a file (readers.py).

Of files that are whole, every library gives the same frames for the same indices: frame k is the k-th, in the order of presentation, that
decodes when the file is decoded from its beginning. Pixels differ by the libraries' colour conversion alone.
torchcodec 0.17 is no choice: it needs FFmpeg's shared libraries on the system, and trusts the time stamps of every
file: on MPEG-4 AVIs with packed B-frames (all of HMDB51's) it gives other frames. It is no faster than PyAV here.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from datasets.decoders.base import PACKAGES, DecodeError, Decoder, DecoderMissing, VideoFile, library
from datasets.decoders.decord_file import DecordFile
from datasets.decoders.pyav_file import PyAVFile

__all__ = ["PACKAGES", "DecodeError", "Decoder", "DecoderMissing", "VideoFile", "library", "open_video"]

OPENERS: dict[str, Callable[[str], VideoFile]] = {"decord": DecordFile, "pyav": PyAVFile}


def open_video(path: str, decoder: Decoder = "decord") -> VideoFile:
    """Open the video at `path` with one library, which decodes on one thread.

    Raises:
        DecodeError: the file is absent, empty or no video, or nothing of it decodes.
        DecoderMissing: the library is not installed.
        ValueError: there is no such library.
    """
    if decoder not in OPENERS:
        raise ValueError(f"data.decoder: {decoder} is none of {', '.join(OPENERS)}")
    if not os.path.isfile(path):
        raise DecodeError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise DecodeError(f"{path}: is empty")
    return OPENERS[decoder](path)
