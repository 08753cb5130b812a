"""The output folder as a whole: one run at a time, of one dataset, with one setting of frames, and no stale lists.

Does not live here: what is written into it (lists.py, extract.py, report.py).
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets.prepare.lists import PrepareError, write_text
from datasets.prepare.plan import SPLITS
from datasets.prepare.space import FULL

SETTINGS = "prepare.json"
LISTS = (*(f"{split}.txt" for split in SPLITS), "labels.csv", "config_snippet.yaml")

logger = logging.getLogger("td4v")


@contextmanager
def workplace(out: Path, dataset: str, frames: dict[str, int] | None) -> Iterator[None]:
    """Holds `out` for this run and takes away an earlier run's lists: lists that are there belong to a run that ended.

    Args:
        dataset: of which the folder is; another one's is refused.
        frames: settings of the extraction (None: no frames); frames made with others are refused.

    Raises:
        PrepareError: `out` cannot be written, is in use, or holds something else.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        if error.errno in FULL:
            raise
        raise PrepareError(f"--out {out}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"--out {out}: another run is writing there") from None
        except OSError as error:
            logger.warning("%s: cannot be locked (%s); start no second run there", out, error.strerror)
        _remember(out, dataset, frames)
        for name in LISTS:
            (out / name).unlink(missing_ok=True)
        yield


def _remember(out: Path, dataset: str, frames: dict[str, int] | None) -> None:
    """Writes what the folder is for; raises PrepareError where that is something else already."""
    file = out / SETTINGS
    if not file.exists():
        if foreign := [name for name in ("frames", "videos", *LISTS) if (out / name).exists()]:
            raise PrepareError(f"{out / foreign[0]}: is not an output of this command; choose another --out")
        there = {}
    else:
        there = json.loads(file.read_text(encoding="utf-8"))
    if there.get("dataset", dataset) != dataset:
        raise PrepareError(f"--out {out}: holds {there['dataset']}, not {dataset}; choose another --out")
    known = there.get("frames") if (out / "frames").exists() else None
    if known and frames and known != frames:
        made, asked = (", ".join(f"{key} {value}" for key, value in each.items()) for each in (known, frames))
        raise PrepareError(f"{out / 'frames'}: was made with {made}, not {asked}; choose another --out")
    write_text(file, json.dumps({"dataset": dataset, "frames": known or frames}) + "\n")
