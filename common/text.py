"""Text for people."""

from __future__ import annotations


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Such as `1 epoch`, `2 epochs`; `several` is the plural where it is not `noun` with an s."""
    return f"{count} {noun if count == 1 else several or f'{noun}s'}"
