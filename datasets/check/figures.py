"""Two figures: frames as the model will see them (the contact sheet), and class balance with video lengths.

The items of the contact sheet come from the datasets of the training and evaluation loaders. T frames make a row; S is
the side of a frame in pixels, V the number of views of a video.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from configs.schema import DataConfig
from datasets.build import test_loader, train_loader, val_loader
from datasets.check.lists import CheckedList
from datasets.mosi import MOTION_NAMES
from datasets.video_dataset import BadVideo

MAX_WIDTH = 2900  # pixels of the contact sheet
SIDES = (96, 176)  # smallest and largest side of a frame on the sheet, pixels
MAX_TRIES = 30  # videos that are tried for each one shown
MAX_NAMED_CLASSES = 60  # with more the plot shows no names
CROP_NAMES = {
    1: ("centre",),
    3: ("left / top", "right / bottom", "centre"),
    5: ("top left", "top right", "bottom left", "bottom right", "centre"),
}
INK, PALE, PAPER, BAND = (20, 20, 20), (105, 105, 105), (255, 255, 255), (228, 234, 242)


@dataclass(frozen=True)
class SheetRow:
    """One view of a video."""

    name: str
    frames: np.ndarray  # (T, S, S, 3) uint8
    numbers: tuple[int, ...]  # of the frames, from 1


@dataclass(frozen=True)
class SheetBlock:
    """The views of one video."""

    title: str
    rows: tuple[SheetRow, ...]


def contact_sheet(
    data: DataConfig, seed: int, names: Sequence[str] | None, path: Path, videos: int, crops: int, clips: int
) -> dict[str, str]:
    """Draw `videos` training videos (all draws), as many of validation, and one of testing (clips * crops views).

    Videos that cannot be read are skipped. No file is written if nothing can be drawn.

    Returns:
        The parts (training, validation, testing) that are missing, each with a reason.

    Raises:
        OSError: `path` cannot be written.
    """
    alone = replace(data, workers=0, batch_size=1)
    drawn = [f"draw {draw + 1}" for draw in range(data.num_sample)] if data.task == "classify" else MOTION_NAMES
    crop_names = CROP_NAMES.get(crops) or (*CROP_NAMES[5], *(f"{name}, mirrored" for name in CROP_NAMES[5]))
    views = [f"clip {clip + 1}: {crop}" for clip in range(clips) for crop in crop_names]
    if data.task == "mosi":
        crops, clips, views = 1, 1, ["centre"]
    parts = {
        "training": (lambda: train_loader(alone, seed), drawn, videos, seed),
        "validation": (lambda: val_loader(alone, seed), ["centre"], videos, seed),
        "testing": (lambda: test_loader(alone, seed, crops=crops, clips=clips), views, 1, seed + 1),
    }
    blocks, missing = [], {}
    for part, (loader, row_names, count, part_seed) in parts.items():
        try:
            dataset = loader().dataset
        except ValueError as error:  # also AnnotationError, ConfigError
            missing[part] = str(error)
            continue
        part_blocks = _make_blocks(
            dataset, part=part, row_names=row_names, data=data, names=names, count=count, seed=part_seed
        )
        blocks += part_blocks
        if not part_blocks:
            missing[part] = "none of the videos that were tried can be read"
    if blocks:
        _draw(blocks, data).save(path)
    return missing


def to_pixels(video: torch.Tensor, data: DataConfig) -> np.ndarray:
    """(..., S, S, 3) uint8 pixels, or float normalised by data.mean and data.std -> (..., S, S, 3) uint8."""
    if video.is_floating_point():
        data = data.with_pixel_statistics()
        mean, std = torch.tensor(data.mean), torch.tensor(data.std)
        video = ((video.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return video.numpy()


def _make_blocks(
    dataset: Dataset,
    part: str,
    row_names: Sequence[str],
    data: DataConfig,
    names: Sequence[str] | None,
    count: int,
    seed: int,
) -> list[SheetBlock]:
    """`count` videos, of different classes if possible, in an order that depends on `seed` alone."""
    records = dataset.source.records
    order = np.random.default_rng(seed).permutation(len(records)).tolist()
    first_of_class = {records[index].label: index for index in reversed(order)}
    order.sort(key=lambda index: first_of_class[records[index].label] != index)  # stable: new classes before others
    blocks = []
    for index in order[: count * MAX_TRIES]:
        if len(blocks) == count:
            break
        item = dataset[(0, index)]
        if isinstance(item, BadVideo):
            continue
        record = records[index]
        numbers = frame_numbers(dataset, index)
        videos = to_pixels(item["video"], data)  # (V, T, S, S, 3)
        labels = item["label"].reshape(-1).tolist()
        labels = labels if len(labels) == len(row_names) else labels * len(row_names)
        rows = []
        for view, (row_name, label) in enumerate(zip(row_names, labels, strict=True)):
            changed = "" if label == record.label else f"\nnow class {label}"
            clip = view * len(numbers) // len(row_names)  # training draws share one clip; test views are clip by clip
            rows.append(SheetRow(row_name + changed, videos[view], numbers[clip]))
        name = f" ({names[record.label]})" if names and record.label < len(names) else ""
        title = f"{part}: {record.path}, class {record.label}{name}, line {record.line}"
        blocks.append(SheetBlock(title, tuple(rows)))
    return blocks


def frame_numbers(dataset: Dataset, index: int) -> list[tuple[int, ...]]:
    """The numbers, from 1, of the frames in each clip of item (0, index) of a loader's dataset."""
    source = dataset.source
    record = source.records[index]
    clip = source.reader.open(os.path.join(source.root, record.path), record.num_frames)
    clips = dataset.clip_indices(clip, 0, index)  # (clips, T * f)
    return [tuple((frames + 1).tolist()) for frames in clips]


def _draw(blocks: Sequence[SheetBlock], data: DataConfig) -> Image.Image:
    gap, margin = 4, 12
    small, large = _font(13), _font(17)
    label_width = 20 + max(_width(line, small) for b in blocks for row in b.rows for line in row.name.split("\n"))
    T = data.num_segments
    fitting = (MAX_WIDTH - 2 * margin - label_width) // T - gap
    side = max(1, min(max(SIDES[0], min(data.input_size, SIDES[1])), fitting))
    numbered = side >= 2 + max(_width(str(n), small) for b in blocks for row in b.rows for n in row.numbers)
    caption, title_height = 18 if numbered else 0, 30
    width = max(2 * margin + label_width + T * (side + gap), 900)
    heading = f"{data.dataset}: what the model sees, T = {T}, {data.input_size} x {data.input_size} pixels"
    heading += "; below each frame its number, from 1" if numbered else ""
    height = 2 * margin + title_height + sum(title_height + 8 + len(b.rows) * (side + caption + gap) for b in blocks)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, margin), heading, PALE, large)
    y = margin + title_height
    for block in blocks:
        pen.rectangle((0, y, width, y + title_height - 6), fill=BAND)
        pen.text((margin, y + 2), _shorten(block.title, large, width - 2 * margin), INK, large)
        y += title_height
        for row in block.rows:
            pen.multiline_text((margin, y + side // 2 - 8), row.name, INK, small, spacing=3)
            for t, frame in enumerate(row.frames):
                x = margin + label_width + t * (side + gap)
                image = Image.fromarray(frame)
                if image.size != (side, side):
                    image = image.resize((side, side), Image.Resampling.BICUBIC)
                sheet.paste(image, (x, y))
                if numbered:
                    pen.text(
                        (x + side // 2, y + side + 1), str(row.numbers[t % len(row.numbers)]), PALE, small, anchor="ma"
                    )
            y += side + caption + gap
        y += 8
    return sheet


def plot_balance(lists: Sequence[CheckedList], data: DataConfig, names: Sequence[str] | None, path: Path) -> None:
    """Plot the videos of each class, the most frequent of the first list at the top, and the lengths of the videos."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    named = data.num_classes <= MAX_NAMED_CLASSES
    height = max(4.0, 0.19 * data.num_classes + 1) if named else 5.0
    figure = Figure(figsize=(13, height), layout="constrained")
    FigureCanvasAgg(figure)
    classes, lengths = figure.subplots(1, 2, width_ratios=(3, 2))
    counts = [checked.class_counts(data.num_classes) for checked in lists]
    order = sorted(range(data.num_classes), key=lambda label: (-counts[0][label], label))
    thickness = 0.8 / len(lists)
    longest = max((result.frames or 0 for checked in lists for result in checked.results), default=0)
    bins = np.arange(0, longest + 2, max(1, math.ceil((longest + 1) / 60))).tolist()  # whole frames
    bins.append(bins[-1] + longest // 60 + 1)
    for number, (checked, of_class) in enumerate(zip(lists, counts, strict=True)):
        colour = f"C{number}"
        values = [of_class[label] for label in order]
        if named:
            tops = [rank + number * thickness for rank in range(len(order))]
            classes.barh(tops, values, height=thickness, align="edge", color=colour)
        else:
            classes.step(range(len(order)), values, where="mid", color=colour)
        frames = [result.frames for result in checked.results if result.frames]
        lengths.hist(frames, bins=bins, histtype="step", linewidth=1.6, color=colour, label=checked.split)
    if named:
        texts = [f"{label} {names[label]}" if names else str(label) for label in order]
        classes.set_yticks([rank + 0.4 for rank in range(len(order))], [_cut(t, 34) for t in texts], fontsize=8)
        classes.set_ylim(len(order), -0.3)
        classes.set_xlabel("videos")
        classes.xaxis.get_major_locator().set_params(integer=True)
    else:
        classes.set_xlabel(f"classes, the most frequent of {lists[0].split} first")
        classes.set_ylabel("videos")
        classes.set_yscale("symlog", linthresh=1)  # shows a class with thousands beside one with none
        classes.yaxis.set_major_formatter("{x:g}")
        classes.set_ylim(bottom=0)
    classes.set_title("Videos a class")
    lengths.set_title("Length of the videos")
    lengths.set_xlabel("frames")
    lengths.set_ylabel("videos")
    lengths.axvline(data.num_segments, color="0.4", linestyle=":", label=f"T = {data.num_segments}")
    figure.legend(*lengths.get_legend_handles_labels(), loc="outside lower center", ncols=len(lists) + 1)
    figure.savefig(path, dpi=100)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows most alphabets."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return math.ceil(font.getlength(text))


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Omit the middle of a text that is too wide."""
    keep = len(text)
    shown = text
    while _width(shown, font) > width and keep > 10:
        keep -= 4
        shown = f"{text[: keep // 2]} ... {text[-(keep // 2) :]}"
    return shown


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
