"""Names of files cannot move the cursor, forge a line or stop a write."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path

import pytest

from common.console import LineFormatter, Parser, expanded, log_lines, log_to_console, show
from common.tables import markdown_table
from common.text import printable

UNDECODABLE = os.fsdecode(b"a\xff.mp4")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("café 跑步 🤸.mp4", "café 跑步 🤸.mp4"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("a\nINFO finished", r"a\nINFO finished"),
        ("a\r\t\0\x7f\x9bb", r"a\r\t\x00\x7f\x9bb"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("a\u2028b", r"a\u2028b"),
        (UNDECODABLE, r"a\xff.mp4"),
        ("\ud800", r"\ud800"),
    ],
)
def test_control_characters_are_escaped_and_other_text_stays(text: str, shown: str) -> None:
    assert printable(text) == shown == printable(shown)
    assert printable(text).encode() and len(printable(text).splitlines()) == 1
    assert printable(f"one\ntwo {text.replace(chr(10), '')}", lines=True).startswith("one\ntwo ")


def test_a_name_cannot_forge_a_line_of_the_log(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "log.txt", encoding="utf-8")
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.warning("skipped: %s", f"x\nINFO done\x1b[2J{UNDECODABLE}")
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        logger.exception("failed")
    log_lines(logger, "first\n second")
    handler.close()
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == r"WARNING skipped: x\nINFO done\x1b[2Ja\xff.mp4"
    assert lines[1:3] == ["ERROR failed", "Traceback (most recent call last):"]
    assert lines[-3:] == [r"ValueError: \x1b[2J", "INFO first", "INFO  second"]


def test_a_terminal_without_the_letters_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    show(f"é {UNDECODABLE}\n")
    with monkeypatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])
        log_to_console(stream=stream)
        logging.getLogger("test").warning("跑")
    stream.flush()
    assert written.getvalue() == b"\\xe9 a\\xff.mp4\n\\u8dd1\n"


def test_cells_of_tables_are_printable() -> None:
    assert r"| a\x1bb c |" in markdown_table(["name"], [["a\x1bb\nc"]])


def test_errors_of_the_command_line_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Parser(prog="x").parse_args(["\x1b[2J"])
    assert capsys.readouterr().err.endswith("x: error: unrecognized arguments: \\x1b[2J\n")


def test_path_options_are_expanded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser(prog="x")
    parser.add_argument("--out", type=Path, default="$HOME/d")
    parser.add_argument("--json", type=expanded)
    parser.add_subparsers().add_parser("sub").add_argument("files", type=Path, nargs="+")
    assert parser.parse_args(["--json=~/x.json"]).json == "/home/me/x.json"
    assert parser.parse_args([]).out == Path("/home/me/d")
    assert parser.parse_args(["--out=~/x", "sub", "$HOME/a", "b"]).files == [Path("/home/me/a"), Path("b")]
    with pytest.raises(SystemExit):
        parser.parse_args(["--out=$NOBODY_SET_THIS/x"])
    assert "argument --out: $NOBODY_SET_THIS/x: the variable $NOBODY_SET_THIS is not set" in capsys.readouterr().err
