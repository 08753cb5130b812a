"""Evaluates any model on any loader; training uses its check of batches too."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine.distributed import Process, unwrap
from engine.errors import EngineError
from engine.log import Eta
from engine.metrics import Accuracy, Scores
from engine.normalize import Normalizer
from engine.optim import Precision
from engine.signals import Stopped, StopSignals, WaitInterrupted

logger = logging.getLogger("td4v")

PASS_CLIPS = 8  # clips in one forward pass


class DataError(EngineError):
    """The loader reports data that cannot be used, or gives none."""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    process: Process,
    precision: Precision,
    expected: int,
    print_freq: int | None = None,
    normalizer: Normalizer | None = None,
    pass_clips: int = PASS_CLIPS,
    signals: StopSignals | None = None,
) -> Accuracy:
    """Accuracy over the videos of all processes, the same on each; each process's loader gives its own part.

    Args:
        expected: number of videos in the list (see metrics.Scores.accuracy).
        print_freq: batches between lines of progress; None for none.
        normalizer: of uint8 pixels; None scales them to 0..1.
        pass_clips: clips in one forward pass, whatever the batches are. Matrix products of another size add in another
            order, so passes of one size give a video the same logits, bit for bit, for any batch size and number of
            processes. The last pass is filled up by a repeated clip, whose logits are dropped.
        signals: a requested stop ends the evaluation at once; nothing in it is worth saving.

    Raises:
        DataError: the loader reports an error.
        MetricsError: not every video has one finite score.
        Stopped: a stop was requested.
    """
    model = unwrap(model)  # without synchronisation: processes may have different numbers of batches
    was_training = model.training
    model.eval()
    normalizer = normalizer or Normalizer()
    scores = Scores()

    def batches() -> Iterator[dict[str, Any]]:
        for batch in watched(loader, "evaluating", print_freq, signals):
            scores.skipped += check_batch(batch)
            yield batch

    def run(clips: Tensor) -> Tensor:
        with precision.autocast(process.device):
            return model(normalizer(clips, process.device))  # (pass_clips, K)

    try:
        for video_outputs in in_passes(run, batches(), pass_clips):
            scores.add(*video_outputs)
    finally:
        model.train(was_training)
    return scores.accuracy(expected)


def watched(
    loader: DataLoader, what: str, print_freq: int | None = None, signals: StopSignals | None = None
) -> Iterator[dict[str, Any]]:
    """The batches of a loader, with progress lines that begin with `what`. Raises Stopped between two batches."""
    eta = Eta(done=0, total=len(loader))
    for number, batch in enumerate(loader if signals is None else _until_stopped(loader, signals), start=1):
        if print_freq is not None and number % print_freq == 0 and number < len(loader):
            left = timedelta(seconds=round(eta.seconds(number)))
            logger.info("%s: batch %d/%d eta %s", what, number, len(loader), left)
        yield batch


def _until_stopped(loader: DataLoader, signals: StopSignals) -> Iterator[dict[str, Any]]:
    try:
        yield from signals.interruptible(loader)
    except WaitInterrupted:
        raise Stopped(signals.requested, "in an evaluation, saved before it") from None


VideoOutputs = tuple[Tensor, Tensor, Tensor, "list[str] | None"]  # index (n,), outputs (n, V, ...), label (n,), names


def in_passes(run: Callable[[Tensor], Tensor], batches: Iterable[dict[str, Any]], size: int) -> Iterator[VideoOutputs]:
    """Regroup the clips of batches (B, V, ...) into passes of one size, and the outputs into videos.

    Args:
        run: (size, ...) -> (size, ...).

    Yields:
        the videos whose views are all done, as soon as they are.
    """
    clips = _ClipQueue()
    videos = _VideoQueue()
    for batch in batches:
        if batch["video"] is None:
            continue
        videos.add(batch)
        clips.add(batch["video"].flatten(0, 1))  # (B, V, ...) -> (B*V, ...)
        while len(clips) >= size:
            yield from videos.complete(run(clips.pop(size)))
    if len(clips):
        yield from videos.complete(run(clips.pop(size)))


class _ClipQueue:
    """Clips that wait for a full pass."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []  # each (n, T, C, H, W), or (n, F) of features

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def add(self, clips: Tensor) -> None:
        self.parts.append(clips)

    def pop(self, size: int) -> Tensor:
        """The first `size` clips; if there are fewer, all, filled up by the last of them."""
        clips = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        self.parts = [clips[size:]]
        fill = size - len(clips)
        return torch.cat([clips, clips[-1:].expand(fill, *clips.shape[1:])]) if fill > 0 else clips[:size]


class _VideoQueue:
    """Videos that wait for the outputs of all of their views."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, int, str | None]] = deque()  # index, label, name
        self.outputs: list[Tensor] = []  # each (n, ...)
        self.views = 1

    def add(self, batch: dict[str, Any]) -> None:
        self.views = batch["video"].shape[1]
        names = batch.get("path") or [None] * len(batch["index"])
        self.waiting += zip(batch["index"].tolist(), batch["label"].tolist(), names, strict=True)

    def complete(self, outputs: Tensor) -> Iterator[VideoOutputs]:
        """Take the outputs (n, ...) of the next clips, and give the videos that are complete with them."""
        self.outputs.append(outputs)
        joined = torch.cat(self.outputs)
        done = min(len(joined) // self.views, len(self.waiting))
        self.outputs = [joined[done * self.views :]]
        if done:
            index, label, name = zip(*(self.waiting.popleft() for _ in range(done)), strict=True)
            by_video = joined[: done * self.views].unflatten(0, (done, self.views))  # (n*V, ...) -> (n, V, ...)
            yield torch.tensor(index), by_video, torch.tensor(label), None if name[0] is None else list(name)


def check_batch(batch: dict[str, Any]) -> int:
    """Raise DataError for an error of the loader, log each skipped video, and return how many there are."""
    if batch["error"] is not None:
        raise DataError(batch["error"])
    for name in batch["skipped"]:
        logger.warning("skipped: %s", name)
    return len(batch["skipped"])


def log_accuracy(what: str, accuracy: Accuracy) -> None:
    """One line with the three percentages."""
    skipped = f", {accuracy.skipped} more skipped" if accuracy.skipped else ""
    logger.info(
        "%s: top-1 %.2f top-5 %.2f mean class %.2f over %d videos%s",
        *(what, accuracy.top1, accuracy.top5, accuracy.mean_class, accuracy.videos, skipped),
    )
