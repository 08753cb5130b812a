"""The command line: from a dataset's downloads to lists that train.

python -m datasets.prepare ucf101|hmdb51|ssv2|ssv1|k400|diving48|folder --videos DIR --annotations DIR --out DIR
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from common.console import Parser, log_to_console
from common.workers import num_cores
from datasets.decoders import PACKAGES
from datasets.prepare.decode import LARGEST_LOSS, FrameSettings
from datasets.prepare.formats import FORMATS
from datasets.prepare.formats.folder import Grouping, parse_groups
from datasets.prepare.output_dir import describe_os_error
from datasets.prepare.plan import PrepareError
from datasets.prepare.run import Options, prepare

logger = logging.getLogger("td4v")


def make_parser() -> argparse.ArgumentParser:
    """One subcommand a dataset; `folder` has options of its own."""
    parser = Parser(
        prog="python -m datasets.prepare",
        description="Turns a dataset's downloads into frames (or checked videos), lists, labels and a configuration "
        "snippet. `python -m datasets.prepare DATASET --help` lists the options.",
        epilog="Run the same command again to resume an interrupted run.",
    )
    datasets = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    for name, form in FORMATS.items():
        dataset = datasets.add_parser(name, help=form.title, description=f"Prepares {form.title}.")
        dataset.add_argument(
            "--annotations", type=Path, help="folder of the published annotation files, or of archives with them"
        )
        _add_common(dataset)
        dataset.add_argument("--split", type=int, default=1, help="number of the published split (default: 1)")
        dataset.add_argument("--splits", help="lists to write, e.g. val or train,val (default: all with labels)")
    folder = datasets.add_parser(
        "folder",
        help="any videos in class folders",
        description="Prepares any videos, or folders of frames, in class folders (CLASS/.../VIDEO), without annotation "
        "files. Folders train, val and test around the class folders are taken as the split.",
    )
    folder.add_argument("--annotations", type=Path, help=argparse.SUPPRESS)
    _add_common(folder)
    folder.add_argument(
        "--group-pattern",
        help=r"regular expression that finds a video's group in its name, e.g. '_g(\d+)_'; a group is never divided "
        "between train.txt and val.txt (default: each video is a group)",
    )
    folder.add_argument(
        "--groups-across-classes", action="store_true", help="a group may span classes (default: one class)"
    )
    folder.add_argument("--val-groups", help="numbers of the groups for val.txt, e.g. 8-12 (default: drawn at random)")
    folder.add_argument("--val-share", type=float, default=0.2, help="share of videos drawn for val.txt (default: 0.2)")
    folder.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videos", type=Path, required=True, help="folder of the videos, or of archives with them")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--frames", action="store_true", default=True, help="one folder of JPEGs a video (default)")
    kind.add_argument("--pack", action="store_true", help="one zip of JPEGs a video: fewer files, the same frames")
    kind.add_argument("--videos-only", dest="frames", action="store_false", help="no frames: lists of the videos")
    parser.add_argument(
        "--short-side", type=int, default=256, help="of the frames in pixels; 0 keeps the video's size (default: 256)"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 100 (default: 90)")
    parser.add_argument("--decoder", choices=PACKAGES, default="pyav", help="of the videos (default: pyav)")
    parser.add_argument("--jobs", type=int, default=num_cores(), help="processes (default: one a core)")
    parser.add_argument(
        "--new-split", action="store_true", help="replace the lists of an earlier run with another split; frames stay"
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="continue without videos that are missing or unreadable, or of which more than "
        f"{100 * LARGEST_LOSS:.0f} %% of the frames do not decode",
    )


def parse_options(argv: list[str] | None) -> Options:
    """Raises PrepareError."""
    values = vars(make_parser().parse_args(argv))
    frames, pack, short_side, quality = (values.pop(key) for key in ("frames", "pack", "short_side", "quality"))
    storage = "zips" if pack else "folders"
    values["frames"] = FrameSettings(short_side, quality, values["decoder"], storage) if frames else None
    if values["dataset"] == "folder":
        val_groups = values.pop("val_groups")
        values["grouping"] = Grouping(
            pattern=values.pop("group_pattern"),
            across_classes=values.pop("groups_across_classes"),
            val_groups=parse_groups(val_groups) if val_groups is not None else None,
            val_share=values.pop("val_share"),
            seed=values.pop("seed"),
        )
    elif values["splits"] is not None:
        values["splits"] = tuple(part.strip() for part in values["splits"].split(","))
    return Options(**values)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 after an error, 130 after Ctrl-C."""
    log_to_console()
    options = None
    try:
        options = parse_options(argv)
        prepare(options)
    except PrepareError as error:
        logger.error("%s", error)
        return 1
    except OSError as error:
        logger.error("%s", describe_os_error(error, options.out if options else Path()))
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; finished videos are kept, run the same command again to resume")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
