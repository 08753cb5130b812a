"""Text that the reports share: tables, numbers, and the section that says where the numbers come from."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.tables import markdown_table
from common.text import plural

UNKNOWN = "–"  # noqa: RUF001


def dict_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with one row a dict; columns that no row fills are dropped, other gaps show UNKNOWN."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in keys if any(row.get(key) is not None for row in rows)]
    cells = [[UNKNOWN if row.get(column) is None else row[column] for column in columns] for row in rows]
    return markdown_table(columns, cells)


def bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def number(value: float | None) -> str | None:
    """Three digits, or all before the point; None stays None."""
    if value is None:
        return None
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(value: float | None) -> str | None:
    """Bytes as a number of MB."""
    return None if value is None else number(value / 1e6)


def spread(values: Sequence[float], digits: int) -> str:
    """Such as `1.52 (1.48 to 1.60)`: median, lowest, highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def short_revision(git: Mapping[str, Any]) -> str:
    """Seven digits, with a star where the working tree has uncommitted changes."""
    return f"{git['revision'][:7]}{'*' if git['dirty'] else ''}"


def environment(meta: Mapping[str, Any], revisions: Sequence[str]) -> str:
    """The section that ends a report: command, revisions of the code, machine, versions. `meta` is a run_info()."""
    hardware = meta["hardware"]
    star = " (*: with uncommitted changes)" if any("*" in revision for revision in revisions) else ""
    gpus = ", ".join(gpu["name"] for gpu in hardware["gpus"]) or "none"
    machine = [hardware["cpu"], plural(hardware["cores"], "core")]
    machine += [plural(meta["threads"], "thread")] if "threads" in meta else []
    machine += [f"{hardware['memory_gib']} GiB; GPUs: {gpus}; device: {meta['device']}"]
    lines = [
        f"`{shlex.join(meta['command'])}`, {meta['started']}",
        f"code: {', '.join(revisions) or 'none'}{star}",
        ", ".join(machine),
        ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
    ]
    return f"## Environment\n\n{bullets(lines)}"
