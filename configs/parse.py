"""Fills frozen dataclasses from YAML files, overrides and plain mappings; an error names the file, the line and the key.

Nothing here knows a key of ours: configs/schema.py has them.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NewType

from common.paths import expand
from configs.yaml_text import MAX_SIZE, NotYamlError, YamlError, decode, read_yaml_text

Ratio = NewType("Ratio", float)  # a positive number, written as a number or as a fraction such as "1/6"
PathText = NewType("PathText", str)  # a path, in which ~ and $VARIABLES are expanded
MAX_INT = 2**31  # what libraries take as a number of something
BASE = "base"  # the key of a file that names the file it builds on


class ConfigError(ValueError):
    """A configuration that cannot be used. The message begins with the file and line, if known, and the dotted key."""


def read_yaml(path: Path, aliases: Mapping[str, str], children: tuple[Path, ...] = ()) -> tuple[dict, dict[str, str]]:
    """Read a YAML file and the files it builds on (`base: other.yaml`, relative to the file).

    Sections are merged key by key; any other value, a list too, replaces the base's. A null does as well: it means
    what it means in a file without a base.

    Args:
        path: the file.
        aliases: dotted keys by their other names.
        children: the files that build on this one, outermost first.

    Returns:
        The merged values without `base`, and the place of each dotted key: its file and line.

    Raises:
        ConfigError: a file that cannot be read, broken YAML, a key given twice, base files in a circle.
    """
    name = f"{path} (base of {children[-1]})" if children else str(path)
    values, lines = _parse_yaml(path, name)
    base = values.pop(BASE, None)
    places = {key: f"{name}, line {line}" for key, line in lines.items()}
    try:
        rename_aliases(values, aliases)
        if base is None:
            return values, _renamed_places(places, aliases)
        if not isinstance(base, str):
            raise ConfigError(f"{BASE}: must be the path of another configuration, not {base!r}")
        base_path = Path(os.path.normpath(path.parent / _expanded(base, BASE)))
        chain = (*children, path)
        if base_path.resolve() in [child.resolve() for child in chain]:
            raise ConfigError(f"{BASE}: the base files form a circle: {' -> '.join(map(str, (*chain, base_path)))}")
        if not base_path.is_file():
            raise ConfigError(f"{BASE}: there is no file {base_path}")
    except ConfigError as error:
        raise locate(error, places, name) from None
    base_values, base_places = read_yaml(base_path, aliases, chain)
    return _merge(base_values, values), base_places | _renamed_places(places, aliases)


def apply_override(values: dict[str, Any], override: str, aliases: Mapping[str, str]) -> str:
    """Set one key of nested values from `a.b=value`, where the value is read as YAML, and return the dotted key."""
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    key = aliases.get(".".join(parts), ".".join(parts))
    parts = key.split(".")
    try:
        value = _read_value(text) if text.strip() else None
    except YamlError as error:
        raise ConfigError(f"--set {_shown(override)}: {error}") from None
    section = values
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise ConfigError(f"{key}: {part} is a value, not a section")
    section[parts[-1]] = value
    return key


def rename_aliases(values: dict[str, Any], aliases: Mapping[str, str]) -> None:
    """Give keys their own names, in place. Raises ConfigError where a key is given under both names."""
    for alias, key in aliases.items():
        section, (*parents, old), new = values, alias.split("."), key.rpartition(".")[2]
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and old in section:
            if new in section:
                raise ConfigError(f"{alias}: is another name of {key}, which is given too; keep one of them")
            section[new] = section.pop(old)


def plain(value: Any) -> Any:
    """A copy of nested values with dicts for mappings (a DotMap too) and lists for tuples."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def locate(error: ConfigError, places: Mapping[str, str], name: str) -> ConfigError:
    """The same error with the place of the key that it begins with, else with the file's name."""
    key = re.split(r"[:\[]", str(error), maxsplit=1)[0]
    place = places.get(key, name)
    return ConfigError(f"{place}: {error}" if place else str(error))


class Filler:
    """Fills dataclasses from nested plain values, with the types that their fields declare.

    A dataclass may have a method `check`, which raises ConfigError; it is called when its fields are filled.

    Args:
        root: the dataclass that is filled.
        prefix: the dotted key under which its values stand, "" for a whole configuration.
        ignored: dotted keys that are accepted and have no effect; those given are collected in `found_ignored`.
        synonyms: what people call a key elsewhere -> the dotted key, for hints.
    """

    def __init__(
        self,
        root: type,
        prefix: str = "",
        *,
        ignored: frozenset[str] = frozenset(),
        synonyms: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        self.root, self.prefix, self.ignored, self.synonyms = root, prefix, ignored, synonyms
        self.found_ignored: list[str] = []

    def fill(self, values: Any) -> Any:
        """The root dataclass, filled. Raises ConfigError, which begins with the dotted key."""
        return self._fill(self.root, values, self.prefix)

    def _fill(self, cls: type, values: Any, path: str) -> Any:
        if not isinstance(values, dict):
            raise ConfigError(f"{path or 'the configuration'}: must be a section of keys, not {_shown(values)}")
        kinds = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        filled = {}
        for key, value in values.items():
            dotted = _join(path, str(key))
            if dotted in self.ignored:
                self.found_ignored.append(dotted)
            elif key not in fields:
                raise ConfigError(f"{dotted}: unknown key{self._hint(str(key), path, list(fields))}")
            elif value is None and not is_optional(kinds[key]):
                continue  # an empty key, as the published files have them, means the default
            else:
                filled[key] = self._convert(kinds[key], value, dotted)
        for name, field in fields.items():
            if name not in filled and not has_default(field):
                raise ConfigError(f"{_join(path, name)}: is required")
        built = cls(**filled)
        if hasattr(built, "check"):
            built.check()
        return built

    def _convert(self, kind: Any, value: Any, key: str) -> Any:
        """Turn a YAML value into the type that a field declares, or say what is wrong with it."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if is_optional(kind):
            return None if value is None else self._convert(inner_kind(kind), value, key)
        if dataclasses.is_dataclass(kind):
            return self._fill(kind, value, key)
        if kind is Ratio and not isinstance(value, bool):
            try:
                return Ratio(parse_ratio(value))
            except ValueError as error:
                raise ConfigError(f"{key}: {error}") from None
        if kind is PathText and isinstance(value, str):
            return PathText(_expanded(value, key))
        if origin is Literal:
            return _choose(arguments, value, key)
        if origin is tuple and isinstance(value, (list, tuple, str, int, float)):
            try:
                items = _as_list(value, arguments[0])
            except NotYamlError:
                raise ConfigError(f"{key}: {value!r} is not a list; write it as 1,2 or [1, 2]") from None
            except YamlError as error:
                raise ConfigError(f"{key}: {error}") from None
            kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else arguments
            if len(kinds) != len(items):
                raise ConfigError(f"{key}: must hold {len(kinds)} values, not {len(items)}")
            pairs = enumerate(zip(kinds, items, strict=True))
            return tuple(self._convert(of, item, f"{key}[{index}]") for index, (of, item) in pairs)
        if origin is dict and isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return value
        if kind in (int, float) and isinstance(value, bool):
            pass  # a bool is an int in Python, but not in a configuration
        elif kind in (bool, int, str) and isinstance(value, kind):
            require(kind is not int or abs(value) < MAX_INT, key, f"must be below {MAX_INT:,}")
            return value
        elif kind is float and isinstance(value, (int, float, str)):
            try:
                number = float(value)  # a text too: PyYAML reads 1e-3, without a dot, as one
            except ValueError:
                pass
            else:
                if not float("-inf") < number < float("inf"):
                    raise ConfigError(f"{key}: must be a finite number")
                return number
        raise ConfigError(f"{key}: must be {_describe(kind)}, not {_shown(value)}{_quotes_hint(kind, value)}")

    def _hint(self, name: str, section: str, siblings: Sequence[str]) -> str:
        """Which key was meant: a synonym's, one like it in the section, the same or one like it elsewhere."""
        keys = list(all_keys(self.root, self.prefix))
        if "." in section:
            keys = [_join(section, sibling) for sibling in siblings]
        synonym = self.synonyms.get(name.lower().replace("-", "_"))
        if synonym in keys:
            return f"; did you mean {synonym}?"
        names = {key.rpartition(".")[2]: key for key in reversed(keys)}
        if (close := nearest(name, siblings)) is not None:
            return f"; did you mean {_join(section, close)}?"
        close = name if name in names else nearest(name, names)
        return f"; did you mean {names[close]}?" if close else ""


def parse_ratio(value: float | str) -> float:
    """A positive number, or a fraction string such as "1/6", as a float. Raises ValueError."""
    try:
        number = float(Fraction(value.replace(" ", ""))) if isinstance(value, str) else float(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise ValueError(f"{value!r} is neither a number nor a fraction such as '1/6'") from None
    if not 0 < number < float("inf"):
        raise ValueError(f"{value!r} must be above 0")
    return number


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None if none is like it."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the known name most like `name`, or an empty text."""
    close = nearest(name, known)
    return f"; did you mean {close}?" if close else ""


def require(condition: bool, key: str, message: str) -> None:
    """Raise a ConfigError about `key` unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: {message}")


def require_positive(section: Any, path: str, *keys: str) -> None:
    """Require fields of a section to be above 0 or null."""
    for key in keys:
        value = getattr(section, key)
        require(value is None or value > 0, f"{path}.{key}", f"must be above 0, not {value}")


def require_between(section: Any, path: str, low: float, high: float, *keys: str) -> None:
    """Require fields of a section to lie in [low, high] or to be null."""
    for key in keys:
        value = getattr(section, key)
        message = f"must lie between {low} and {high}, not {value}"
        require(value is None or low <= value <= high, f"{path}.{key}", message)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def all_fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a dataclass and of the dataclasses in it, with its type."""
    for name, kind in typing.get_type_hints(cls).items():
        yield _join(prefix, name), kind
        if dataclasses.is_dataclass(inner_kind(kind)):
            yield from all_fields(inner_kind(kind), _join(prefix, name))


def all_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a dataclass and of the dataclasses in it."""
    return (key for key, _ in all_fields(cls, prefix))


def is_optional(kind: Any) -> bool:
    """Whether a field may hold None."""
    return type(None) in typing.get_args(kind)


def inner_kind(kind: Any) -> Any:
    """The type of a field where it is not None."""
    return next(of for of in typing.get_args(kind) if of is not type(None)) if is_optional(kind) else kind


def has_default(field: dataclasses.Field) -> bool:
    """Whether a field may be left out."""
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _parse_yaml(path: Path, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of one file and the line of each dotted key."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SIZE + 1)
        values, lines = read_yaml_text(decode(content))
    except OSError as error:
        raise ConfigError(f"{name}: cannot read this configuration ({error.strerror or error})") from None
    except YamlError as error:
        raise ConfigError(f"{name}, line {error.line}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: must hold sections of keys, such as data, network and solver")
    return values, lines


def _read_value(text: str) -> Any:
    """The value of an override. Text that breaks YAML's grammar, such as {:05d}.jpg, is meant as it stands.

    Raises YamlError.
    """
    try:
        value = read_yaml_text(text)[0]
    except NotYamlError:
        return text
    is_cut = isinstance(value, str) and " #" in text and text.lstrip()[0] not in "'\""
    return text.strip() if is_cut else value  # a comment in a file, but part of a name here


def _renamed_places(places: dict[str, str], aliases: Mapping[str, str]) -> dict[str, str]:
    return {aliases.get(key, key): place for key, place in places.items()}


def _merge(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _choose(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    """The value, which must be one of `choices`."""
    if value is False and "off" in choices:
        value = "off"  # which YAML reads as false
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    hint = did_you_mean(str(value), map(str, choices))
    raise ConfigError(f"{key}: must be one of {', '.join(map(str, choices))}, not {_shown(value)}{hint}")


def _as_list(value: Any, kind: Any) -> Sequence[Any]:
    """A list, which may be written without its brackets: `1,3,4`, or one value alone. A text with commas is one text."""
    if isinstance(value, str) and kind is not str:
        return [read_yaml_text(part)[0] for part in value.split(",")]
    return value if isinstance(value, (list, tuple)) else [value]


def _expanded(path: str, key: str) -> str:
    try:
        return expand(path)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {_describe(typing.get_args(kind)[0]).removeprefix('a ').removeprefix('an ')}s"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        PathText: "a path",
        Ratio: "a number or a fraction such as '1/6'",
    }
    return names.get(kind, "a section of keys" if typing.get_origin(kind) is dict else str(kind))


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _quotes_hint(kind: Any, value: Any) -> str:
    """What to do where YAML reads a text as something else."""
    if kind not in (str, PathText) or isinstance(value, (list, tuple)):
        return ""
    words = " (YAML reads yes, no, on and off as true and false)" if isinstance(value, bool) else ""
    return f"; put it in quotes{words}"


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
