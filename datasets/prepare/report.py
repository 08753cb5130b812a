"""What a run found: counts of each split, and every video that is missing, unreadable or shorter than it claims.

OUT/report.json   all of it
OUT/report.txt    the same to read; its table is also printed
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets.prepare.decode import Outcome
from datasets.prepare.lists import write_text
from datasets.prepare.plan import Entry, Plan
from datasets.prepare.space import in_bytes

COLUMNS = ("listed", "found", "missing", "unreadable", "frames", "bytes")


@dataclass
class Counts:
    """One split's videos. `frames` and `bytes` are of what training reads: extracted frames, or the videos."""

    listed: int = 0
    found: int = 0
    missing: int = 0
    unreadable: int = 0
    frames: int = 0
    bytes: int = 0
    classes_without_video: int = 0


@dataclass
class Report:
    """The result of a run; lists hold [name, reason or place] in the plan's order."""

    dataset: str
    split: int | None  # number of the owners' split; None where they publish one
    classes: int
    splits: dict[str, Counts]
    missing: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    shorter_than_declared: list[tuple[str, int, int]] = field(default_factory=list)  # video, declared, decoded
    identical_across_sides: list[tuple[str, str]] = field(default_factory=list)  # training video, validation video
    classes_without_video: list[str] = field(default_factory=list)
    extracted_before: int = 0

    def table(self) -> str:
        """The counts as text, a line a split, and below what else there is to say."""
        rows = [("", *COLUMNS)]
        for split, counts in self.splits.items():
            values = asdict(counts)
            rows.append((split, *(in_bytes(values[key]) if key == "bytes" else str(values[key]) for key in COLUMNS)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
        for split, counts in self.splits.items():
            if counts.classes_without_video:
                lines.append(f"{split}: {counts.classes_without_video} of {self.classes} classes have no video")
        if self.shorter_than_declared:
            lines.append(f"{len(self.shorter_than_declared)} videos declare more frames than decode")
        for train, val in self.identical_across_sides:
            lines.append(f"{train} (train) and {val} (val) are byte-identical")
        return "\n".join(lines)

    def text(self) -> str:
        """The table and every list."""
        split = f", split {self.split}" if self.split else ""
        parts = [f"{self.dataset}{split}, {self.classes} classes", self.table()]
        if self.classes_without_video:
            parts.append("\n".join(["classes without any video:", *self.classes_without_video]))
        for title, rows in (("missing", self.missing), ("unreadable", self.unreadable)):
            if rows:
                parts.append("\n".join([f"{title}:", *(f"{name}: {why}" for name, why in rows)]))
        if self.shorter_than_declared:
            lines = (f"{name}: {declared} declared, {frames}" for name, declared, frames in self.shorter_than_declared)
            parts.append("\n".join(["frames declared and decoded:", *lines]))
        return "\n\n".join(parts) + "\n"

    def write(self, out: Path) -> None:
        """Writes both files. Raises OSError."""
        write_text(out / "report.json", json.dumps(asdict(self), indent=1) + "\n")
        write_text(out / "report.txt", self.text())


def make_report(
    plan: Plan, split: int | None, found: Mapping[Entry, str], missing: Sequence[Entry], outcomes: Mapping[str, Outcome]
) -> Report:
    """Counts a plan's entries; videos without an outcome count as found and no more."""
    report = Report(plan.title, split, len(plan.classes), {split: Counts() for split in plan.splits})
    for entry in missing:
        counts = report.splits[entry.split]
        counts.listed += 1
        counts.missing += 1
        report.missing.append((entry.names[0], f"{entry.split}, {plan.classes[entry.label]}"))
    used: set[tuple[str, int]] = set()
    for entry, path in found.items():
        counts, outcome = report.splits[entry.split], outcomes.get(path, Outcome())
        counts.listed += 1
        counts.found += 1
        if outcome.error:
            counts.unreadable += 1
            report.unreadable.append((path, outcome.error))
            continue
        used.add((entry.split, entry.label))
        counts.frames += outcome.frames
        counts.bytes += outcome.bytes
        if outcome.frames < outcome.declared:
            report.shorter_than_declared.append((path, outcome.declared, outcome.frames))
    for name, counts in report.splits.items():
        counts.classes_without_video = len(plan.classes) - sum(side == name for side, _ in used)
    with_video = {label for _, label in used}
    report.classes_without_video = [name for label, name in enumerate(plan.classes) if label not in with_video]
    return report
