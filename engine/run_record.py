"""What a run folder says of its run: config.yaml and run.json, or what the newest checkpoint holds in their place.

A checkpoint has checksums, these two files have none. So where they are missing, cannot be read, or contradict the
checkpoint, it is the checkpoint that counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.compare import difference
from configs.schema import ConfigError, load_config
from engine import checkpoint_file
from engine.checkpoint_file import Checkpoint
from engine.run_info import DataChangedError, check_same_lists

CONFIG, STARTS, METRICS, LOG, LOCK = "config.yaml", "run.json", "metrics.jsonl", "log.txt", ".lock"


@dataclass(frozen=True)
class RunRecord:
    """How a run was configured and started.

    Args:
        config: as `Config.to_dict` wrote it.
        starts: of run_info.run_info, one entry a start, at least one.
        finished: the run is complete.
        mended: file name: what is wrong with it, for files that a checkpoint was read in place of.
        source: that checkpoint.
    """

    config: dict[str, Any]
    starts: list[dict[str, Any]]
    finished: bool
    mended: dict[str, str]
    source: Path | None = None


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds a run of ours, and not just weights."""
    if all((folder / name).is_file() for name in (CONFIG, STARTS)):
        return True
    return any((folder / name).is_file() for name in (CONFIG, STARTS, METRICS, LOG)) and _saved(folder) is not None


def file_of_run(folder: Path) -> str | None:
    """A file that tells that a folder is used for something; None if there is none.

    The remains of a start that was killed before it wrote run.json, our lock without a checkpoint, do not count.
    """
    killed_early = (folder / LOCK).exists() and not is_run_folder(folder) and not any(folder.glob("*.pt"))
    names = (checkpoint_file.LAST, CONFIG, STARTS, LOG)
    return None if killed_early else next((name for name in names if (folder / name).exists()), None)


def read_record(folder: Path) -> RunRecord:
    """Read the record of a run; nothing is written or logged.

    Raises:
        ValueError: config.yaml or run.json is missing or damaged, and there is no checkpoint to read in its place.
    """
    config, config_fault = _read(folder / CONFIG, _parse_config)
    starts, starts_fault = _read(folder / STARTS, _parse_starts)
    saved = _saved(folder)
    if saved is None:
        if config_fault or starts_fault:
            name, fault = (CONFIG, config_fault) if config_fault else (STARTS, starts_fault)
            raise ValueError(f"{folder}: its {name} {fault}, and no checkpoint holds what it said")
        return RunRecord(config, starts, bool(starts[-1].get("finished")), {})
    contradictions = [
        None if config_fault else _contradiction(config, saved.content["config"]),
        None if starts_fault else _other_starts(starts, saved.content["meta"]),
    ]
    if not all(contradictions):  # else the checkpoint is of another run, which is refused when it is read
        config_fault, starts_fault = config_fault or contradictions[0], starts_fault or contradictions[1]
    faults = {CONFIG: config_fault, STARTS: starts_fault}
    return RunRecord(
        config=saved.content["config"] if config_fault else config,
        starts=[saved.content["meta"]] if starts_fault else starts,
        finished=is_finished(saved) if starts_fault else bool(starts[-1].get("finished")),
        mended={name: fault for name, fault in faults.items() if fault},
        source=saved.path,
    )


def is_finished(saved: Checkpoint) -> bool:
    """Whether a checkpoint is the last one of its run."""
    solver, content = saved.content["config"].get("solver") or {}, saved.content
    if not saved.is_run or content["unevaluated_epoch"] is not None:
        return False
    early_stop = solver.get("early_stop")
    stopped = early_stop is not None and content["evaluations_since_best"] >= early_stop
    return stopped or content["epoch"] >= solver.get("epochs", content["epoch"] + 1)


def _saved(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, if it says how its run was configured and started."""
    saved = checkpoint_file.newest_values(folder)
    says = saved is not None and all(isinstance(saved.content.get(key), dict) for key in ("config", "meta"))
    return saved if says else None


def _read(path: Path, parse: Callable[[str], Any]) -> tuple[Any, str | None]:
    """What a file holds, or what is wrong with it."""
    try:
        return parse(path.read_text(encoding="utf-8")), None
    except FileNotFoundError:
        return None, "is missing"
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        return None, f"cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})"


def _parse_config(text: str) -> dict[str, Any]:
    config = yaml.safe_load(text)
    if not isinstance(config, dict):
        raise ValueError("it holds no settings")
    return config


def _parse_starts(text: str) -> list[dict[str, Any]]:
    starts = json.loads(text)
    if not isinstance(starts, list) or not starts or not all(isinstance(start, dict) for start in starts):
        raise ValueError("it holds no starts of a run")
    return starts


def _contradiction(config: dict[str, Any], saved: dict[str, Any]) -> str | None:
    """What a configuration has else than the checkpoint that was made with it: it is damaged, for instance cut."""
    if config == saved:
        return None
    try:
        found = difference(saved, load_config(config), more_epochs=True, same_start=False)
    except ConfigError as error:
        found = str(error)
    return found and f"is damaged ({found})"


def _other_starts(starts: list[dict[str, Any]], saved: dict[str, Any]) -> str | None:
    """What a run's starts have else than the one that wrote its checkpoint."""
    start, own = starts[-1], ("started", "command", "seed")
    if not any(all(one.get(key) == saved.get(key) for key in own) for one in starts):
        return f"is damaged (it has no start at {saved.get('started')})"
    processes = [meta.get("world_size") for meta in (saved, start)]
    if processes[0] != processes[1]:
        return f"is damaged (it began with {processes[0]} processes, not {processes[1]})"
    try:
        check_same_lists(saved, start, STARTS)
    except (DataChangedError, AttributeError, KeyError, TypeError):
        return "is damaged (it names other data lists than the checkpoint)"
    return None
