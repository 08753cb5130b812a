"""The published annotation files: finding them below --annotations, and reading text, csv and JSON with file and line."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import walk
from datasets.prepare.plan import PrepareError, choose_splits

EXAMPLES = 6  # names of existing files in a message


class AnnotationFileMissing(PrepareError):
    """An annotation file is missing; it may be in an archive."""


class AnnotationFiles:
    """The files below a folder, by name; hidden ones are ignored.

    Args:
        root: the folder given by --annotations.
        title: the dataset's name in messages.
        unpacked: a folder of unpacked archives, used for names that `root` does not have.

    Raises:
        PrepareError: `root` is not a folder.
    """

    def __init__(self, root: Path, title: str, unpacked: Path | None = None):
        if not root.is_dir() and unpacked is None:
            raise PrepareError(f"--annotations {root}: is not a folder")
        self.root, self.title = root, title
        self._files = _by_name(root, skip=unpacked)
        if unpacked is not None:
            self._files = {**_by_name(unpacked), **self._files}

    def find(self, *names: str) -> Path | None:
        """The file of one of these names, or None. Raises PrepareError if there are several."""
        found = [path for name in names for path in self._files.get(name, ())]
        if len(found) > 1:
            raise PrepareError(f"{found[0]} and {found[1]} could both be an annotation file of {self.title}; keep one")
        return found[0] if found else None

    def require(self, *names: str) -> Path:
        """The file of one of these names. Raises PrepareError if there is none or several."""
        path = self.find(*names)
        if path is None:
            existing = sorted(self._files)
            shown = ", ".join(existing[:EXAMPLES]) + (" ..." if len(existing) > EXAMPLES else "")
            raise AnnotationFileMissing(
                f"--annotations {self.root}: {self.title} needs {' or '.join(names[:2])}; found {shown or 'no files'}"
            )
        return path

    def matching(self, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], Path]]:
        """All files whose names match, sorted by name."""
        matches = ((pattern.fullmatch(name), name) for name in sorted(self._files))
        return [(match, self.require(name)) for match, name in matches if match]

    def split_files(self, names: Mapping[str, Sequence[str]], requested: Sequence[str] | None) -> dict[str, Path]:
        """The file of each split. Only `test` may be missing, unless --splits requests it."""
        files = {}
        for split in choose_splits(self.title, tuple(names), requested):
            optional = requested is None and split == "test"
            path = self.find(*names[split]) if optional else self._require_split(split, names)
            if path is not None:
                files[split] = path
        return files

    def _require_split(self, split: str, names: Mapping[str, Sequence[str]]) -> Path:
        """The file of a split; the message says how to prepare the splits whose files exist."""
        try:
            return self.require(*names[split])
        except AnnotationFileMissing as error:
            others = [other for other in names if other != split and any(self._files.get(n) for n in names[other])]
            hint = f" (--splits {','.join(others)} prepares only what is there)" if others else ""
            raise AnnotationFileMissing(f"{error}{hint}") from None


def _by_name(root: Path, skip: Path | None = None) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = defaultdict(list)
    for folder, names in walk(root, skip) if root.is_dir() else ():
        for name in names:
            files[name].append(folder / name)
    return dict(files)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PrepareError(f"{path}: is not UTF-8 text ({error.reason})") from None


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, stripped, with their numbers from 1. Raises PrepareError if it is not UTF-8."""
    lines = enumerate(_read_text(path).split("\n"), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_table(path: Path, delimiter: str = ",") -> list[tuple[str, list[str]]]:
    """The rows of a csv that are not blank, each as (`file, line n`, stripped fields). Raises PrepareError."""
    rows = []
    for number, line in read_lines(path):
        try:
            fields = next(csv.reader([line], delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise PrepareError(f"{path}, line {number}: is not valid csv ({error})") from None
        rows.append((f"{path}, line {number}", [field.strip() for field in fields]))
    return rows


def read_json(path: Path, kind: type) -> Any:
    """The parsed file. Raises PrepareError if it is not valid JSON or not of `kind` (list or dict)."""
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise PrepareError(f"{path}, line {error.lineno}: is not valid JSON ({error.msg})") from None
    if not isinstance(data, kind):
        expected = {list: "a list", dict: "an object"}[kind]
        raise PrepareError(f"{path}: must hold {expected}, not {type(data).__name__}")
    return data


def json_field(item: Any, key: str, where: str) -> Any:
    """`item[key]` of a JSON object. Raises PrepareError that starts with `where`."""
    if not isinstance(item, dict) or key not in item:
        raise PrepareError(f"{where}: has no {key!r}")
    return item[key]


def class_names(ids: Mapping[str, int], path: Path) -> tuple[str, ...]:
    """Names in the order of their ids. Raises PrepareError if the ids are not 0, 1, 2, ..."""
    if not ids or sorted(ids.values()) != list(range(len(ids))):
        raise PrepareError(f"{path}: its {len(ids)} classes are not numbered without gaps")
    return tuple(sorted(ids, key=ids.__getitem__))


def parse_number(text: object, what: str, where: str) -> int:
    """`text` as a number from 0. Raises PrepareError."""
    if not re.fullmatch(r"[0-9]+", str(text)):
        raise PrepareError(f"{where}: {what} must be a whole number, not {text!r}")
    return int(str(text))
