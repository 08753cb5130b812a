"""Runs side by side: what they reached, which settings, versions and data set them apart, and their curves.

Lives here: the tables and the picture. Does not live here: reading run folders (run_folders.py).

    python -m scripts.compare_runs exp/somethingv2 [RUN...] [--metric mean_class] [--out results/ablation]
"""

from __future__ import annotations

import argparse
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

import matplotlib
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from scripts.run_reader import Row, Run, RunReadError, find_runs

matplotlib.use("Agg")
from matplotlib import pyplot

logger = logging.getLogger("td4v")

METRICS = {"top1": "top-1", "top5": "top-5", "mean_class": "mean class"}
LIST_HASH = re.compile(r"lists\.(.+)\.sha256")  # in run.json; the list's name is its key below `data`
UNKNOWN = "–"  # noqa: RUF001


def overview(runs: list[Run], metric: str) -> list[Row]:
    """What each run reached, one row a run, as text; what is not known is None."""
    return [
        {
            "run": f"{number} {run.name}",
            "epochs": "{} of {}".format(*run.epochs),
            f"best {METRICS[metric]}": scores(run.best(metric)),
            "last": scores(run.last(metric)),
            "loss": f"{run.known('train_loss')[-1]:.4f}" if run.known("train_loss") else None,
            "clips/s": f"{statistics.median(run.known('clips_per_s')):.1f}" if run.known("clips_per_s") else None,
            "GiB": f"{max(run.known('memory_gib')):.1f}" if run.known("memory_gib") else None,
            "skipped videos": f"{sum(run.known('skipped')):.0f}" if any(run.known("skipped")) else None,
            "steps left out": f"{left:.0f}" if (left := sum(run.known("left_out") + run.known("overflows"))) else None,
            "tuned": f"{tuned:,}" if (tuned := tuned_parameters(run)) else None,
            "revision": ", ".join(revisions(run)) or None,
            "starts": str(len(run.starts)) if len(run.starts) > 1 else None,
            "seed": run.seed,
            "tests": "; ".join(f"{name}: {number_text(test.get(metric))}" for name, test in run.tests.items()) or None,
        }
        for number, run in enumerate(runs, start=1)
    ]


def scores(row: Row | None) -> str | None:
    """Top-1 / top-5 / mean class and the epoch, counted from 1."""
    if row is None:
        return None
    return f"{' / '.join(number_text(row.get(name)) for name in METRICS)} (epoch {row['epoch'] + 1})"


def number_text(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}"


def revisions(run: Run) -> list[str]:
    """Short revisions of all starts; a star for a tree with changes of its own."""
    known = [(start.get("git.revision"), start.get("git.dirty")) for start in run.starts]
    return [f"{revision[:7]}{'*' if dirty else ''}" for revision, dirty in dict.fromkeys(known) if revision]


def tuned_parameters(run: Run) -> int | None:
    """From run.json, or from the results of a test."""
    counts = run.of_starts("parameters.tuned")
    counts += [test["parameters"]["tuned"] for test in run.tests.values() if "tuned" in (test.get("parameters") or {})]
    return counts[-1] if counts else None


def different_settings(runs: list[Run]) -> dict[str, list[Any]]:
    """Dotted key: the value in each run, UNKNOWN where it has none; only keys that are not the same in all."""
    keys = sorted({key for run in runs for key in run.settings})
    values = {key: [run.settings.get(key, UNKNOWN) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len(set(map(repr, row))) > 1}


def different_places(runs: list[Run]) -> dict[str, list[str]]:
    """Versions, machine and data lists that differ from run to run, or changed from start to start within one. What
    only some runs have noted is no difference; nor are lists of the same content in two places."""
    parts = ("versions.", "hardware.", "lists.", "gpu", "host", "platform", "world_size")
    keys = sorted({key for run in runs for start in run.starts for key in start if key.startswith(parts)})
    keys = [key for key in keys if not (key.startswith("lists.") and key.endswith((".path", ".rows")))]
    table = {}
    for key in keys:
        values = [run.of_starts(key) for run in runs]
        if len({tuple(value) for value in values if value}) > 1 or any(len(value) > 1 for value in values):
            short = 12 if key.endswith(".sha256") else None
            table[key] = [" then ".join(str(part)[:short] for part in value) or UNKNOWN for value in values]
            if short:
                rows = key.replace(".sha256", ".rows")
                table[rows] = [" then ".join(map(str, run.of_starts(rows))) or UNKNOWN for run in runs]
    return table


def over_seeds(runs: list[Run], metric: str) -> list[Row]:
    """Mean and sample standard deviation over finished runs that differ in nothing but the seed: settings, data lists
    (their content, where it was noted) and number of processes are the same. Of several with one seed, the latest
    counts. One row a group of at least two seeds, as text."""
    groups: dict[str, list[tuple[int, Run]]] = {}
    for number, run in enumerate(runs, start=1):
        hashes = {key: run.of_starts(key) for start in run.starts for key in start if LIST_HASH.fullmatch(key)}
        noted = {"seed", *(LIST_HASH.sub(r"data.\1", key) for key in hashes)}
        same = {key: value for key, value in run.settings.items() if key not in noted}
        key = json.dumps([same, hashes, run.of_starts("world_size")], sort_keys=True, default=str)
        groups.setdefault(key, []).append((number, run))
    table = []
    for members in groups.values():
        done = [(number, run) for number, run in members if run.finished and run.last(metric)]
        by_seed = {run.seed: (number, run) for number, run in sorted(done, key=lambda each: each[1].latest)}
        if len(by_seed) < 2:
            continue
        counted = {number: run for number, run in sorted(by_seed.values(), key=lambda each: each[0])}
        finished = list(counted.values())
        columns = {
            f"best {METRICS[metric]}": [run.best(metric)[metric] for run in finished],
            **{f"last {title}": [row.get(name) for run in finished if (row := run.last(metric))]
               for name, title in METRICS.items()},
            **{f"test {test}": [run.tests.get(test, {}).get(metric) for run in finished]
               for test in dict.fromkeys(test for run in finished for test in run.tests)},
        }  # fmt: skip
        table.append(
            {
                "runs": listed(counted),
                "seeds": listed(run.seed for run in finished),
                "seed again, left out": listed(number for number, _ in done if number not in counted) or None,
                "not finished": listed(each[0] for each in members if each not in done) or None,
                **{title: mean_and_deviation(values) for title, values in columns.items() if None not in values},
                "revisions": listed(dict.fromkeys(name for run in finished for name in revisions(run))) or None,
            }
        )
    return table


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def mean_and_deviation(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def as_table(rows: list[Row]) -> str:
    """Aligned Markdown; columns that no row fills are left out."""
    heads = [head for head in dict.fromkeys(key for row in rows for key in row)
             if any(row.get(head) is not None for row in rows)]  # fmt: skip
    cells = [[UNKNOWN if row.get(head) is None else str(row[head]) for head in heads] for row in rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in [heads, *cells]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]]) + "\n"


def by_run(values: dict[str, list[Any]], head: str) -> list[Row]:
    """One row a key and one column a run, which its number names."""
    return [{head: key, **dict(zip(map(str, range(1, len(row) + 1)), short(row), strict=True))}
            for key, row in values.items()]  # fmt: skip


def short(values: list[Any], width: int = 28) -> list[str]:
    """As text, long ones cut at the left where that leaves different ones different."""
    texts = ["null" if value is None else str(value) for value in values]
    cut = [text if len(text) <= width else f"…{text[1 - width :]}" for text in texts]
    return cut if len(set(cut)) == len(set(texts)) else texts


def report(runs: list[Run], metric: str) -> str:
    """All tables, as Markdown."""
    parts = [as_table(overview(runs, metric)), "Scores are top-1 / top-5 / mean class; * marks uncommitted changes.\n"]
    tables = (
        ("Settings that differ", by_run(different_settings(runs), "setting")),
        ("Versions, machines and data that differ", by_run(different_places(runs), "")),
        ("Runs that differ in nothing but the seed (mean ± sample standard deviation)", over_seeds(runs, metric)),
    )
    parts += [f"{title}:\n\n{as_table(rows)}" for title, rows in tables if rows]
    return "\n".join(parts)


def record(runs: list[Run], metric: str) -> Row:
    """The same as plain values, with every epoch."""
    return {
        "metric": metric,
        "runs": [
            {"number": number, "name": run.name, "folder": str(run.folder), "epochs": run.epochs, "seed": run.seed,
             "best": run.best(metric), "last": run.last(metric), "tuned": tuned_parameters(run),
             "revisions": revisions(run), "starts": len(run.starts), "metrics": run.rows,
             "tests": {name: {key: test.get(key) for key in METRICS} for name, test in run.tests.items()}}
            for number, run in enumerate(runs, start=1)
        ],
        "settings": different_settings(runs),
        "places": different_places(runs),
        "seeds": over_seeds(runs, metric),
    }  # fmt: skip


def draw(runs: list[Run], metric: str, path: Path) -> None:
    """Training loss and validation score by epoch, one colour a run, their names below."""
    names = [textwrap.fill(f"{number} {run.name}", 140).replace("$", r"\$") for number, run in enumerate(runs, 1)]
    columns = max(1, min(4, len(runs), 150 // (max(map(len, names)) + 8)))
    legend = -(-sum(name.count("\n") + 1 for name in names) // columns) * 0.19  # inches
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6 + legend), layout="constrained")
    handles = []
    for run, style in zip(runs, styles(len(runs)), strict=True):
        handles.append(Line2D([], [], linewidth=2.5, **style))
        for axis, key in zip(axes, ("train_loss", metric), strict=True):
            if points := [(row["epoch"] + 1, row[key]) for row in run.epochs_with(key)]:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.4, **style)
    last = max(run.epochs[0] for run in runs)
    for axis, title in zip(axes, ("training loss", f"validation {METRICS[metric]} (%)"), strict=True):
        axis.set(xlabel="epoch", title=title, xlim=(0.5, max(last, 1) + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.25)
        if not axis.lines:
            axis.set_yticks([])
            axis.text(0.5, 0.5, "nothing yet", ha="center", va="center", transform=axis.transAxes, color="gray")
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def styles(number: int) -> list[Row]:
    """One colour each; above ten, neighbours on the scale also differ in dashes."""
    if number <= 10:
        return [{"color": color} for color in pyplot.get_cmap("tab10").colors[:number]]
    scale = [pyplot.get_cmap("turbo")(place / (number - 1)) for place in range(number)]
    darker = [tuple(0.85 * part for part in color[:3]) for color in scale]  # its yellow is pale on white
    return [{"color": color, "linestyle": ("-", "--")[place % 2]} for place, color in enumerate(darker)]


def outputs(out: str) -> dict[str, Path]:
    """Suffix: file. `out` is a folder that exists or ends with a slash, or the files' name without suffix."""
    folder = out.endswith(("/", os.sep)) or Path(out).is_dir()
    base = Path(out, "compare") if folder else Path(out.removesuffix(".md").removesuffix(".json").removesuffix(".png"))
    base.parent.mkdir(parents=True, exist_ok=True)
    return {suffix: base.with_name(f"{base.name}.{suffix}") for suffix in ("md", "json", "png")}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.compare_runs", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder with runs below it")
    parser.add_argument(
        "--out",
        default="exp/compare",
        help="folder (FOLDER/), or name of the files without suffix (default: %(default)s)",
    )
    parser.add_argument("--metric", choices=METRICS, default="top1", help="what chooses the best epoch and is drawn")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        runs = find_runs(options.runs)
        text = report(runs, options.metric)
        files = outputs(options.out)
        files["md"].write_text(text, encoding="utf-8")
        files["json"].write_text(json.dumps(record(runs, options.metric), indent=1) + "\n", encoding="utf-8")
        draw(runs, options.metric, files["png"])
    except (RunReadError, OSError) as error:
        logger.error("%s", error)
        return 1
    print(text, end="")
    logger.info("%s", ", ".join(map(str, files.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
