"""Fixtures that several files of tests share: the fault tests' bench and reference runs, the tiny data and runs."""

import gc
from collections.abc import Iterator

import pytest

from tests.helpers.cli_harness import tiny, tiny_data, trained, varied
from tests.helpers.fault_harness import bench, reference

__all__ = ["bench", "reference", "tiny", "tiny_data", "trained", "varied"]


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Measuring collects garbage often, which all the modules of a test session make slow: they are left out."""
    gc.freeze()
    yield
    gc.unfreeze()
