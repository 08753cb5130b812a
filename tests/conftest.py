"""Fixtures that several test modules share."""

import gc
from collections.abc import Iterator

import pytest

from tests.helpers.cli_harness import tiny, tiny_data, trained, varied
from tests.helpers.fault_harness import harness, reference

__all__ = ["harness", "reference", "tiny", "tiny_data", "trained", "varied"]


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Garbage collection without the objects that exist already: measuring collects often, and they make it slow."""
    gc.freeze()
    yield
    gc.unfreeze()
