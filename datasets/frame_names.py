"""Which file is frame k of a folder, and under which names a folder holds its frames if they are other ones."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9]*?(?:\.\w+)?)")  # before the last number, the number, behind it


@dataclass(frozen=True)
class FrameNames:
    """Frame k, from 0, is the file `image_tmpl.format(index_base + k)`."""

    image_tmpl: str = "{:06d}.jpg"
    index_base: int = 1

    def name(self, index: int) -> str:
        return self.image_tmpl.format(self.index_base + index)

    def advice(self, files: Iterable[str], template: str = "data.image_tmpl: ", base: str = "data.index_base: ") -> str:
        """A clause that says how these files are named and what to set; empty where this is how they are named.

        Args:
            files: all names that there are in the folder. template, base: what the user writes before the values.
        """
        found = _numbered(files, self.image_tmpl)
        if found is None:
            return ""
        image_tmpl, first, last = found
        names = f"; its files are {image_tmpl.format(first)} to {image_tmpl.format(last)}"
        settings = []
        if image_tmpl.format(last) != self.image_tmpl.format(last):
            settings.append(f"{template}'{image_tmpl}'")
        if first not in (0, 1):
            return f"{names}, but frames are numbered from 0 or 1"
        if first != self.index_base:
            settings.append(f"{base}{first}")
        return f"{names}: set {' and '.join(settings)}" if settings else ""


USUAL = FrameNames()


def _numbered(files: Iterable[str], image_tmpl: str) -> tuple[str, int, int] | None:
    """Template, first and last number of the files that are numbered: those of `image_tmpl`, else most of them."""
    groups = defaultdict(list)
    for file in files:
        if match := NUMBERED.fullmatch(file):
            before, digits, behind = match.groups()
            groups[before, behind].append(digits)
    if not groups:
        return None

    def fitness(group: tuple[str, str]) -> tuple[bool, bool, int]:
        before, behind = group
        expected = any(f"{before}{digits}{behind}" == image_tmpl.format(int(digits)) for digits in groups[group])
        return expected, "flow" not in before, len(groups[group])  # optical flow is often beside the frames

    before, behind = max(sorted(groups), key=fitness)
    numbers = groups[before, behind]
    padded = [len(digits) for digits in numbers if digits.startswith("0") and len(digits) > 1]
    place = f"{{:0{min(padded)}d}}" if padded else "{}"
    before, behind = (text.replace("{", "{{").replace("}", "}}") for text in (before, behind))
    return f"{before}{place}{behind}", min(map(int, numbers)), max(map(int, numbers))
