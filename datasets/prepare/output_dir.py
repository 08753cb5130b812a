"""The output folder as a whole: one run at a time, of one dataset, with one setting of frames, and no stale lists.

    OUT/prepare.json   {"dataset", "split", "decoder", "frames": how they were extracted, null: none}

Does not live here: what else is written into it (lists.py, extract.py, report.py).
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.prepare.lists import PrepareError, write_text
from datasets.prepare.plan import SPLITS
from datasets.prepare.space import FULL

SETTINGS = "prepare.json"
LISTS = (*(f"{split}.txt" for split in SPLITS), "labels.csv", "config_snippet.yaml")
FRAMES, UNPACKED = "frames", "unpacked"  # folders

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Use:
    """What an output folder is used for.

    Args:
        split: number of the owners' split; None where they publish one.
        frames: settings of the extraction; None: no frames.
    """

    dataset: str
    split: int | None
    decoder: str
    frames: dict[str, Any] | None


@dataclass(frozen=True)
class OutputDir:
    """The folder during a run."""

    out: Path
    use: Use
    former: dict[str, Any]  # what prepare.json said before

    def begin(self) -> None:
        """Takes an earlier run's lists away and notes this one: to be called where nothing more can be mistyped."""
        split = self.former.get("split")
        if split not in (None, self.use.split) and any((self.out / name).exists() for name in LISTS):
            logger.warning(
                "--out %s: the lists of split %s are replaced by those of split %s", self.out, split, self.use.split
            )
        for name in LISTS:
            (self.out / name).unlink(missing_ok=True)
        self.note(self.use.split, self.use.frames or self.former.get("frames"))

    def note(self, split: int | None, frames: dict[str, Any] | None) -> None:
        """Writes prepare.json."""
        known = {"dataset": self.use.dataset, "split": split, "decoder": self.use.decoder, "frames": frames}
        write_text(self.out / SETTINGS, json.dumps(known) + "\n")


@contextmanager
def workplace(out: Path, use: Use) -> Iterator[OutputDir]:
    """Holds `out` for this run, which calls `begin` before it writes frames or lists.

    Raises:
        PrepareError: `out` cannot be written, is in use, or holds something else, or frames made with other settings.
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
        place = OutputDir(out, use, _former(out, use))
        if not place.former:
            place.note(None, None)
        yield place


def _former(out: Path, use: Use) -> dict[str, Any]:
    """What prepare.json says, {} without one; raises PrepareError where the folder is for something else."""
    file = out / SETTINGS
    if not file.exists():
        if foreign := [name for name in (FRAMES, UNPACKED, *LISTS) if (out / name).exists()]:
            raise PrepareError(f"{out / foreign[0]}: is not an output of this command; choose another --out")
        return {}
    try:
        former = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # of JSON or of UTF-8
        former = None
    if not isinstance(former, dict) or not isinstance(former.get("dataset"), str):
        raise PrepareError(f"{file}: does not say which dataset {out} holds, it is damaged; choose another --out")
    if former["dataset"] != use.dataset:
        raise PrepareError(f"--out {out}: holds {former['dataset']}, not {use.dataset}; choose another --out")
    made = former.get("frames")
    if (out / FRAMES).exists():
        if not isinstance(made, dict) or not made:
            raise PrepareError(f"{file}: does not say how {out / FRAMES} was made; choose another --out")
        if use.frames and made != use.frames:
            had, asked = (", ".join(f"{key} {value}" for key, value in each.items()) for each in (made, use.frames))
            raise PrepareError(f"{out / FRAMES}: was made with {had}, not {asked}; choose another --out")
        return former
    return {**former, "frames": None}
