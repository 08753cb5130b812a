"""Reads run folders: config.yaml, run.json, metrics.jsonl, and the results of test_vision.py beside the checkpoints."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common.text import plural
from configs.schema import ConfigError, load_config

if TYPE_CHECKING:
    from engine.checkpoint_file import Checkpoint

logger = logging.getLogger("td4v")

LAST = "last_model.pt"
NOT_COMPARED = ("logging.output_dir", "resume")  # where a run is and how it was started, not what it is
Row = dict[str, Any]


class RunReadError(ValueError):
    """A run folder that cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    Args:
        settings: the configuration, flat, with dotted keys.
        starts: one entry of run.json for each time the run was started or resumed, flat.
        epochs: the lines of metrics.jsonl, in order.
        tests: results of test_vision.py by checkpoint and views, such as "last_model 3x4" (crops x clips).
    """

    name: str
    folder: Path
    settings: Row
    starts: list[Row]
    epochs: list[Row]
    tests: dict[str, Row]

    @property
    def epochs_done(self) -> int:
        return max((row["epoch"] + 1 for row in self.epochs), default=0)

    @property
    def epochs_planned(self) -> int | None:
        return self.settings.get("solver.epochs")

    @property
    def finished(self) -> bool:
        """Whether all epochs are there, or the latest start recorded the end (early_stop ends a run before)."""
        recorded = bool(self.starts and self.starts[-1].get("finished"))
        return self.epochs_done > 0 and (self.epochs_done == self.epochs_planned or recorded)

    @property
    def latest(self) -> float:
        """When it finished, else when it was last started, in seconds since 1970; 0 where neither was recorded."""
        last = self.starts[-1] if self.starts else {}
        try:
            return datetime.fromisoformat(str(last.get("finished") or last.get("started"))).timestamp()
        except ValueError:
            return 0.0

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")

    def recorded(self, key: str) -> list[Any]:
        """The different values of one key of run.json, in the order of the starts."""
        return list(dict.fromkeys(start[key] for start in self.starts if start.get(key) is not None))

    def epochs_with(self, key: str) -> list[Row]:
        return [row for row in self.epochs if row.get(key) is not None]

    def values(self, key: str) -> list[float]:
        """The values of one key of metrics.jsonl, of the epochs that have it."""
        return [row[key] for row in self.epochs_with(key)]

    def best(self, metric: str) -> Row | None:
        return max(self.epochs_with(metric), key=lambda row: row[metric], default=None)

    def last(self, metric: str) -> Row | None:
        return self.epochs_with(metric)[-1] if self.epochs_with(metric) else None


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs at or below each path, in the order given, each once. Raises RunReadError."""
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise RunReadError(f"{path}: there is no such folder")
        named = ("config.yaml", "run.json", LAST)
        below = {file.parent for name in named for file in path.rglob(name)}
        candidates = [path] if is_run(path) else sorted(below)
        found = [folder.resolve() for folder in candidates if is_run(folder)]
        for folder in candidates:
            if folder.resolve() not in found and (folder / "run.json").is_file():
                logger.warning("%s: passed over, because its config.yaml is missing", folder)
        if not found:
            raise RunReadError(f"{path}: holds no run (config.yaml with run.json or metrics.jsonl), nor does any below")
        folders |= dict.fromkeys(found)
    common = os.path.commonpath([folder.parent for folder in folders])
    return [read_run(folder, folder.relative_to(common).as_posix()) for folder in folders]


def is_run(folder: Path) -> bool:
    configured, *others = ((folder / name).is_file() for name in ("config.yaml", "run.json", "metrics.jsonl"))
    return (configured and any(others)) or (any(others) and _newest(folder) is not None)


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder, and its newest checkpoint in place of files that are damaged. Raises RunReadError."""
    newest = _newest(folder)
    config, starts = _read_record(folder) if newest is None else _mended_record(folder)
    history = [] if newest is None else newest.content.get("history", [])
    return Run(
        name=name,
        folder=folder,
        settings=_settings(config, folder / "config.yaml"),
        starts=[_flat(start) for start in starts],
        epochs=_read_epochs(folder / "metrics.jsonl", [_parse(json.dumps(row)) for row in history]),
        tests=_read_tests(folder),
    )


def _newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, if it holds one."""
    if not (folder / LAST).exists() and not any(folder.glob("step_*.pt")):
        return None
    from engine.checkpoint_file import newest_values  # here, because it imports torch, which takes seconds

    newest = newest_values(folder)
    return newest if newest is not None and newest.is_run else None


def _mended_record(folder: Path) -> tuple[Row, list[Row]]:
    """Configuration and starts of a run with a checkpoint."""
    from engine.run_record import read_record

    record = read_record(folder)
    for name, fault in record.mended.items():
        logger.warning("%s: %s; %s is read instead", folder / name, fault, record.source)
    return record.config, record.starts


def _read_record(folder: Path) -> tuple[Row, list[Row]]:
    """config.yaml and run.json of a run without a checkpoint."""
    starts = _read_json(folder / "run.json") if (folder / "run.json").is_file() else []
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise RunReadError(f"{folder / 'run.json'}: is not a list of a run's starts")
    return _read_config(folder / "config.yaml"), starts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunReadError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _parse(text: str) -> Any:
    """JSON with None in place of NaN and infinities, so that what is written from it is strict JSON."""
    return json.loads(text, parse_constant=lambda _: None)


def _read_json(path: Path) -> Any:
    try:
        return _parse(_read_text(path))
    except json.JSONDecodeError as error:
        raise RunReadError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None


def _read_config(path: Path) -> Row:
    try:
        values = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RunReadError(f"{path}{f', line {mark.line + 1}' if mark else ''}: not valid YAML") from None
    if not isinstance(values, dict):
        raise RunReadError(f"{path}: is not a configuration")
    return values


def _settings(values: Row, path: Path) -> Row:
    """A run's configuration, flat. Keys that did not exist when it was trained get their defaults."""
    try:
        values = load_config(values).to_dict()
    except ConfigError as error:
        logger.warning("%s: compared without defaults, because this version refuses it (%s)", path, error)
    return {key: value for key, value in _flat(values).items() if key not in NOT_COMPARED}


def _read_epochs(path: Path, history: list[Row]) -> list[Row]:
    """The lines of metrics.jsonl, the latest of each epoch; a last line that was cut off is skipped with a warning.

    Args:
        history: the rows that the newest checkpoint holds, which replace damaged ones with a warning.
    """
    saved = {row["epoch"]: row for row in history}
    try:
        rows = _read_lines(path)
    except RunReadError as error:
        if not saved:
            raise
        logger.warning("%s", error)
        rows = {}
    # A process that is killed between saving and writing leaves the last row out.
    if wrong := [epoch for epoch in list(saved)[:-1] if rows.get(epoch) != saved[epoch]]:
        epochs = plural(len(wrong), "epoch")
        logger.warning("%s: damaged in %s, which are read from the newest checkpoint instead", path, epochs)
    rows |= saved
    return [rows[epoch] for epoch in sorted(rows)]


def _read_lines(path: Path) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    lines = _read_text(path).splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = _parse(line)
            rows[int(row["epoch"])] = {**row, "epoch": int(row["epoch"])}
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise RunReadError(f"{path}, line {number}: is not a line of metrics with an epoch") from None
            logger.warning("%s, line %d: skipped, because it was cut off", path, number)
    return rows


def _read_tests(folder: Path) -> dict[str, Row]:
    """Results of test_vision.py beside the checkpoints; other JSON files are ignored."""
    tests: dict[str, Row] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = _parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.warning("%s: skipped, because it cannot be read (%s)", path, error)
            continue
        if isinstance(result, dict) and "top1" in result and "crops" in result:
            dense = " dense" if result.get("dense") else ""
            checkpoint = Path(str(result.get("weights") or path.name)).stem
            name = f"{checkpoint} {result['crops']}x{result.get('clips', 1)}{dense}"
            tests[f"{name} ({path.stem})" if name in tests else name] = result
    return tests


def _flat(values: Row, prefix: str = "") -> Row:
    """Nested dicts as one with dotted keys; lists become text, so that all values can be compared and hashed."""
    result: Row = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return result
