"""Measures how much faster clips are read than by the field's usual recipe, on one core.

    python -m scripts.benchmarks.loader CONFIG [CONFIG ...] [--videos 160] [--repeats 5] [--core N] [--out DIR]

A CONFIG is a configuration, or the config_snippet.yaml of datasets.prepare, of frame folders or of videos. Its training
list is read, 8 frames a clip, at 224 pixels out of 256. The recipe (reference.py) and the project's loader read the same
frames of the same videos, in turn, on the same core, with one thread. Each is measured in two ways:

    loader   a DataLoader with one worker, batches of 8: what training waits for
    item     one clip in this process, without the transfer from the worker: the work of a core

The project's clips end as uint8 pixels; the recipe normalises in the worker. A ratio is of one repeat; median, lowest and
highest are shown, and also where an item's time goes, the time of decoding alone, and how far the pixels of the same
random draw are from the recipe's.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import Parser, expanded, show
from common.tables import markdown_table
from scripts.cli import positive_int, run, write_json, write_text
from scripts.reports import spread

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from configs.schema import DataConfig
    from datasets.video_dataset import TrainDataset
    from scripts.benchmarks.loader.reference import Reference

logger = logging.getLogger("td4v")

BATCH = 8
SEED = 0
SEGMENTS, INPUT_SIZE, SCALE_SIZE = 8, 224, 256
WAYS = ("loader", "item")
READERS = ("recipe", "ours")
PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "opencv-python-headless", "av", "numpy", "timm")
Key = tuple[int, int]  # epoch, index


@dataclass(frozen=True)
class Case:
    """One line of the table. `augments_whole`: the recipe augments frames before it crops them."""

    name: str
    data: DataConfig
    augments_whole: bool = False


@dataclass(frozen=True)
class Result:
    """The measurements of one case.

    Args:
        times: way -> "recipe" or "ours" -> milliseconds a clip of each repeat.
        stages: "recipe" or "ours" -> stage -> milliseconds a clip.
        decoding: milliseconds a video of decoding the frames alone with our decoder, files in memory.
        pixels: how far our pixels are from the same draw carried out by PIL, in 255ths; None if the recipe augments
            the crop, which ours never does.
    """

    case: str
    videos: int
    draws: int
    times: dict[str, dict[str, list[float]]]
    stages: dict[str, dict[str, float]]
    decoding: float
    pixels: dict[str, float] | None

    def ratios(self, way: str) -> list[float]:
        """Recipe over ours, of each repeat."""
        return [recipe / ours for recipe, ours in zip(*(self.times[way][who] for who in READERS), strict=True)]


def cases_of(path: str) -> Iterator[Case]:
    """All ways of reading that a configuration can be measured in."""
    from configs.schema import ConfigError, load_config
    from datasets.decoders import DecoderMissing, library

    data = replace(
        load_config(path).data,
        batch_size=BATCH,
        workers=1,
        num_sample=1,
        num_segments=SEGMENTS,
        input_size=INPUT_SIZE,
        scale_size=SCALE_SIZE,
        crop_scale=(0.08, 1.0),
        random_shift=True,
        dense=False,
        flip=True,
        flip_pairs=None,
        gray_prob=0.0,
        rand_aug=False,
        rand_erase=False,
        style="kinetics",
        shot=None,
    )
    if data.modality == "video":
        try:
            library("decord")
        except DecoderMissing as error:
            raise ConfigError(f"{path}: the recipe reads video files with decord ({error})") from None
        for decoder in ("pyav", "decord"):
            yield Case(f"video files by {decoder}", replace(data, decoder=decoder))
        return
    yield Case("frames", data)
    yield Case("frames, two draws a video", replace(data, num_sample=2))
    yield Case("frames, RandAugment", replace(data, rand_aug=True))
    yield Case("frames, RandAugment before the crop", replace(data, rand_aug=True), augments_whole=True)


def measure(case: Case, videos: int, repeats: int) -> Result:
    """Read the same clips by the recipe and by the project's loader, `repeats` times in turn."""
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from datasets.build import train_loader
    from datasets.loader import PREFETCH, VideoLoader
    from datasets.video_dataset import BadVideo, collate
    from scripts.benchmarks.loader.reference import Reference, Stages

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
    times: dict[str, dict[str, list[float]]] = {way: {who: [] for who in READERS} for way in WAYS}
    for repeat in tqdm(range(repeats + 1), desc=case.name, disable=None):
        for who in READERS:
            found = {"loader": _time_pass(loaders[who]), "item": _time_items(items[who], order) / draws}
            for way in WAYS if repeat else ():  # the first repeat warms up
                times[way][who].append(found[way])
    stages = Stages()
    for key in order:
        reference.read(key, stages)
    comparable = case.augments_whole or not case.data.rand_aug
    return Result(
        case=case.name,
        videos=videos,
        draws=draws,
        times=times,
        stages={"recipe": stages.milliseconds(videos * draws), "ours": _our_stages(dataset, order)},
        decoding=_decoding(dataset, order),
        pixels=_pixel_differences(dataset, reference, order[: 4 * BATCH]) if comparable else None,
    )


def _time_pass(loader: DataLoader) -> float:
    """Milliseconds a clip of one pass; from the second pass on the worker exists already."""
    start, seen = time.perf_counter(), 0
    for batch in loader:
        seen += batch["label"].numel()
    return 1000 * (time.perf_counter() - start) / seen


def _time_items(item: Callable[[Key], Any], order: Sequence[Key]) -> float:
    """Milliseconds of one item."""
    start = time.perf_counter()
    for key in order:
        item(key)
    return 1000 * (time.perf_counter() - start) / len(order)


def _our_stages(dataset: TrainDataset, order: Sequence[Key]) -> dict[str, float]:
    """Milliseconds a clip of what TrainDataset does; `rest` is the remainder of a complete item."""
    from datasets.box import Box
    from datasets.seeding import seeded
    from scripts.benchmarks.loader.reference import Stages

    stage, transform = Stages(), dataset.transform
    for epoch, index in order:
        record = dataset.source.records[index]
        with stage("read and decode"):
            clip = dataset.source.reader.open(os.path.join(dataset.source.root, record.path), record.num_frames)
            frames = transform.shrink(clip.fetch(dataset.clip_indices(clip, epoch, index)[0]))
        draws = []
        for number in range(dataset.num_sample):
            with stage("draw"), seeded(dataset.seed, epoch, index, number):
                draws.append(transform.draw(frames.height, frames.width))
        origin = reduce(Box.joined, [draw.needs for draw in draws])
        with stage("read and decode"):
            pixels = frames.decode(origin, fast=True)
        with stage("augment, crop, flip"):
            for draw in draws:
                transform(pixels, origin, draw, record.label)
    found = stage.milliseconds(len(order) * dataset.num_sample)
    item = _time_items(dataset.__getitem__, order) / dataset.num_sample
    return found | {"rest": max(0.0, item - sum(found.values()))}


def _decoding(dataset: TrainDataset, order: Sequence[Key]) -> float:
    """Milliseconds a video of decoding alone: complete images from memory, or videos from the file."""
    from datasets.jpeg import decode

    seconds = 0.0
    for epoch, index in order:
        record = dataset.source.records[index]
        start = time.perf_counter()
        clip = dataset.source.reader.open(os.path.join(dataset.source.root, record.path), record.num_frames)
        wanted = dataset.clip_indices(clip, epoch, index)[0]
        if hasattr(clip, "load"):
            files = [clip.load(frame)[1] for frame in wanted.tolist()]
            start = time.perf_counter()
            for file in files:
                decode(file)
        else:
            clip.read(wanted)
        seconds += time.perf_counter() - start
    return 1000 * seconds / len(order)


def _pixel_differences(dataset: TrainDataset, reference: Reference, order: Sequence[Key]) -> dict[str, float]:
    """How far our pixels are from PIL's for the same draw."""
    import numpy as np

    from datasets.video_dataset import BadVideo

    differences = []
    for key in order:
        item = dataset[key]
        if isinstance(item, BadVideo):
            raise ValueError(item.message)
        ours = item["video"][0].numpy().astype(int)  # (T, 224, 224, 3)
        differences.append(np.abs(ours - reference.with_our_draw(key)))
    found = np.stack(differences)
    return {"mean": float(found.mean()), "99 %": float(np.percentile(found, 99)), "highest": float(found.max())}


def table(results: Sequence[Result]) -> str:
    """Markdown: ratios with their spread, then milliseconds."""
    columns = ["read from"]
    columns += [f"recipe / ours, {way}" for way in WAYS] + [f"recipe, ours: ms a clip, {way}" for way in WAYS]
    columns += ["decoding alone", "pixels off by: mean, 99 %, highest"]
    rows = []
    for result in results:
        medians = [[statistics.median(result.times[way][who]) for who in READERS] for way in WAYS]
        rows.append(
            [
                result.case,
                *(spread(result.ratios(way), 2) for way in WAYS),
                *("{:.2f}, {:.2f}".format(*both) for both in medians),
                f"{result.decoding / result.draws:.2f}",
                "{mean:.2f}, {99 %:.0f}, {highest:.0f}".format(**result.pixels) if result.pixels else None,
            ]
        )
    return markdown_table(columns, rows)


def draw(results: Sequence[Result], path: Path) -> None:
    """A bar a case for the recipe and one for ours: where the milliseconds of an item go."""
    from matplotlib.figure import Figure

    from scripts.figures import bar_panel, bar_styles, legend_below, save

    parts = list(dict.fromkeys(part for result in results for who in READERS for part in result.stages[who]))
    colors = dict(zip(parts, bar_styles(len(parts)), strict=True))
    figure = Figure(figsize=(10, 1.5 + 0.8 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    bar_panel(axes, [f"{result.case}: {who}" for result in results for who in READERS], "time of an item on one core")
    for index, result in enumerate(results):
        for row, who in enumerate(READERS, start=2 * index):
            left = 0.0
            for part, width in result.stages[who].items():
                axes.barh(row, width, left=left, **colors[part])
                left += width
            axes.text(left, row, f" {left:.1f}", va="center", fontsize=9)
        decoding = result.decoding / result.draws
        axes.plot([decoding, decoding], [2 * index - 0.4, 2 * index + 1.4], color="black", linewidth=1.5)
    axes.set_xlabel("milliseconds a clip; black line: decoding alone")
    axes.margins(x=0.08)
    legend_below(figure, [axes.barh(0, 0, **colors[part]) for part in parts], parts)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(prog="python -m scripts.benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument(
        "configs", type=expanded, nargs="+", metavar="CONFIG", help="configurations, or snippets of datasets.prepare"
    )
    parser.add_argument("--videos", type=positive_int, default=160, help="videos of a pass (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="passes that count (default: %(default)s)")
    parser.add_argument("--core", type=int, help="the core to measure on (default: the last that is allowed)")
    parser.add_argument("--out", type=Path, default=Path("exp/bench_loader"), metavar="FOLDER",
                        help="for table.md, result.json and stages.png (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.videos < BATCH:
        parser.error(f"--videos must be at least {BATCH}")
    from engine.distributed import Process  # here, as all that imports torch, so that --help is quick
    from engine.log import setup_logging

    setup_logging(Process())
    return run(lambda: benchmark(options))


def benchmark(options: argparse.Namespace) -> None:
    """Measure all cases, and write the table, the numbers and the figure."""
    import torch

    from engine.run_info import run_info

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if options.core is None else options.core})
    cases = [case for path in options.configs for case in cases_of(path)]
    results = [measure(case, options.videos, options.repeats) for case in cases]
    options.out.mkdir(parents=True, exist_ok=True)
    meta = run_info() | {"packages": {name: version(name) for name in PACKAGES}}
    write_json(options.out / "result.json", {"meta": meta, "results": [asdict(result) for result in results]})
    write_text(options.out / "table.md", table(results))
    draw(results, options.out / "stages.png")
    show(table(results))
    logger.info("%s: table.md, result.json, stages.png", options.out)
