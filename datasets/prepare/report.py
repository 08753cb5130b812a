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
from datasets.prepare.decode import Outcome
from datasets.prepare.output_dir import write_text
from datasets.prepare.plan import SPLITS, Entry, Plan

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
    classes_without_video: int = 0


@dataclass
class Report:
    """The result of a run; the lists are in the plan's order."""

    dataset: str
    split: int | None  # number of the published split; None if there is only one
    classes: int
    splits: dict[str, Counts]
    missing: list[tuple[str, str]] = field(default_factory=list)  # video, split and class
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # video, reason
    shorter_than_declared: list[tuple[str, int, int]] = field(default_factory=list)  # video, frames declared, decoded
    identical_across_splits: list[tuple[str, str]] = field(default_factory=list)  # training video, validation video
    classes_without_video: list[str] = field(default_factory=list)
    extracted_before: int = 0  # videos that an earlier run had extracted

    def table(self) -> str:
        """The counts of each split, and what else is worth a line."""
        rows = []
        for split, counts in self.splits.items():
            values = asdict(counts) | {"bytes": format_bytes(counts.bytes)}
            rows.append([split, *(values[column] for column in COLUMNS)])
        lines = [markdown_table(["", *COLUMNS], rows, align="l" + "r" * len(COLUMNS)).rstrip()]
        for split, counts in self.splits.items():
            if counts.classes_without_video:
                lines.append(f"{split}: {counts.classes_without_video} of {self.classes} classes have no video")
        if self.shorter_than_declared:
            lines.append(f"{len(self.shorter_than_declared)} videos declare more frames than decode")
        for train, val in self.identical_across_splits:
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
            lines = (
                f"{name}: {declared} declared, {frames} decoded"
                for name, declared, frames in self.shorter_than_declared
            )
            parts.append("\n".join(["declare more frames than decode:", *lines]))
        return "\n\n".join(parts) + "\n"

    def write(self, out: Path) -> None:
        """Write report.json and report.txt. Raises OSError."""
        write_text(out / "report.json", json.dumps(asdict(self), indent=1) + "\n")
        write_text(out / "report.txt", self.text())


def make_report(
    plan: Plan, split: int | None, found: Mapping[Entry, str], missing: Sequence[Entry], outcomes: Mapping[str, Outcome]
) -> Report:
    """Count a plan's entries; videos without an outcome count as found only."""
    report = Report(plan.title, split, len(plan.classes), {split: Counts() for split in plan.splits})
    for entry in missing:
        counts = report.splits[entry.split]
        counts.listed += 1
        counts.missing += 1
        report.missing.append((entry.names[0], f"{entry.split}, {plan.classes[entry.label]}"))
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
    for name, counts in report.splits.items():
        counts.classes_without_video = len(plan.classes) - sum(split == name for split, _ in usable)
    with_video = {label for _, label in usable}
    report.classes_without_video = [name for label, name in enumerate(plan.classes) if label not in with_video]
    return report


def write_snippet(
    out: Path,
    plan: Plan,
    split: int | None,
    listed_splits: Sequence[str],
    root: str,
    extracted: bool,
    decoder: str,
) -> str:
    """Write OUT/config_snippet.yaml and return it.

    Args:
        split: number of the published split; None if there is only one.
        listed_splits: those that have a list.
        root: absolute path that the list rows are relative to.
        extracted: the rows name extracted frames; otherwise what was published.
        decoder: of videos.
    """
    frames = extracted or plan.published_frames
    data: dict[str, object] = {"dataset": plan.config_name}
    if plan.style:
        data["style"] = plan.style
    data.update(modality="RGB" if frames else "video", num_classes=len(plan.classes))
    if frames:
        data["image_tmpl"] = "{:06d}.jpg" if extracted else "{:05d}.jpg"
    else:
        data["decoder"] = decoder
    data.update({f"{name}_root": root if name in listed_splits else None for name in SPLITS})
    for name in SPLITS:
        data[f"{name}_list"] = os.path.abspath(out / f"{name}.txt") if name in listed_splits else None
    data["label_list"] = os.path.abspath(out / "labels.csv")
    lines = [
        f"# {plan.title}{f', split {split}' if split else ''}: replaces the same keys under `data:` of a configuration.",
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
