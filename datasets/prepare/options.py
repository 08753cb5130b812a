"""What a run is asked for, and which of it no run could do. Does not live here: parsing (__main__.py)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from datasets.decoders import PACKAGES, Decoder
from datasets.prepare.formats import FORMATS
from datasets.prepare.formats.folder import Grouping
from datasets.prepare.lists import PrepareError
from datasets.prepare.output_dir import Use


@dataclass(frozen=True)
class Options:
    """What to prepare. `frames`: extract JPEGs; otherwise the videos stay as they are. Sizes in pixels."""

    dataset: str  # a name of FORMATS, or `folder`
    videos: Path
    out: Path
    annotations: Path | None = None
    split: int = 1
    splits: tuple[str, ...] | None = None  # None: all that the owners publish with labels
    frames: bool = True
    short_side: int = 256  # 0: as in the video
    quality: int = 90
    decoder: Decoder = "decord"
    jobs: int = 2
    allow_missing: bool = False
    grouping: Grouping = field(default_factory=Grouping)

    def check(self) -> None:
        """Raises PrepareError for values that no run could use."""
        if self.jobs < 1:
            raise PrepareError(f"--jobs must be positive, not {self.jobs}")
        if _same(self.out, self.videos):
            raise PrepareError(
                f"--out must not be the videos' folder {self.videos}; a folder inside it or around it may be"
            )
        if self.short_side < 0:
            raise PrepareError(f"--short-side must be positive, or 0 for the video's own, not {self.short_side}")
        if not 1 <= self.quality <= 100:
            raise PrepareError(f"--quality must lie between 1 and 100, not be {self.quality}")
        if importlib.util.find_spec(PACKAGES[self.decoder]) is None:
            package = PACKAGES[self.decoder]
            raise PrepareError(f"--decoder {self.decoder} needs the package {package}: pip install {package}")
        if self.dataset == "folder":
            self.grouping.check()
            return
        form = FORMATS[self.dataset]
        if not 1 <= self.split <= form.numbered_splits:
            has = f"splits 1 to {form.numbered_splits}" if form.numbered_splits > 1 else "one split"
            raise PrepareError(f"--split {self.split}: {form.title} has {has}")
        if self.annotations is None:
            raise PrepareError(f"{self.dataset} needs --annotations, the folder of {form.title}'s annotation files")

    def numbered_split(self) -> int | None:
        """The owners' split, None where there is but one."""
        form = FORMATS.get(self.dataset)
        return self.split if form and form.numbered_splits > 1 else None

    def lists(self) -> tuple[int, tuple[str, ...] | None]:
        """Which of the owners' lists: number of the split, and sides."""
        return self.split, self.splits

    def use(self) -> Use:
        """What the output folder is for."""
        frames = {"short_side": self.short_side, "quality": self.quality, "decoder": self.decoder}
        return Use(self.dataset, self.numbered_split(), self.decoder, frames if self.frames else None)


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
