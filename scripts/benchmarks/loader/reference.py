"""The field's usual recipe for a clip of frames, in plain code, as the benchmark's reference.

PIL decodes each frame at full size (decord each video), resizes it to a short side of 256, crops a random part and
resizes that to 224 x 224, flips, augments (timm's RandAugment rand-m7-n4-mstd0.5-inc1, one image after the other with the
same draw), stacks, converts to floats and normalises, all in the worker.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch.utils.data import Dataset

from configs.schema import DataConfig
from datasets.box import Box
from datasets.seeding import seeded
from datasets.transforms import Draw
from datasets.video_dataset import TrainDataset


class Stages:
    """Seconds spent in each named part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def milliseconds(self, clips: int) -> dict[str, float]:
        """Of one clip."""
        return {name: 1000 * seconds / clips for name, seconds in self.seconds.items()}


class Reference(Dataset):
    """The recipe for the clips of a TrainDataset: the same frames of the same videos.

    Args:
        augments_whole: RandAugment sees complete frames, as in the code that the paper builds on, not the crop.
    """

    def __init__(self, dataset: TrainDataset, data: DataConfig, augments_whole: bool = False):
        self.dataset, self.data, self.augments_whole = dataset, data.with_pixel_statistics(), augments_whole
        fill = tuple(round(255 * value) for value in self.data.mean)
        hparams = {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        self.augment = rand_augment_transform(data.rand_aug_policy, hparams) if data.rand_aug else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self.read(key, Stages())

    def read(self, key: tuple[int, int], stage: Stages) -> dict[str, Any]:
        """data.num_sample draws of one clip: video (draws, T * 3, 224, 224) float32, label (draws,)."""
        with stage("read and decode"):
            images = self.images(key)
        videos = [self.draw(images, stage) for _ in range(self.data.num_sample)]
        label = torch.full((len(videos),), self.dataset.source.records[key[1]].label)
        return {"video": torch.stack(videos) if len(videos) > 1 else videos[0][None], "label": label}

    def draw(self, images: list[Image.Image], stage: Stages) -> torch.Tensor:
        """One draw: (T * 3, 224, 224) float32."""
        if self.augment and self.augments_whole:
            with stage("RandAugment"):
                images = self.each_augmented(images)
        with stage("resize"):
            width, height = images[0].size
            scale = self.data.scale_size / min(width, height)
            size = (int(width * scale), int(height * scale))
            images = [image.resize(size, Image.Resampling.BICUBIC) for image in images]
        with stage("crop"):
            left, top, width, height = self.random_crop(*size)
            box = (left, top, left + width, top + height)
            side = (self.data.input_size,) * 2
            images = [image.crop(box).resize(side, Image.Resampling.BILINEAR) for image in images]
        with stage("flip"):
            if random.random() < 0.5:
                images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        if self.augment and not self.augments_whole:
            with stage("RandAugment"):
                images = self.each_augmented(images)
        with stage("stack"):
            stacked = np.concatenate([np.asarray(image) for image in images], axis=2)  # (224, 224, T * 3)
        with stage("float"):
            video = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)
        with stage("normalise"):
            clip = video.view(len(images), 3, *video.shape[1:])  # (T, 3, 224, 224)
            clip.sub_(torch.tensor(self.data.mean).view(3, 1, 1)).div_(torch.tensor(self.data.std).view(3, 1, 1))
        return video

    def images(self, key: tuple[int, int]) -> list[Image.Image]:
        """The frames that the dataset takes for this key."""
        epoch, index = key
        record = self.dataset.source.records[index]
        path = os.path.join(self.dataset.source.root, record.path)
        if self.data.modality == "video":
            import decord  # here, because PyAV's libraries must be loaded before its own

            video = decord.VideoReader(path, num_threads=1)
            frames = video.get_batch(
                self.dataset.frame_indices(record.num_frames or len(video), epoch, index)[0]
            ).asnumpy()
            return [Image.fromarray(frame) for frame in frames]
        wanted = self.dataset.frame_indices(record.num_frames, epoch, index)[0]
        files = [os.path.join(path, self.data.image_tmpl.format(frame + self.data.index_base)) for frame in wanted]
        return [Image.open(file).convert("RGB") for file in files]

    def each_augmented(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The same draw for every image."""
        states, augmented = (random.getstate(), np.random.get_state()), []
        for image in images:
            random.setstate(states[0])
            np.random.set_state(states[1])
            augmented.append(self.augment(image))
        return augmented

    def random_crop(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of a part of the image with uniform area and aspect ratio."""
        for _ in range(10):
            area, ratio = random.uniform(*self.data.crop_scale) * width * height, random.uniform(3 / 4, 4 / 3)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if random.random() < 0.5:
                w, h = h, w
            if w <= width and h <= height:
                break
        else:
            w = h = min(width, height)
        return random.randint(0, width - w), random.randint(0, height - h), w, h

    def with_our_draw(self, key: tuple[int, int]) -> np.ndarray:
        """The dataset's own draw for this key (crop, flip, RandAugment) carried out by PIL: (T, 224, 224, 3) uint8."""
        epoch, index = key
        images = self.images(key)
        width, height = images[0].size
        with seeded(self.dataset.seed, epoch, index, 0):
            if self.augment:
                np.random.seed(random.getrandbits(32))
                images = self.each_augmented(images)
        with seeded(self.dataset.seed, epoch, index, 0):
            draw: Draw = self.dataset.transform.draw(height, width)
        crop: Box = draw.boxes[-1]
        scale = self.data.scale_size / min(width, height)
        size = (int(width * scale), int(height * scale))
        box = tuple(round(edge * scale) for edge in (crop.left, crop.top, crop.right, crop.bottom))
        side = (self.data.input_size,) * 2
        images = [image.resize(size, Image.Resampling.BICUBIC).crop(box) for image in images]
        images = [image.resize(side, Image.Resampling.BILINEAR) for image in images]
        if draw.flip:
            images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        return np.stack([np.asarray(image) for image in images])
