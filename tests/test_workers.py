"""Processes that die cost their task alone; progress is told where there is no terminal."""

import logging
import os

import pytest

from datasets import workers


def die_on_three(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number * 10


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_a_task_that_kills_its_process_costs_itself_only(start):
    with workers.Workers(2, start) as pool:
        assert dict(pool.run(die_on_three, range(8))) == {n: None if n == 3 else n * 10 for n in range(8)}


def test_progress_passes_items_on_and_tells(caplog, monkeypatch):
    monkeypatch.setattr(workers, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "td4v"):
        assert list(workers.progress(iter("abc"), 3, "reading")) == ["a", "b", "c"]
    assert "reading: 3 of 3 videos" in caplog.messages[-1] and "reading: 1 of 3 videos" in caplog.messages[0]
