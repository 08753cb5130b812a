"""Other people's names of weights -> ours, by a table of regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def renamed(key: str, rules: Iterable[Rule]) -> str:
    """The key after all substitutions of a table, one after the other."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
