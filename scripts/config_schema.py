"""Writes the JSON schema of a configuration, from which editors complete and check the keys of a YAML file.

    python -m scripts.config_schema --out configs/schema.json

It is made of the dataclasses of configs/schema.py and of every model's Options; the comment of a field describes it. A
file names its schema in a line that the YAML language server reads: `# yaml-language-server: $schema=schema.json`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import re
import textwrap
import tokenize
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from common.console import Parser, show
from configs.parse import BASE, PathText, Ratio, has_default, inner_kind
from configs.schema import ALIASES, IGNORED_KEYS, Config
from models.registry import MODELS
from scripts.cli import run, write_text

DRAFT = "https://json-schema.org/draft/2020-12/schema"
SIMPLE = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    PathText: {"type": "string", "minLength": 1},
    Ratio: {
        "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^\s*\d+\s*/\s*\d+\s*$"}]
    },
}


def config_schema() -> dict[str, Any]:
    """The schema of a configuration file, JSON Schema draft 2020-12."""
    schema = section_schema(Config, "")
    required = schema.pop("required")
    schema["properties"] = {
        BASE: {
            "type": "string",
            "description": "A file, relative to this one, whose values hold where this one has none.",
        }
    } | schema["properties"]
    network = schema["properties"]["network"]
    network["properties"]["options"] = {
        "description": network["properties"]["options"]["description"],
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in MODELS] + [{"type": "null"}],
    }
    network["allOf"] = [_options_of(name) for name in MODELS]
    data = schema["properties"]["data"]
    complete = {"required": required, "properties": {"data": {"required": data.pop("required")}}}
    return {
        "$schema": DRAFT,
        "title": "TD4V configuration",
        **schema,
        "if": {"not": {"required": [BASE]}},  # a file with a base may leave out what the base has
        "then": complete,
        "$defs": {name: section_schema(module.Options, "network.options") for name, module in MODELS.items()},
    }


def section_schema(cls: type, path: str) -> dict[str, Any]:
    """The schema of a dataclass; `path` is its dotted key."""
    kinds, comments = typing.get_type_hints(cls), field_comments(cls)
    properties: dict[str, Any] = {}
    required = []
    for field in dataclasses.fields(cls):
        value = value_schema(kinds[field.name], f"{path}.{field.name}".strip("."))
        if has_default(field):  # a null is the default
            value = _or_null(value)
            value |= _default(field)
        else:
            required.append(field.name)
        description = {"description": comments[field.name]} if field.name in comments else {}
        properties[field.name] = description | value
    properties |= _accepted_keys(path, properties)
    schema = {"type": "object", "description": inspect.getdoc(cls).splitlines()[0], "properties": properties}
    return schema | {"additionalProperties": False} | ({"required": required} if required else {})


def value_schema(kind: Any, path: str) -> dict[str, Any]:
    """The schema of a field's type."""
    kind, arguments = inner_kind(kind), typing.get_args(inner_kind(kind))
    if dataclasses.is_dataclass(kind):
        return section_schema(kind, path)
    if typing.get_origin(kind) is Literal:
        return {"enum": [*arguments, *([False] if "off" in arguments else [])]}  # YAML reads off as false
    if typing.get_origin(kind) is tuple:
        items = value_schema(arguments[0], path)
        length = {} if arguments[-1] is Ellipsis else {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "items": items, **length}
    return {"type": "object"} if typing.get_origin(kind) is dict else dict(SIMPLE[kind])


def field_comments(cls: type) -> dict[str, str]:
    """The comment of each field: behind it, else the lines above it."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above = node.lineno - 1
        while lines[above - 1].lstrip().startswith("#"):
            above -= 1
        text = comments.get(node.end_lineno) or " ".join(comments[line] for line in range(above + 1, node.lineno))
        if text:
            found[node.target.id] = text
    return found


def _options_of(name: str) -> dict[str, Any]:
    """Options are those of the model, if the file names it."""
    keys = ("model", *(alias.rpartition(".")[2] for alias, key in ALIASES.items() if key == "network.model"))
    chosen = {"anyOf": [{"properties": {key: {"const": name}}, "required": [key]} for key in keys]}
    return {"if": chosen, "then": {"properties": {"options": {"$ref": f"#/$defs/{name}"}}}}


def _accepted_keys(path: str, properties: dict[str, Any]) -> dict[str, Any]:
    """Other names of keys of a section, and keys that have no effect."""
    accepted = {key: {"deprecated": True, "description": "A published key without effect."} for key in IGNORED_KEYS}
    for alias, key in ALIASES.items():
        name = key.rpartition(".")[2]
        if alias.rpartition(".")[0] == path:
            accepted[alias] = properties[name] | {"deprecated": True, "description": f"Another name of {key}."}
    inside = {key: value for key, value in sorted(accepted.items()) if key.rpartition(".")[0] == path}
    return {key.rpartition(".")[2]: value for key, value in inside.items()}


def _or_null(value: dict[str, Any]) -> dict[str, Any]:
    if "type" in value:
        return value | {"type": [value["type"], "null"]}
    key = "enum" if "enum" in value else "anyOf"
    return value | {key: [*value[key], None if key == "enum" else {"type": "null"}]}


def _default(field: dataclasses.Field) -> dict[str, Any]:
    """The default, where it is one value or a list."""
    if field.default in (dataclasses.MISSING, None):
        return {}
    return {"default": list(field.default) if isinstance(field.default, tuple) else field.default}


def schema_text() -> str:
    """The schema as the text of a file, with a list of plain values in one line."""
    text = json.dumps(config_schema(), indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: json.dumps(json.loads(found[0])), text) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(prog="python -m scripts.config_schema", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the file to write (default: print the schema)")
    out = parser.parse_args(arguments).out
    if out is None:
        show(schema_text())
    else:
        return run(functools.partial(write_text, out, schema_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
