"""What run folders say: config.yaml, run.json, metrics.jsonl and the results of test_vision.py beside the checkpoints.

Lives here: finding and reading runs of any age, and the class Run. Does not live here: setting them side by side
(compare_runs.py) and writing run folders (engine/run_folder.py, engine/record.py).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from configs.schema import ConfigError, config_from_dict

logger = logging.getLogger("td4v")

NOT_SETTINGS = ("logging.output_dir", "resume")  # where a run lies and how it was started, not what it is
Row = dict[str, Any]


class RunReadError(ValueError):
    """A run folder that cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class Run:
    """What a run folder says. `settings` and each start are flat, with dotted keys; `rows` are in order of epochs."""

    name: str
    folder: Path
    settings: Row
    starts: list[Row]
    rows: list[Row]
    tests: dict[str, Row]  # "last_model 3x4" (checkpoint, crops x clips): the results

    @property
    def epochs(self) -> tuple[int, int | None]:
        """Epochs done, and to be done."""
        return max((row["epoch"] + 1 for row in self.rows), default=0), self.settings.get("solver.epochs")

    @property
    def finished(self) -> bool:
        """All epochs are there, or its latest start has noted the end (as one that early_stop ended does)."""
        done, planned = self.epochs
        return done > 0 and (done == planned or bool(self.starts and self.starts[-1].get("finished")))

    @property
    def latest(self) -> float:
        """When it finished, else was last started, in seconds since 1970; 0 where neither was noted."""
        last = self.starts[-1] if self.starts else {}
        try:
            return datetime.fromisoformat(str(last.get("finished") or last.get("started"))).timestamp()
        except ValueError:
            return 0.0

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")

    def of_starts(self, key: str) -> list[Any]:
        """The values of one key of run.json, each once, in the order in which the starts brought them."""
        return list(dict.fromkeys(start[key] for start in self.starts if start.get(key) is not None))

    def epochs_with(self, key: str) -> list[Row]:
        """The epochs that have a value of `key`."""
        return [row for row in self.rows if row.get(key) is not None]

    def best(self, metric: str) -> Row | None:
        return max(self.epochs_with(metric), key=lambda row: row[metric], default=None)

    def last(self, metric: str) -> Row | None:
        return self.epochs_with(metric)[-1] if self.epochs_with(metric) else None

    def known(self, key: str) -> list[float]:
        """The values of one key of metrics.jsonl, where it has them."""
        return [row[key] for row in self.epochs_with(key)]


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs at or anywhere below each path, in the order given, each once. Raises RunReadError."""
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise RunReadError(f"{path}: there is no such folder")
        found = [path] if is_run(path) else sorted(file.parent for file in path.rglob("config.yaml"))
        found = [folder.resolve() for folder in found if is_run(folder)]
        if not found:
            raise RunReadError(f"{path}: holds no run (config.yaml with run.json or metrics.jsonl), nor does any below")
        folders |= dict.fromkeys(found)
    common = os.path.commonpath([folder.parent for folder in folders])
    return [read_run(folder, folder.relative_to(common).as_posix()) for folder in folders]


def is_run(folder: Path) -> bool:
    files = {name for name in ("config.yaml", "run.json", "metrics.jsonl") if (folder / name).is_file()}
    return "config.yaml" in files and len(files) > 1


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder. Raises RunReadError."""
    starts = read_json(folder / "run.json") if (folder / "run.json").is_file() else []
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise RunReadError(f"{folder / 'run.json'}: is not a list of a run's starts")
    return Run(name, folder, read_settings(folder / "config.yaml"), [flat(start) for start in starts],
               read_rows(folder / "metrics.jsonl"), read_tests(folder))  # fmt: skip


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunReadError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def parse(text: str) -> Any:
    """JSON with None in place of NaN and infinities, which no reader of our JSON need know. Raises ValueError."""
    return json.loads(text, parse_constant=lambda _: None)


def read_json(path: Path) -> Any:
    try:
        return parse(read_text(path))
    except json.JSONDecodeError as error:
        raise RunReadError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None


def read_settings(path: Path) -> Row:
    """A run's configuration, flat. Keys younger than the run had their defaults."""
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RunReadError(f"{path}{f', line {mark.line + 1}' if mark else ''}: not valid YAML") from None
    if not isinstance(values, dict):
        raise RunReadError(f"{path}: is not a configuration")
    try:
        values = config_from_dict(values).to_dict()
    except ConfigError as error:
        logger.warning("%s: compared as it stands, for it is no configuration of this version (%s)", path, error)
    return {key: value for key, value in flat(values).items() if key not in NOT_SETTINGS}


def read_rows(path: Path) -> list[Row]:
    """The lines of metrics.jsonl, the latest of each epoch; a last line that was cut off is left out with a warning."""
    rows: dict[int, Row] = {}
    lines = read_text(path).splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse(line)
            rows[int(row["epoch"])] = {**row, "epoch": int(row["epoch"])}
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise RunReadError(f"{path}, line {number}: is not a line of metrics with an epoch") from None
            logger.warning("%s, line %d: left out, for it was cut off", path, number)
    return [rows[epoch] for epoch in sorted(rows)]


def read_tests(folder: Path) -> dict[str, Row]:
    """Results of test_vision.py beside the checkpoints, by checkpoint and views; other JSON files are passed over."""
    tests: dict[str, Row] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.warning("%s: left out, for it cannot be read (%s)", path, error)
            continue
        if isinstance(result, dict) and "top1" in result and "crops" in result:
            dense = " dense" if result.get("dense") else ""
            checkpoint = Path(str(result.get("weights") or path.name)).stem
            name = f"{checkpoint} {result['crops']}x{result.get('clips', 1)}{dense}"
            tests[f"{name} ({path.stem})" if name in tests else name] = result
    return tests


def flat(values: Row, prefix: str = "") -> Row:
    """Nested dicts as one with dotted keys; lists become text, so that all values can be compared and hashed."""
    result: Row = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return result
