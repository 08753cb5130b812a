"""What a check found, and the report files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.text import printable

Level = Literal["problem", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One sentence about the data; a problem fails the check."""

    level: Level
    kind: str  # a word or two to count by
    message: str
    list_file: str | None = None
    line: int | None = None  # from 1

    def __str__(self) -> str:
        if self.list_file is None:
            return self.message
        return f"{self.list_file}{'' if self.line is None else f', line {self.line}'}: {self.message}"


@dataclass
class Report:
    """The content of report.md and report.json."""

    command: str
    config_file: str
    config: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)  # title -> Markdown
    figures: dict[str, str] = field(default_factory=dict)  # title -> file name
    values: dict[str, Any] = field(default_factory=dict)  # the numbers behind the sections

    def of(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    def verdict(self) -> str:
        problems, warnings = self.of("problem"), self.of("warning")
        if not problems:
            return f"No problems, {_count(len(warnings), 'warning')}."
        kinds = ", ".join(f"{kind}: {count}" for kind, count in Counter(f.kind for f in problems).most_common())
        return f"{_count(len(problems), 'problem')} ({kinds}), {_count(len(warnings), 'warning')}."

    def write(self, folder: Path) -> None:
        """Write report.md and report.json. Raises OSError."""
        parts = [
            f"# Data check of {printable(self.config_file)}",
            f"**{self.verdict()}**",
            f"`{printable(self.command)}`",
        ]
        for title, text in self.sections.items():
            parts += [f"## {title}", text.rstrip()]
        for level in ("problem", "warning", "note"):
            if found := self.of(level):
                parts += [f"## {level.capitalize()}s", "\n".join(f"- {printable(str(finding))}" for finding in found)]
        for title, file in self.figures.items():
            parts += [f"## {title}", f"![{title}]({file})"]
        config = printable(json.dumps(self.config, indent=2, ensure_ascii=False), lines=True)
        parts += ["## Configuration", f"```json\n{config}\n```"]
        (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        content = json.dumps({"verdict": self.verdict(), **asdict(self)}, indent=1)
        (folder / "report.json").write_text(content + "\n", encoding="utf-8")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
