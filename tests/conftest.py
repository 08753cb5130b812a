"""Fixtures that several files of tests share: the fault tests' bench and reference runs."""

from tests.fault_bench import bench, reference

__all__ = ["bench", "reference"]
