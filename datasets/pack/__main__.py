"""The command line of `python -m datasets.pack`.

Does not live here: the format and reading it (format.py), writing (writer.py), verifying and reindexing (verify.py):
what runs in processes of its own must not lie in a `__main__` module, which these cannot import.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets.pack
from datasets.annotation import AnnotationError
from datasets.pack.format import PackError, Settings
from datasets.pack.verify import reindex, verify
from datasets.pack.writer import write_pack

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?B|B?)")

logger = logging.getLogger("td4v")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one mode; returns the exit code: 0, 1 with a sentence on stderr, 130 after Ctrl-C."""
    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.verify:
            verify(arguments.verify, arguments.jobs)
        elif arguments.reindex:
            reindex(arguments.reindex, arguments.jobs)
        else:
            settings = Settings(arguments.image_tmpl, arguments.index_base, arguments.shard_size)
            write_pack(arguments.frames, arguments.out, arguments.list, settings, arguments.jobs)
    except (PackError, AnnotationError) as error:
        logger.error("%s", error)
        return 1
    except OSError as error:
        pack = arguments.out or arguments.verify or arguments.reindex
        logger.error("%s: %s", error.filename or pack, error.strerror or error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; what is finished is kept, the same command goes on from there")
        return 130
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m datasets.pack",
        description=datasets.pack.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--frames", type=Path, metavar="DIR", help="the folder of the frame folders; needs --out")
    mode.add_argument("--verify", type=Path, metavar="PACK", help="compare every frame with its checksum")
    mode.add_argument("--reindex", type=Path, metavar="PACK", help="make the index again from the shards")
    parser.add_argument("--out", type=Path, metavar="PACK", help="the pack to write or to go on with")
    parser.add_argument("--list", action="append", default=[], metavar="FILE", help="pack only its videos (repeatable)")
    parser.add_argument("--image-tmpl", default=Settings.image_tmpl, help="default: %(default)s")
    parser.add_argument("--index-base", type=int, default=Settings.index_base, help="first number, %(default)s")
    parser.add_argument("--shard-size", type=_size, default=Settings.shard_size, help="e.g. 500MB; default: 1GiB")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes, %(default)s")
    arguments = parser.parse_args(argv)
    if (arguments.frames is None) != (arguments.out is None):
        parser.error("--frames and --out go together")
    if arguments.jobs < 1:
        parser.error("--jobs must be 1 or more")
    return arguments


def _size(text: str) -> int:
    match = SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1GiB or 500MB")
    base, power = 1024 if "i" in match[2] else 1000, "BKMGT".index(match[2][:1] or "B")
    size = int(float(match[1]) * base**power)
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than one byte")
    return size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
