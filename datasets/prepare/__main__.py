"""From a dataset's downloads to lists that train: the command line.

    python -m datasets.prepare ucf101|hmdb51|ssv2|ssv1|k400|diving48|folder --videos DIR --annotations DIR --out DIR

Does not live here: any work (run.py).
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from datasets.decoders import PACKAGES
from datasets.prepare.decode import LARGEST_LOSS
from datasets.prepare.formats import FORMATS
from datasets.prepare.formats.folder import Grouping, parse_groups
from datasets.prepare.lists import PrepareError
from datasets.prepare.options import Options
from datasets.prepare.run import prepare
from datasets.prepare.space import explain

logger = logging.getLogger("td4v")


def make_parser() -> argparse.ArgumentParser:
    """The options; `folder` has some of its own, which the other datasets refuse."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.prepare",
        description="From a dataset's downloads to frames or videos, lists, labels and a piece of configuration.",
        epilog="Interrupted runs go on where they stopped: give the same command again.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--videos", type=Path, required=True, help="folder of the videos or of the archives with them")
    common.add_argument("--annotations", type=Path, help="folder of the owners' annotation files or of archives")
    common.add_argument("--out", type=Path, required=True, help="folder to write to")
    kind = common.add_mutually_exclusive_group()
    kind.add_argument("--frames", dest="frames", action="store_true", default=True, help="extract JPEGs (default)")
    kind.add_argument("--videos-only", dest="frames", action="store_false", help="lists of the videos as they are")
    common.add_argument("--short-side", type=int, default=256, help="of the frames, pixels; 0: the video's (256)")
    common.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 100 (90)")
    common.add_argument("--decoder", choices=PACKAGES, default="decord", help="of the videos (decord)")
    common.add_argument("--jobs", type=int, default=cores(), help="processes (all cores that this one may use)")
    lost = f"unreadable is also a video of which more than {LARGEST_LOSS:.0%} of the frames do not decode"
    common.add_argument(
        "--allow-missing",
        action="store_true",
        help=f"leave missing and unreadable videos out; {lost}".replace("%", "%%"),
    )
    datasets = parser.add_subparsers(dest="dataset", required=True)
    for name, form in FORMATS.items():
        dataset = datasets.add_parser(name, parents=[common], help=form.title)
        dataset.add_argument("--split", type=int, default=1, help="which of the owners' alternative splits (1)")
        dataset.add_argument("--splits", help="only some lists, e.g. val or train,val (all that are published)")
    folder = datasets.add_parser("folder", parents=[common], help="any videos in class folders")
    folder.add_argument("--group-pattern", help=r"expression that finds a video's group in its name, e.g. '_g(\d+)_'")
    folder.add_argument("--groups-across-classes", action="store_true", help="equal groups of two classes are one")
    folder.add_argument("--val-groups", help="numbers of the groups of val.txt, e.g. 8-12 (default: drawn)")
    folder.add_argument("--val-share", type=float, default=0.2, help="share of the videos drawn for val.txt (0.2)")
    folder.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    return parser


def cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_options(argv: list[str] | None) -> Options:
    """The command line as options; raises PrepareError."""
    values = vars(make_parser().parse_args(argv))
    if values["dataset"] == "folder":
        named = values.pop("val_groups")
        values["grouping"] = Grouping(
            pattern=values.pop("group_pattern"),
            across_classes=values.pop("groups_across_classes"),
            val_groups=parse_groups(named) if named is not None else None,
            val_share=values.pop("val_share"),
            seed=values.pop("seed"),
        )
    elif values["splits"] is not None:
        values["splits"] = tuple(part.strip() for part in values["splits"].split(","))
    return Options(**values)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = None
    try:
        options = read_options(argv)
        prepare(options)
    except PrepareError as error:
        logger.error("%s", error)
        return 1
    except OSError as error:
        logger.error("%s", explain(error, options.out if options else Path()))
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; what is finished is kept, the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
