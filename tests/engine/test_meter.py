"""Sums over an epoch: their averages, and that they continue from a checkpoint with the same digits."""

from __future__ import annotations

import json
import time

import pytest
import torch

from engine.meter import Meter, StepSums

STEPS = [(2.3, 0.1, 4), (1.7, 0.4, 4), (0.1 + 0.2, 0.3, 3)]  # loss, norm of the gradients, clips


def _filled(steps: list[tuple[float, float, int]], meter: Meter | None = None) -> Meter:
    meter = meter or Meter()
    for step in steps:
        meter.add(*step)
    return meter


def test_an_epoch_averages_over_clips_and_steps() -> None:
    meter = _filled(STEPS)
    meter.skipped_steps, meter.skipped_videos = 1, 2
    row = meter.summary(torch.device("cpu"))
    assert row["train_loss"] == pytest.approx((2.3 * 4 + 1.7 * 4 + 0.3 * 3) / 11)
    assert row["grad_norm"] == pytest.approx(0.8 / 3) and (row["skipped_steps"], row["skipped_videos"]) == (1, 2)
    assert row["clips_per_s"] > 0 and row["memory_gib"] is None
    curves = meter.since_log.curves()
    assert curves["train/loss_max"] == 2.3 and curves["train/grad_norm_max"] == 0.4


def test_nothing_but_skipped_steps() -> None:
    time.sleep(0.001)
    row = Meter().summary(torch.device("cpu"))
    assert row["train_loss"] is None and row["grad_norm"] is None and StepSums().curves() == {}


def test_a_checkpoint_in_the_middle_changes_no_digit() -> None:
    straight, half = _filled(STEPS), _filled(STEPS[:1])
    before = json.loads(json.dumps(half.state()))
    resumed = _filled(STEPS[1:], Meter.from_state(before))
    assert (
        resumed.epoch == straight.epoch and resumed.since_log == straight.since_log and resumed.clips == straight.clips
    )
    assert resumed.state()["seconds"] > before["seconds"] > 0
    assert resumed.clips_per_second() > 0 and resumed._clips_before == 4  # the rate is of this process's own steps
