"""How much faster than the field's usual recipe clips are read, on one core, in one run.

    python -m scripts.benchmarks.loader CONFIG [CONFIG ...] [--videos 160] [--repeats 5] [--core N] [--out DIR]

A CONFIG is a configuration or the config_snippet.yaml of datasets.prepare, of frame folders or of videos; its training
list is read, 8 frames a clip, at 224 pixels out of 256. The usual recipe (scripts/bench_reference.py) and the loaders here read the same frames of the same
videos, in turn, on the same core, with one thread, and each is measured in two ways:

    loader   a DataLoader with one worker, batches of 8: what training waits for
    item     one clip in this process, without the way from the worker: what a core works

Ours end as uint8 pixels, the recipe normalises in the worker. Ratios are of one repeat each; median, lowest and highest are given. Also: where the time of an item goes, how far it is
from decoding alone, and how far its pixels are from the recipe's for the same random draw.

Lives here: the measurement, the table and the picture. Does not live here: the recipe, and the loaders (datasets/).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs.schema import ConfigError, DataConfig, load_config
from datasets.annotation import AnnotationError
from datasets.box import Box
from datasets.build import train_loader
from datasets.jpeg import decode as decode_jpeg
from datasets.loader import PREFETCH, VideoLoader
from datasets.seeding import seeded
from datasets.video_dataset import BadVideo, TrainDataset, collate
from engine.distributed import Process
from engine.log import setup_logging
from engine.run_info import run_info
from scripts.benchmarks.loader.reference import Reference, Stages

BATCH = 8
SEED = 0
SEGMENTS, INPUT_SIZE, SCALE_SIZE = 8, 224, 256
WAYS = ("loader", "item")
PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "opencv-python-headless", "decord", "av", "numpy", "timm")

Key = tuple[int, int]
logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Case:
    """One line of the table: our loader for `data` against the recipe."""

    name: str
    data: DataConfig
    augments_whole: bool = False


@dataclass(frozen=True)
class Result:
    """What one case gave.

    Attributes:
        times: way -> "recipe" or "ours" -> milliseconds a clip of each repeat.
        stages: "recipe" or "ours" -> part -> milliseconds a clip.
        decoding: milliseconds that decoding the frames of a video alone takes with our decoder, files in memory.
        pixels: how far ours are from the same draw carried out by PIL, in 255ths; None where the recipe augments the
            crop, which ours never do.
    """

    case: str
    videos: int
    draws: int
    times: dict[str, dict[str, list[float]]]
    stages: dict[str, dict[str, float]]
    decoding: float
    pixels: dict[str, float] | None

    def ratio(self, way: str) -> tuple[float, float, float]:
        """Median, lowest and highest of recipe / ours."""
        both = zip(self.times[way]["recipe"], self.times[way]["ours"], strict=True)
        ratios = [recipe / ours for recipe, ours in both]
        return statistics.median(ratios), min(ratios), max(ratios)


def cases_of(path: str) -> Iterator[Case]:
    """Every way of reading that a configuration can be measured in."""
    data = load_config(path).data
    data = replace(
        data, batch_size=BATCH, workers=1, num_sample=1, input_size=INPUT_SIZE, scale_size=SCALE_SIZE, gray_prob=0.0,
        flip=True, flip_pairs=None, rand_aug=False, rand_erase=False, style="kinetics", shot=None, dense=False,
        num_segments=SEGMENTS, crop_scale=(0.08, 1.0), random_shift=True,
    )  # fmt: skip
    if data.modality == "video":
        for decoder in ("pyav", "decord"):
            yield Case(f"video files by {decoder}", replace(data, decoder=decoder))
        return
    yield Case("frames", data)
    yield Case("frames, two draws a video", replace(data, num_sample=2))
    yield Case("frames, RandAugment", replace(data, rand_aug=True))
    yield Case("frames, RandAugment before the crop", replace(data, rand_aug=True), augments_whole=True)


def measure(case: Case, videos: int, repeats: int) -> Result:
    """Read the same clips by the recipe and by ours, `repeats` times in turn."""
    dataset: TrainDataset = train_loader(replace(case.data, workers=0), SEED).dataset
    reference = Reference(dataset, case.data, augments_whole=case.augments_whole)
    order: list[Key] = [(number // len(dataset), number % len(dataset)) for number in range(videos)]
    draws = case.data.num_sample
    size = draws * SEGMENTS * INPUT_SIZE**2 * 3
    loaders = {
        "recipe": DataLoader(
            reference, BATCH, sampler=order, num_workers=1, prefetch_factor=PREFETCH, persistent_workers=True
        ),
        "ours": VideoLoader(dataset, order, BATCH, size, collate, workers=1),
    }
    if isinstance(bad := dataset[order[0]], BadVideo):
        raise ValueError(bad.message)
    items = {"recipe": reference.__getitem__, "ours": dataset.__getitem__}
    times: dict[str, dict[str, list[float]]] = {way: {who: [] for who in loaders} for way in WAYS}
    for repeat in tqdm(range(repeats + 1), desc=case.name, disable=None):
        for who in loaders:
            found = {"loader": _pass(loaders[who]), "item": _each(items[who], order) / draws}
            for way in WAYS if repeat else ():  # the first repeat warms everything up
                times[way][who].append(found[way])
    timing = Stages()
    for key in order:
        reference.read(key, timing)
    stages = {"recipe": timing.milliseconds(videos * draws), "ours": _our_stages(dataset, order)}
    comparable = case.augments_whole or not case.data.rand_aug
    pixels = _pixels(dataset, reference, order[: 4 * BATCH]) if comparable else None
    return Result(case.name, videos, draws, times, stages, _decoding(dataset, order), pixels)


def _pass(loader: DataLoader) -> float:
    """Milliseconds a clip of one pass; from the second pass on the worker is there already."""
    start, seen = time.perf_counter(), 0
    for batch in loader:
        seen += batch["label"].numel()
    return 1000 * (time.perf_counter() - start) / seen


def _each(item: Callable[[Key], Any], order: Sequence[Key]) -> float:
    """Milliseconds of one item."""
    start = time.perf_counter()
    for key in order:
        item(key)
    return 1000 * (time.perf_counter() - start) / len(order)


def _our_stages(dataset: TrainDataset, order: Sequence[Key]) -> dict[str, float]:
    """What TrainDataset does, part by part; `rest` is the remainder of the whole item."""
    stage, transform = Stages(), dataset.transform
    for epoch, index in order:
        record = dataset.source.records[index]
        with stage("read and decode"):
            clip = dataset.source.reader.open(os.path.join(dataset.source.root, record.path), record.num_frames)
            frames = clip.fetch(dataset.frame_indices(clip.num_frames, epoch, index)[0])
        draws = []
        for number in range(dataset.num_sample):
            with stage("draw"), seeded(dataset.seed, epoch, index, number):
                draws.append(transform.draw(frames.height, frames.width))
        origin = reduce(Box.joined, [draw.needs for draw in draws])
        with stage("read and decode"):
            whole = frames.decode(origin, fast=True)
        for draw in draws:
            pixels = draw.needs.cut(whole, origin)
            if draw.steps:
                with stage("RandAugment"):
                    pixels = transform.rand_augment(pixels, draw.steps, draw.boxes, draw.height, draw.width)
            with stage("crop and flip"):
                done = replace(draw, steps=(), boxes=draw.boxes[-1:])
                transform(pixels, done.needs, done, record.label)
    clips = len(order) * dataset.num_sample
    whole = _each(dataset.__getitem__, order) / dataset.num_sample
    found = stage.milliseconds(clips)
    return found | {"rest": max(0.0, whole - sum(found.values()))}


def _decoding(dataset: TrainDataset, order: Sequence[Key]) -> float:
    """Milliseconds a video of nothing but decoding: images from memory, whole; videos from the file."""
    seconds = 0.0
    for epoch, index in order:
        record = dataset.source.records[index]
        start = time.perf_counter()
        clip = dataset.source.reader.open(os.path.join(dataset.source.root, record.path), record.num_frames)
        wanted = dataset.frame_indices(clip.num_frames, epoch, index)[0]
        if hasattr(clip, "load"):
            files = [clip.load(frame)[1] for frame in wanted.tolist()]
            start = time.perf_counter()
            for file in files:
                decode_jpeg(file)
        else:
            clip.read(wanted)
        seconds += time.perf_counter() - start
    return 1000 * seconds / len(order)


def _pixels(dataset: TrainDataset, reference: Reference, order: Sequence[Key]) -> dict[str, float]:
    """How far our pixels are from PIL's for the same draw."""
    differences = []
    for key in order:
        item = dataset[key]
        if isinstance(item, BadVideo):
            raise ValueError(item.message)
        ours = item["video"][0].permute(0, 2, 3, 1).numpy().astype(int)  # (T, 224, 224, 3)
        differences.append(np.abs(ours - reference.with_our_draw(key)))
    found = np.stack(differences)
    return {"mean": float(found.mean()), "99 %": float(np.percentile(found, 99)), "highest": float(found.max())}


def table(results: Sequence[Result]) -> str:
    """Markdown: ratios with their spread, then milliseconds."""
    lines = [
        "| read from | recipe / ours, loader | recipe / ours, item | recipe, ours: ms a clip, loader | "
        "recipe, ours: ms a clip, item | decoding alone | pixels off by: mean, 99 %, highest |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ratios = ["{:.2f} ({:.2f} to {:.2f})".format(*result.ratio(way)) for way in WAYS]
        times = [
            ", ".join(f"{statistics.median(result.times[way][who]):.2f}" for who in ("recipe", "ours")) for way in WAYS
        ]
        pixels = "{mean:.2f}, {99 %:.0f}, {highest:.0f}".format(**result.pixels) if result.pixels else ""
        lines.append(
            f"| {' | '.join([result.case, *ratios, *times, f'{result.decoding / result.draws:.2f}', pixels])} |"
        )
    return "\n".join(lines) + "\n"


def picture(results: Sequence[Result], path: Path) -> None:
    """Where the milliseconds of an item go: one bar for the recipe and one for ours a case."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = list(dict.fromkeys(part for result in results for who in result.stages.values() for part in who))
    colors = dict(zip(parts, pyplot.get_cmap("tab20").colors, strict=False))
    figure, axes = pyplot.subplots(figsize=(10, 0.9 + 0.9 * len(results)), layout="constrained")
    labels = []
    for row, result in enumerate(results):
        for place, who in enumerate(("recipe", "ours")):
            y, left = 2.6 * row + place, 0.0
            labels.append((y, f"{result.case}: {who}"))
            for part, width in result.stages[who].items():
                axes.barh(y, width, left=left, color=colors[part])
                left += width
            axes.text(left, y, f" {left:.1f}", va="center")
        y = 2.6 * row
        axes.plot([result.decoding / result.draws] * 2, [y - 0.5, y + 1.5], color="black", linewidth=1.5)
    axes.set_yticks(*zip(*labels, strict=True))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a clip on one core; black line: decoding alone")
    axes.margins(x=0.08)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[part]) for part in parts]
    figure.legend(handles, parts, loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", help="configurations, or snippets of datasets.prepare")
    parser.add_argument("--videos", type=int, default=160, help="videos of a pass (default 160)")
    parser.add_argument("--repeats", type=int, default=5, help="passes that count (default 5)")
    parser.add_argument("--core", type=int, help="the core to measure on (default: the last that is allowed)")
    parser.add_argument(
        "--out", type=Path, default=Path("exp/bench_loader"), help="for table.md, result.json, stages.png"
    )
    options = parser.parse_args(argv)
    setup_logging(Process())
    if options.videos < BATCH or options.repeats < 1:
        logger.error("--videos must be at least %d and --repeats at least 1", BATCH)
        return 1
    torch.set_num_threads(1)
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if options.core is None else options.core})
        cases = [case for path in options.configs for case in cases_of(path)]
        results = [measure(case, options.videos, options.repeats) for case in cases]
        options.out.mkdir(parents=True, exist_ok=True)
    except (ConfigError, AnnotationError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    meta = run_info() | {"packages": {name: version(name) for name in PACKAGES}}
    record = {"meta": meta, "results": [asdict(result) for result in results]}
    (options.out / "result.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (options.out / "table.md").write_text(table(results), encoding="utf-8")
    picture(results, options.out / "stages.png")
    print(table(results), end="")
    logger.info("%s: table.md, result.json, stages.png", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
