"""YAML's traps end at once with a sentence that names the line, and plain values are read as they look."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from configs.schema import ConfigError, load_config
from configs.yaml_text import MAX_SIZE, read_yaml_text

DATA = "data:\n    dataset: hmdb51\n    num_classes: 5\n"
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(20))


def refusal(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.monotonic() - start < 2 and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value).removeprefix(f"{path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, ", line 5: holds more than 10,000 values, aliases (*) included"),
        ("a: &a [*a]\n", ", line 1: an alias (*) stands for what it is in"),
        ("a: &a\n  <<: *a\n", ", line 2: an alias (*) stands for what it is in"),
        ("seed: " + "[" * 10_000, ", line 1: is nested more than 20 deep"),
        ("".join(f"{' ' * n}a:\n" for n in range(40)), ", line 20: is nested more than 20 deep"),
        (b"x" * (MAX_SIZE + 1), ", line 1: is larger than 200,000 bytes"),
        (DATA + "    num_classes: 6\n", ", line 4: data.num_classes is given twice, first in line 3"),
        (DATA + "\tbatch_size: 2\n", ", line 4: a tab: indent with spaces"),
        (DATA + "    image_tmpl: {:06d}.jpg  # frames\n", "put the value in quotes, as in image_tmpl: '{:06d}.jpg'"),
        (DATA + "    image_tmpl: %06d.jpg\n", ", line 4: not valid YAML (found character '%'"),
        (DATA + "    train_root: @x\n", "put the value in quotes, as in train_root: '@x'"),
        (DATA + "    train_root: a: b\n", "put the value in quotes, as in train_root: 'a: b'"),
        ("data: {dataset: x, image_tmpl: {:06d}.jpg}\n", "put text with braces or colons in quotes"),
        (DATA + "    train_root: 'x\n", "(found unexpected end of stream, begun in line 4)"),
        (DATA + "    batch_size: 010\n", ", line 4: data.batch_size: YAML reads 010 as the octal number 8; write 10"),
        (DATA + "    batch_size: 1:30\n", ", line 4: data.batch_size: YAML reads 1:30 as 90; put it in quotes"),
        (DATA + "resume: !!binary aGk=\n", ", line 4: resume: the tag !!binary is not read"),
        (DATA + "resume: !!python/object/apply:os.getcwd []\n", "the tag !!python/object/apply:os.getcwd is not read"),
        (DATA + "seed: !!int x\n", ", line 4: seed: x is not a value of its type"),
        (DATA + f"seed: {'9' * 5000}\n", f", line 4: seed: {'9' * 50} is not a value of its type"),
        (DATA + "---\nseed: 1\n", ", line 4: a second document begins here (---)"),
        (DATA + "? [a]\n: 1\n", ", line 4: a key must be a word"),
        (DATA + "on: 1\n", ", line 4: on: unknown key"),
        (DATA + "1: 1\n", ", line 4: 1: unknown key"),
        (DATA + "# \a\n", ", line 4: holds the character '\\x07': remove it"),
        (DATA.encode("utf-16"), ", line 1: is not UTF-8 text"),
        ((DATA + "resume: café\n").encode("latin-1"), ", line 4: is not UTF-8 text"),
        ("- data\n", ": must hold sections of keys"),
    ],
)
def test_what_is_not_a_configuration_ends_at_once_with_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path / "c.yaml", text)


def test_a_merged_key_is_located_where_it_is_written(tmp_path: Path) -> None:
    text = "data:\n    <<: {dataset: hmdb51, num_classes: 4, batchsize: 3}\n    num_classes: 5\n"
    assert ", line 2: data.batchsize: unknown key" in refusal(tmp_path / "c.yaml", text)
    (tmp_path / "c.yaml").write_text(text.replace(", batchsize: 3", ""))
    assert load_config(tmp_path / "c.yaml").data.num_classes == 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-3", "1e-3"),  # a float where one is wanted
        ("a: 0x1f", 31),
        ("a: 0", 0),
        ("a: 0.5", 0.5),
        ("a: '051'", "051"),
        ("a: yes", True),
        ("a: 2020-01-01", "2020-01-01"),
        ("a: =", "="),
        ("a: img_{:05d}.jpg", "img_{:05d}.jpg"),
        ("\ufeffa: é\r\n", "é"),
        ("x: &x [1, 2]\na: *x", [1, 2]),
        ("a: {b: ~}", {"b": None}),
    ],
)
def test_plain_values_are_read_as_they_look(text: str, value: object) -> None:
    assert read_yaml_text(text)[0]["a"] == value


def test_lines_of_keys() -> None:
    values, lines = read_yaml_text("a:\n  b: 1\n\n  c: [1, 2]\nd: 2\n")
    assert values == {"a": {"b": 1, "c": [1, 2]}, "d": 2} and lines == {"a": 1, "a.b": 2, "a.c": 4, "d": 5}
    assert read_yaml_text("") == (None, {})
