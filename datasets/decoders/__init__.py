"""Video file -> uint8 RGB frames: one function, `open_video`, over the libraries that can decode.

Every library gives the same frames for the same indices, or one sentence that refuses the file: frame k is the k-th, in
the order of presentation, that decodes when the file is decoded from its beginning, turned and mirrored as players show
it. Pixels differ by the libraries' colour conversion alone.

torchcodec 0.17 is no choice: it needs FFmpeg's shared libraries on the system, and it trusts the time stamps of every
file, so on MPEG-4 AVIs with packed B-frames (all of HMDB51's) it gives other frames. It is not faster.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from datasets.decoders.base import LARGEST_LOSS, PACKAGES, DecodeError, Decoder, DecoderMissing, VideoFile, library
from datasets.decoders.decord_file import DecordFile
from datasets.decoders.pyav_file import PyAVFile

__all__ = ["LARGEST_LOSS", "PACKAGES", "DecodeError", "Decoder", "DecoderMissing", "VideoFile", "library", "open_video"]

OPENERS: dict[str, Callable[[str], VideoFile]] = {"pyav": PyAVFile, "decord": DecordFile}


def open_video(path: str, decoder: Decoder = "pyav") -> VideoFile:
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
