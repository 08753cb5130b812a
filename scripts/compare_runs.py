"""Compares runs: what they reached, which settings, versions and data differ, and their curves.

python -m scripts.compare_runs exp/somethingv2 [RUN...] [--metric mean_class] [--out results/ablation]
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.console import Parser, expanded, log_to_console, show
from scripts.cli import write_json, write_text
from scripts.reports import UNKNOWN, dict_table, short_revision
from scripts.run_reader import Row, Run, RunReadError, find_runs

logger = logging.getLogger("td4v")

METRICS = {"top1": "top-1", "top5": "top-5", "mean_class": "mean class"}
LIST_HASH = re.compile(r"lists\.(.+)\.sha256")  # in run.json; the group is the list's key below `data`


def overview(runs: list[Run], metric: str) -> list[Row]:
    """One row of text a run; None is unknown."""
    return [
        {
            "run": f"{number} {run.name}",
            "epochs": f"{run.epochs_done} of {run.epochs_planned}",
            f"best {METRICS[metric]}": scores(run.best(metric)),
            "last": scores(run.last(metric)),
            "loss": f"{losses[-1]:.4f}" if (losses := run.values("train_loss")) else None,
            "clips/s": f"{statistics.median(rates):.1f}" if (rates := run.values("clips_per_s")) else None,
            "GiB": f"{max(memory):.1f}" if (memory := run.values("memory_gib")) else None,
            "skipped videos": f"{videos:.0f}" if (videos := sum(run.values("skipped_videos"))) else None,
            "skipped steps": f"{steps:.0f}"
            if (steps := sum(run.values("skipped_steps") + run.values("overflows")))
            else None,
            "trainable": f"{count:,}" if (count := trainable_parameters(run)) else None,
            "revision": listed(revisions(run)) or None,
            "starts": len(run.starts) if len(run.starts) > 1 else None,
            "seed": run.seed,
            "tests": "; ".join(f"{name}: {percent(test.get(metric))}" for name, test in run.tests.items()) or None,
        }
        for number, run in enumerate(runs, start=1)
    ]


def scores(row: Row | None) -> str | None:
    """Top-1 / top-5 / mean class and the epoch, counted from 1."""
    if row is None:
        return None
    return f"{' / '.join(percent(row.get(name)) for name in METRICS)} (epoch {row['epoch'] + 1})"


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}"


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def revisions(run: Run) -> list[str]:
    """The revisions of the code of all starts."""
    found = [{"revision": start.get("git.revision"), "dirty": start.get("git.dirty")} for start in run.starts]
    return list(dict.fromkeys(short_revision(git) for git in found if git["revision"]))


def trainable_parameters(run: Run) -> int | None:
    """From run.json, or from the results of a test."""
    counts = run.recorded("parameters.trainable")
    counts += [
        test["parameters"]["trainable"] for test in run.tests.values() if "trainable" in (test.get("parameters") or {})
    ]
    return counts[-1] if counts else None


def different_settings(runs: list[Run]) -> dict[str, list[Any]]:
    """Dotted key: the value in each run, UNKNOWN where it has none; only keys whose values differ."""
    keys = sorted({key for run in runs for key in run.settings})
    values = {key: [run.settings.get(key, UNKNOWN) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len(set(map(repr, row))) > 1}


def different_environments(runs: list[Run]) -> dict[str, list[str]]:
    """Versions, machine and data lists that differ between runs, or between the starts of one run.

    What only some runs recorded is no difference, nor are lists with the same content in two places.
    """
    compared = ("versions.", "hardware.", "lists.", "gpu", "host", "platform", "world_size")
    keys = sorted({key for run in runs for start in run.starts for key in start if key.startswith(compared)})
    keys = [key for key in keys if not (key.startswith("lists.") and key.endswith((".path", ".rows")))]
    table = {}
    for key in keys:
        values = [run.recorded(key) for run in runs]
        if len({tuple(value) for value in values if value}) > 1 or any(len(value) > 1 for value in values):
            digits = 12 if key.endswith(".sha256") else None
            table[key] = [" then ".join(str(part)[:digits] for part in value) or UNKNOWN for value in values]
            if digits:
                rows = key.replace(".sha256", ".rows")
                table[rows] = [" then ".join(map(str, run.recorded(rows))) or UNKNOWN for run in runs]
    return table


def over_seeds(runs: list[Run], metric: str) -> list[Row]:
    """Mean and sample standard deviation over finished runs that differ in the seed alone; one row a group.

    Settings, data lists (their content, where it was recorded) and the number of processes are the same. Of several
    runs with one seed the latest counts. A group has at least two seeds.
    """
    groups: dict[str, dict[int, Run]] = {}
    for number, run in enumerate(runs, start=1):
        groups.setdefault(_all_but_seed(run), {})[number] = run
    table = []
    for members in groups.values():
        done = {number: run for number, run in members.items() if run.finished and run.last(metric)}
        by_seed = {done[number].seed: number for number in sorted(done, key=lambda number: done[number].latest)}
        if len(by_seed) < 2:
            continue
        counted = {number: done[number] for number in sorted(by_seed.values())}
        table.append(
            {
                "runs": listed(counted),
                "seeds": listed(run.seed for run in counted.values()),
                "same seed, not counted": listed(number for number in done if number not in counted) or None,
                "not finished": listed(number for number in members if number not in done) or None,
                **_means(list(counted.values()), metric),
                "revisions": listed(dict.fromkeys(name for run in counted.values() for name in revisions(run))) or None,
            }
        )
    return table


def _all_but_seed(run: Run) -> str:
    hashes = {key: run.recorded(key) for start in run.starts for key in start if LIST_HASH.fullmatch(key)}
    ignored = {"seed", *(LIST_HASH.sub(r"data.\1", key) for key in hashes)}
    settings = {key: value for key, value in run.settings.items() if key not in ignored}
    return json.dumps([settings, hashes, run.recorded("world_size")], sort_keys=True, default=str)


def _means(runs: list[Run], metric: str) -> Row:
    columns = {f"best {METRICS[metric]}": [run.best(metric)[metric] for run in runs]}
    for name, title in METRICS.items():
        columns[f"last {title}"] = [run.last(metric).get(name) for run in runs]
    for test in dict.fromkeys(test for run in runs for test in run.tests):
        columns[f"test {test}"] = [run.tests.get(test, {}).get(metric) for run in runs]
    return {
        title: f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        for title, values in columns.items()
        if None not in values
    }


def by_run(values: dict[str, list[Any]], head: str) -> list[Row]:
    """One row a key and one column a run, named by its number."""
    return [
        {head: key, **{str(number): text for number, text in enumerate(shortened(row), 1)}}
        for key, row in values.items()
    ]


def shortened(values: list[Any], width: int = 28) -> list[str]:
    """As text, cut at the left where that leaves different values different."""
    texts = ["null" if value is None else str(value) for value in values]
    cut = [text if len(text) <= width else f"…{text[1 - width :]}" for text in texts]
    return cut if len(set(cut)) == len(set(texts)) else texts


def report(runs: list[Run], metric: str) -> str:
    """All tables, as Markdown."""
    parts = [
        dict_table(overview(runs, metric)),
        "Scores are top-1 / top-5 / mean class; * marks uncommitted changes.\n",
    ]
    tables = {
        "Settings that differ": by_run(different_settings(runs), "setting"),
        "Versions, machines and data that differ": by_run(different_environments(runs), "what"),
        "Runs that differ in the seed alone (mean ± sample standard deviation)": over_seeds(runs, metric),
    }
    parts += [f"{title}:\n\n{dict_table(rows)}" for title, rows in tables.items() if rows]
    return "\n".join(parts)


def to_dict(runs: list[Run], metric: str) -> Row:
    """The content of the report as plain values, with every epoch."""
    return {
        "metric": metric,
        "runs": [
            {
                "number": number,
                "name": run.name,
                "folder": str(run.folder),
                "epochs": [run.epochs_done, run.epochs_planned],
                "seed": run.seed,
                "best": run.best(metric),
                "last": run.last(metric),
                "trainable": trainable_parameters(run),
                "revisions": revisions(run),
                "starts": len(run.starts),
                "metrics": run.epochs,
                "tests": {name: {key: test.get(key) for key in METRICS} for name, test in run.tests.items()},
            }
            for number, run in enumerate(runs, start=1)
        ],
        "settings": different_settings(runs),
        "environments": different_environments(runs),
        "seeds": over_seeds(runs, metric),
    }


def draw(runs: list[Run], metric: str, path: Path) -> None:
    """Training loss and validation score by epoch, one line a run."""
    from matplotlib.figure import Figure  # here, so that --help is quick
    from matplotlib.ticker import MaxNLocator

    from scripts.figures import empty_panel, legend_below, line_panel, line_style, save

    names = [textwrap.fill(f"{number} {run.name}", 140).replace("$", r"\$") for number, run in enumerate(runs, 1)]
    legend_inches = 0.19 * sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(12, 4.6 + legend_inches), layout="constrained")
    last = max(run.epochs_done for run in runs)
    panels = {"train_loss": "training loss", metric: f"validation {METRICS[metric]}, %"}
    for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        line_panel(axes, title, "epoch")
        lines = []
        for index, run in enumerate(runs):
            rows = run.epochs_with(key)
            x, y = [row["epoch"] + 1 for row in rows], [row[key] for row in rows]
            lines += axes.plot(x, y, marker="o", markersize=3, linewidth=1.4, **line_style(index))
        axes.set_xlim(0.5, max(last, 1) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if not any(run.epochs_with(key) for run in runs):
            empty_panel(axes, "no values yet")
    legend_below(figure, lines, names)
    save(figure, path)


def output_files(out: str) -> dict[str, Path]:
    """The files by suffix. `out` is a folder that exists or ends with a slash, or the files' name without suffix."""
    is_folder = out.endswith(("/", os.sep)) or Path(out).is_dir()
    base = Path(out, "compare") if is_folder else Path(re.sub(r"(\.md|\.json|\.png)$", "", out))
    if base.name == "run":
        raise RunReadError(f"--out {out}: would write run.json, which is a run's record; choose another name")
    base.parent.mkdir(parents=True, exist_ok=True)
    return {suffix: base.with_name(f"{base.name}.{suffix}") for suffix in ("md", "json", "png")}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(prog="python -m scripts.compare_runs", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", type=expanded, nargs="+", metavar="RUN", help="a run folder, or a folder with runs below it"
    )
    parser.add_argument("--out", type=expanded, default="exp/compare", metavar="NAME",
                        help="folder (FOLDER/), or name of the files without suffix (default: %(default)s)")  # fmt: skip
    parser.add_argument("--metric", choices=METRICS, default="top1",
                        help="the score that chooses the best epoch and is plotted (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    log_to_console()
    try:
        runs = find_runs(options.runs)
        text = report(runs, options.metric)
        files = output_files(options.out)
        write_text(files["md"], text)
        write_json(files["json"], to_dict(runs, options.metric))
        draw(runs, options.metric, files["png"])
    except (RunReadError, OSError) as error:
        logger.error("%s", error)
        return 1
    show(text)
    logger.info("%s", listed(files.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
