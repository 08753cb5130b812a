"""Small frame folders for the tests of packed frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datasets.packed_frames import PackedVideo, PackError

VIDEOS = {"a/v_1": 12, "a/v_10": 9, "b c/Größe 動画": 11, "b c/v": 1, "d/e/f": 14, "z": 10}  # frames of each


def make_frames(root: Path, videos: dict[str, int] = VIDEOS) -> Path:
    """Folders of files that are no images: packing does not look into them."""
    rng = np.random.default_rng(0)
    for name, count in videos.items():
        (root / name).mkdir(parents=True)
        for number in range(1, count + 1):
            (root / name / f"{number:06d}.jpg").write_bytes(rng.bytes(int(rng.integers(2000, 6000))))
    return root


def content(folder: Path) -> dict[str, bytes]:
    """Path and bytes of every file that is not hidden."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def failure(function, *arguments, **options) -> str:
    with pytest.raises(PackError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_packed(packed: Path, frames: Path, videos: dict[str, int] = VIDEOS) -> None:
    """All videos are packed, byte for byte, and nothing else is."""
    assert content(packed).keys() == {f"{name}.zip" for name in videos}
    for name, count in videos.items():
        video = PackedVideo(packed / f"{name}.zip")
        files = {f"{number:06d}.jpg": (frames / name / f"{number:06d}.jpg") for number in range(1, count + 1)}
        assert video.sizes() == {name: file.stat().st_size for name, file in files.items()}
        assert all(video.read(name) == file.read_bytes() for name, file in files.items())
