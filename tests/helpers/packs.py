"""Small frame folders and what is said about packs of them, for the tests of packs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datasets.annotation import AnnotationError
from datasets.pack.format import Pack, PackError, Settings

SMALL = Settings(shard_size=100_000)  # about two of the videos below
VIDEOS = {"a/v_1": 12, "a/v_10": 9, "b c/Größe 動画": 11, "b c/v": 1, "d/e/f": 14, "z": 10}


def make_frames(root: Path, videos: dict[str, int] = VIDEOS) -> Path:
    rng = np.random.default_rng(0)
    for name, count in videos.items():
        (root / name).mkdir(parents=True)
        for number in range(1, count + 1):
            (root / name / f"{number:06d}.jpg").write_bytes(rng.bytes(int(rng.integers(2000, 6000))))
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def failure(function, *arguments, **options) -> str:
    with pytest.raises((PackError, AnnotationError)) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal(pack: Pack, frames: Path, videos: dict[str, int] = VIDEOS) -> None:
    for name, count in videos.items():
        for index in range(count):
            assert pack.read(name, index) == (frames / name / f"{index + 1:06d}.jpg").read_bytes()
