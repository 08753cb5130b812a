"""The owners' annotation files: finding them below --annotations and reading text, csv and JSON with file and line.

Does not live here: what the files of one dataset mean (formats/).
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import walk
from datasets.prepare.lists import PrepareError
from datasets.prepare.plan import choose_splits

SHOWN = 6  # names of what is there instead, in a message


class AbsentError(PrepareError):
    """An annotation file that is not there; it may be in an archive."""


class AnnotationFiles:
    """The files below folders, by name; hidden ones are passed over.

    Args:
        root: the folder that was given, for messages.
        more: a folder with what was unpacked, which counts only for names that `root` does not have.

    Raises PrepareError where `root` is not a folder.
    """

    def __init__(self, root: Path, title: str, more: Path | None = None):
        if not root.is_dir() and more is None:
            raise PrepareError(f"--annotations {root}: is not a folder")
        self.root, self.title = root, title
        self._files = _by_name(root, skip=more)
        if more is not None:
            self._files = {**_by_name(more), **self._files}

    def find(self, *names: str) -> Path | None:
        """The file of one of these names; None where there is none. Raises PrepareError where there are several."""
        found = [path for name in names for path in self._files.get(name, ())]
        if len(found) > 1:
            raise PrepareError(f"{found[0]} and {found[1]} both could be the one of {self.title}; keep one")
        return found[0] if found else None

    def need(self, *names: str) -> Path:
        """`find`, but raises PrepareError where there is none."""
        path = self.find(*names)
        if path is None:
            there = sorted(self._files)
            shown = ", ".join(there[:SHOWN]) + (" ..." if len(there) > SHOWN else "") if there else "nothing"
            raise AbsentError(
                f"--annotations {self.root}: {self.title} needs {' or '.join(names[:2])}; there is {shown}"
            )
        return path

    def matching(self, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], Path]]:
        """All files whose names fit, in the order of names."""
        fits = ((pattern.fullmatch(name), name) for name in sorted(self._files))
        return [(fit, self.need(name)) for fit, name in fits if fit]

    def split_files(self, names: Mapping[str, Sequence[str]], wanted: Sequence[str] | None) -> dict[str, Path]:
        """The file of each split. Every split must have one, except `test` where nobody asked for it by --splits."""
        files = {}
        for split in choose_splits(self.title, tuple(names), wanted):
            optional = wanted is None and split == "test"
            path = self.find(*names[split]) if optional else self._need_split(split, names)
            if path is not None:
                files[split] = path
        return files

    def _need_split(self, split: str, names: Mapping[str, Sequence[str]]) -> Path:
        """`need`, which in its message says how to go on with the splits whose files are there."""
        try:
            return self.need(*names[split])
        except AbsentError as error:
            others = [other for other in names if other != split and any(self._files.get(n) for n in names[other])]
            hint = f" (--splits {','.join(others)} prepares only what is there)" if others else ""
            raise AbsentError(f"{error}{hint}") from None


def _by_name(root: Path, skip: Path | None = None) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = defaultdict(list)
    for folder, names in walk(root, skip) if root.is_dir() else ():
        for name in names:
            files[name].append(folder / name)
    return dict(files)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, stripped, numbered from 1. Raises PrepareError where it is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PrepareError(f"{path}: is not UTF-8 text ({error.reason})") from None
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_table(path: Path, delimiter: str = ",") -> list[tuple[str, list[str]]]:
    """The rows of a csv without blank ones, each as (`file, line n`, fields stripped)."""
    rows = []
    try:
        for number, line in read_lines(path):
            fields = next(csv.reader([line], delimiter=delimiter, strict=True))
            rows.append((f"{path}, line {number}", [field.strip() for field in fields]))
    except csv.Error as error:
        raise PrepareError(f"{path}, line {number}: is not valid csv ({error})") from None
    return rows


def read_json(path: Path, kind: type) -> Any:
    """The parsed file, which must be of `kind` (list or dict). Raises PrepareError with the line of a fault."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise PrepareError(f"{path}, line {error.lineno}: is not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise PrepareError(f"{path}: is not UTF-8 text ({error.reason})") from None
    if not isinstance(data, kind):
        expected = {list: "a list", dict: "an object"}[kind]
        raise PrepareError(f"{path}: must hold {expected}, not {type(data).__name__}")
    return data


def json_field(item: Any, key: str, where: str) -> Any:
    """`item[key]` of a JSON object. Raises PrepareError that names the place."""
    if not isinstance(item, dict) or key not in item:
        raise PrepareError(f"{where}: has no {key!r}")
    return item[key]


def class_names(ids: Mapping[str, int], path: Path) -> tuple[str, ...]:
    """Names in the order of their ids. Raises PrepareError where the ids are not 0, 1, 2 ... once each."""
    if not ids or sorted(ids.values()) != list(range(len(ids))):
        raise PrepareError(f"{path}: its {len(ids)} classes are not numbered in one go")
    return tuple(sorted(ids, key=ids.__getitem__))


def whole_number(text: object, what: str, where: str) -> int:
    """`text` as a number from 0. Raises PrepareError."""
    if not re.fullmatch(r"[0-9]+", str(text)):
        raise PrepareError(f"{where}: {what} must be a whole number, not {text!r}")
    return int(str(text))
