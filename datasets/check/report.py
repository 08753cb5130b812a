"""What a check found, and the two files it is written to.

Lives here: findings, tables as Markdown, report.md and report.json.
Does not live here: finding anything.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger("td4v")

Level = Literal["problem", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One sentence. A problem fails the check; `kind` is a word to count by; `line` counts from 1."""

    level: Level
    kind: str
    message: str
    list_file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        if self.list_file is None:
            return self.message
        return f"{self.list_file}{'' if self.line is None else f', line {self.line}'}: {self.message}"


@dataclass
class Table:
    """Rows of cells under a header."""

    title: str
    header: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

    def text(self) -> str:
        """Aligned columns, for a screen."""
        lines = [list(map(str, line)) for line in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([aligned[0], "-" * max(map(len, aligned)), *aligned[1:]])


@dataclass
class Report:
    """Everything that the two files hold. `values` are the numbers behind the tables."""

    command: str
    config_file: str
    config: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    paragraphs: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def of(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    def verdict(self) -> str:
        problems, warnings = self.of("problem"), self.of("warning")
        if not problems:
            return f"No problems, {_count(len(warnings), 'warning')}."
        kinds = ", ".join(f"{kind}: {count}" for kind, count in Counter(f.kind for f in problems).most_common())
        return f"{_count(len(problems), 'problem')} ({kinds}), {_count(len(warnings), 'warning')}."

    def write(self, folder: Path) -> None:
        """report.md and report.json. Raises OSError."""
        parts = [f"# Data check of {self.config_file}", f"**{self.verdict()}**", f"`{self.command}`"]
        for table in self.tables:
            parts += [f"## {table.title}", table.markdown()]
        for title, text in self.paragraphs.items():
            parts += [f"## {title}", text]
        for level in ("problem", "warning", "note"):
            if found := self.of(level):
                parts += [f"## {level.capitalize()}s", "\n".join(f"- {finding}" for finding in found)]
        for title, file in self.pictures.items():
            parts += [f"## {title}", f"![{title}]({file})"]
        config = json.dumps(self.config, indent=2, ensure_ascii=False)
        parts += ["## Configuration", f"```json\n{config}\n```"]
        (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        content = {"verdict": self.verdict(), **asdict(self), "paragraphs": self.paragraphs}
        (folder / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
