"""The quickstart: does TD4V see motion? Made data, four variants, several seeds, a table and a picture.

Lives here: which variants are trained with the two commands of the project, and how their results are shown.
Does not live here: running them (trials.py) and the data (datasets/prepare/frame_order.py).

    python -m scripts.quickstart --output quickstart --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from datasets.prepare.synthetic import make
from scripts.experiments import ROOT, USUAL_JOBS, Experiment, ExperimentError, run_experiments

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIG = str(ROOT / "configs/quickstart.yaml")


@dataclass(frozen=True)
class Variant:
    """One row of the table: what is trained, and what is expected of it."""

    key: str
    title: str
    overrides: tuple[str, ...]
    color: str


VARIANTS = (
    Variant("side", "TD4V side-tuning", (), "#1f6f8b"),
    Variant("finetune", "TD4V fine-tuning", ("network.model=td4v_finetune",), "#c8553d"),
    Variant(
        "blind",
        "side network, every temporal part off",
        ("network.options={td4v: false, stem_kernel: 1, token_shift: false, temporal_embedding: false}",),
        "#888888",
    ),
    Variant("no_td4v", "side network, only TD4V off", ("network.options={td4v: false}",), "#e0a030"),
)
CHANCE = 25.0
FAR_ABOVE_CHANCE = 60.0  # what TD4V side-tuning must reach in every seed


class QuickstartError(RuntimeError):
    """TD4V did not learn what it must; the message is one sentence."""


def main() -> None:
    """Run it all; exit status 1 if a step fails or TD4V does not learn what it must."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for data, runs, table, picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="one seed, two of the variants, few epochs: for CI")
    parser.add_argument("--jobs", type=int, default=USUAL_JOBS, help="runs at a time")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        quickstart(arguments.output.resolve(), arguments.seeds, arguments.short, arguments.jobs)
    except (QuickstartError, ExperimentError, OSError, ValueError) as error:
        raise SystemExit(f"quickstart: {error}") from None


def quickstart(output: Path, seeds: list[int], short: bool, jobs: int) -> None:
    """Data, training, testing, table and picture below `output`."""
    started = time.monotonic()
    variants = [variant for variant in VARIANTS if not short or variant.key in ("side", "blind")]
    seeds = seeds[:1] if short else seeds
    data = output / "data"
    make_data(data)
    print(f"data: 256 training and 128 test videos of 8 JPEG frames in {data}; chance is {CHANCE:.0f} %", flush=True)
    print("CLIP: a small tower with RANDOM, frozen weights", flush=True)
    trials = {
        (variant.key, seed): trial_of(output, data, variant, seed, short) for seed in seeds for variant in variants
    }
    results = dict(zip(trials, run_experiments(list(trials.values()), jobs, device="cpu"), strict=True))
    table = make_table(variants, seeds, results)
    (output / "table.md").write_text(table)
    draw(output, data, variants, seeds, results, trials)
    print(f"\n{table}\ntable: {output / 'table.md'}\npicture: {output / 'quickstart.png'}")
    print(f"TensorBoard: tensorboard --logdir {output / 'runs'}\n{(time.monotonic() - started) / 60:.1f} minutes")
    check(variants, seeds, results)


def trial_of(output: Path, data: Path, variant: Variant, seed: int, short: bool) -> Experiment:
    """One variant with one seed."""
    settings = (
        *variant.overrides, f"seed={seed}",
        *(f"data.{split}_root={data / 'frames'}" for split in ("train", "val")),
        *(f"data.{split}_list={data / split}.txt" for split in ("train", "val")),
        f"data.label_list={data / 'labels.csv'}",
        *(("solver.epochs=4",) if short else ()),
    )  # fmt: skip
    folder = output / "runs" / f"{variant.key}_seed{seed}"
    return Experiment(f"{variant.title}, seed {seed}", variant.key, CONFIG, settings, folder)


def make_data(folder: Path) -> None:
    """The quickstart's data, unless they are there. Raises PrepareError, OSError."""
    make(folder, train=256, val=128, seed=0, size=64)


def make_table(variants: list[Variant], seeds: list[int], results: dict) -> str:
    """Markdown: mean, spread and each seed's top-1."""
    rows = [
        f"| variant | top-1, mean of {len(seeds)} seeds | lowest to highest | tuned parameters |",
        "|---|---|---|---|",
    ]
    for variant in variants:
        scores = [results[variant.key, seed]["top1"] for seed in seeds]
        tuned = results[variant.key, seeds[0]]["parameters"]["tuned"]
        rows.append(
            f"| {variant.title} | {statistics.mean(scores):.1f} % | {min(scores):.1f} to {max(scores):.1f} % | {tuned:,} |"
        )
    seeds_text = ", ".join(map(str, seeds))
    return "\n".join(
        [
            *rows,
            "",
            f"Chance is {CHANCE:.0f} %. Seeds {seeds_text}. CLIP: small, frozen, random weights. 128 test videos, last epoch.",
            "",
        ]
    )


def check(variants: list[Variant], seeds: list[int], results: dict) -> None:
    """What must hold: TD4V side-tuning sees the order of frames, the network without temporal parts cannot."""
    for variant in variants:
        for seed in seeds:
            score = results[variant.key, seed]["top1"]
            if variant.key == "side" and score < FAR_ABOVE_CHANCE:
                raise QuickstartError(
                    f"{variant.title} reached only {score:.1f} % with seed {seed}; {FAR_ABOVE_CHANCE:.0f} % were expected"
                )
            if variant.key == "blind" and abs(score - CHANCE) > 1e-6:
                raise QuickstartError(
                    f"{variant.title} reached {score:.1f} % with seed {seed}; it must be exactly at chance on these data"
                )


def draw(output: Path, data: Path, variants: list[Variant], seeds: list[int], results: dict, trials: dict) -> None:
    """The picture: curves, TD4V's confusion matrix, film strips with predictions."""
    figure = plt.figure(figsize=(13, 11), layout="constrained")
    grid = figure.add_gridspec(5, 2, height_ratios=[4.2, 1, 1, 1, 1])
    curves = figure.add_subplot(grid[0, 0])
    for variant in variants:
        runs = [[line["top1"] for line in trials[variant.key, seed].metrics()] for seed in seeds]  # all are validated
        epochs = range(1, len(runs[0]) + 1)
        for run in runs:
            curves.plot(epochs, run, color=variant.color, alpha=0.3, linewidth=1)
        curves.plot(
            epochs, np.mean(runs, 0), color=variant.color, linewidth=2.2, marker="o", markersize=4, label=variant.title
        )
    curves.axhline(CHANCE, color="black", linestyle=":", linewidth=1, label="chance")
    curves.set(
        xlabel="epoch",
        ylabel="top-1 on the test videos (%)",
        ylim=(0, 103),
        title=f"Learning curves, mean and each of {len(seeds)} seeds",
    )
    curves.legend(fontsize=8, loc="lower right", ncols=2)

    names = [line.split(",", 1)[1] for line in (data / "labels.csv").read_text().splitlines()[1:]]
    shown = results["side", seeds[0]]
    matrix = figure.add_subplot(grid[0, 1])
    confusion = np.array(shown["confusion"], dtype=float)
    matrix.imshow(confusion, cmap="Blues", vmin=0, vmax=confusion.sum(1).max())
    for row, column in np.ndindex(confusion.shape):
        dark = confusion[row, column] > confusion.max() / 2
        matrix.text(
            column, row, f"{confusion[row, column]:.0f}", ha="center", va="center", color="white" if dark else "black"
        )
    matrix.set(
        xticks=range(len(names)),
        yticks=range(len(names)),
        xlabel="predicted",
        ylabel="true",
        title=f"TD4V side-tuning, seed {seeds[0]}: videos by class",
    )
    matrix.set_xticklabels(names)
    matrix.set_yticklabels(names)

    rows = [line.rsplit(" ", 2) for line in (data / "val.txt").read_text().splitlines()]
    blind = dict(results["blind", seeds[0]]["predicted"])
    seen = dict(shown["predicted"])
    for strip, index in enumerate(
        [next(i for i, row in enumerate(rows) if int(row[2]) == label) for label in range(len(names))]
    ):
        axis = figure.add_subplot(grid[1 + strip, :])
        frames = [
            np.asarray(Image.open(data / "frames" / rows[index][0] / f"{number:06d}.jpg")) for number in range(1, 9)
        ]
        axis.imshow(
            np.concatenate([np.pad(frame, ((0, 0), (2, 2), (0, 0)), constant_values=255) for frame in frames], 1)
        )
        axis.axis("off")
        mark = "right" if seen[index] == int(rows[index][2]) else "wrong"
        axis.set_title(
            f"true: {names[int(rows[index][2])]}   TD4V side-tuning: {names[seen[index]]} ({mark})   no temporal parts: {names[blind[index]]}",
            fontsize=10,
            loc="left",
        )
    figure.suptitle("The same frames in four orders: only motion tells the classes apart", fontsize=14)
    figure.savefig(output / "quickstart.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
