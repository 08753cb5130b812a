"""Checks the data of a configuration before anything is trained on it.

    python -m datasets.check configs/ucf101.yaml [--set key=value ...] [--out DIR] [--jobs N] [--full]
                             [--need CLIPS_PER_S | --run RUNFOLDER] [--seconds 20]

Every row of every list against disk, class balance, a picture of what the model will see, and the loader's rate.
Writes report.md, report.json, contact_sheet.png and class_balance.png to exp/check/DATASET. Exit code: 0 without
problems, 1 with problems, 130 after Ctrl-C.

Lives here: the command line and the order of the steps. Does not live here: the steps.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.workers import progress
from configs.schema import ConfigError, DataConfig, load_config
from datasets.annotation import AnnotationError
from datasets.check.lists import (
    balance_table,
    findings_between,
    findings_of,
    label_names,
    open_lists,
    sorted_results,
    values_of,
)
from datasets.check.pictures import balance_picture, contact_sheet
from datasets.check.report import Finding, Report, Table
from datasets.check.rows import RowChecker, check_rows
from datasets.check.speed import advice, measure, need_of_run
from datasets.readers import ReadError

logger = logging.getLogger("td4v")
ON_SCREEN = 20  # problems
FILES = ("report.md", "report.json", "contact_sheet.png", "class_balance.png")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m datasets.check", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. data.workers=8"
    )
    parser.add_argument("--out", type=Path, help="folder of the report (default: exp/check/DATASET)")
    parser.add_argument(
        "--jobs", type=_at_least_one, default=_cores(), help="processes that check (default: all cores)"
    )
    parser.add_argument("--full", action="store_true", help="decode every frame of every video")
    parser.add_argument("--videos", type=_at_least_one, default=3, help="training videos on the picture (default 3)")
    parser.add_argument("--crops", type=int, choices=(1, 3, 5, 10), default=3, help="test crops on the picture")
    parser.add_argument("--clips", type=_at_least_one, default=2, help="test clips on the picture (default 2)")
    parser.add_argument(
        "--seconds", type=_not_negative, default=20, help="length of a measurement; 0 for none (default 20)"
    )
    needs = parser.add_mutually_exclusive_group()
    needs.add_argument("--need", type=float, metavar="CLIPS_PER_S", help="what training takes, a process")
    needs.add_argument("--run", type=Path, metavar="RUNFOLDER", help="take that from the metrics.jsonl of a former run")
    options = parser.parse_args(argv)
    if options.need is not None and not 0 < options.need < math.inf:
        parser.error("--need must be above 0")
    return options


def check(options: argparse.Namespace, command: str) -> Report:
    """All steps in their order; the pictures and the report are written to the folder of the options.

    Raises:
        ConfigError: the configuration, a root, a list, --run or --out cannot be used. ReadError: a pack cannot be opened.
        OSError: the folder cannot be written.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load_config(options.config, options.set)
    data = config.data
    need, how = need_of_run(options.run) if options.run else (options.need, "--need")
    lists, findings = open_lists(data)
    folder = options.out or Path("exp/check", data.dataset.replace("/", "-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--out {folder}: is a file or lies below one, not a folder") from None
    for name in FILES:  # what a former check left must not look like this one's
        (folder / name).unlink(missing_ok=True)
    report = Report(command, options.config, config.to_dict())
    report.findings += [Finding("note", "configuration", str(warning.message)) for warning in caught]

    names, found = label_names(data)
    report.findings += [*findings, *found]
    for checked in lists:
        records = checked.source.records
        results = check_rows(RowChecker(checked.source, options.full), records, options.jobs)
        checked.results = sorted_results(progress(results, len(records), f"checking {checked.split}"))
        report.findings += findings_of(checked, data, names)
        report.values[checked.split] = values_of(checked, data)
    report.findings += findings_between(lists)
    _show(report.findings)
    if lists:
        report.tables.append(balance_table(lists, data))
        logger.info("\n%s\n", report.tables[-1].text())
        balance_picture(lists, data, names, folder / "class_balance.png")
        report.pictures["Class balance"] = "class_balance.png"
    sheet = folder / "contact_sheet.png"
    views = {"videos": options.videos, "crops": options.crops, "clips": options.clips}
    for what, reason in contact_sheet(data, config.seed, names, sheet, **views).items():
        level = "warning" if report.of("problem") else "problem"  # mostly told already, row by row
        report.findings.append(Finding(level, "picture", f"{sheet.name} lacks {what}: {reason}"))
        _show(report.findings[-1:])
    if sheet.exists():
        report.pictures["What the model will see"] = sheet.name
    with _loader_problems(report):
        if options.seconds > 0:
            _measure(report, data, config.seed, options.seconds, need, how)
    report.write(folder)
    logger.info("%s Report: %s", report.verdict(), folder / "report.md")
    return report


@contextmanager
def _loader_problems(report: Report) -> Iterator[None]:
    """A loader that cannot be built or gives nothing is a problem, told once."""
    try:
        yield
    except (AnnotationError, ValueError) as error:
        if not any(str(error) in str(finding) for finding in report.of("problem")):
            report.findings.append(Finding("problem", "loader", str(error)))
            _show(report.findings[-1:])


def _measure(report: Report, data: DataConfig, seed: int, seconds: float, need: float | None, how: str) -> None:
    """Add the rates of the loader, with the configured workers and with one, and the advice."""
    rates = []
    for workers in dict.fromkeys((data.workers, 1)):
        logger.info("measuring the training loader, data.workers: %d, for about %.0f s", workers, seconds)
        rates.append(measure(data, seed, workers, seconds))
    table = Table("Loader", ["workers", "clips/s", "videos/s", "CPU ms a clip", "first batch", "measured"])
    for rate in rates:
        cpu = "-" if rate.cpu_ms is None else f"{rate.cpu_ms:.1f}"
        measured = f"{rate.batches} batches, {rate.seconds:.1f} s{', rough' if rate.rough else ''}"
        clips, videos = f"{rate.clips_per_s:.1f}", f"{rate.videos_per_s:.1f}"
        table.rows.append([str(rate.workers), clips, videos, cpu, f"{rate.first_batch:.1f} s", measured])
    text, numbers = advice(rates, need, _cores())
    report.tables.append(table)
    report.paragraphs["Is the loader fast enough?"] = text + (f" (Need: {how}.)" if need is not None else "")
    report.values["loader"] = numbers | {"rates": [vars(rate) for rate in rates], "cores": _cores()}
    logger.info("\n%s\n\n%s\n", table.text(), report.paragraphs["Is the loader fast enough?"])


def _show(findings: Sequence[Finding]) -> None:
    """The first problems and all warnings on the screen; the report has them all."""
    problems = [finding for finding in findings if finding.level == "problem"]
    for finding in problems[:ON_SCREEN]:
        logger.error("problem: %s", finding)
    if len(problems) > ON_SCREEN:
        logger.error("... and %d more problems, see the report", len(problems) - ON_SCREEN)
    for finding in findings:
        if finding.level == "warning":
            logger.warning("warning: %s", finding)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, not {number}")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = shlex.join(["python", "-m", "datasets.check", *(sys.argv[1:] if argv is None else argv)])
    try:
        return 1 if check(options, command).of("problem") else 0
    except OSError as error:
        logger.error("%s: %s", error.filename or "the report", error.strerror or error)
        return 1
    except (ConfigError, AnnotationError, ReadError) as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C has nothing left to end
    for process in multiprocessing.active_children():
        process.terminate()
    logger.error("interrupted: no report was written")
    return 130


if __name__ == "__main__":
    raise SystemExit(main())
