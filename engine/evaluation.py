"""Evaluation of any model on any loader, and the checks of a batch that training shares with it.

Lives here: from batches to an Accuracy, views folded into clips, progress. Does not live here: what an accuracy is
(metrics.py), when it is taken (loop.py), what people look at (report.py).
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine.distributed import EngineError, Process, unwrap
from engine.log import Eta
from engine.metrics import Accuracy, Scores
from engine.optim import Precision
from engine.pixels import Normalizer
from engine.stop import Stopped, StopSignals

logger = logging.getLogger("td4v")


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
    max_clips: int = 32,
    signals: StopSignals | None = None,
) -> Accuracy:
    """Accuracy over the videos of all processes, each of which gives its own part; the same result on each.

    Args:
        expected: videos in the list (see metrics.Scores.accuracy).
        print_freq: batches between lines of progress; None for none.
        normalizer: of uint8 pixels; None scales them to 0..1.
        max_clips: clips in one forward pass at most; views beyond that wait on the CPU.
        signals: where a wish to stop is noted, which ends an evaluation at once: nothing in it is worth saving.

    Raises:
        DataError: the loader reports an error. MetricsError: not every video has one finite score. Stopped.
    """
    model = unwrap(model)  # processes may have different numbers of batches, so nothing may wait for the others
    was_training = model.training
    model.eval()
    normalizer = normalizer or Normalizer()
    scores = Scores()
    eta = Eta(done=0, total=len(loader))
    try:
        for number, batch in enumerate(loader, start=1):
            if signals is not None and signals.asked:
                raise Stopped(signals.asked, "in an evaluation, saved before it")
            if print_freq is not None and number % print_freq == 0 and number < len(loader):
                left = timedelta(seconds=round(eta.seconds(number)))
                logger.info("evaluating: batch %d/%d eta %s", number, len(loader), left)
            scores.skipped += check_batch(batch)
            if batch["video"] is None:
                continue
            views = batch["video"].shape[1]
            clips = batch["video"].flatten(0, 1)  # (B*V, T, C, H, W)
            with precision.autocast(process.device):
                parts = [model(normalizer(part, process.device)) for part in filled(clips, views, max_clips)]
            logits = torch.cat(parts)[: len(clips)].unflatten(0, (-1, views))  # (B, V, K)
            scores.add(batch["index"], logits, batch["label"], batch.get("path"))
    finally:
        model.train(was_training)
    return scores.accuracy(expected)


def filled(clips: Tensor, views: int, most: int) -> list[Tensor]:
    """Clips (B*V, T, C, H, W) in passes of one size, which `views` alone decides; the last is filled up by a repeated clip.

    Matrix products of another size add up in another order: a pass of one size gives a video the same logits, bit for
    bit, whatever the batch size and the number of processes.
    """
    size = min(views, most) if views >= 8 else min(8 // views * views, most)
    if short := -len(clips) % size:
        clips = torch.cat([clips, clips[-1:].expand(short, *clips.shape[1:])])
    return list(clips.split(size))


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
