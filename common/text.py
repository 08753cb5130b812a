"""Text for people: words that agree with numbers, and text from files, safe to show."""

from __future__ import annotations

_BIDIRECTIONAL = (
    0x61C,
    0x200E,
    0x200F,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)  # show letters in another order
_LINE_ENDS = (0x2028, 0x2029)
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_ESCAPES |= {code: f"\\u{code:04x}" for code in (*_BIDIRECTIONAL, *_LINE_ENDS, *range(0xD800, 0xE000))}
_ESCAPES |= {code: f"\\x{code - 0xDC00:02x}" for code in range(0xDC80, 0xDD00)}  # bytes of a name that is not UTF-8
_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}
_ESCAPES_IN_LINES = {code: escape for code, escape in _ESCAPES.items() if code != ord("\n")}


def printable(text: str, lines: bool = False) -> str:
    """The text in one line that a terminal shows as it stands, and that UTF-8 can encode.

    Names of files may hold what moves a terminal's cursor, clears it, reverses the order of letters or forges another
    line. Such characters are escaped, as are bytes that are not UTF-8.

    Args:
        lines: keep line feeds, in a text whose lines are the program's own.
    """
    return text.translate(_ESCAPES_IN_LINES if lines else _ESCAPES)


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Such as `1 epoch`, `2 epochs`; `several` is the plural where it is not `noun` with an s."""
    return f"{count} {noun if count == 1 else several or f'{noun}s'}"
