"""Configuration -> data loaders, and the checks before any video is read.

sources = read_sources(config.data, ("train", "val"))      # optional: the lists alone, checked before all else
loader = train_loader(config.data, seed=config.seed, rank=0, world_size=1, source=sources["train"])
loader.set_epoch(epoch)
for batch in loader: ...   # what a batch holds: video_dataset.collate
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch.utils.data import Sampler

from configs.schema import ConfigError, DataConfig
from datasets.annotation import AnnotationError, few_shot, read_labels, read_list
from datasets.decoders import DecoderMissing, library
from datasets.list_doubts import list_doubts
from datasets.loader import VideoLoader
from datasets.mosi import MOTION_NAMES
from datasets.overlap import warn_of_trained_videos
from datasets.readers import FrameFolderReader, Reader, VideoReader
from datasets.registry import dataset_traits
from datasets.sampler import ShuffledSampler, StridedSampler
from datasets.sampling import ClipSampling
from datasets.transforms import (
    Crop,
    EvalTransform,
    MultiScaleCrop,
    RandomResizedCrop,
    RandomShortSideCrop,
    TrainTransform,
)
from datasets.video_dataset import EvalDataset, MosiDataset, PlainTrainDataset, TrainDataset, VideoSource, collate

Split = Literal["train", "val", "test"]
Sources = dict[Split, VideoSource]

logger = logging.getLogger("td4v")


def read_sources(data: DataConfig, splits: Sequence[Split]) -> Sources:
    """The videos of these splits, for the loaders below, so that bad rows are seen early and lists are read once.

    Raises:
        ConfigError, AnnotationError: as `train_loader`.
    """
    return {split: video_source(data, split) for split in splits}


def log_doubts(data: DataConfig, sources: Sources, names: Sequence[str] | None) -> None:
    """Warn where valid rows probably mean something else, and of validation videos that are trained on.

    Args:
        names: of the classes.
    """
    for split, source in sources.items():
        classes = data.listed_classes or 1 + max(record.label for record in source.records)
        names = names if data.task == "classify" else None
        doubts = list_doubts(source.records, data.modality, classes, names, trains=split == "train")
        for _, text in doubts:
            logger.warning("%s: %s", source.list_file, text)
    if (train := sources.get("train")) is not None and (val := sources.get("val")) is not None:
        warn_of_trained_videos(val, train.records, train.root, train.list_file)


def warn_of_training_list(tested: VideoSource, trained: DataConfig, list_file: str) -> int:
    """Warn of tested videos that stand in the training list of a checkpoint; returns how many do.

    Args:
        trained: its train_root is where the list's paths start. list_file: the list that the checkpoint was trained on.
    """
    try:
        records = read_list(list_file, trained.modality, trained.listed_classes)
    except AnnotationError:  # of rules that were others
        return 0
    return warn_of_trained_videos(tested, records, trained.train_root or "", list_file)


def train_loader(
    data: DataConfig,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    frames_per_segment: int = 1,
    source: VideoSource | None = None,
) -> VideoLoader:
    """Shuffled full batches of data.batch_size videos; call `loader.set_epoch(epoch)` before each epoch.

    Args:
        seed: the same in every process; processes differ by `rank`.
        frames_per_segment: f, the neighbouring frames that the model reads at each of the T sampled ones.
        source: the list, where it is read already (`read_sources`).

    Raises:
        ConfigError: a list or root is not set or not there, or data.rand_aug_policy is unknown.
        AnnotationError: a list with a bad row.
        ValueError: fewer videos than one batch in each process.
    """
    dataset = _training(data, _training_source(data, seed, source), seed, frames_per_segment)
    sampler = ShuffledSampler(len(dataset), data.batch_size, seed, rank, world_size)
    return _loader(data, dataset, sampler, data.batch_size, views=data.clips_per_video, seed=seed)


def listed_loader(
    data: DataConfig,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    frames_per_segment: int = 1,
    source: VideoSource | None = None,
) -> VideoLoader:
    """Every video that `train_loader` draws from, once over all processes, in order and as validation sees videos."""
    dataset = _evaluation(data, _training_source(data, seed, source), data.dense, frames_per_segment)
    return _eval_loader(data, dataset, seed, rank, world_size)


def val_loader(
    data: DataConfig,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    frames_per_segment: int = 1,
    source: VideoSource | None = None,
) -> VideoLoader:
    """Every video of data.val_list once over all processes, in order: one clip, one centre crop. Raises as above."""
    source = _with_reversed(data, source or video_source(data, "val"))
    dataset = _evaluation(data, source, data.dense, frames_per_segment)
    return _eval_loader(data, dataset, seed, rank, world_size)


def test_loader(
    data: DataConfig,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    crops: int = 1,
    clips: int = 1,
    dense: bool = False,
    frames_per_segment: int = 1,
    source: VideoSource | None = None,
) -> VideoLoader:
    """Every video of data.test_list (else data.val_list) once over all processes, as clips * crops views.

    A batch holds about data.batch_size views, so that many views need no more memory than few. Their sizes are those of
    data.test_size and data.test_scale.

    Raises:
        ConfigError, AnnotationError: as `train_loader`. ValueError: clips below 1, or crops other than 1, 3, 5, 10.
    """
    if clips < 1:
        raise ValueError(f"clips must be above 0, not {clips}")
    data = data.for_testing()
    source = _with_reversed(data, source or video_source(data, "test"))
    dataset = _evaluation(data, source, dense, frames_per_segment, crops, clips)
    return _eval_loader(data, dataset, seed, rank, world_size)


test_loader.__test__ = False  # not a test, whatever pytest makes of its name


def class_names(data: DataConfig) -> tuple[str, ...] | None:
    """The names in data.label_list by label, or None where there is no such file in the configuration.

    The motions of data.task: mosi have names of their own, and so have classes of reversed videos.
    """
    if data.task == "mosi":
        return MOTION_NAMES
    if data.label_list is None:
        return None
    names = read_labels(data.label_list, data.listed_classes)
    return (*names, *(f"{name}, reversed" for name in names)) if data.reversed_classes else names


def _training(
    data: DataConfig, source: VideoSource, seed: int, frames_per_segment: int
) -> TrainDataset | PlainTrainDataset | MosiDataset:
    traits = dataset_traits(data)
    sampling = _sampling(data, data.dense, frames_per_segment)
    if data.task == "mosi":
        return _motions(data, source, sampling, seed)
    if not data.augment:
        return PlainTrainDataset(source, sampling, _eval_transform(data, crops=1))
    pixels = data.with_pixel_statistics()
    try:
        transform = TrainTransform(
            data.input_size,
            _crop(data, traits.scale_size),
            rand_aug_policy=data.rand_aug_policy if data.rand_aug else None,
            rand_erase=data.rand_erase,
            flip=traits.flip,
            flip_pairs=traits.flip_pairs,
            gray_prob=traits.gray_prob,
            mean=pixels.mean,
            std=pixels.std,
        )
    except ValueError as error:
        raise ConfigError(f"data.rand_aug_policy: {error}") from None
    return TrainDataset(source, sampling, transform, seed, num_sample=data.num_sample, random_frames=data.random_shift)


def _crop(data: DataConfig, scale_size: int | tuple[int, int]) -> Crop:
    if data.crop == "multi_scale":
        return MultiScaleCrop(data.input_size, data.crop_scales)
    if data.crop == "random_short_side":
        return RandomShortSideCrop(data.input_size, data.short_side)
    return RandomResizedCrop(scale_size, data.crop_scale)


def _training_source(data: DataConfig, seed: int, source: VideoSource | None) -> VideoSource:
    source = source or video_source(data, "train")
    source = source if data.shot is None else replace(source, records=few_shot(source.records, data.shot, seed))
    return _with_reversed(data, source)


def _with_reversed(data: DataConfig, source: VideoSource) -> VideoSource:
    return source.with_reversed(data.listed_classes) if data.reversed_classes else source


def _motions(data: DataConfig, source: VideoSource, sampling: ClipSampling, seed: int | None) -> MosiDataset:
    return MosiDataset(
        source if seed is not None else source.with_motions(),
        sampling,
        input_size=data.input_size,
        scale_size=data.short_side_size,
        seed=seed,
        flip=data.flip is not False,
        static_mask=data.static_mask,
    )


def _evaluation(
    data: DataConfig,
    source: VideoSource,
    dense: bool,
    frames_per_segment: int,
    crops: int = 1,
    clips: int | None = None,
) -> EvalDataset | MosiDataset:
    if data.task == "mosi":
        if crops != 1 or clips not in (None, 1):
            raise ValueError(f"data.task: mosi is tested on one crop and one clip, not {crops} crops and {clips} clips")
        return _motions(data, source, _sampling(data, dense, frames_per_segment), seed=None)
    sampling = _sampling(data, dense, frames_per_segment)
    return EvalDataset(source, sampling, _eval_transform(data, crops), clips)


def _eval_transform(data: DataConfig, crops: int) -> EvalTransform:
    return EvalTransform(data.input_size, dataset_traits(data).scale_size, crops, data.eval_crop)


def _sampling(data: DataConfig, dense: bool, frames_per_segment: int) -> ClipSampling:
    return ClipSampling(
        num_segments=data.num_segments,
        style=data.sampling_style,
        dense=dense,
        frames_per_segment=frames_per_segment,
        interval=data.interval,
    )


def _eval_loader(
    data: DataConfig, dataset: EvalDataset | MosiDataset, seed: int, rank: int, world_size: int
) -> VideoLoader:
    views = dataset.transform.crops * (dataset.clips or 1) if isinstance(dataset, EvalDataset) else 1
    sampler = StridedSampler(len(dataset), rank, world_size)
    return _loader(data, dataset, sampler, max(1, data.batch_size // views), views=views, seed=seed)


def check_paths(data: DataConfig, split: Split) -> None:
    """Raise ConfigError if the list or root of a split is not set or does not exist; nothing is read."""
    root_key, root = list_or_root(data, split, "root")
    if not os.path.isdir(root):
        raise ConfigError(f"data.{root_key}: there is no folder {root}")
    list_key, list_file = list_or_root(data, split, "list")
    if not os.path.isfile(list_file):
        raise ConfigError(f"data.{list_key}: there is no file {list_file}")


def video_source(data: DataConfig, split: Split) -> VideoSource:
    check_paths(data, split)
    (list_key, list_file), (_, root) = (list_or_root(data, split, what) for what in ("list", "root"))
    return VideoSource(
        records=read_list(list_file, data.modality, data.listed_classes, f"data.{list_key}"),
        root=root,
        reader=build_reader(data),
        list_file=list_file,
        skip_errors=data.on_error == "skip",
    )


def build_reader(data: DataConfig) -> Reader:
    if data.modality == "RGB":
        return FrameFolderReader(data.image_tmpl, data.index_base, data.fps)
    try:
        library(data.decoder)  # in a worker, a missing one would be pages of text
    except DecoderMissing as error:
        raise ConfigError(str(error)) from None
    return VideoReader(data.decoder)


def list_or_root(data: DataConfig, split: str, what: Literal["list", "root"]) -> tuple[str, str]:
    """The key that names the list or root of a split, and its value; testing falls back to validation's."""
    keys = [f"{split}_{what}"] + ([f"val_{what}"] if split == "test" else [])
    for key in keys:
        if getattr(data, key):
            return key, getattr(data, key)
    raise ConfigError(f"data.{' or data.'.join(keys)}: is not set")


def _loader(
    data: DataConfig,
    dataset: TrainDataset | EvalDataset | MosiDataset,
    sampler: Sampler[tuple[int, int]],
    batch_size: int,
    views: int,
    seed: int,
) -> VideoLoader:
    clip_bytes = dataset.sampling.clip_frames * 3 * data.input_size**2
    if data.rand_erase and isinstance(dataset, TrainDataset):
        clip_bytes *= 4  # erasing gives float32
    return VideoLoader(
        dataset,
        sampler,
        batch_size,
        item_bytes=views * clip_bytes,
        collate=collate,
        workers=data.workers,
        pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
