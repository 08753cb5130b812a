"""Paths mean what they mean to a shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from common.paths import expand


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/home/me", "DATA": "/data", "EMPTY": "", "AGAIN": "$DATA", "TILDE": "~"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home/me"),
        ("~/exp", "/home/me/exp"),
        ("~root", "/root"),
        ("$DATA/train.txt", "/data/train.txt"),
        ("a/${DATA}x", "a//datax"),
        ("$HOME$DATA", "/home/me/data"),
        ("$TILDE/x", "/home/me/x"),
        ("a~b/~c", "a~b/~c"),
        ("./~", "./~"),
        ("price$5/$", "price$5/$"),
        ("relative/path", "relative/path"),
    ],
)
def test_what_a_shell_expands_is_expanded_once(text: str, path: str) -> None:
    assert expand(text) == path == expand(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOWHERE/x", r"^\$NOWHERE/x: the variable \$NOWHERE is not set$"),
        ("${NOWHERE}", r"the variable \$\{NOWHERE\} is not set"),
        ("${}", r"the variable \$\{\} is not set"),
        ("$EMPTY/x", r"the variable \$EMPTY is empty"),
        ("~nobody_of_this_name/x", r"there is no user 'nobody_of_this_name' \(write \./~nobody"),
        ("$AGAIN/x", r"becomes \$DATA/x, in which \$DATA is another variable"),
        ("", "is empty"),
        (" ", "is empty"),
        ("a\0b", "null character"),
    ],
)
def test_what_cannot_be_expanded_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(text)


PATH_OPTIONS = {
    "--config", "-cfg", "--output", "--out", "--json", "--weights", "--log_time", "--costs", "--compare", "--accuracy",
    "--run", "--annotations", "config", "configs", "runs", "checkpoint", "scores", "frames", "out",
}  # fmt: skip


def test_every_path_option_of_every_command_is_expanded() -> None:
    """Either of type Path, which the parser expands, or of type `expanded`."""
    root, found = Path(__file__).parents[2], set()
    for path in [*root.glob("*.py"), *root.glob("scripts/**/*.py"), *root.glob("datasets/**/*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or ast.unparse(call.func).rpartition(".")[2] != "add_argument":
                continue
            names = {argument.value for argument in call.args if isinstance(argument, ast.Constant)} & PATH_OPTIONS
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if (names and "action" not in options) or options.get("type") in ("Path", "expanded"):
                found |= names
                numbers = options.get("type") == "float"  # scripts.ensemble's --weights
                assert numbers or options.get("type") in ("Path", "expanded"), f"{path}: {names}"
    assert found == PATH_OPTIONS
