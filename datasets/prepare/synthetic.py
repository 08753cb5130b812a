"""Draws a small dataset of frame folders whose four classes differ only in the order of the frames.

    python -m datasets.prepare.synthetic --out data/frame_order

A scene is a still coloured background with one to three bright shapes, which travel along a horizontal torus. It is
drawn at the eight offsets k * W/8, k = 0..7, as eight JPEGs. Class c shows them in the order (phase + step * t) mod 8,
t = 0..7, with step 1, 3, 5 or 7: right slow, right fast, left fast, left slow. Every scene is written once a class, with
independently drawn phases. So the four videos of a scene hold the same eight files, and whatever ignores the order of
frames (one frame, their average, their set) has an accuracy of exactly 1/4 by construction.

Training needs two settings. A horizontal flip exchanges the classes: use `flip: false`, or `flip_pairs` as in FLIP_PAIRS.
The steps survive only if all eight frames are used: `num_segments: 8`, and `random_shift: false` or `style: something`.

    DIR/frames/<train|val>/<video>/000001.jpg ... 000008.jpg     root of both lists: DIR/frames
    DIR/train.txt  DIR/val.txt   rows `<split>/<video> 8 label`
    DIR/labels.csv  DIR/dataset.json (the arguments)
"""

from __future__ import annotations

import colorsys
import io
import json
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.console import Parser, log_to_console
from datasets.prepare.output_dir import write_labels, write_rows, write_text
from datasets.prepare.plan import PrepareError

FRAMES = 8  # of a video; also the positions on the torus
STEPS = (1, 3, 5, 7)  # positions travelled a frame, by label; 5 and 7 are -3 and -1 mod 8
CLASSES = ("right slow", "right fast", "left fast", "left slow")
FLIP_PAIRS = ((0, 3), (1, 2))  # labels that a horizontal flip exchanges
JPEG_QUALITY = 90
SUPERSAMPLING = 4  # shapes are drawn this many times larger, for smooth edges

logger = logging.getLogger("td4v")


def draw_scene(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw one scene at its eight positions on the torus.

    Args:
        rng: determines the scene.
        size: height and width in pixels, a multiple of 8.

    Returns:
        uint8 (8, size, size, 3), RGB. In image k every shape is k * size / 8 pixels right of its position in image 0,
        modulo size. No two images are equal: the shapes of a scene differ in hue and each has a horizontal band.
    """
    coarse = Image.fromarray(rng.integers(10, 130, (5, 5, 3), dtype=np.uint8))
    background = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    colour = np.zeros((size, size, 3), np.float32)
    opacity = np.zeros((size, size, 1), np.float32)
    count = int(rng.integers(1, 4))
    first_hue = rng.random()
    for index in range(count):
        shape = _draw_shape(rng, size, centre_y=(index + rng.uniform(0.4, 0.6)) / count)
        hue = first_hue + (index + rng.uniform(-0.2, 0.2)) / count
        rgb = np.multiply(255, colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.6, 1), 1), dtype=np.float32)
        colour = np.where(shape > 0, rgb, colour)
        opacity = np.maximum(opacity, shape)
    images = []
    for position in range(FRAMES):
        shift = position * size // FRAMES
        alpha = np.roll(opacity, shift, axis=1)
        images.append(background * (1 - alpha) + np.roll(colour, shift, axis=1) * alpha)
    return np.stack(images).round().astype(np.uint8)  # (8, H, W, 3)


def _draw_shape(rng: np.random.Generator, size: int, centre_y: float) -> np.ndarray:
    """One filled shape at a random column of the torus: its opacity (size, size, 1), float32 in 0..1."""
    canvas = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    x, y = canvas.width / 2, centre_y * canvas.height
    radius = rng.uniform(0.09, 0.13) * canvas.width
    sides = int(rng.choice((0, 3, 4, 6)))
    if sides == 0:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        pen.regular_polygon((x, y, radius * 1.2), sides, rotation=int(rng.integers(360)), fill=255)
    opacity = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32)[..., None] / 255  # (H, W, 1)
    return np.roll(opacity, int(rng.integers(size)), axis=1)


def make(out: Path, train: int = 256, val: int = 128, seed: int = 0, size: int = 64) -> bool:
    """Write the dataset under a temporary name beside `out`, then rename it.

    Args:
        out: folder to make; missing, empty, or the finished output of the same arguments.
        train, val: videos of each split, four a scene.
        seed: of the scenes and phases; no scene depends on the number of others.
        size: height and width in pixels.

    Returns:
        False if the finished output existed already, else True.

    Raises:
        PrepareError: an argument is out of range, or `out` holds something else.
        OSError: the folder cannot be written.
    """
    for name, videos in (("--train", train), ("--val", val)):
        if videos < 4 or videos % 4:
            raise PrepareError(
                f"{name} must be a positive multiple of 4 (a scene is written once a class), not {videos}"
            )
    if size < 32 or size % FRAMES:
        raise PrepareError(f"--size must be a multiple of {FRAMES} and at least 32, not {size}")
    if seed < 0:
        raise PrepareError(f"--seed must not be negative, not {seed}")
    arguments = {"maker": "datasets.prepare.synthetic", "train": train, "val": val, "seed": seed, "size": size}
    if _is_finished(out, arguments):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        build = Path(scratch) / "dataset"
        build.mkdir()
        for stream, (split, videos) in enumerate((("train", train), ("val", val))):
            rows = []
            for scene in range(videos // len(CLASSES)):
                rows += _write_scene(build / "frames", split, scene, np.random.default_rng((seed, stream, scene)), size)
            write_rows(build / f"{split}.txt", rows)
        write_labels(build / "labels.csv", CLASSES)
        write_text(build / "dataset.json", json.dumps(arguments, indent=2) + "\n")
        os.replace(build, out)
    return True


def _is_finished(out: Path, arguments: dict[str, object]) -> bool:
    """Whether `out` holds the output of these arguments. Raises PrepareError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        existing = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        existing = None
    if not isinstance(existing, dict) or existing.get("maker") != arguments["maker"]:
        raise PrepareError(f"{out} is not empty and was not made by this command; choose another --out")
    if existing != arguments:
        changed = [f"--{key} {existing.get(key)}" for key in arguments if existing.get(key) != arguments[key]]
        raise PrepareError(f"{out} was made with {', '.join(changed)}; remove it or choose another --out")
    return True


def _write_scene(root: Path, split: str, scene: int, rng: np.random.Generator, size: int) -> list[tuple[str, int, int]]:
    """Write a scene's four videos below root / split and return their list rows."""
    jpegs = []
    for image in draw_scene(rng, size):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
        jpegs.append(buffer.getvalue())
    rows = []
    for label, step in enumerate(STEPS):
        video = f"{split}/scene{scene:04d}_{CLASSES[label].replace(' ', '_')}"
        folder = root / video
        folder.mkdir(parents=True)
        phase = int(rng.integers(FRAMES))
        for time in range(FRAMES):
            (folder / f"{time + 1:06d}.jpg").write_bytes(jpegs[(phase + step * time) % FRAMES])
        rows.append((video, FRAMES, label))
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(prog="python -m datasets.prepare.synthetic", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=256, help="training videos, four a scene (default: 256)")
    parser.add_argument("--val", type=int, default=128, help="validation videos, four a scene (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels (default: 64)")
    options = parser.parse_args(argv)
    log_to_console()
    try:
        made = make(**vars(options))
    except (PrepareError, OSError) as error:
        logger.error("%s", error)
        return 1
    logger.info("%s: %d + %d videos%s", options.out, options.train, options.val, "" if made else ", already there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
