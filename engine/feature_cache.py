"""Frozen features, computed once and kept on disk, and the loaders that give them in place of videos.

Lives here: which features are the same (the key), computing them on all processes, the files, and what stands in for a
loader. Does not live here: what a frozen feature is (`frozen_features` and `from_frozen` of a method), nor the loaders of
videos.

A folder OUTPUT_DIR/features/KEY holds the features of one list: part_N.bin, the rows that process N computed, one after
the other, and features.json, which tells what they are, whose, the stamp of the videos (what their files' sizes and times
of change were), and which could not be read. It gets its name when
all of that is on the disk; until then it is called .KEY.partial, and a killed run leaves nothing else.

Letters: B clips, V views a video (1), F values of a feature.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.files import try_lock, write_atomic
from configs.schema import Config
from engine.distributed import Process, gather
from engine.errors import EngineError
from engine.evaluation import PASS_CLIPS, check_batch, in_passes, watched
from engine.normalize import Normalizer
from engine.optim import Precision

logger = logging.getLogger("td4v")

FORMAT = 2  # of the files; another one makes other keys
WAIT_S = 1.0  # between two looks at whether another run has computed the same features
_ABOUT = "features.json"


class FeatureError(EngineError):
    """Features that cannot be computed, kept or read; the message is one sentence."""


class Features:
    """The features of a list, on disk: read when they are asked for.

    Args:
        folder: of a finished computation.

    Raises:
        OSError, ValueError, KeyError: it is not there, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        self.folder, self.dtype = folder, getattr(torch, about["dtype"])
        self.width, self.bytes = about["width"], about["width"] * self.dtype.itemsize
        self.stamp = about["stamp"]
        self.unreadable = {int(index): sentence for index, sentence in about["unreadable"].items()}
        self.rows: dict[int, tuple[np.ndarray, int, str]] = {}
        for number, videos in enumerate(about["parts"]):
            path = folder / _part(number)
            if path.stat().st_size != len(videos) * self.bytes:
                raise ValueError(f"{path.name} holds {path.stat().st_size} bytes, not {len(videos) * self.bytes}")
            if videos:  # an empty file cannot be mapped
                values = np.asarray(np.memmap(path, np.uint8, "r", shape=(len(videos), self.bytes)))
                self.rows |= {index: (values[row], label, name) for row, (index, label, name) in enumerate(videos)}

    def __len__(self) -> int:
        return len(self.rows) + len(self.unreadable)

    def batch(self, indices: Sequence[int], views: bool, skip_errors: bool) -> dict[str, Any]:
        """What a loader of videos gives for these places of the list, with features (B, F) or (B, 1, F) for videos."""
        bad = [self.unreadable[index] for index in indices if index in self.unreadable]
        good = [index for index in indices if index not in self.unreadable]
        error = bad[0] if bad and not skip_errors else None
        good = good if error is None else []
        video = None
        if good:
            video = torch.from_numpy(np.stack([self.rows[index][0] for index in good])).view(self.dtype)  # (B, F)
        return {
            "video": video[:, None] if views and good else video,
            "label": torch.tensor([self.rows[index][1] for index in good], dtype=torch.int64),
            "index": torch.tensor(good, dtype=torch.int64),
            "path": [self.rows[index][2] for index in good],
            "skipped": bad if skip_errors else [],
            "error": error,
        }


class FeatureLoader:
    """Stands in for a loader of videos: the same videos in the same batches, in the same order, epoch by epoch.

    Args:
        loader: a datasets.loader.VideoLoader, whose sampler gives (epoch, index); it is not kept, nor are its workers.
        views: batches hold (B, 1, F), as evaluation takes them, instead of (B, F).
        skip_errors: leave videos that could not be read out, instead of ending the run.
    """

    def __init__(self, loader: DataLoader, features: Features, views: bool, skip_errors: bool) -> None:
        self.dataset, self.order, self.batch_size = loader.dataset, loader.order, loader.batch_sampler.batch_size
        self.features, self.views, self.skip_errors = features, views, skip_errors

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """As VideoLoader's."""
        self.order.set_epoch(epoch, first_batch * self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = iter(self.order)
        while keys := list(itertools.islice(order, self.batch_size)):
            yield self.features.batch([index for _, index in keys], self.views, self.skip_errors)


class FeatureCache:
    """Gives the features of a list, from the disk or, the first time, from the model.

    Results with them are those without. Bit for bit on a CPU in evaluation, whose passes have one size, in which the
    features are computed too; in training as near as matrix products of another number of clips are.

    Args:
        config: of the run; its `logging.output_dir` takes the features.
        lists: of record.run_info, for the hashes of the data lists.
        model: with its final frozen weights. It must have `frozen_features(video (B, T, C, H, W)) -> (B, F)`, and take
            that for a video in `forward`. It is moved to the process's device.
        backbone: the hash of its frozen weights.
    """

    def __init__(
        self,
        config: Config,
        lists: Mapping[str, Any],
        model: nn.Module,
        backbone: str,
        process: Process,
        precision: Precision,
        normalizer: Normalizer,
    ) -> None:
        self.config, self.lists, self.backbone = config, lists, backbone
        self.model, self.process = model.to(process.device), process
        self.precision, self.normalizer = precision, normalizer
        self.home = Path(config.logging.output_dir, "features")

    def loader(self, split: Literal["train", "val"], listed: DataLoader, instead_of: DataLoader) -> FeatureLoader:
        """What stands in for a loader; every process must call it.

        Args:
            listed: gives each video of the list of that split once over all processes, one view each; its dataset's
                `stamp()` is another where these have changed, and then they are computed again.
            instead_of: the loader to stand in for; `listed` itself in evaluation.

        Raises:
            FeatureError: no room on the disk, or it cannot be written or read. DataError: the loader reports an error.
        """
        about, rows = self.about(split), len(listed.dataset)
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.home / key
        with self._alone(folder):
            stamp = listed.dataset.stamp() if self.process.is_main else ""
            if not self._on_main(lambda: self._is_there(folder, rows, stamp)):
                self._compute(folder, {"about": about, "stamp": stamp}, split, listed)
            else:
                logger.info("features of %d videos read from %s", rows, folder)
        features = self._opened(folder, rows)
        if features.unreadable:
            logger.warning(
                "%s: %d videos could not be read when it was made; without that folder they are tried again",
                *(folder, len(features.unreadable)),
            )
        return FeatureLoader(instead_of, features, split == "val", self.config.data.on_error == "skip")

    def cost(self, rows: int) -> str:
        """What the features of so many videos take on the disk, in words."""
        width, dtype = self._size()
        size = width * dtype.itemsize
        return f"{rows} videos x {size:,} bytes = {rows * size / 1e6:.1f} MB in {self.home}"

    def about(self, split: Literal["train", "val"]) -> dict[str, Any]:
        """All that the features of a list depend on, as plain values: what has the same has the same features."""
        data, network = self.config.data, self.config.network
        shot = {"shot": data.shot, "seed": self.config.seed} if split == "train" and data.shot is not None else {}
        list_file, root = (getattr(data, f"{split}_{what}") for what in ("list", "root"))
        return {
            "format": FORMAT, "method": network.model_name, "options": network.options, "backbone": self.backbone,
            "list": (self.lists.get(f"{split}_list") or {}).get("sha256") or list_file, **shot,
            "root": os.path.realpath(root), "modality": data.modality, "image_tmpl": data.image_tmpl,
            "decoder": data.decoder, "T": data.num_segments, "style": data.sampling_style, "dense": data.dense,
            "input_size": data.input_size, "scale_size": data.scale_size, "mean": list(data.mean), "std": list(data.std),
            "precision": self.precision.name, "tf32": self.config.solver.tf32, "device": self.process.device.type,
        }  # fmt: skip

    def _compute(self, folder: Path, head: dict[str, Any], split: str, listed: DataLoader) -> None:
        """Compute the features of a list and give them their name when all are on the disk; `head` says what they are."""
        rows, partial = len(listed.dataset), folder.with_name(f".{folder.name}.partial")
        width, dtype = self._size()
        needed = rows * width * dtype.itemsize
        each = f"{rows} videos x {width * dtype.itemsize:,} bytes"
        self._on_main(lambda: _make_room(partial, needed, each))
        logger.info("computing the features of data.%s_list: %s, %.1f MB in %s", split, each, needed / 1e6, folder)
        unreadable: dict[int, str] = {}
        batches = self._batches(listed, split, unreadable)
        try:
            with open(partial / _part(self.process.rank), "wb") as file:
                videos = self._write(file.write, batches)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FeatureError(f"{partial}: cannot keep features ({error.strerror or error})") from error
        parts = gather((videos, unreadable))
        content = {
            **head, "width": width, "dtype": str(dtype).removeprefix("torch."),
            "parts": [part for part, _ in parts],
            "unreadable": {index: sentence for _, part in parts for index, sentence in part.items()},
        }  # fmt: skip

        def name() -> None:
            write_atomic(partial / _ABOUT, lambda file: file.write(json.dumps(content).encode()))
            shutil.rmtree(folder, ignore_errors=True)  # damaged ones
            os.replace(partial, folder)

        self._on_main(name)

    @torch.inference_mode()
    def _write(self, write: Callable[[Any], object], batches: Iterable[dict[str, Any]]) -> list[tuple[int, int, str]]:
        """Write the features of batches (B, 1, T, C, H, W); (place, label, name) of each row in turn."""
        videos: list[tuple[int, int, str]] = []
        was_training = self.model.training
        self.model.eval()
        try:
            for index, parts, label, names in in_passes(self._run, batches, PASS_CLIPS):
                if not bool(parts.isfinite().all()):
                    raise FeatureError(
                        f"the features of {', '.join(names or map(str, index.tolist()))} are not finite in precision {self.precision.name}; choose bf16 or fp32"
                    )
                write(parts[:, 0].contiguous().cpu().view(torch.uint8).numpy())  # (n, F * bytes of a value)
                videos += zip(index.tolist(), label.tolist(), names or map(str, index.tolist()), strict=True)
        finally:
            self.model.train(was_training)
        return videos

    def _run(self, clips: Tensor) -> Tensor:
        with self.precision.autocast(self.process.device):
            return self.model.frozen_features(self.normalizer(clips, self.process.device))  # (B, F)

    @torch.inference_mode()
    def _size(self) -> tuple[int, torch.dtype]:
        """Values of a feature, and their type."""
        data = self.config.data
        feature = self._run(torch.zeros(1, data.num_segments, 3, data.input_size, data.input_size))
        return feature.shape[1], feature.dtype

    def _batches(self, listed: DataLoader, split: str, unreadable: dict[int, str]) -> Iterator[dict[str, Any]]:
        """The batches of a loader, checked; places and sentences of videos that were left out go to `unreadable`."""
        order = iter(listed.order)
        for batch in watched(listed, f"features of data.{split}_list", self.config.logging.print_freq):
            check_batch(batch)
            keys = [index for _, index in itertools.islice(order, listed.batch_sampler.batch_size)]
            there = set(batch["index"].tolist())
            missing = [index for index in keys if index not in there]
            unreadable.update(zip(missing, batch["skipped"], strict=True))
            yield batch

    @contextlib.contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """Wait until no other run computes these features; it has done so then, if it was not killed."""
        lock = self._on_main(lambda: _lock_file(folder))
        try:
            for attempt in itertools.count():
                if self._on_main(lambda: try_lock(lock)):
                    break
                if attempt == 0:
                    logger.info("waiting for another run that computes the same features (%s)", folder)
                time.sleep(WAIT_S)
            yield
        finally:
            if lock is not None:
                lock.close()

    def _is_there(self, folder: Path, rows: int, stamp: str) -> bool:
        """Whether it is whole, and of the videos as they are."""
        try:
            if not folder.is_dir():
                return False
            features = Features(folder)
            if features.stamp != stamp:
                logger.warning("%s: videos or frames have changed since (size or time), computed again", folder)
            return features.stamp == stamp and len(features) == rows
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: is damaged (%s), computed again", folder, error)
            return False

    def _opened(self, folder: Path, rows: int) -> Features:
        """The features on every process; FeatureError on every one where one cannot see them."""
        features = problem = None
        try:
            features = Features(folder)
            problem = None if len(features) == rows else f"holds {len(features)} videos of {rows}"
        except (OSError, ValueError, KeyError) as error:
            problem = f"cannot be read ({error}); logging.output_dir must be on a disk that all machines share"
        problem = next((one for one in gather(problem) if one is not None), None)
        if problem is not None:
            raise FeatureError(f"{folder}: {problem}")
        return features

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """What `action` gives on rank 0: there as it is, elsewhere as far as it can be sent; its errors everywhere."""
        value = problem = None
        if self.process.is_main:
            try:
                value = action()
            except OSError as error:
                problem = f"{self.home}: cannot keep features ({error.strerror or error})"
            except FeatureError as error:
                problem = str(error)
        sent, problem = gather((value if isinstance(value, bool) else None, problem))[0]
        if problem is not None:
            raise FeatureError(problem)
        return value if self.process.is_main else sent


def _part(number: int) -> str:
    return f"part_{number}.bin"


def _lock_file(folder: Path) -> Any:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return open(folder.with_name(f".{folder.name}.lock"), "a+", encoding="utf-8")


def _make_room(partial: Path, needed: int, each: str) -> None:
    """An empty folder on a disk that has room. Raises FeatureError, OSError."""
    shutil.rmtree(partial, ignore_errors=True)  # a killed run's
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needed:
        partial.rmdir()
        raise FeatureError(
            f"{partial.parent}: the features take {needed / 1e6:.1f} MB ({each}), and the disk has {free / 1e6:.1f} MB left: set logging.output_dir to another disk, or network.cache_features to off"
        )
