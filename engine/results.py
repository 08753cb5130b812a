"""What people look at after a test: files beside each other that share a stem, written whole or not at all.

    X.json            the numbers and where they come from
    X.npz             raw scores, for averaging runs (scripts/ensemble.py) and for questions nobody has asked yet
    X_per_class.csv   one row a class: videos, correct, top-1, what it is most often taken for
    X_confusion.csv   row: the true class; column: what it was taken for; videos
    X_confusion.png   the same as a picture (confusion_picture.py)

Lives here: these files' names and layouts, reading X.npz back, the worst confusions. Does not live here: how numbers come
from scores (metrics.py), where they come from (the scripts say).

The arrays of X.npz, none of them pickled: `index` (N,) int64, `score` (N, K) float64, `label` (N,) int64 and `path` (N,)
text, as in metrics.Table; `skipped` () int64; `class_names` (K,) text, (0,) where there are none; `sha256` () text, of the
rows' paths and labels; `meta` () text, JSON.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from common.files import write_atomic
from engine.errors import EngineError
from engine.metrics import Accuracy, Table

logger = logging.getLogger("td4v")

SUFFIXES = {
    "scores": ".npz",
    "per_class": "_per_class.csv",
    "confusion": "_confusion.csv",
    "picture": "_confusion.png",
}
ARRAYS = ("index", "score", "label", "path", "skipped", "class_names", "sha256", "meta")


class ReportError(EngineError):
    """A file of results that cannot be written, or read back; the message names it."""


@dataclass(frozen=True)
class Confusion:
    """`times` of the `videos` videos of class `label` were taken for class `taken_for`."""

    label: int
    taken_for: int
    times: int
    videos: int

    def sentence(self, names: Sequence[str] | None) -> str:
        """Such as `left taken for right: 13 of 40`."""
        label, taken_for = class_name(names, self.label), class_name(names, self.taken_for)
        return f"{label} taken for {taken_for}: {self.times} of {self.videos}"


@dataclass(frozen=True, eq=False)
class SavedScores:
    """What X.npz holds; `meta` says where the scores come from."""

    table: Table
    names: tuple[str, ...] | None
    meta: dict[str, Any]


def class_name(names: Sequence[str] | None, label: int) -> str:
    """Its name in one line, or `class 7` where there are none."""
    return f"class {label}" if names is None else " ".join(names[label].split())


def check_target(path: Path, makes_folder: bool = False) -> None:
    """Refuse, before hours of testing, a `path` (X.json) that `write` could not write to.

    Args:
        makes_folder: whether its folder, if there is none, will be made by then.

    Raises:
        ReportError: not a .json, no such folder, no permission, a folder in its place, or no matplotlib for the picture.
    """
    if path.suffix != ".json":
        raise ReportError(f"{path}: the name of the results must end in .json")
    folder = path.parent
    while makes_folder and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        if makes_folder:
            raise ReportError(f"{folder}: is a file, no folder to make one in for the results")
        raise ReportError(f"there is no folder {folder} for the results")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ReportError(f"{folder}: the results cannot be written into this folder, choose another")
    for target in (path, *files_of(path).values()):
        if target.is_dir():
            raise ReportError(f"{target}: is a folder, and the results would need that name")
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError("the picture of the results needs matplotlib: pip install matplotlib")


def files_of(path: Path) -> dict[str, Path]:
    """The files beside X.json, by what they are (the keys of SUFFIXES)."""
    return {what: path.with_name(path.stem + suffix) for what, suffix in SUFFIXES.items()}


def write(path: Path, accuracy: Accuracy, names: Sequence[str] | None, about: dict[str, Any]) -> None:
    """Write all files of `path` (X.json), the scores first, and log the worst confusions.

    Args:
        accuracy: with its `table`.
        names: of the K classes, or None.
        about: where the numbers come from, plain values; in X.json beside the numbers, in X.npz under `meta`.

    Raises:
        ReportError: a file cannot be written; those before it are whole.
    """
    files, worst = files_of(path), worst_confusions(accuracy)
    if path.exists():
        logger.info("%s, and what stands beside it, are of an earlier test and are replaced", path)
    _whole(files["scores"], lambda file: _write_scores(file, accuracy.table, names, about))
    result = {
        **accuracy.to_dict(),
        **about,
        "class_names": names,
        "list_sha256": rows_sha256(accuracy.table),
        "files": {what: file.name for what, file in files.items()},
        "worst_confusions": [{**vars(each), "sentence": each.sentence(names)} for each in worst],
    }
    _whole(path, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    _whole(files["per_class"], lambda file: _write_csv(file, _per_class(accuracy, names)))
    _whole(files["confusion"], lambda file: _write_csv(file, _confusion_rows(accuracy, names)))
    from engine.confusion_plot import draw  # here, as matplotlib takes a second to import

    title = f"top-1 {accuracy.top1:.2f} %, mean class {accuracy.mean_class:.2f} %, {accuracy.videos} videos"
    _whole(files["picture"], lambda file: draw(file, accuracy.confusion, names, title))
    if worst:
        logger.info("most often confused:\n%s", "\n".join(f"  {each.sentence(names)}" for each in worst))
    logger.info("results: %s and, beside it, %s", path, ", ".join(file.name for file in files.values()))


def worst_confusions(accuracy: Accuracy, most: int = 10) -> list[Confusion]:
    """The pairs of classes that cost the most videos; of equally many, first the larger share, then by class number."""
    found = [
        Confusion(label, taken_for, times, sum(row))
        for label, row in enumerate(accuracy.confusion)
        for taken_for, times in enumerate(row)
        if times and taken_for != label
    ]
    found.sort(key=lambda each: (-each.times, each.videos, each.label, each.taken_for))
    return found[:most]


def rows_sha256(table: Table) -> str:
    """Of the videos' paths and labels, in the order of the list."""
    rows = json.dumps([table.path, table.label.tolist()], ensure_ascii=True)
    return hashlib.sha256(rows.encode()).hexdigest()


def load_scores(path: str | Path) -> SavedScores:
    """Read an X.npz, refusing pickled objects.

    Raises:
        ReportError: missing, truncated, holding pickled objects, or not what `write` writes.
    """
    path = Path(path)
    if not path.is_file():
        raise ReportError(f"{path}: there is no such file of scores")
    if not os.access(path, os.R_OK):
        raise ReportError(f"{path}: cannot be read, for lack of permission")
    if not zipfile.is_zipfile(path):
        raise ReportError(f"{path}: truncated, or not an .npz file")
    try:
        with numpy.load(path, allow_pickle=False) as file:
            if lacking := [name for name in ARRAYS if name not in file.files]:
                raise ReportError(f"{path}: not the scores of a test, for it lacks {', '.join(lacking)}")
            arrays = {name: file[name] for name in ARRAYS}
    except ReportError:
        raise
    except Exception as error:  # zip, zlib and NumPy's header each have their own for damaged bytes
        if "allow_pickle" in str(error):
            raise ReportError(f"{path}: holds pickled objects besides numbers and text, refused") from None
        raise ReportError(f"{path}: damaged ({(str(error) or type(error).__name__).splitlines()[0]})") from None
    if (fault := _fault(arrays)) is not None:
        raise ReportError(f"{path}: not the scores of a test: {fault}")
    index, score, label = (torch.from_numpy(arrays[name]) for name in ("index", "score", "label"))
    table = Table(index, score, label, tuple(arrays["path"].tolist()), int(arrays["skipped"]))
    if rows_sha256(table) != str(arrays["sha256"]):
        raise ReportError(f"{path}: its videos or labels were changed after the test that wrote it")
    return SavedScores(table, tuple(arrays["class_names"].tolist()) or None, json.loads(str(arrays["meta"])))


def _fault(arrays: dict[str, numpy.ndarray]) -> str | None:
    """The first thing that is wrong with the arrays of an .npz."""
    kinds = {"index": "i8", "score": "f8", "label": "i8", "skipped": "i8"}
    for name, array in arrays.items():
        kind, wanted = array.dtype.str[1:], kinds.get(name, "text")
        if kind != wanted and not (wanted == "text" and kind.startswith("U")):
            return f"{name} holds {array.dtype}, not {wanted}"
    score = arrays["score"]
    if score.ndim != 2 or 0 in score.shape:
        return f"score has shape {score.shape}, not (videos, classes)"
    videos, classes = score.shape
    shapes = {"index": (videos,), "label": (videos,), "path": (videos,), "skipped": (), "sha256": (), "meta": ()}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            return f"{name} has shape {arrays[name].shape}, not {shape}"
    if arrays["class_names"].shape not in ((0,), (classes,)):
        return f"class_names has shape {arrays['class_names'].shape} for {classes} classes"
    if not numpy.isfinite(score).all():
        return "score holds values that are not finite"
    if score.min() < 0 or score.max() > 1.000001 or not numpy.allclose(score.sum(axis=1), 1, rtol=0, atol=1e-6):
        return "score does not hold probabilities that sum to 1 for each video"
    if (numpy.diff(arrays["index"]) <= 0).any() or arrays["index"][0] < 0 or arrays["skipped"] < 0:
        return "index does not ascend from 0"
    if arrays["label"].min() < 0 or arrays["label"].max() >= classes:
        return f"a label is outside 0..{classes - 1}"
    try:
        meta = json.loads(str(arrays["meta"]))
    except (ValueError, RecursionError):  # the latter where it is nested thousands deep
        return "meta is not JSON that can be read"
    if not isinstance(meta, dict) or _deeper(meta, 100):
        return "meta is not a JSON object, or nested more than 100 deep"
    return None


def _deeper(value: Any, levels: int) -> bool:
    """Whether a plain value is nested deeper than so; the writer of JSON has its limit, too."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _deeper(each, levels - 1) for each in inner)


def _whole(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    try:
        write_atomic(path, fill)
    except OSError as error:
        raise ReportError(f"{path}: cannot be written ({error.strerror or error})") from error


def _write_scores(file: BinaryIO, table: Table, names: Sequence[str] | None, about: dict[str, Any]) -> None:
    numpy.savez(
        file,
        index=table.index.numpy(),
        score=table.score.numpy(),
        label=table.label.numpy(),
        path=numpy.array(table.path, dtype=str),
        skipped=numpy.int64(table.skipped),
        class_names=numpy.array(names or (), dtype=str),
        sha256=numpy.array(rows_sha256(table)),
        meta=numpy.array(json.dumps(about)),
    )


def _write_csv(file: BinaryIO, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    file.write(text.getvalue().encode())


def _per_class(accuracy: Accuracy, names: Sequence[str] | None) -> list[list[Any]]:
    rows: list[list[Any]] = [["id", "name", "videos", "correct", "top1", "taken_for", "taken_for_name", "times"]]
    for label, row in enumerate(accuracy.confusion):
        top1 = accuracy.per_class[label]
        other, times = max(((j, n) for j, n in enumerate(row) if j != label), key=lambda pair: pair[1], default=(0, 0))
        taken = [other, class_name(names, other), times] if times else ["", "", 0]
        shown = "" if top1 is None else round(top1, 4)
        rows.append([label, class_name(names, label), sum(row), row[label], shown, *taken])
    return rows


def _confusion_rows(accuracy: Accuracy, names: Sequence[str] | None) -> list[list[Any]]:
    shown = [class_name(names, label) for label in range(len(accuracy.confusion))]
    body = [[label, shown[label], *row] for label, row in enumerate(accuracy.confusion)]
    return [["id", "name", *shown], *body]
