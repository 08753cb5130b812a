"""Paths as a shell would read them: ~ and variables stand for folders wherever a person writes a path."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)


def expand(text: str) -> str:
    """A path with its leading `~` or `~user` and its `$NAME` and `${NAME}` replaced; expanding it again changes nothing.

    Raises:
        ValueError: it is empty, a user or variable is unknown, or what replaces it would be expanded again.
    """
    if not text.strip():
        raise ValueError("the path is empty")
    if "\0" in text:
        raise ValueError(f"{text!r} holds a null character")
    expanded = os.path.expanduser(_VARIABLE.sub(_value, text))
    if expanded.startswith("~"):
        user = expanded.partition("/")[0][1:]
        raise ValueError(f"{text}: there is no user {user!r} (write ./{expanded} for a file of that name)")
    if found := _VARIABLE.search(expanded):
        raise ValueError(f"{text}: becomes {expanded}, in which {found[0]} is another variable")
    return expanded


def _value(found: re.Match[str]) -> str:
    """The value of the variable that was found. Raises ValueError."""
    value = os.environ.get(found[1] or found[2])
    if not value:
        raise ValueError(f"{found.string}: the variable {found[0]} is {'empty' if value == '' else 'not set'}")
    return value
