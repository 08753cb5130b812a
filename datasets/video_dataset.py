"""Row of a list -> item -> batch: the map-style datasets, what happens to a video that cannot be read, and `collate`.

B is the number of videos in a batch, V of views of a video, T * f of frames in a clip, S the side of a frame in pixels.
Pixels are (..., T * f, S, S, 3) from the decoder to the batch of `collate`; the loader moves the channels once, to
(..., T * f, 3, S, S). They stay uint8, a quarter of the bytes, until they are on the model's device.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from datasets import mosi
from datasets.annotation import VideoRecord
from datasets.box import Box
from datasets.decoders import DecodeError, DecoderMissing
from datasets.loader import INDEX, SharedBuffers, Slot, too_many_files
from datasets.readers import Clip, Frames, Reader, ReadError
from datasets.sampling import ClipSampling
from datasets.seeding import seeded
from datasets.transforms import EvalTransform, TrainTransform, picture


@dataclass(frozen=True)
class VideoSource:
    """Where the videos of a list are and how they are read.

    Args:
        records: the rows of the list.
        root: the folder that their paths start from.
        list_file: named in messages, with the line.
        skip_errors: skip a video that cannot be read, instead of ending the run.
        backwards_from: the first label whose videos are played backwards; None: no video is.
    """

    records: Sequence[VideoRecord]
    root: str
    reader: Reader
    list_file: str
    skip_errors: bool = False
    backwards_from: int | None = None

    def with_reversed(self, classes: int) -> VideoSource:
        """Each video once more, backwards, as one of `classes` more classes."""
        backwards = [replace(row, label=row.label + classes) for row in self.records]
        return replace(self, records=(*self.records, *backwards), backwards_from=classes)

    def with_motions(self) -> VideoSource:
        """Each video once a motion, with the motion as label."""
        motions = range(len(mosi.MOTIONS))
        return replace(self, records=[replace(row, label=motion) for row in self.records for motion in motions])

    def stamp(self) -> str:
        """A hash of the sizes and modification times of all files that the rows name; the contents are not read.

        Of a frame folder it takes the folder's own: a frame that is written over in place does not change it.
        """
        digest = hashlib.sha256()
        for path in dict.fromkeys(self.reader.stored_at(os.path.join(self.root, row.path)) for row in self.records):
            try:
                found = os.stat(path)
                digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
            except OSError:  # reported where the video is read
                digest.update(b"none\n")
        return digest.hexdigest()


# Mistakes in the code or in the setup: they stay visible, and no video is skipped for them. Whatever else is raised while
# a video is read, by this package, Python or a native library, is that video's: libraries raise nearly anything for
# damaged files, lack of memory included.
NOT_OF_THE_VIDEO = (
    TypeError,
    AttributeError,
    NameError,
    LookupError,
    AssertionError,
    NotImplementedError,
    ImportError,
    DecoderMissing,
)


@dataclass(frozen=True)
class BadVideo:
    """An item whose video could not be read. As an exception, it would arrive from a worker as pages of text."""

    message: str
    index: int
    skip: bool


class _VideoDataset(Dataset):
    """What all datasets share: open a video, read its frames, report what cannot be read.

    Keys are (epoch, index), or an index alone, which means epoch 0. The index of the video that is being read is noted
    in `in_work`, an array that a VideoLoader watches.
    """

    def __init__(self, source: VideoSource, sampling: ClipSampling):
        self.source, self.sampling = source, sampling
        self.in_work: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.source.records)

    def stamp(self) -> str:
        """Changes with the videos (see VideoSource.stamp)."""
        return self.source.stamp()

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any] | BadVideo:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        record = self.source.records[index]
        path = os.path.join(self.source.root, record.path)
        self._note(index)
        try:
            clip = self.source.reader.open(path, record.num_frames)
            frames = clip.fetch(self.clip_indices(clip, epoch, index).reshape(-1))
            views = self._views(frames, record.label, epoch, index)
        except NOT_OF_THE_VIDEO:
            raise
        except Exception as error:
            if (sentence := _no_more_files()) is not None:  # the video may be valid, so it is not skipped
                return BadVideo(sentence, index, skip=False)
            message = str(error) if isinstance(error, (ReadError, DecodeError)) else _unusual(path, error)
            return BadVideo(f"{message} ({self._line(index)})", index, self.source.skip_errors)
        finally:
            self._note(-1)
        return {**views, "path": record.path}

    def __getitems__(self, keys: Sequence[Any]) -> list[Any]:
        """The items of a batch; a slot before the keys is passed on to `collate`."""
        return [key if isinstance(key, Slot) else self[key] for key in keys]

    def location(self, index: int) -> str:
        """A video's path and its line in the list, for messages."""
        return f"{os.path.join(self.source.root, self.source.records[index].path)} ({self._line(index)})"

    def _line(self, index: int) -> str:
        return f"{self.source.list_file}, line {self.source.records[index].line}"

    def _note(self, index: int) -> None:
        if self.in_work is not None:
            self.in_work[INDEX] = index

    def clip_indices(self, clip: Clip, epoch: int, index: int) -> np.ndarray:
        """The frames, from 0, that item (epoch, index) shows of its video: (clips, T * f) int64. Raises ReadError."""
        if self.sampling.needs_fps and clip.fps is None:
            path = os.path.join(self.source.root, self.source.records[index].path)
            raise ReadError(f"{path}: does not state its frames a second, which data.style: tada_interval needs")
        indices = self.frame_indices(clip.num_frames, epoch, index, clip.fps)
        backwards_from = self.source.backwards_from
        is_backwards = backwards_from is not None and self.source.records[index].label >= backwards_from
        return indices[:, ::-1] if is_backwards else indices

    def frame_indices(self, num_frames: int, epoch: int, index: int, fps: float | None = None) -> np.ndarray:
        """The same of a video of `num_frames`, `fps` a second: (clips, T * f) int64."""
        raise NotImplementedError

    def _views(self, frames: Frames, label: int, epoch: int, index: int) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class TrainDataset(_VideoDataset):
    """One random clip a video, transformed `num_sample` times (repeated augmentation): same frames, other draws.

    Everything random depends on (seed, epoch, index, draw) alone: not on the number of workers or processes. The
    generators of the calling process are left as they were.

    Item: video (num_sample, T * f, S, S, 3) uint8 (float32 with erasing), label and index (num_sample,) int64, path
    str; or BadVideo.

    Args:
        random_frames: False takes the frames of validation.
    """

    def __init__(
        self,
        source: VideoSource,
        sampling: ClipSampling,
        transform: TrainTransform,
        seed: int,
        num_sample: int = 1,
        random_frames: bool = True,
    ):
        super().__init__(source, sampling)
        self.transform, self.seed = transform, seed
        self.num_sample, self.random_frames = num_sample, random_frames

    def frame_indices(self, num_frames: int, epoch: int, index: int, fps: float | None = None) -> np.ndarray:
        if not self.random_frames:
            return self.sampling.val(num_frames, fps)[None]
        rng = np.random.default_rng([self.seed, epoch, index])
        return self.sampling.train(num_frames, rng, fps)[None]

    def _views(self, frames: Frames, label: int, epoch: int, index: int) -> dict[str, torch.Tensor]:
        frames, draws = self.transform.shrink(frames), []
        for draw in range(self.num_sample):
            with seeded(self.seed, epoch, index, draw):
                draws.append(self.transform.draw(frames.height, frames.width))
        origin = reduce(Box.joined, [draw.needs for draw in draws])
        pixels = frames.decode(origin, fast=True)
        videos, labels = zip(*(self.transform(pixels, origin, draw, label) for draw in draws), strict=True)
        indices = torch.full((self.num_sample,), index)
        video = torch.stack(videos) if len(videos) > 1 else videos[0][None]  # (num_sample, T * f, S, S, 3)
        return {"video": video, "label": torch.tensor(labels), "index": indices}


class EvalDataset(_VideoDataset):
    """The same views of a video every time: V = clips * crops, the crops of the first clip first.

    Item: video (V, T * f, S, S, 3) uint8, label and index () int64, path str; or BadVideo.

    Args:
        clips: None for validation's one clip, a number for that many clips of testing.
    """

    def __init__(
        self,
        source: VideoSource,
        sampling: ClipSampling,
        transform: EvalTransform,
        clips: int | None = None,
    ):
        super().__init__(source, sampling)
        self.transform, self.clips = transform, clips

    def frame_indices(self, num_frames: int, epoch: int, index: int, fps: float | None = None) -> np.ndarray:
        if self.clips is None:
            return self.sampling.val(num_frames, fps)[None]
        return self.sampling.test(num_frames, self.clips, fps)

    def _views(self, frames: Frames, label: int, epoch: int, index: int) -> dict[str, torch.Tensor]:
        video = self.transform(frames)  # (crops, clips * T * f, S, S, 3)
        video = video.unflatten(1, (-1, self.sampling.clip_frames))  # (crops, clips, T * f, S, S, 3)
        video = video.transpose(0, 1).flatten(0, 1)  # (clips * crops, T * f, S, S, 3)
        return {"video": video, "label": torch.tensor(label), "index": torch.tensor(index)}


class PlainTrainDataset(EvalDataset):
    """Training without augmentation: validation's frames and centre crop, the same in every epoch.

    Item: video (1, T * f, S, S, 3) uint8, label and index (1,) int64, path str: as TrainDataset's; or BadVideo.
    """

    def _views(self, frames: Frames, label: int, epoch: int, index: int) -> dict[str, torch.Tensor]:
        item = super()._views(frames, label, epoch, index)
        return item | {key: item[key][None] for key in ("label", "index")}  # (1,)


class MosiDataset(_VideoDataset):
    """Motions over one frame of a video, its picture: short side `scale_size`, a square of it.

    In training an item is all nine motions over a random frame and square, mirrored half the time. In evaluation an item
    is one motion, the label of its row, over the middle of the middle frame (see VideoSource.with_motions).

    Item: training: video (9, T * f, S, S, 3) uint8, label and index (9,) int64, path str; evaluation: video
    (1, T * f, S, S, 3) uint8, label and index () int64, path str; or BadVideo.

    Args:
        input_size: S, pixels. scale_size: the side of the picture, above S.
        seed: of all that is random in training; None for evaluation.
        flip: mirror half of the pictures in training.
        static_mask: in training only a random rectangle of each clip moves.
    """

    def __init__(
        self,
        source: VideoSource,
        sampling: ClipSampling,
        *,
        input_size: int,
        scale_size: int,
        seed: int | None,
        flip: bool = True,
        static_mask: bool = False,
    ):
        super().__init__(source, sampling)
        self.input_size, self.scale_size, self.seed = input_size, scale_size, seed
        self.flip, self.static_mask = flip, static_mask

    def frame_indices(self, num_frames: int, epoch: int, index: int, fps: float | None = None) -> np.ndarray:
        """The one frame that is the picture: (1, 1) int64."""
        if self.seed is None:
            return np.array([[num_frames // 2]])
        return np.random.default_rng([self.seed, epoch, index]).integers(num_frames, size=(1, 1))

    def _views(self, frames: Frames, label: int, epoch: int, index: int) -> dict[str, torch.Tensor]:
        T, S = self.sampling.clip_frames, self.input_size
        if self.seed is None:
            clip = mosi.moving_clip(picture(frames, self.scale_size), S, T, mosi.MOTIONS[label])
            return {
                "video": torch.from_numpy(clip[None]),
                "label": torch.tensor(label),
                "index": torch.tensor(index),
            }
        rng = np.random.default_rng([self.seed, epoch, index, 1])
        still = picture(frames, self.scale_size, rng)
        if rng.random() < 0.5 and self.flip:
            still = still[:, ::-1]  # before it moves, so that right stays right
        clips = mosi.moving_clips(still, S, T, rng)  # (9, T * f, S, S, 3)
        if self.static_mask:
            clips = np.stack([mosi.with_static_mask(clip, rng) for clip in clips])
        motions = torch.arange(len(clips))
        return {"video": torch.from_numpy(clips), "label": motions, "index": torch.full_like(motions, index)}


def collate(items: Sequence[dict[str, Any] | BadVideo | Slot], buffers: SharedBuffers | None = None) -> dict[str, Any]:
    """Items -> batch.

    Args:
        items: those of a dataset; before them maybe the slot of a shared buffer.
        buffers: those of the slot; None in the process that uses the batch.

    Returns:
        video: training (B * num_sample, T * f, S, S, 3), the draws of a video side by side; evaluation
            (B, V, T * f, S, S, 3); uint8, or float32 where the transform normalised it. With a slot, a BufferRef. None
            where no video of the batch could be read: such a batch is passed over.
        label, index: training (B * num_sample,), evaluation (B,); int64. The index is the row of the list. With
            buffers, NumPy arrays.
        path: list of str, the paths of the videos as the list has them, in the order of label: one for each clip in
            training, one a video in evaluation; empty where nothing could be read.
        skipped: one sentence for each skipped video.
        error: None, or the sentence that must end the run; the user of the batch raises it.
        slot: the slot, or None.
    """
    slot = next((item for item in items if isinstance(item, Slot)), None)
    bad = [item for item in items if isinstance(item, BadVideo)]
    good = [item for item in items if isinstance(item, dict)]
    batch: dict[str, Any] = {
        "video": None,
        "label": torch.empty(0, dtype=torch.int64),
        "index": torch.empty(0, dtype=torch.int64),
        "path": [],
        "skipped": [item.message for item in bad if item.skip],
        "error": next((item.message for item in bad if not item.skip), None),
        "slot": slot,
    }
    if good and batch["error"] is None:
        join = torch.cat if good[0]["label"].ndim else torch.stack
        batch |= {key: join([item[key] for item in good]) for key in ("label", "index")}
        batch["path"] = [item["path"] for item in good for _ in range(item["label"].numel())]
        videos = [item["video"] for item in good]
        if slot is not None and buffers is not None:
            batch["video"] = buffers.put(slot, videos, join)
        else:
            batch["video"] = join(videos)
            if buffers is not None:
                batch["video"].share_memory_()  # here, where too little of it is an error that the main process gets
    if buffers is not None:  # NumPy arrays travel in the message itself, tensors in a file each
        batch |= {key: batch[key].numpy() for key in ("label", "index")}
    return batch


def _unusual(path: str, error: Exception) -> str:
    """The sentence for an error that is none of this package's."""
    if isinstance(error, MemoryError):
        return f"{path}: needs more memory than there is to be decoded"
    reason = (str(error).splitlines() or [""])[0][:200]
    return f"{path}: cannot be read ({type(error).__name__}{': ' if reason else ''}{reason})"


def _no_more_files() -> str | None:
    """The sentence to end with if this process may open no more files; else None."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        worker = get_worker_info()
        return too_many_files(worker.num_workers if worker else None)
    return None
