"""The files of a test, side by side, with one stem; each is written completely or not at all.

    X.json            the numbers and where they come from
    X.npz             raw scores, for averaging runs (scripts/ensemble.py) and for other questions
    X_per_class.csv   one row a class: videos, correct, top-1, the class it is most often predicted as
    X_confusion.csv   row: the true class; column: the predicted class; videos
    X_confusion.png   the same as a figure (confusion_plot.py)

The arrays of X.npz, none of them pickled: `index` (N,) int64, `score` (N, K) float64, `label` (N,) int64 and `path` (N,)
text, as in metrics.ScoreTable; `skipped` () int64; `class_names` (K,) text, (0,) if there are none; `sha256` () text, of
the rows' paths and labels; `meta` () text, JSON. Tests, not ensembles, have `positive_logit` (N, K) float64 too.
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
from engine.metrics import Accuracy, ScoreTable

logger = logging.getLogger("td4v")

SUFFIXES = {
    "scores": ".npz",
    "per_class": "_per_class.csv",
    "confusion": "_confusion.csv",
    "plot": "_confusion.png",
}
ARRAYS = ("index", "score", "label", "path", "skipped", "class_names", "sha256", "meta")
POSITIVE_LOGIT = "positive_logit"  # not in files of earlier versions


class ResultsError(EngineError):
    """A results file that cannot be written or read; the message names it."""


@dataclass(frozen=True)
class Confusion:
    """`times` of the `videos` videos of class `label` were predicted as class `predicted`."""

    label: int
    predicted: int
    times: int
    videos: int

    def sentence(self, names: Sequence[str] | None) -> str:
        """Such as `left predicted as right: 13 of 40`."""
        label, predicted = class_name(names, self.label), class_name(names, self.predicted)
        return f"{label} predicted as {predicted}: {self.times} of {self.videos}"


@dataclass(frozen=True, eq=False)
class SavedScores:
    """The content of X.npz; `meta` says where the scores come from."""

    table: ScoreTable
    names: tuple[str, ...] | None
    meta: dict[str, Any]


def class_name(names: Sequence[str] | None, label: int) -> str:
    """The name in one line, or `class 7` without names."""
    return f"class {label}" if names is None else " ".join(names[label].split())


def check_target(path: Path, makes_folder: bool = False) -> None:
    """Refuse, before hours of testing, a `path` (X.json) that `write` could not write to.

    Args:
        makes_folder: whether a missing folder will be made by then.

    Raises:
        ResultsError: not a .json, the name of a run's record, no such folder, no permission, a folder of that name, or no matplotlib.
    """
    if path.suffix != ".json":
        raise ResultsError(f"{path}: the name of the results must end in .json")
    if path.name == "run.json":
        raise ResultsError(f"{path}: is the name of a run's record; choose another")
    folder = path.parent
    while makes_folder and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        if makes_folder:
            raise ResultsError(f"{folder}: is a file, so no folder can be made in it for the results")
        raise ResultsError(f"there is no folder {folder} for the results")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResultsError(f"{folder}: the results cannot be written into this folder; choose another")
    for target in (path, *files_of(path).values()):
        if target.is_dir():
            raise ResultsError(f"{target}: is a folder, and the results need that name")
    if importlib.util.find_spec("matplotlib") is None:
        raise ResultsError("the confusion plot needs matplotlib: pip install matplotlib")


def files_of(path: Path) -> dict[str, Path]:
    """The files beside X.json, by what they are (the keys of SUFFIXES)."""
    return {what: path.with_name(path.stem + suffix) for what, suffix in SUFFIXES.items()}


def write(path: Path, accuracy: Accuracy, names: Sequence[str] | None, about: dict[str, Any]) -> None:
    """Write all files of `path` (X.json), the scores first, and log the worst confusions.

    Args:
        accuracy: with its `table`.
        names: of the K classes, or None.
        about: where the numbers come from, as plain values; in X.json beside the numbers, in X.npz under `meta`.

    Raises:
        ResultsError: a file cannot be written; those before it are complete.
    """
    files, worst = files_of(path), worst_confusions(accuracy)
    if path.exists():
        logger.info("%s and the files beside it are from an earlier test and are replaced", path)
    _write(files["scores"], lambda file: _write_scores(file, accuracy.table, names, about))
    result = {
        **accuracy.to_dict(),
        **about,
        "class_names": names,
        "list_sha256": rows_sha256(accuracy.table),
        "files": {what: file.name for what, file in files.items()},
        "worst_confusions": [{**vars(each), "sentence": each.sentence(names)} for each in worst],
    }
    _write(path, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    _write(files["per_class"], lambda file: _write_csv(file, _per_class(accuracy, names)))
    _write(files["confusion"], lambda file: _write_csv(file, _confusion_rows(accuracy, names)))
    from engine.confusion_plot import draw  # here, because importing matplotlib takes a second

    title = f"top-1 {accuracy.top1:.2f} %, mean class {accuracy.mean_class:.2f} %, {accuracy.videos} videos"
    _write(files["plot"], lambda file: draw(file, accuracy.confusion, names, title))
    if worst:
        logger.info("most often confused:")
        for each in worst:
            logger.info("  %s", each.sentence(names))
    logger.info("results: %s and, beside it, %s", path, ", ".join(file.name for file in files.values()))


def worst_confusions(accuracy: Accuracy, most: int = 10) -> list[Confusion]:
    """The pairs of classes with the most errors; equal ones by share of the class, then by class number."""
    found = [
        Confusion(label, predicted, times, sum(row))
        for label, row in enumerate(accuracy.confusion)
        for predicted, times in enumerate(row)
        if times and predicted != label
    ]
    found.sort(key=lambda each: (-each.times, each.videos, each.label, each.predicted))
    return found[:most]


def rows_sha256(table: ScoreTable) -> str:
    """Of the videos' paths and labels, in the order of the list."""
    rows = json.dumps([table.path, table.label.tolist()], ensure_ascii=True)
    return hashlib.sha256(rows.encode()).hexdigest()


def load_scores(path: str | Path) -> SavedScores:
    """Read an X.npz, refusing pickled objects.

    Raises:
        ResultsError: missing, truncated, with pickled objects, or not as `write` writes it.
    """
    path = Path(path)
    if not path.is_file():
        raise ResultsError(f"{path}: there is no such file of scores")
    if not os.access(path, os.R_OK):
        raise ResultsError(f"{path}: cannot be read: permission denied")
    if not zipfile.is_zipfile(path):
        raise ResultsError(f"{path}: truncated, or not an .npz file")
    try:
        with numpy.load(path, allow_pickle=False) as file:
            if missing := [name for name in ARRAYS if name not in file.files]:
                raise ResultsError(f"{path}: not the scores of a test: {', '.join(missing)} missing")
            optional = [POSITIVE_LOGIT] if POSITIVE_LOGIT in file.files else []
            arrays = {name: file[name] for name in (*ARRAYS, *optional)}
    except ResultsError:
        raise
    except Exception as error:  # zip, zlib and NumPy raise different ones for damaged bytes
        if "allow_pickle" in str(error):
            raise ResultsError(f"{path}: holds pickled objects, which are refused") from None
        raise ResultsError(f"{path}: damaged ({(str(error) or type(error).__name__).splitlines()[0]})") from None
    if (fault := _fault(arrays)) is not None:
        raise ResultsError(f"{path}: not the scores of a test: {fault}")
    index, score, label = (torch.from_numpy(arrays[name]) for name in ("index", "score", "label"))
    positive_logit = torch.from_numpy(arrays[POSITIVE_LOGIT]) if POSITIVE_LOGIT in arrays else None
    path_texts, skipped = tuple(arrays["path"].tolist()), int(arrays["skipped"])
    table = ScoreTable(index, score, label, path_texts, skipped, positive_logit)
    if rows_sha256(table) != str(arrays["sha256"]):
        raise ResultsError(f"{path}: its videos or labels were changed after the test")
    return SavedScores(table, tuple(arrays["class_names"].tolist()) or None, json.loads(str(arrays["meta"])))


def _fault(arrays: dict[str, numpy.ndarray]) -> str | None:
    """The first error in the arrays of an .npz, or None."""
    kinds = {"index": "i8", "score": "f8", "label": "i8", "skipped": "i8", POSITIVE_LOGIT: "f8"}
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
    logit = arrays.get(POSITIVE_LOGIT, numpy.zeros_like(score))
    if logit.shape != score.shape or not numpy.isfinite(logit).all() or logit.min() < 0:
        return "positive_logit does not hold one finite number from 0 for each score"
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
    except (ValueError, RecursionError):  # the latter if it is nested thousands deep
        return "meta is not JSON that can be read"
    if not isinstance(meta, dict) or _is_deeper(meta, 100):
        return "meta is not a JSON object, or nested more than 100 deep"
    return None


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a plain value is nested deeper than `levels`: writing JSON has a limit, too."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _is_deeper(each, levels - 1) for each in inner)


def _write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    try:
        write_atomic(path, fill)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written ({error.strerror or error})") from error


def _write_scores(file: BinaryIO, table: ScoreTable, names: Sequence[str] | None, about: dict[str, Any]) -> None:
    logit = table.positive_logit
    numpy.savez(
        file,
        **({} if logit is None else {POSITIVE_LOGIT: logit.numpy()}),
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
    rows: list[list[Any]] = [["id", "name", "videos", "correct", "top1", "predicted", "predicted_name", "times"]]
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
