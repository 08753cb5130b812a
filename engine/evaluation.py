"""Evaluation of any model on any loader, and the checks of a batch that training shares with it.

Lives here: from batches to an Accuracy, views folded into clips, progress. Does not live here: what an accuracy is
(metrics.py), when it is taken (loop.py), what people look at (report.py).
"""

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
from engine.signals import Stopped, StopSignals

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
    """Accuracy over the videos of all processes, each of which gives its own part; the same result on each.

    Args:
        expected: videos in the list (see metrics.Scores.accuracy).
        print_freq: batches between lines of progress; None for none.
        normalizer: of uint8 pixels; None scales them to 0..1.
        pass_clips: clips in one forward pass, wherever batches and videos end; the last is filled up by a repeated clip,
            whose logits are dropped. Matrix products of another size add up in another order: passes of one size give a
            video the same logits, bit for bit, whatever the batch size and the number of processes.
        signals: where a wish to stop is noted, which ends an evaluation at once: nothing in it is worth saving.

    Raises:
        DataError: the loader reports an error. MetricsError: not every video has one finite score. Stopped.
    """
    model = unwrap(model)  # processes may have different numbers of batches, so nothing may wait for the others
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
        for index, logits, label, names in in_passes(run, batches(), pass_clips):
            scores.add(index, logits, label, names)
    finally:
        model.train(was_training)
    return scores.accuracy(expected)


def watched(
    loader: DataLoader, what: str, print_freq: int | None = None, signals: StopSignals | None = None
) -> Iterator[dict[str, Any]]:
    """The batches of a loader, with lines of progress that begin with `what`. Raises Stopped between two of them."""
    eta = Eta(done=0, total=len(loader))
    for number, batch in enumerate(loader, start=1):
        if signals is not None and signals.asked:
            raise Stopped(signals.asked, "in an evaluation, saved before it")
        if print_freq is not None and number % print_freq == 0 and number < len(loader):
            left = timedelta(seconds=round(eta.seconds(number)))
            logger.info("%s: batch %d/%d eta %s", what, number, len(loader), left)
        yield batch


def in_passes(
    run: Callable[[Tensor], Tensor], batches: Iterable[dict[str, Any]], size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[str] | None]]:
    """Give `run` the clips of batches (B, V, ...) in passes of one size, (size, ...) -> (size, ...).

    Yields videos all of whose views are through: index (n,), outputs (n, V, ...), label (n,), names or None.
    """
    waiting = _Waiting()
    for batch in batches:
        if batch["video"] is not None:
            for clips in waiting.take(batch, size):
                yield from waiting.give(run(clips))
    if (rest := waiting.rest(size)) is not None:
        yield from waiting.give(run(rest))


class _Waiting:
    """Clips that wait for a full pass, and videos that wait for the outputs of all of their views."""

    def __init__(self) -> None:
        self.clips: list[Tensor] = []  # each (n, T, C, H, W), or (n, F) of features
        self.outputs: list[Tensor] = []  # each (n, ...)
        self.videos: deque[tuple[int, int, str | None]] = deque()  # index, label, path
        self.views = 1

    def take(self, batch: dict[str, Any], size: int) -> Iterator[Tensor]:
        """Take in a batch, and give the passes of `size` clips (size, T, C, H, W) that are full."""
        self.views = batch["video"].shape[1]
        names = batch.get("path") or [None] * len(batch["index"])
        self.videos += zip(batch["index"].tolist(), batch["label"].tolist(), names, strict=True)
        self.clips.append(batch["video"].flatten(0, 1))  # (B*V, T, C, H, W)
        while sum(map(len, self.clips)) >= size:
            clips = self.clips[0] if len(self.clips) == 1 else torch.cat(self.clips)
            self.clips = [clips[size:]]
            yield clips[:size]

    def rest(self, size: int) -> Tensor | None:
        """The last clips as a pass of `size`, filled up by the last of them; None without any."""
        clips = torch.cat(self.clips) if self.clips else torch.empty(0)
        if len(clips) == 0:
            return None
        return torch.cat([clips, clips[-1:].expand(size - len(clips), *clips.shape[1:])])

    def give(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, list[str] | None]]:
        """Take in the outputs (n, ...) of a pass, and give the videos all of whose views are there."""
        self.outputs.append(outputs)
        there = torch.cat(self.outputs)
        done = min(len(there) // self.views, len(self.videos))
        self.outputs = [there[done * self.views :]]
        if done:
            index, label, path = zip(*(self.videos.popleft() for _ in range(done)), strict=True)
            parts = there[: done * self.views].unflatten(0, (done, self.views))  # (n, V, ...)
            yield torch.tensor(index), parts, torch.tensor(label), None if path[0] is None else list(path)


def check_batch(batch: dict[str, Any]) -> int:
    """Stop on an error of the loader, warn of each skipped video, and return how many there are."""
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
