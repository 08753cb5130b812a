"""Frozen features of a list, computed once and kept on disk, and loaders that give them in place of videos.

OUTPUT_DIR/features/KEY holds the features of one list: part_N.bin, the rows that process N computed, and features.json:
what they depend on, the videos of each part with a checksum of each row, a stamp of the video files, which videos could
not be read, and a checksum of itself. The folder gets its name when all is on disk; until then it is .KEY.partial. All
rows are checked when a run opens the folder, and each row again when it is read.

Letters: B clips, V views a video (1), F values of a feature.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

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

FORMAT = 3  # of the files; part of the key
WAIT_S = 1.0  # between two tries to lock a folder
_INDEX = "features.json"
_CHECKSUM = "crc32"  # the key of the index that holds the checksum of its other keys


class FeatureError(EngineError):
    """Features that cannot be computed, kept or read; the message is one sentence."""


class Features:
    """The features of a list in a finished folder; values are read from disk when they are used.

    Raises OSError, ValueError, KeyError: the folder is missing, or damaged so that a look at its index and the sizes of
    its files finds it.
    """

    def __init__(self, folder: Path) -> None:
        index = _read_index(folder / _INDEX)
        self.folder, self.about = folder, index["about"]
        self.dtype: torch.dtype = getattr(torch, index["dtype"])
        self.stamp = index["stamp"]
        self.unreadable = {int(number): sentence for number, sentence in index["unreadable"].items()}
        self.rows: dict[int, tuple[np.ndarray, int, str, int]] = {}  # by index in the list: bytes, label, name, CRC-32
        row_bytes = index["width"] * self.dtype.itemsize
        for rank, videos in enumerate(index["parts"]):
            path = folder / _part_name(rank)
            if path.stat().st_size != len(videos) * row_bytes:
                raise ValueError(f"{path.name} holds {path.stat().st_size} bytes, not {len(videos) * row_bytes}")
            if videos:  # an empty file cannot be mapped
                values = np.asarray(np.memmap(path, np.uint8, "r", shape=(len(videos), row_bytes)))
                self.rows |= {number: (values[row], *about) for row, (number, *about) in enumerate(videos)}

    def __len__(self) -> int:
        return len(self.rows) + len(self.unreadable)

    def damaged(self, process: Process) -> int:
        """How many rows of a process's share differ from their checksums; reads them."""
        share = itertools.islice(self.rows.values(), process.rank, None, process.world_size)
        return sum(zlib.crc32(values) != checksum for values, _, _, checksum in share)

    def row(self, number: int) -> np.ndarray:
        """The bytes of a video's feature. Raises FeatureError where they differ from their checksum."""
        values, _, name, checksum = self.rows[number]
        if zlib.crc32(values) != checksum:
            raise FeatureError(
                f"{self.folder}: the features of {name} are damaged; start the run again, and they are computed again"
            )
        return values

    def batch(self, indices: Sequence[int], views: bool, skip_errors: bool) -> dict[str, Any]:
        """A loader's batch for these videos, with features (B, F), or (B, 1, F) with `views`, in place of pixels."""
        bad = [self.unreadable[number] for number in indices if number in self.unreadable]
        failed = bool(bad) and not skip_errors
        good = [] if failed else [number for number in indices if number not in self.unreadable]
        video = None
        if good:
            video = torch.from_numpy(np.stack([self.row(number) for number in good])).view(self.dtype)  # (B, F)
            video = video[:, None] if views else video
        return {
            "video": video,
            "label": torch.tensor([self.rows[number][1] for number in good], dtype=torch.int64),
            "index": torch.tensor(good, dtype=torch.int64),
            "path": [self.rows[number][2] for number in good],
            "skipped": bad if skip_errors else [],
            "error": bad[0] if failed else None,
        }


class FeatureLoader:
    """Replaces a loader of videos: the same videos in the same batches and order, epoch by epoch.

    Args:
        loader: a datasets.loader.VideoLoader, whose sampler gives (epoch, index); neither it nor its workers are kept.
        views: batches hold (B, 1, F), as evaluation takes them, instead of (B, F).
        skip_errors: skip videos that could not be read instead of ending the run.
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
    """Gives the features of a list, from disk, or from the model the first time.

    Results equal those without a cache: bit for bit in evaluation on a CPU, because features are computed in passes of
    the same size; in training as closely as matrix products of another number of clips are.

    Args:
        config: of the run, with data.mean and data.std filled in; features go below its logging.output_dir.
        lists: the data lists with their hashes, as in run_info.
        model: with its final frozen weights. It has `frozen_features(video (B, T, C, H, W)) -> (B, F)`, and its forward
            takes that in place of a video. It is moved to the process's device.
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
        """The replacement of a loader; every process must call it.

        Args:
            listed: gives each video of the split's list once over all processes, one view each. If its dataset's
                `stamp()` changed, the features are computed again.
            instead_of: the loader to replace; `listed` itself in evaluation.

        Raises:
            FeatureError: the disk is full, or cannot be written or read.
            DataError: the loader reports an error.
        """
        identity, rows = self.identity(split), len(listed.dataset)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.home / key
        with self._locked(folder):
            stamp = listed.dataset.stamp() if self.process.is_main else ""
            if self._on_main(lambda: _is_valid(folder, rows, stamp, identity)) and self._is_undamaged(folder, rows):
                logger.info("features of %d videos read from %s", rows, folder)
            else:
                self._compute(folder, {"about": identity, "stamp": stamp}, split, listed)
        features = self._open(folder, rows)
        if features.unreadable:
            logger.warning(
                "%s: %d videos could not be read when it was made; remove the folder to try them again",
                *(folder, len(features.unreadable)),
            )
        return FeatureLoader(
            instead_of, features, views=split == "val", skip_errors=self.config.data.on_error == "skip"
        )

    def cost(self, rows: int) -> str:
        """The disk space for so many videos, in words."""
        size = self._feature().nbytes
        return f"{rows} videos x {size:,} bytes = {rows * size / 1e6:.1f} MB in {self.home}"

    def identity(self, split: Literal["train", "val"]) -> dict[str, Any]:
        """All that the features of a list depend on, as plain values: equal identities have equal features."""
        data, network = self.config.data, self.config.network
        list_file, root = (getattr(data, f"{split}_{what}") for what in ("list", "root"))
        identity = {
            "format": FORMAT,
            "model": network.model_name,
            "options": network.options,
            "arch": network.arch,  # activation and heads, which the weights' hash does not show
            "vision": None if network.vision is None else dataclasses.asdict(network.vision),
            "backbone": self.backbone,
            "list": (self.lists.get(f"{split}_list") or {}).get("sha256") or list_file,
            "root": os.path.realpath(root),
            "style": data.sampling_style,
            "precision": self.precision.name,
            "tf32": self.config.solver.tf32,
            "device": self.process.device.type,
        }
        keys = (
            "modality", "image_tmpl", "index_base", "decoder", "task", "reversed_classes", "num_segments", "dense",
            "interval", "fps", "input_size", "scale_size", "eval_crop",
        )  # fmt: skip
        identity |= {name: getattr(data, name) for name in keys}
        identity |= {"mean": list(data.mean), "std": list(data.std)}
        if split == "train" and data.shot is not None:
            identity |= {"shot": data.shot, "seed": self.config.seed}
        return identity

    def _compute(self, folder: Path, head: dict[str, Any], split: str, listed: DataLoader) -> None:
        """Compute the features of a list, and rename their folder when all is on disk. `head` opens features.json."""
        rows, partial = len(listed.dataset), folder.with_name(f".{folder.name}.partial")
        feature = self._feature()
        size = feature.nbytes
        each = f"{rows} videos x {size:,} bytes"
        self._on_main(lambda: _make_room(partial, rows * size, each))
        logger.info("computing the features of data.%s_list: %s, %.1f MB in %s", split, each, rows * size / 1e6, folder)
        unreadable: dict[int, str] = {}
        try:
            with open(partial / _part_name(self.process.rank), "wb") as file:
                videos = self._write_rows(file, self._checked_batches(listed, split, unreadable))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FeatureError(f"{partial}: features cannot be written ({error.strerror or error})") from error
        parts = gather((videos, unreadable))
        index = {
            **head,
            "width": feature.shape[1],
            "dtype": str(feature.dtype).removeprefix("torch."),
            "parts": [videos for videos, _ in parts],
            "unreadable": {number: sentence for _, part in parts for number, sentence in part.items()},
        }

        def finish() -> None:
            text = json.dumps({_CHECKSUM: zlib.crc32(json.dumps(index).encode()), **index})
            write_atomic(partial / _INDEX, lambda file: file.write(text.encode()))
            shutil.rmtree(folder, ignore_errors=True)  # damaged or outdated
            os.replace(partial, folder)

        self._on_main(finish)

    @torch.inference_mode()
    def _write_rows(self, file: IO[bytes], batches: Iterable[dict[str, Any]]) -> list[tuple[int, int, str, int]]:
        """Write the features of batches (B, 1, T, C, H, W); returns (index, label, name, CRC-32) of each row."""
        videos: list[tuple[int, int, str, int]] = []
        was_training = self.model.training
        self.model.eval()
        try:
            for index, features, label, names in in_passes(self._run, batches, PASS_CLIPS):  # features (n, 1, F)
                names = names or [str(number) for number in index.tolist()]
                if not bool(features.isfinite().all()):
                    raise FeatureError(
                        f"the features of {', '.join(names)} are not finite in precision {self.precision.name}; "
                        "choose bf16 or fp32"
                    )
                values = features[:, 0].contiguous().cpu().view(torch.uint8).numpy()  # (n, F * bytes of a value)
                file.write(values)
                videos += zip(index.tolist(), label.tolist(), names, map(zlib.crc32, values), strict=True)
        finally:
            self.model.train(was_training)
        return videos

    def _run(self, clips: Tensor) -> Tensor:
        with self.precision.autocast(self.process.device):
            return self.model.frozen_features(self.normalizer(clips, self.process.device))  # (B, F)

    @torch.inference_mode()
    def _feature(self) -> Tensor:
        """A feature (1, F) of a black video, for its size and type."""
        data = self.config.data
        frames = data.num_segments * getattr(self.model, "frames_per_segment", 1)
        return self._run(torch.zeros(1, frames, 3, data.input_size, data.input_size))

    def _checked_batches(self, listed: DataLoader, split: str, unreadable: dict[int, str]) -> Iterator[dict[str, Any]]:
        """The batches of a loader; adds index and message of each skipped video to `unreadable`."""
        order = iter(listed.order)
        for batch in watched(listed, f"features of data.{split}_list", self.config.logging.print_freq):
            check_batch(batch)
            expected = [index for _, index in itertools.islice(order, listed.batch_sampler.batch_size)]
            present = set(batch["index"].tolist())
            missing = [index for index in expected if index not in present]
            unreadable.update(zip(missing, batch["skipped"], strict=True))
            yield batch

    @contextlib.contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """Wait until no other run computes these features."""
        lock = self._on_main(lambda: _open_lock(folder))
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

    def _is_undamaged(self, folder: Path, rows: int) -> bool:
        """Whether all rows equal their checksums."""
        damaged = sum(gather(self._open(folder, rows).damaged(self.process)))
        if damaged and self.process.is_main:
            logger.warning("%s: %d of %d rows are damaged, so all videos are computed again", folder, damaged, rows)
        return not damaged

    def _open(self, folder: Path, rows: int) -> Features:
        """The features on every process. Raises FeatureError on all of them if one cannot read them."""
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
        """Run `action` on rank 0. Rank 0 gets its value, the others only a bool or None; its errors are raised on all."""
        value = problem = None
        if self.process.is_main:
            try:
                value = action()
            except OSError as error:
                problem = f"{self.home}: features cannot be written ({error.strerror or error})"
            except FeatureError as error:
                problem = str(error)
        sent, problem = gather((value if isinstance(value, bool) else None, problem))[0]
        if problem is not None:
            raise FeatureError(problem)
        return value if self.process.is_main else sent


def _part_name(rank: int) -> str:
    return f"part_{rank}.bin"


def _open_lock(folder: Path) -> IO[str]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return open(folder.with_name(f".{folder.name}.lock"), "a+", encoding="utf-8")


def _read_index(path: Path) -> dict[str, Any]:
    """The index of a folder. Raises OSError, ValueError, KeyError."""
    index = json.loads(path.read_text(encoding="utf-8"))
    checksum = index.pop(_CHECKSUM, None)
    if zlib.crc32(json.dumps(index).encode()) != checksum:
        raise ValueError(f"{path.name} differs from its checksum")
    return index


def _is_valid(folder: Path, rows: int, stamp: str, identity: Mapping[str, Any]) -> bool:
    """Whether the folder is complete and of the video files as they are now; no row is read."""
    if not folder.is_dir():
        return False
    try:
        features = Features(folder)
        if features.about != json.loads(json.dumps(identity)):
            raise ValueError(f"{_INDEX} is of other features")
        if len(features) != rows:
            raise ValueError(f"it holds {len(features)} videos of {rows}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: is damaged (%s), so all videos are computed again", folder, error)
        return False
    if features.stamp != stamp:
        logger.warning("%s: videos or frames have changed since (size or time), computed again", folder)
    return features.stamp == stamp


def _make_room(partial: Path, needed: int, each: str) -> None:
    """An empty folder on a disk that has room. Raises FeatureError, OSError."""
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needed:
        partial.rmdir()
        raise FeatureError(
            f"{partial.parent}: the features take {needed / 1e6:.1f} MB ({each}), and the disk has {free / 1e6:.1f} MB "
            "left: set logging.output_dir to another disk, or network.cache_features to off"
        )
