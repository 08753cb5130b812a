"""Writing the files that every maker leaves behind: list files and the labels csv, and the makers' one error.

Does not live here: reading them back (datasets/annotation.py) and anything about one dataset.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


class PrepareError(ValueError):
    """A dataset that cannot be made as asked; the message is one sentence that names the file, folder or option."""


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 under a temporary name, then renames: `path` is whole or absent. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Writes a list file: the fields of a row joined by one space, one row a line."""
    write_text(path, "".join(" ".join(map(str, row)) + "\n" for row in rows))


def write_labels(path: Path, names: Sequence[str]) -> None:
    """Writes the labels csv with the header `id,name`; the id of a name is its place in `names`."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("id", "name"))
    writer.writerows(enumerate(names))
    write_text(path, buffer.getvalue())
