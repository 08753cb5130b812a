"""The shell scripts choose an interpreter and install only when asked. A fake Python records what it is told to run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.check_requirements import missing

ROOT = Path(__file__).parents[2]
FAKE = """#!/usr/bin/env bash
# Has all requirements where a file `complete` lies beside it.
here=$(cd "$(dirname "$0")" && pwd)
case "$1 ${2:-}" in
    "-c "*) exit 0 ;;
    "scripts/check_requirements.py "*) [ -e "$here/complete" ] || { echo "torch>=2.11"; exit 1; } ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") touch "$here/complete" ;;
esac
[ "$1" = scripts/check_requirements.py ] || echo "$here: $*" >> "$LOG"
"""


class Checkout:
    """A folder with the scripts alone, and fake interpreters."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        (folder / "scripts").mkdir()
        for name in ("environment.sh", "quickstart.sh", "run_tests.sh"):
            shutil.copy(ROOT / "scripts" / name, folder / "scripts")
        shutil.copy(ROOT / "requirements.txt", folder)

    def python(self, place: str, complete: bool = True) -> Path:
        path = self.folder / place / "bin/python"
        path.parent.mkdir(parents=True)
        path.write_text(FAKE)
        path.chmod(0o755)
        if complete:
            path.with_name("complete").touch()
        return path

    def run(self, script: str, *words: str, **variables: str | Path) -> subprocess.CompletedProcess:
        fixed = {"LOG": str(self.log), "PATH": f"{self.folder / 'system/bin'}:/usr/bin:/bin"}
        variables = {name: str(value) for name, value in variables.items()}
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VIRTUAL_ENV", "VENV")}
        command = [shutil.which("bash"), str(self.folder / "scripts" / script), *words]
        return subprocess.run(command, env=clean | fixed | variables, capture_output=True, text=True, check=False)

    def commands(self) -> list[str]:
        """What was run, without the looks at versions: `place: words`."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.removeprefix(f"{self.folder}/").replace("/bin: ", ": ") for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", ["quickstart.sh", "run_tests.sh"])
def test_nothing_is_installed_unasked(checkout: Checkout, script: str) -> None:
    active = checkout.python("active", complete=False)
    done = checkout.run(script, VIRTUAL_ENV=active.parents[1])
    assert done.returncode == 1 and done.stdout == "" and checkout.commands() == []
    assert done.stderr == (
        f"missing in {active}: torch>=2.11; install it with 'python -m venv .venv && .venv/bin/pip install -r requirements.txt', "
        "or run this script with --install\n"
    )
    assert not (checkout.folder / ".venv").exists() and not active.with_name("complete").exists()


def test_a_complete_environment_is_used(checkout: Checkout) -> None:
    """The active one first, then .venv, then the PATH's."""
    checkout.python("system").rename(checkout.folder / "system/bin/python3")
    assert checkout.run("quickstart.sh", "--short").returncode == 0
    own, active = checkout.python(".venv"), checkout.python("active")
    assert checkout.run("quickstart.sh").returncode == 0
    assert checkout.run("quickstart.sh", VIRTUAL_ENV=active.parents[1]).returncode == 0
    active.with_name("complete").unlink()
    assert checkout.run("quickstart.sh", VIRTUAL_ENV=active.parents[1]).returncode == 0
    assert checkout.run("quickstart.sh", VIRTUAL_ENV=own.parents[1], PYTHON=active).returncode == 1
    quickstart = "-m scripts.quickstart"
    assert checkout.commands() == [
        f"system: {quickstart} --short", f".venv: {quickstart}", f"active: {quickstart}", f".venv: {quickstart}"
    ]  # fmt: skip


@pytest.mark.parametrize(("words", "variables"), [(["--install"], {}), ([], {"INSTALL": "1"})])
def test_install_fills_a_new_environment(checkout: Checkout, words: list[str], variables: dict[str, str]) -> None:
    active = checkout.python("active", complete=False)
    for _ in range(2):  # the second call finds all there
        done = checkout.run("run_tests.sh", *words, "-k", "one two", PYTHON=active, **variables)
        assert done.returncode == 0, done.stderr
    pip = "-m pip install --quiet --disable-pip-version-check -r requirements.txt"
    pytest_words = "pytest -m not slow -n 2 --dist loadfile -k one two"
    tests = [f".venv: -m {words}" for words in ("ruff check .", "ruff format --check .", pytest_words)]
    assert checkout.commands() == ["active: -m venv .venv", f".venv: {pip}", *tests, *tests]
    assert not active.with_name("complete").exists()


def test_no_python_at_all(checkout: Checkout) -> None:
    checkout.python(".venv").write_text("#!/bin/sh\nexit 1\n")  # older than 3.10
    tools = checkout.folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    for words in ([], ["--install"]):
        done = checkout.run("run_tests.sh", *words, PATH=tools, VENV="new" if words else ".venv")
        assert done.returncode == 1 and done.stderr == "Python 3.10 or newer is needed: set PYTHON to one\n"


def test_what_is_missing_is_named() -> None:
    lines = [
        "# tests",
        "pytest>=1",
        "",
        "pytest>=99  # new",
        "no-such-package>=1",
        "no-such-thing; python_version < '3'",
    ]
    first, second = missing(lines)
    assert first.startswith("pytest>=99 (installed: ") and second == "no-such-package>=1"
