"""Trains and tests TD4V on small made videos that only motion tells apart, and shows the accuracy of four variants.

python -m scripts.quickstart --output quickstart --seeds 0 1 2
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import Parser, log_to_console
from common.tables import markdown_table
from common.text import plural
from scripts.cli import ROOT, default_jobs, positive_int, run, write_text

if TYPE_CHECKING:
    from scripts.experiments import Experiment

Results = Mapping[tuple[str, int], dict[str, Any]]  # by variant and seed: what test_vision.py wrote


@dataclass(frozen=True)
class Variant:
    """A row of the table: `overrides` of the configuration (KEY=VALUE)."""

    key: str
    title: str
    overrides: tuple[str, ...] = ()


NO_TEMPORAL_PART = "{td4v: false, stem_kernel: 1, token_shift: false, temporal_embedding: false}"
VARIANTS = (
    Variant("side", "TD4V side-tuning"),
    Variant("finetune", "TD4V fine-tuning", ("network.model=td4v_finetune",)),
    Variant("no_td4v", "side network without TD4V", ("network.options={td4v: false}",)),
    Variant("blind", "side network without any temporal part", (f"network.options={NO_TEMPORAL_PART}",)),
)
CHANCE = 25.0
EXPECTED = 60.0  # what TD4V side-tuning must reach with every seed


class QuickstartError(ValueError):
    """A variant did not reach what it must; the message is one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, which is 1 if a step fails or a variant does not reach what it must."""
    parser = Parser(prog="python -m scripts.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("quickstart"), metavar="FOLDER",
                        help="for data, runs, table.md and quickstart.png (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--short", action="store_true", help="one seed, two of the variants, few epochs")
    parser.add_argument("--jobs", type=positive_int, default=default_jobs(), metavar="N",
                        help="runs at a time (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    log_to_console(stream=sys.stdout)
    return run(
        lambda: quickstart(options.output.resolve(), options.seeds, options.short, options.jobs),
        interrupted="interrupted; rerun the command to resume it",
    )


def quickstart(output: Path, seeds: list[int], short: bool, jobs: int) -> None:
    """Make the data, train, test, and write the table and the figure into `output`."""
    from scripts.experiments import run_experiments  # here, as all that imports torch, so that --help is quick
    from scripts.quickstart_figure import draw

    started = time.monotonic()
    variants = [variant for variant in VARIANTS if not short or variant.key in ("side", "blind")]
    seeds = seeds[:1] if short else seeds
    data = output / "data"
    output.mkdir(parents=True, exist_ok=True)
    make_data(data)
    print(f"data: 256 training and 128 test videos of 8 JPEG frames in {data}; chance is {CHANCE:.0f} %", flush=True)
    print("CLIP: a small tower with RANDOM, frozen weights", flush=True)
    experiments = {
        (variant.key, seed): experiment_of(output, data, variant, seed, short) for seed in seeds for variant in variants
    }
    results = dict(zip(experiments, run_experiments(list(experiments.values()), jobs, device="cpu"), strict=True))
    table = make_table(variants, seeds, results)
    write_text(output / "table.md", table)
    scores = {variant.title: [results[variant.key, seed]["top1"] for seed in seeds] for variant in variants}
    draw(data, scores, output / "quickstart.png")
    print(f"\n{table}\ntable: {output / 'table.md'}\nfigure: {output / 'quickstart.png'}")
    print(f"TensorBoard: tensorboard --logdir {output / 'runs'}\n{(time.monotonic() - started) / 60:.1f} minutes")
    check(variants, seeds, results)


def make_data(folder: Path) -> None:
    """Make the quickstart's data, unless they are there. Raises PrepareError, OSError."""
    from datasets.prepare.synthetic import make

    make(folder, train=256, val=128, seed=0, size=64)


def experiment_of(output: Path, data: Path, variant: Variant, seed: int, short: bool) -> Experiment:
    from scripts.experiments import Experiment

    settings = [*variant.overrides, f"seed={seed}", f"data.label_list={data / 'labels.csv'}"]
    for split in ("train", "val"):
        settings += [f"data.{split}_root={data / 'frames'}", f"data.{split}_list={data / f'{split}.txt'}"]
    settings += ["solver.epochs=4"] if short else []
    return Experiment(
        title=f"{variant.title}, seed {seed}",
        kind=variant.key,
        path=str(ROOT / "configs/quickstart.yaml"),
        settings=tuple(settings),
        folder=output / "runs" / f"{variant.key}_seed{seed}",
    )


def make_table(variants: Sequence[Variant], seeds: Sequence[int], results: Results) -> str:
    """Markdown: mean and range of top-1 over the seeds, and trainable parameters."""
    rows = []
    for variant in variants:
        scores = [results[variant.key, seed]["top1"] for seed in seeds]
        trainable = results[variant.key, seeds[0]]["parameters"]["trainable"]
        mean, span = f"{statistics.mean(scores):.1f} %", f"{min(scores):.1f} to {max(scores):.1f} %"
        rows.append([variant.title, mean, span, f"{trainable:,}"])
    columns = ["variant", f"top-1, mean of {plural(len(seeds), 'seed')}", "lowest to highest", "trainable parameters"]
    return (
        f"{markdown_table(columns, rows, align='lrrr')}\nChance is {CHANCE:.0f} %. Seeds {', '.join(map(str, seeds))}. "
        "CLIP: small, frozen, random weights. 128 test videos, last epoch.\n"
    )


def check(variants: Sequence[Variant], seeds: Sequence[int], results: Results) -> None:
    """Raises QuickstartError unless side-tuning sees motion and the network without temporal parts is at chance."""
    for variant in variants:
        for seed in seeds:
            score = results[variant.key, seed]["top1"]
            if variant.key == "side" and score < EXPECTED:
                raise QuickstartError(
                    f"{variant.title} reached only {score:.1f} % with seed {seed}; at least {EXPECTED:.0f} % are expected"
                )
            if variant.key == "blind" and abs(score - CHANCE) > 1e-6:
                raise QuickstartError(
                    f"{variant.title} reached {score:.1f} % with seed {seed}; on these data it must be exactly at chance"
                )


if __name__ == "__main__":
    sys.exit(main())
