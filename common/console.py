"""What all commands show and read: the log, standard output, and the command line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, TextIO

from common.paths import expand
from common.text import printable


class LineFormatter(logging.Formatter):
    """One line a message, whatever names of files are in it; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return printable(super().formatException(ei), lines=True)


class Parser(argparse.ArgumentParser):
    """An argument parser whose options of type Path are expanded (see `expand`), and whose errors are printable."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", Path, lambda text: Path(expanded(text)))

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def log_to_console(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send the log of a command to a stream, by default standard error, without times."""
    handler = logging.StreamHandler(_tolerant(stream) if stream else None)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler])


def log_lines(logger: logging.Logger, text: str) -> None:
    """Log each line of a text of the program as a message."""
    for line in text.splitlines():
        logger.info("%s", line)


def show(text: str) -> None:
    """Write a text of the program to standard output, with escapes for what its encoding does not have."""
    print(printable(text, lines=True), end="", file=_tolerant(sys.stdout), flush=True)


def expanded(text: str) -> str:
    """An argparse type: a path as text, expanded."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tolerant(stream: TextIO) -> TextIO:
    """A stream that escapes what its encoding does not have, as standard error always does."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def end_at_once(status: int) -> NoReturn:
    """End this process, with its output written, but without an orderly exit of the interpreter.

    Where loaders or process groups were at work, native threads that they leave behind abort such an exit now and then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
