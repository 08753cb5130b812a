"""The JSON schema of a configuration: it knows every key, accepts what load_config accepts, and is up to date."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.parse import all_keys
from configs.schema import Config
from models.registry import MODELS
from scripts.config_schema import config_schema, field_comments, main, schema_text

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "studies")
SCHEMA = config_schema()
SMALL = {"data": {"dataset": "hmdb51", "num_classes": 5}}
REFUSED = [
    {"solver": {"learning_rate": 1}},
    {"solver": {"optim": "adam"}},
    {"solver": {"betas": [0.9]}},
    {"solver": {"epochs": 1.5}},
    {"network": {"DA_ratio": "x"}},
    {"network": {"model": "aim", "options": {"placement": "both"}}},
    {"network": {"method": "aim", "options": {"placement": "both"}}},
    {"network": {"options": {"no_model_has_this": 1}}},
    {"data": {"dataset": "hmdb51"}},
    {"unknown": 1},
]


def properties_of(schema: dict[str, Any], key: str) -> dict[str, Any]:
    for part in key.split("."):
        schema = schema["properties"][part]
    return schema


def test_the_file_is_up_to_date():
    hint = "run python -m scripts.config_schema --out configs/schema.json"
    assert (CONFIGS / "schema.json").read_text() == schema_text(), hint


def test_the_command_writes_or_prints_it(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "schema.json")]) == 0
    assert (tmp_path / "schema.json").read_text() == schema_text()
    assert main([]) == 0 and capsys.readouterr().out == schema_text()
    assert json.loads(schema_text())["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path, caplog):
    assert main(["--out", str(tmp_path / "missing" / "schema.json")]) == 1
    assert len(caplog.messages) == 1 and "missing" in caplog.text
    assert not any(tmp_path.iterdir())


def test_every_key_is_there_and_no_other_is_allowed():
    for key in all_keys(Config):
        assert properties_of(SCHEMA, key)
    for section in ("data", "network", "network.pyramid", "network.text", "network.vision", "solver", "logging"):
        assert properties_of(SCHEMA, section)["additionalProperties"] is False
    assert SCHEMA["additionalProperties"] is False and "base" in SCHEMA["properties"]
    assert SCHEMA["then"] == {"required": ["data"], "properties": {"data": {"required": ["dataset", "num_classes"]}}}


def test_every_model_has_its_options():
    assert set(SCHEMA["$defs"]) == set(MODELS)
    for name, module in MODELS.items():
        own = SCHEMA["$defs"][name]["properties"]
        assert list(own) == [field.name for field in dataclasses.fields(module.Options)]
    choices = properties_of(SCHEMA, "network")["allOf"]
    assert [one["then"]["properties"]["options"]["$ref"] for one in choices] == [f"#/$defs/{name}" for name in MODELS]


def test_types_defaults_and_descriptions():
    assert properties_of(SCHEMA, "solver.lr") == {
        "description": "the highest learning rate", "type": ["number", "null"], "default": 1e-3
    }  # fmt: skip
    assert properties_of(SCHEMA, "solver.betas")["minItems"] == 2
    assert properties_of(SCHEMA, "network.cache_features")["enum"] == ["off", "val", "all", False, None]
    assert properties_of(SCHEMA, "network.text.tuned")["description"].startswith("none: the classifier is CLIP's")
    assert properties_of(SCHEMA, "data.flip_pairs")["items"]["items"] == {"type": "integer"}
    assert properties_of(SCHEMA, "network.tm")["deprecated"] and properties_of(SCHEMA, "network.method")["deprecated"]


@dataclass
class Commented:
    # above, in
    # two lines
    first: int = 0
    second: str = "#"  # behind
    third: int = 1
    fourth: tuple[int, int] = (
        1,
        2,
    )  # behind the last line


def test_comments_of_fields():
    assert field_comments(Commented) == {
        "first": "above, in two lines", "second": "behind", "fourth": "behind the last line"
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_shipped_files_name_the_schema_and_keep_to_it(path):
    first, *_ = text = path.read_text().splitlines()
    schema = path.parent / first.removeprefix("# yaml-language-server: $schema=")
    assert schema.resolve() == CONFIGS / "schema.json"

    def check(values: dict[str, Any], schema: dict[str, Any]) -> None:
        for key, value in values.items():
            assert key in schema["properties"], key
            if isinstance(value, dict) and "properties" in schema["properties"][key]:
                check(value, schema["properties"][key])

    check(yaml.safe_load("\n".join(text)), SCHEMA)


def test_a_validator_agrees():
    jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema, which nothing else needs")
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    for path in FILES:
        values = json.loads(json.dumps(yaml.safe_load(path.read_text())))
        assert [error.message for error in validator.iter_errors(values)] == [], path
    assert validator.is_valid(SMALL) and validator.is_valid({"base": "other.yaml"})
    assert validator.is_valid(SMALL | {"network": {"model": None, "DA_ratio": 0.5, "options": None}})
    for section in REFUSED:
        assert not validator.is_valid(SMALL | section), section
