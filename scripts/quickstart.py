"""The quickstart: does TD4V see motion? Made data, four variants, several seeds, a table and a picture.

Lives here: which variants are trained with the two commands of the project, and how their results are shown.
Does not live here: training, testing (train_vision.py, test_vision.py) and the data (datasets/prepare/frame_order.py).

    python -m scripts.quickstart --output quickstart --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from datasets.prepare.frame_order import make

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
CONFIG = "configs/quickstart.yaml"


@dataclass(frozen=True)
class Variant:
    """One row of the table: what is trained, and what is expected of it."""

    key: str
    title: str
    overrides: tuple[str, ...]
    color: str


VARIANTS = (
    Variant("side", "TD4V side-tuning", (), "#1f6f8b"),
    Variant("finetune", "TD4V fine-tuning", ("network.method=td4v_finetune",), "#c8553d"),
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
    """A step failed; the message is one sentence."""


def main() -> None:
    """Run it all; exit status 1 if a step fails or TD4V does not learn what it must."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for data, runs, table, picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="one seed, two of the variants, few epochs: for CI")
    parser.add_argument("--jobs", type=int, default=max(1, min(4, os.cpu_count() or 1)), help="runs at a time")
    arguments = parser.parse_args()
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        quickstart(arguments.output.resolve(), arguments.seeds, arguments.short, arguments.jobs)
    except (QuickstartError, OSError, ValueError) as error:
        raise SystemExit(f"quickstart: {error}") from None


def quickstart(output: Path, seeds: list[int], short: bool, jobs: int) -> None:
    """Data, training, testing, table and picture below `output`."""
    started = time.monotonic()
    variants = [variant for variant in VARIANTS if not short or variant.key in ("side", "blind")]
    seeds = seeds[:1] if short else seeds
    if (output / "runs").exists():
        raise QuickstartError(f"{output / 'runs'} holds an earlier quickstart; remove it or choose another --output")
    data = output / "data"
    make(data, train=256, val=128, seed=0, size=64)
    print(f"data: 256 training and 128 test videos of 8 JPEG frames in {data}; chance is {CHANCE:.0f} %", flush=True)
    print("CLIP: a small tower with RANDOM, frozen weights", flush=True)
    tasks = [(variant, seed) for seed in seeds for variant in variants]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_one, output, data, variant, seed, short, jobs) for variant, seed in tasks]
        try:
            watch(output, tasks, futures, started)
            results = {
                (variant.key, seed): future.result() for (variant, seed), future in zip(tasks, futures, strict=True)
            }
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    table = make_table(variants, seeds, results)
    (output / "table.md").write_text(table)
    draw(output, data, variants, seeds, results)
    print(f"\n{table}\ntable: {output / 'table.md'}\npicture: {output / 'quickstart.png'}")
    print(f"TensorBoard: tensorboard --logdir {output / 'runs'}\n{(time.monotonic() - started) / 60:.1f} minutes")
    check(variants, seeds, results)


def run_one(output: Path, data: Path, variant: Variant, seed: int, short: bool, jobs: int) -> dict:
    """Train and test one variant with the project's two commands; returns the test's results."""
    folder = output / "runs" / f"{variant.key}_seed{seed}"
    settings = [
        *variant.overrides, f"seed={seed}",
        *(f"data.{split}_root={data / 'frames'}" for split in ("train", "val")),
        *(f"data.{split}_list={data / split}.txt" for split in ("train", "val")),
        f"data.label_list={data / 'labels.csv'}",
        *(("solver.epochs=4",) if short else ()),
    ]  # fmt: skip
    chosen = [word for setting in settings for word in ("--set", setting)]
    log = output / "runs" / f"{variant.key}_seed{seed}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    call(log, jobs, "train_vision.py", "--config", CONFIG, "--output", str(folder), *chosen)
    # The last checkpoint, not the best: choosing by the test videos would flatter the result.
    results = folder / "results.json"
    weights = folder / "last_model.pt"
    call(log, jobs, "test_vision.py", "--config", CONFIG, "--weights", str(weights), "--json", str(results), *chosen)
    return json.loads(results.read_text())


def call(log: Path, jobs: int, *command: str) -> None:
    """Run one of the project's commands with its share of the cores, its output into `log`."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        last = log.read_text().strip().splitlines()[-1:] or ["no output"]
        raise QuickstartError(f"{command[0]} failed: {last[0]} (all of it: {log})")


def watch(output: Path, tasks: list, futures: list, started: float) -> None:
    """Print each epoch of each run as it is finished, with an estimate of the time that is left."""
    seen: dict[int, int] = {}
    while True:
        finished = all(future.done() for future in futures)
        for number, (variant, seed) in enumerate(tasks):
            epochs = read_metrics(output, variant, seed)
            for line in epochs[seen.get(number, 0) :]:
                done = sum(future.done() for future in futures)
                passed = time.monotonic() - started
                left = f", about {passed / done * (len(tasks) - done) / 60:.1f} min left" if done else ""
                print(f"[{passed:4.0f} s, run {number + 1}/{len(tasks)}{left}] {variant.title}, seed {seed}, epoch {line['epoch'] + 1}: loss {line['train_loss']:.3f}, top-1 {line['top1']:.1f} %", flush=True)  # fmt: skip
            seen[number] = len(epochs)
        if finished or any(future.done() and future.exception() for future in futures):
            return
        time.sleep(1)


def read_metrics(output: Path, variant: Variant, seed: int) -> list[dict]:
    """The validated epochs that a run has written so far."""
    path = output / "runs" / f"{variant.key}_seed{seed}" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [values for values in map(json.loads, lines) if values.get("top1") is not None]


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


def draw(output: Path, data: Path, variants: list[Variant], seeds: list[int], results: dict) -> None:
    """The picture: curves, TD4V's confusion matrix, film strips with predictions."""
    figure = plt.figure(figsize=(13, 11), layout="constrained")
    grid = figure.add_gridspec(5, 2, height_ratios=[4.2, 1, 1, 1, 1])
    curves = figure.add_subplot(grid[0, 0])
    for variant in variants:
        runs = [[line["top1"] for line in read_metrics(output, variant, seed)] for seed in seeds]
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
