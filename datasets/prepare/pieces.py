"""Files cut in pieces, read as one: `cat piece-00 piece-01 ...` as a stream that can seek."""

from __future__ import annotations

import bisect
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path


class PieceStream(io.RawIOBase):
    """Reads `paths` one after another as one binary file. Raises OSError where a piece cannot be opened or read."""

    def __init__(self, paths: Sequence[Path]):
        self._files = [path.open("rb", buffering=0) for path in paths]
        sizes = (path.stat().st_size for path in paths)
        self._starts = list(itertools.accumulate(sizes, initial=0))  # of each piece, and the end of the last
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        if self._position >= self._starts[-1]:
            return 0
        piece = bisect.bisect_right(self._starts, self._position) - 1
        file = self._files[piece]
        file.seek(self._position - self._starts[piece])
        count = file.readinto(buffer) or 0
        self._position += count
        return count

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
