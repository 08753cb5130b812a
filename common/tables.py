"""One renderer for the Markdown tables of all reports, and sizes in their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.text import printable

_RULES = {"l": "-{}-", "r": "-{}:", "c": ":{}:"}


def markdown_table(columns: Sequence[object], rows: Iterable[Sequence[object]], align: str | None = None) -> str:
    """Render a table whose columns also line up in a terminal.

    Args:
        columns: the headings.
        rows: one value a column; None gives an empty cell. `|` and control characters are escaped, and a line break becomes a space.
        align: one letter a column, "l", "r" or "c" (e.g. "lrr"); None aligns all columns left.

    Returns:
        The lines of the table, each ending in a line break.

    Raises:
        ValueError: `align` or a row has another number of columns.
    """
    align = align or "l" * len(columns)
    cells = [[_cell(value) for value in row] for row in (columns, *rows)]
    if {len(align), *map(len, cells)} != {len(columns)}:
        raise ValueError(f"each row and `align` must have {len(columns)} columns")
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = [_RULES[side].format("-" * width) for side, width in zip(align, widths, strict=True)]
    lines = [_line(row, widths, align) for row in cells]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]]) + "\n"


def format_bytes(count: float) -> str:
    """E.g. `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _cell(value: object) -> str:
    return "" if value is None else printable(str(value).replace("|", "\\|").replace("\n", " "))


def _line(cells: Sequence[str], widths: Sequence[int], align: str) -> str:
    place = {"l": str.ljust, "r": str.rjust, "c": str.center}
    padded = [place[side](cell, width) for cell, width, side in zip(cells, widths, align, strict=True)]
    return f"| {' | '.join(padded)} |"
