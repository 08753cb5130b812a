"""Which run a command goes on with, and from which checkpoint.

Lives here: the rules by which the same command is the same run. Does not live here: what is in a run folder
(run_folder.py) and in a checkpoint (checkpoint.py, state.py), and what settings make another run (configs.schema).
"""

from __future__ import annotations

import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from configs.schema import Config, check_same_run, difference
from engine import checkpoint_file
from engine.checkpointer import is_resumable
from engine.distributed import Process, gather
from engine.run_dir import choose_folder, is_run
from engine.run_info import DataChangedError, check_same_lists

logger = logging.getLogger("td4v")


def restarted() -> bool:
    """Whether torchrun or Slurm started this command again, which goes on then even if it once began a fresh run."""
    return any(int(os.environ.get(f"{who}_RESTART_COUNT") or 0) for who in ("TORCHELASTIC", "SLURM"))


def find_run(
    config: Config, meta: dict[str, Any], process: Process, output: str | None, name: str | None, fresh: bool
) -> tuple[Path, bool]:
    """Where the run goes, the same on every process, and whether it goes on with what is there.

    Args:
        meta: of record.run_info, with the data lists.
        output, name: the folder, or its name in OUTPUT_DIR/DATASET/ARCH, if the user gave one. Else it is the folder of
            a `resume` that is called last_model.pt, else the newest unfinished run that began as this one, else a new
            one named after the time.
        fresh: never go on with a run.

    Raises:
        RunDirError: the folder holds another run; the message says what differs.
    """
    home = Path(config.logging.output_dir, config.data.dataset, config.network.arch.replace("/", "-"))
    explicit = Path(output) if output else home / name if name else None
    resume = Path(config.resume) if config.resume else None
    if explicit is None and resume is not None and resume.name == checkpoint_file.LAST and is_run(resume.parent):
        explicit = resume.parent  # it goes on where it is; an older one would overwrite what came after
    own = (
        explicit is not None and resume is not None and resume.resolve() == (explicit / checkpoint_file.LAST).resolve()
    )

    def differs(former: dict[str, Any], began: dict[str, Any]) -> str | None:
        reason = difference(former, config, more_epochs=explicit is not None, same_start=not own)
        if reason is None and began.get("world_size") != process.world_size:
            reason = f"it began with {began.get('world_size')} processes, here are {process.world_size}"
        if reason is None:
            try:
                check_same_lists(began, meta, explicit or home)
            except DataChangedError as error:
                reason = str(error)
        return reason

    return choose_folder(process, explicit, home, datetime.now().strftime("%Y%m%d_%H%M%S"), differs, fresh)


def changed(former: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What may change results and is not what it was: sources, versions of packages, GPU."""
    names = {name: (former.get(name), now.get(name)) for name in ("gpu",)}
    for part, of in (("git", ("revision", "dirty")), ("versions", (now.get("versions") or {}).keys())):
        before, after = former.get(part) or {}, now.get(part) or {}
        names |= {f"{part} {name}": (before.get(name), after.get(name)) for name in of if name in before}
    return [f"{name} was {old} and is now {new}" for name, (old, new) in names.items() if old != new]


def starting_point(
    config: Config, meta: dict[str, Any], folder: Path | None, process: Process
) -> tuple[str | None, dict[str, Any], bool]:
    """The checkpoint to begin with, its content ({} without one), and whether it is a whole run, not weights alone.

    Args:
        folder: of a run to go on with, whose newest whole checkpoint comes before `resume` and `pretrain`.

    Raises:
        CheckpointError, ConfigError, DataChangedError: it cannot be read, or is of another run.
    """
    newest = checkpoint_file.newest(folder, is_resumable) if folder is not None and process.is_main else None
    path = gather(str(newest) if newest else None)[0] or config.resume or config.pretrain
    if newest is None and folder is not None and process.is_main and (folder / "metrics.jsonl").exists():
        logger.warning("%s: holds no checkpoint, so its run begins again", folder)
    if path is None:
        return None, {}, False
    content = checkpoint_file.load(path)
    whole = path != config.pretrain and is_resumable(content)
    if whole:
        check_same_run(content["config"], config, path)
        check_same_lists(content["meta"], meta, path)
        if process.is_main and (changes := changed(content["meta"], meta)):
            logger.warning("%s: this run goes on with other code or machines: %s", path, "; ".join(changes))
    elif path == config.resume:
        logger.warning("%s: holds weights but no run of ours to go on with: training starts at epoch 0 with them", path)
    return path, content, whole
