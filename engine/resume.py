"""How a run begins: in which folder, and from which checkpoint. Rerunning a command resumes its unfinished run."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common.text import plural
from configs.compare import check_same_run, difference
from configs.schema import Config
from engine import checkpoint_file
from engine.checkpoint_file import Checkpoint, CheckpointError
from engine.distributed import Process, gather
from engine.run_dir import RunDirError, in_use, lock_user, state_of
from engine.run_info import DataChangedError, check_same_lists
from engine.run_record import METRICS, STARTS, file_of_run, is_run_folder, read_record

logger = logging.getLogger("td4v")

PATIENCE_S = 15  # for another process that uses the folder


@dataclass(frozen=True)
class RunPlan:
    """How a run begins.

    Args:
        folder: where it goes; None: nothing is written.
        in_place: the folder holds this run already.
        auto_named: the folder is new and named after the time.
        checkpoint: what it begins with; None: from scratch.
        resumes: the training in `checkpoint` is continued; else only its weights are taken.
        state: of the folder when the checkpoint was chosen, see run_dir.state_of; None on processes that do not write.
    """

    folder: Path | None = None
    in_place: bool = False
    auto_named: bool = False
    checkpoint: Checkpoint | None = None
    resumes: bool = False
    state: tuple[int, ...] | None = None

    @property
    def brings_backbone(self) -> bool:
        """Whether the checkpoint holds the frozen weights; those of the run then must too: nothing else has them."""
        return self.checkpoint is not None and self.checkpoint.has_backbone


def plan_run(
    config: Config,
    meta: dict[str, Any],
    process: Process,
    *,
    home: Path,
    writes: bool = True,
    output: str | None = None,
    name: str | None = None,
    fresh: bool = False,
) -> RunPlan:
    """Find the run that a command starts or resumes, the same on every process. Nothing is written.

    The folder is `output`, or `home`/`name`, or that of a `resume` called last_model.pt, or the newest unfinished run
    that began as this one, or a new one named after the time. A run in the folder is resumed from its newest valid
    checkpoint.

    Args:
        meta: of run_info.run_info, with the data lists.
        home: the folder of all runs of this dataset and network.
        writes: False for an evaluation or a dry run, which has no folder.
        fresh: start a new run in any case (but see `restarted`).

    Raises:
        RunDirError: the folder holds another run; the message says what differs.
        CheckpointError, ConfigError, DataChangedError: see `read_start`.
    """
    if not writes:
        checkpoint, resumes = read_start(config, meta, process)
        return RunPlan(checkpoint=checkpoint, resumes=resumes)
    named = Path(output) if output else home / name if name else None
    resume = Path(config.resume) if config.resume else None
    if named is None and resume is not None and resume.name == checkpoint_file.LAST and is_run_folder(resume.parent):
        named = resume.parent  # the run continues in its folder; from an older checkpoint it would overwrite later ones
    same_checkpoint = named is not None and resume is not None
    same_checkpoint = same_checkpoint and resume.resolve() == (named / checkpoint_file.LAST).resolve()

    def differs(previous: dict[str, Any], start: dict[str, Any]) -> str | None:
        reason = difference(previous, config, more_epochs=named is not None, same_start=not same_checkpoint)
        if reason is None and start.get("world_size") != process.world_size:
            reason = f"it began with {start.get('world_size')} processes, here are {process.world_size}"
        if reason is None:
            try:
                check_same_lists(start, meta, named or home)
            except DataChangedError as error:
                reason = str(error)
        return reason

    new = home / datetime.now().strftime("%Y%m%d_%H%M%S")
    folder, in_place = choose_folder(process, named, new, differs, fresh and not restarted())
    state = state_of(folder) if in_place and process.is_main else None
    checkpoint, resumes = read_start(config, meta, process, folder if in_place else None)
    auto_named = named is None and not in_place
    return RunPlan(folder, in_place, auto_named, checkpoint, resumes, state)


def read_start(
    config: Config, meta: dict[str, Any], process: Process, folder: Path | None = None
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint that a run begins with, and whether it is resumed (see RunPlan).

    Args:
        folder: of a run to resume, whose newest valid checkpoint comes before `resume` and `pretrain`.

    Raises:
        CheckpointError, ConfigError, DataChangedError: it cannot be read, or is of another run.
    """
    newest = checkpoint_file.newest(folder, must_be_run=True) if folder is not None and process.is_main else None
    path = gather(str(newest.path) if newest else None)[0] or config.resume or config.pretrain
    if newest is None and folder is not None and process.is_main:
        _check_begun(folder)
    if path is None:
        return None, False
    checkpoint = newest or checkpoint_file.load(path)
    resumes = path != config.pretrain and checkpoint.is_run
    if resumes:
        check_same_run(checkpoint.config, config, path)
        check_same_lists(checkpoint.content["meta"], meta, path)
        if process.is_main and (changes := changed(checkpoint.content["meta"], meta)):
            logger.warning("%s: this run is resumed with other code or machines: %s", path, "; ".join(changes))
    elif path == config.resume:
        logger.warning(
            "%s: holds weights but no run to resume (%s missing): training starts at epoch 0 with them",
            *(path, ", ".join(checkpoint.missing_run_keys)),
        )
    return checkpoint, resumes


def _check_begun(folder: Path) -> None:
    """Refuse to begin a run without a checkpoint again where it has results, which would be overwritten.

    A run that was killed before its first checkpoint has none.

    Raises:
        CheckpointError: it has.
    """
    results = [folder / METRICS, folder / checkpoint_file.BEST]
    if any(path.exists() and path.stat().st_size for path in results):
        raise CheckpointError(
            f"{folder}: its {checkpoint_file.LAST} is lost, so this run cannot be resumed: put it back, or start "
            "another run with --fresh or --output"
        )
    logger.warning("%s: was ended before its first checkpoint, so this run begins again", folder)


def restarted() -> bool:
    """Whether torchrun or Slurm started this command again; then it resumes its run even with --fresh."""
    return any(int(os.environ.get(f"{launcher}_RESTART_COUNT") or 0) for launcher in ("TORCHELASTIC", "SLURM"))


def changed(previous: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What may change results and differs between two starts: sources, versions of packages, GPU."""
    values = {"gpu": (previous.get("gpu"), now.get("gpu"))}
    for part, names in (("git", ("revision", "dirty")), ("versions", (now.get("versions") or {}).keys())):
        before, after = previous.get(part) or {}, now.get(part) or {}
        values |= {f"{part} {name}": (before.get(name), after.get(name)) for name in names if name in before}
    return [f"{name} was {old} and is now {new}" for name, (old, new) in values.items() if old != new]


def choose_folder(
    process: Process,
    named: Path | None,
    new: Path,
    differs: Callable[[dict[str, Any], dict[str, Any]], str | None],
    fresh: bool = False,
) -> tuple[Path, bool]:
    """The folder of a run, the same on every process, and whether it holds that run already.

    Args:
        named: the folder that the user named; None takes the newest unfinished run of the same kind beside `new` that
            no process is using, else `new`.
        differs: from the configuration and the newest start of a run why it is another run, or None.
        fresh: never resume.

    Raises:
        RunDirError: on every process, if the named folder holds another run, or any run with `fresh`.
    """
    found: tuple[Path, bool] | str | None = None
    if process.is_main:
        try:
            if named is not None:
                found = _check_named(named, differs, fresh)
            else:
                unfinished = None if fresh else _find_unfinished(new.parent, differs)
                found = (new, False) if unfinished is None else (unfinished, True)
        except (OSError, ValueError) as error:
            found = f"{named or new.parent}: cannot be searched for a run to resume ({error})"
    found = gather(found)[0]
    if isinstance(found, str):
        raise RunDirError(found)
    return found


def _check_named(folder: Path, differs: Callable, fresh: bool) -> tuple[Path, bool] | str:
    file = file_of_run(folder)
    if file is None:
        return folder, False
    if fresh:
        return f"{folder}: already holds a run ({file}), which --fresh does not resume: choose another folder"
    if not is_run_folder(folder):
        return f"{folder}: holds {file}, but no run to resume: choose another folder"
    record = read_record(folder)
    if (reason := differs(record.config, record.starts[-1])) is not None:
        return f"{folder}: already holds another run: {reason}"
    if (user := wait_for_user(folder)) is not None:  # what it still saves must be there before a checkpoint is chosen
        return in_use(folder, user)
    return folder, True


def _find_unfinished(home: Path, differs: Callable) -> Path | None:
    """The newest run in `home` that can be resumed; why others are not is logged."""
    folders = [path for path in home.iterdir() if path.is_dir()] if home.is_dir() else []
    runs = [folder for folder in folders if file_of_run(folder) is not None]
    passed_over: list[str] = []
    for folder in sorted(runs, key=_changed_at, reverse=True):
        try:
            record = read_record(folder)
            if record.finished:
                continue
            reason = differs(record.config, record.starts[-1])
            user = None if reason else wait_for_user(folder)
        except (OSError, ValueError) as error:
            logger.warning("%s: passed over (%s)", folder, error)
            continue
        if reason is None and user is None:
            finished = "finished while this command waited for it" if _has_finished(folder) else "is not finished"
            logger.info("resuming %s, which %s (--fresh starts a new run)", folder, finished)
            return folder
        why = f"not finished, but another run: {reason}" if reason else f"in use by {user}"
        passed_over.append(f"{folder}: {why}")
    if passed_over:
        logger.warning("%s; a new run starts (--output names the one to resume)", passed_over[0])
    return None


def _has_finished(folder: Path) -> bool:
    try:
        return read_record(folder).finished
    except ValueError:
        return False


def _changed_at(folder: Path) -> float:
    """When a run was started or ended, or saved where that is lost."""
    for name in (STARTS, checkpoint_file.LAST):
        with contextlib.suppress(OSError):  # missing, or deleted meanwhile
            return (folder / name).stat().st_mtime
    return 0.0


def wait_for_user(folder: Path) -> str | None:
    """Who is still using a run folder after PATIENCE_S seconds, None if nobody is.

    The processes of a launcher that was just killed still finish a step and save.
    """
    until, logged = time.monotonic() + PATIENCE_S, False
    while (user := lock_user(folder)) is not None and time.monotonic() < until:
        if not logged:
            logger.info("%s is used by %s: waiting up to %s for its end", folder, user, plural(PATIENCE_S, "second"))
        logged = True
        time.sleep(0.5)
    return user
