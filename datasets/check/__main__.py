"""Checks the data of a configuration before a model is trained on it.

    python -m datasets.check configs/ucf101.yaml [--set key=value ...] [--out DIR] [--full]
                             [--need CLIPS_PER_S | --run RUN_DIR] [--seconds 20]

Checks every row of every list against disk, class balance, and the loader's rate, and draws what the model will see.
Writes report.md, report.json, contact_sheet.png and class_balance.png to exp/check/DATASET. Exit code: 0 without
problems, 1 with problems, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.console import Parser, end_at_once, expanded, log_lines, log_to_console
from common.tables import markdown_table
from common.workers import num_cores, progress


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m datasets.check", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=expanded, help="a YAML file, see configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. data.workers=8"
    )
    parser.add_argument("--out", type=Path, help="folder of the report (default: exp/check/DATASET)")
    parser.add_argument("--jobs", type=_positive, default=num_cores(), help="processes (default: one a core)")
    parser.add_argument("--full", action="store_true", help="decode every frame of every video, instead of two")
    parser.add_argument(
        "--videos", type=_positive, default=3, help="training and validation videos on the contact sheet (default: 3)"
    )
    parser.add_argument(
        "--crops", type=int, choices=(1, 3, 5, 10), default=3, help="test crops on the contact sheet (default: 3)"
    )
    parser.add_argument("--clips", type=_positive, default=2, help="test clips on the contact sheet (default: 2)")
    parser.add_argument(
        "--seconds", type=_not_negative, default=20, help="length of a rate measurement; 0 for none (default: 20)"
    )
    needs = parser.add_mutually_exclusive_group()
    needs.add_argument("--need", type=float, metavar="CLIPS_PER_S", help="clips a second that a training process needs")
    needs.add_argument("--run", type=Path, metavar="RUN_DIR", help="compute the need from a previous run")
    options = parser.parse_args(argv)
    if options.need is not None and not 0 < options.need < math.inf:
        parser.error("--need must be above 0")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, not {number}")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return number


if __name__ == "__main__":
    parse_arguments(None)  # before the imports below, which take seconds, so that --help answers at once

from configs.schema import ConfigError, DataConfig, load_config
from datasets.annotation import AnnotationError
from datasets.check.doubts import row_doubts
from datasets.check.figures import contact_sheet, plot_balance
from datasets.check.lists import (
    balance_table,
    findings_between,
    findings_of,
    label_names,
    lists_alone,
    open_lists,
    values_of,
)
from datasets.check.report import Finding, Report
from datasets.check.rows import RowChecker, check_rows
from datasets.check.speed import advise, measure, need_of_run
from datasets.readers import ReadError

MAX_LOGGED = 20  # problems; the report has all
FILES = ("report.md", "report.json", "contact_sheet.png", "class_balance.png")

logger = logging.getLogger("td4v")


def check(options: argparse.Namespace, command: str) -> Report:
    """Run all steps, and write the figures and the report.

    Raises:
        ConfigError: the configuration, a root, a list, --run or --out cannot be used.
        OSError: the folder of the report cannot be written.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load_config(options.config, options.set)
    data = config.data
    need, need_source = need_of_run(options.run) if options.run else (options.need, None)
    lists, list_findings = open_lists(data)
    folder = _empty_folder(options.out or Path("exp/check", data.dataset.replace("/", "-")))
    report = Report(command, options.config, config.to_dict())
    report.findings += [Finding("note", "configuration", str(warning.message)) for warning in caught]

    listed = lists_alone(data, lists)
    names, name_findings = label_names(listed)
    report.findings += [*list_findings, *name_findings]
    for checked in lists:
        records = checked.source.records
        results = check_rows(RowChecker(checked.source, options.full), records, options.jobs)
        results = progress(results, len(records), f"checking {checked.split}")
        checked.results = sorted(results, key=lambda result: result.record.line)
        report.findings += findings_of(checked, listed, names)
        report.findings += row_doubts(checked, names)
        report.values[checked.split] = values_of(checked, listed)
    report.findings += findings_between(lists)
    _log(report.findings)
    if lists:
        _add_section(report, "Classes and videos", balance_table(lists, listed))
        plot_balance(lists, listed, names, folder / "class_balance.png")
        report.figures["Class balance"] = "class_balance.png"
    sheet = folder / "contact_sheet.png"
    views = {"videos": options.videos, "crops": options.crops, "clips": options.clips}
    for part, reason in contact_sheet(data, config.seed, names, sheet, **views).items():
        level = "warning" if report.of("problem") else "problem"  # a row's finding mostly says it already
        _add_finding(report, Finding(level, "contact sheet", f"{sheet.name} lacks {part}: {reason}"))
    if sheet.exists():
        report.figures["What the model sees"] = sheet.name
    with _loader_problems(report):
        if options.seconds > 0:
            _measure(report, data, config.seed, options.seconds, need, need_source)
    report.write(folder)
    logger.info("%s Report: %s", report.verdict(), folder / "report.md")
    return report


def _empty_folder(folder: Path) -> Path:
    """Create the folder and remove the files of a previous check. Raises ConfigError, OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--out {folder}: is a file or lies below one, not a folder") from None
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    return folder


@contextmanager
def _loader_problems(report: Report) -> Iterator[None]:
    """A loader that cannot be built or yields nothing is a problem, reported once."""
    try:
        yield
    except (AnnotationError, ValueError) as error:
        if not any(str(error) in str(finding) for finding in report.of("problem")):
            _add_finding(report, Finding("problem", "loader", str(error)))


def _measure(
    report: Report, data: DataConfig, seed: int, seconds: float, need: float | None, need_source: str | None
) -> None:
    """Measure the loader with the configured workers and with one, and add the rates and the advice."""
    rates = []
    for workers in dict.fromkeys((data.workers, 1)):
        logger.info("measuring the training loader, data.workers: %d, for about %.0f s", workers, seconds)
        rates.append(measure(data, seed, workers, seconds))
    columns = ["workers", "clips/s", "videos/s", "CPU ms a clip", "first batch", "measured"]
    rows = [
        [
            rate.workers,
            f"{rate.clips_per_s:.1f}",
            f"{rate.videos_per_s:.1f}",
            "-" if rate.cpu_ms is None else f"{rate.cpu_ms:.1f}",
            f"{rate.first_batch:.1f} s",
            f"{rate.batches} batches, {rate.seconds:.1f} s{', rough' if rate.is_rough else ''}",
        ]
        for rate in rates
    ]
    _add_section(report, "Loader", markdown_table(columns, rows, align="rrrrrl"))
    advice, numbers = advise(rates, need, num_cores())
    advice += f" The need is that of {need_source}." if need_source else ""
    _add_section(report, "Is the loader fast enough?", advice)
    report.values["loader"] = numbers | {"rates": [vars(rate) for rate in rates], "cores": num_cores()}


def _add_section(report: Report, title: str, text: str) -> None:
    report.sections[title] = text
    log_lines(logger, f"\n{text.rstrip()}\n")


def _add_finding(report: Report, finding: Finding) -> None:
    report.findings.append(finding)
    _log([finding])


def _log(findings: Sequence[Finding]) -> None:
    """Log the first problems and all warnings."""
    problems = [finding for finding in findings if finding.level == "problem"]
    for finding in problems[:MAX_LOGGED]:
        logger.error("problem: %s", finding)
    if len(problems) > MAX_LOGGED:
        logger.error("... and %d more problems, see the report", len(problems) - MAX_LOGGED)
    for finding in findings:
        if finding.level == "warning":
            logger.warning("warning: %s", finding)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse_arguments(argv)
    log_to_console()
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
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only interrupt the clean-up
    for process in multiprocessing.active_children():
        process.terminate()
    logger.error("interrupted: no report was written")
    return 130


if __name__ == "__main__":
    end_at_once(main())
