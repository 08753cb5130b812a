"""YAML text -> plain values, with the line of each key, or one sentence that says what to change.

PyYAML does the reading. Refused besides what it refuses: a key given twice, values that mean something else than they
look like (051 is 41, 12:30 is 750), tags, texts that grow without end when aliases are followed, deep nesting.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_SIZE = 200_000  # bytes or characters
MAX_VALUES = 10_000  # with each alias counted as what it stands for
MAX_DEPTH = 20

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_TEXT_TAGS = {_TAG + name for name in ("timestamp", "value", "merge")}  # of words that YAML has a use for, such as =
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_REASONS = {
    "but found another document": "a second document begins here (---): keep one in the file",
    "found character '\\t'": "a tab: indent with spaces",
}
_TEMPLATE = re.compile(r"\{[^{}\s,]*\}")
_NEEDS_QUOTES = re.compile(r"[{%@`&*!|>]|[^'\"].*(?::\s|\{)")


class YamlError(ValueError):
    """Text that is not the YAML of a configuration; `line` counts from 1."""

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


class NotYamlError(YamlError):
    """Text that breaks the grammar, as opposed to values that a configuration does not take."""


def decode(content: bytes) -> str:
    """The text of a file, of which no more than MAX_SIZE + 1 bytes need to be read. Raises YamlError."""
    if len(content) > MAX_SIZE:
        raise YamlError(f"is larger than {MAX_SIZE:,} bytes, so it is no configuration")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise NotYamlError("is not UTF-8 text: save the file in that encoding", line) from None


def read_yaml_text(text: str) -> tuple[Any, dict[str, int]]:
    """The value that a text holds, and the line of each dotted key.

    Raises:
        YamlError: it holds something else than plain values, or cannot be read.
    """
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else loader.value(node, "", lines)), lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise NotYamlError(f"holds the character {chr(error.character)!r}: remove it", line) from None
    except yaml.MarkedYAMLError as error:
        raise _in_words(error, text.splitlines()) from None


class _Loader(yaml.SafeLoader):
    """Composes nodes as far as a configuration may go, and makes values of them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.total = 0
        self.sizes: dict[yaml.Node, int] = {}  # of finished nodes, with what their aliases stand for
        self.flattened: set[yaml.Node] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self.sizes:
                raise YamlError("an alias (*) stands for what it is in: write the value out", line)
            self.total += self.sizes[node]
        else:
            before, self.depth = self.total, self.depth + 1
            if self.depth > MAX_DEPTH:
                raise YamlError(f"is nested more than {MAX_DEPTH} deep", line)
            node = super().compose_node(parent, index)
            self.total, self.depth = self.total + 1, self.depth - 1
            self.sizes[node] = self.total - before
        if self.total > MAX_VALUES:
            raise YamlError(f"holds more than {MAX_VALUES:,} values, aliases (*) included: write it shorter", line)
        return node

    def value(self, node: yaml.Node, key: str, lines: dict[str, int]) -> Any:
        """The plain value of a node; adds the line of each dotted key below `key`."""
        if isinstance(node, yaml.MappingNode):
            self._check_tag(node, key)
            return {name: self.value(inner, dotted, lines) for name, dotted, inner in self._pairs(node, key, lines)}
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, key)
            return [self.value(inner, f"{key}[{place}]", lines) for place, inner in enumerate(node.value)]
        return self._scalar(node, key)

    def _pairs(self, node: yaml.MappingNode, key: str, lines: dict[str, int]) -> Iterator[tuple[str, str, yaml.Node]]:
        """The name, dotted key and value of each pair, those of merge keys (<<) first. Keys are texts."""
        if node not in self.flattened:
            self.flattened.add(node)
            _refuse_repeated(node, key)
            self.flatten_mapping(node)
        for name, inner in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise YamlError(f"{_where(key)}a key must be a word", name.start_mark.line + 1)
            dotted = f"{key}.{name.value}" if key else name.value
            lines[dotted] = name.start_mark.line + 1
            yield name.value, dotted, inner

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        line, is_plain = node.start_mark.line + 1, node.style is None
        if node.tag in _TEXT_TAGS:
            return node.value
        self._check_tag(node, key)
        try:
            value = self.construct_object(node)
        except (ValueError, KeyError):  # such as !!int x, or a number of thousands of digits
            raise YamlError(f"{_where(key)}{node.value[:50]} is not a value of its type", line) from None
        if is_plain and node.tag in (_TAG + "int", _TAG + "float"):
            if ":" in node.value:
                raise YamlError(f"{_where(key)}YAML reads {node.value} as {value}; put it in quotes", line)
            if _OCTAL.fullmatch(node.value):
                decimal = node.value.replace("_", "").lstrip("+-0") or "0"
                meant = f"write {decimal}, or put it in quotes"
                raise YamlError(f"{_where(key)}YAML reads {node.value} as the octal number {value}; {meant}", line)
        return value

    def _check_tag(self, node: yaml.Node, key: str) -> None:
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace(_TAG, "!!")
            raise YamlError(
                f"{_where(key)}the tag {tag} is not read: write a plain value, or put it in quotes",
                node.start_mark.line + 1,
            )


def _refuse_repeated(node: yaml.MappingNode, key: str) -> None:
    seen: dict[str, int] = {}
    for name, _ in node.value:
        line = name.start_mark.line + 1
        if isinstance(name, yaml.ScalarNode):
            if name.value in seen:
                dotted = f"{key}.{name.value}" if key else name.value
                raise YamlError(f"{dotted} is given twice, first in line {seen[name.value]}: keep one of them", line)
            seen[name.value] = line


def _where(key: str) -> str:
    return f"{key}: " if key else ""


def _in_words(error: yaml.MarkedYAMLError, lines: list[str]) -> NotYamlError:
    """PyYAML's error with what to do about it, where the line shows what is wrong."""
    problem = str(error.problem)
    marks = [
        mark.line for mark in (error.problem_mark, error.context_mark) if mark is not None and mark.line < len(lines)
    ]
    if reason := next((words for sign, words in _REASONS.items() if sign in problem), None):
        return NotYamlError(reason, error.problem_mark.line + 1)
    for number in dict.fromkeys(marks):
        name, _, value = lines[number].partition(":")
        value = value.partition(" #")[0].strip()
        if _NEEDS_QUOTES.match(value):
            example = f"{name.strip(' -')}: '{value}'"
            is_text = len(value) <= 60 and "'" not in value and (value[0] != "{" or _TEMPLATE.match(value))
            advice = (
                f"put the value in quotes, as in {example}" if is_text else "put text with braces or colons in quotes"
            )
            return NotYamlError(f"not valid YAML ({problem}): {advice}", number + 1)
    begun = f", begun in line {marks[-1] + 1}" if marks and marks[-1] != error.problem_mark.line else ""
    return NotYamlError(f"not valid YAML ({problem}{begun})", error.problem_mark.line + 1)
