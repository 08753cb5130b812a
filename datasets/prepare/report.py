"""The results of a run: what was found, what is missing or unreadable, and the configuration that reads it.

OUT/report.json           all of it
OUT/report.txt            the same to read; its table is also printed
OUT/config_snippet.yaml   the part of a configuration that the dataset decides
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from common.tables import format_bytes, markdown_table
from common.text import printable
from datasets.frame_names import USUAL
from datasets.prepare.decode import Outcome
from datasets.prepare.output_dir import describe_split, write_text
from datasets.prepare.plan import SPLITS, Entry, Plan

SHOWN_CLASSES = 5  # in the printed table
COLUMNS = ("listed", "found", "missing", "unreadable", "frames", "bytes")


@dataclass
class Counts:
    """One split's videos. `frames` and `bytes` are those of what training reads: extracted frames, or the videos."""

    listed: int = 0
    found: int = 0
    missing: int = 0
    unreadable: int = 0
    frames: int = 0
    bytes: int = 0


@dataclass
class Report:
    """The result of a run; the lists are in the plan's order."""

    dataset: str
    split: dict[str, object]  # how videos were divided
    classes: int
    splits: dict[str, Counts]
    missing: list[tuple[str, str]] = field(default_factory=list)  # video, split and class
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # video, reason
    shorter_than_declared: list[tuple[str, int, int]] = field(default_factory=list)  # video, frames declared, decoded
    identical_across_splits: list[tuple[str, str]] = field(default_factory=list)  # two videos, each with its split
    classes_without_video: dict[str, list[str]] = field(default_factory=dict)  # split -> class names
    notes: list[str] = field(default_factory=list)  # how classes, labels or splits were chosen, what was passed over
    passed_over: list[str] = field(default_factory=list)  # files that are no videos
    extracted_before: int = 0  # videos that an earlier run had extracted

    def table(self) -> str:
        """The counts of each split, and what else is worth a line."""
        rows = []
        for split, counts in self.splits.items():
            values = asdict(counts) | {"bytes": format_bytes(counts.bytes)}
            rows.append([split, *(values[column] for column in COLUMNS)])
        lines = [markdown_table(["", *COLUMNS], rows, align="l" + "r" * len(COLUMNS)).rstrip()]
        for split, names in self.classes_without_video.items():
            if names:
                shown = ", ".join(names[:SHOWN_CLASSES]) + (" ..." if len(names) > SHOWN_CLASSES else "")
                lines.append(f"{split}: {len(names)} of {self.classes} classes have no video: {shown}")
        if self.shorter_than_declared:
            lines.append(f"{len(self.shorter_than_declared)} videos declare more frames than decode")
        for one, other in self.identical_across_splits:
            lines.append(f"{one} and {other} are byte-identical")
        return "\n".join(lines)

    def text(self) -> str:
        """The table and every list."""
        parts = [f"{self.dataset}: {describe_split(self.split)}", *self.notes, self.table()]
        for split, names in self.classes_without_video.items():
            if names:
                parts.append("\n".join([f"{split}, classes without a video:", *names]))
        for title, rows in (("missing", self.missing), ("unreadable", self.unreadable)):
            if rows:
                parts.append("\n".join([f"{title}:", *(f"{name}: {why}" for name, why in rows)]))
        if self.shorter_than_declared:
            lines = (
                f"{name}: {declared} declared, {frames} decoded"
                for name, declared, frames in self.shorter_than_declared
            )
            parts.append("\n".join(["declare more frames than decode:", *lines]))
        if self.passed_over:
            parts.append("\n".join(["files that were passed over:", *self.passed_over]))
        return "\n\n".join(parts) + "\n"

    def write(self, out: Path) -> None:
        """Write report.json and report.txt. Raises OSError."""
        write_text(out / "report.json", json.dumps(asdict(self), indent=1) + "\n")
        write_text(out / "report.txt", printable(self.text(), lines=True))


def make_report(
    plan: Plan,
    split: dict[str, object],
    found: Mapping[Entry, str],
    missing: Sequence[Entry],
    outcomes: Mapping[str, Outcome],
) -> Report:
    """Count a plan's entries; videos without an outcome count as found only."""
    report = Report(plan.title, split, len(plan.classes), {name: Counts() for name in plan.splits})
    for entry in missing:
        counts = report.splits[entry.split]
        counts.listed += 1
        counts.missing += 1
        report.missing.append((entry.name, f"{entry.split}, {plan.classes[entry.label]}"))
    usable: set[tuple[str, int]] = set()  # (split, label)
    for entry, path in found.items():
        counts, outcome = report.splits[entry.split], outcomes.get(path, Outcome())
        counts.listed += 1
        counts.found += 1
        if outcome.error:
            counts.unreadable += 1
            report.unreadable.append((path, outcome.error))
            continue
        usable.add((entry.split, entry.label))
        counts.frames += outcome.frames
        counts.bytes += outcome.bytes
        if outcome.frames < outcome.declared:
            report.shorter_than_declared.append((path, outcome.declared, outcome.frames))
    for split_name in plan.splits:
        names = [name for label, name in enumerate(plan.classes) if (split_name, label) not in usable]
        report.classes_without_video[split_name] = names
    return report


def write_snippet(
    out: Path,
    plan: Plan,
    split: dict[str, object],
    listed_splits: Sequence[str],
    root: str,
    extracted: bool,
    decoder: str,
) -> str:
    """Write OUT/config_snippet.yaml and return it.

    Args:
        split: how videos were divided.
        listed_splits: those that have a list.
        root: absolute path that the list rows are relative to.
        extracted: the rows name extracted frames; otherwise what was published.
        decoder: of videos.
    """
    frame_names = USUAL if extracted else plan.frame_names
    data: dict[str, object] = {"dataset": plan.config_name}
    if plan.style:
        data["style"] = plan.style
    data.update(modality="RGB" if frame_names else "video", num_classes=len(plan.classes))
    if frame_names:
        data["image_tmpl"] = frame_names.image_tmpl
        if frame_names.index_base != USUAL.index_base:
            data["index_base"] = frame_names.index_base
    else:
        data["decoder"] = decoder
    data.update({f"{name}_root": root if name in listed_splits else None for name in SPLITS})
    for name in SPLITS:
        data[f"{name}_list"] = os.path.abspath(out / f"{name}.txt") if name in listed_splits else None
    data["label_list"] = os.path.abspath(out / "labels.csv")
    lines = [
        f"# {plan.title}, {describe_split(split)}: replaces the same keys under `data:` of a configuration.",
        *(f"# There is no {name} list: it has no usable video." for name in plan.splits if name not in listed_splits),
    ]
    if plan.style:
        lines.append(
            "# Set `style: something` if the direction of a motion decides the class; nothing is mirrored then."
        )
    body = yaml.safe_dump({"data": data}, sort_keys=False, indent=4, width=1000, allow_unicode=True)
    text = "\n".join([*lines, body])
    write_text(out / "config_snippet.yaml", text)
    return text
