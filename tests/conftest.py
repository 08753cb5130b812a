"""Fixtures that several files of tests share: the fault tests' bench and reference runs, the tiny data and runs."""

from tests.entry_bench import tiny, tiny_data, trained, varied
from tests.fault_bench import bench, reference

__all__ = ["bench", "reference", "tiny", "tiny_data", "trained", "varied"]
