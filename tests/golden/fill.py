"""Fills the weights and inputs of a golden case from their names alone, and compares a module's numbers with it.

Needs only NumPy: a tensor may be a NumPy array or anything that NumPy can read.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def _normal(key: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 values that depend on the key alone: RandomState never changes its stream."""
    draw = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF).standard_normal(tuple(shape))
    return np.asarray(draw).astype(np.float32)


def _weight(key: str, shape: Sequence[int], is_norm_weight: bool) -> np.ndarray:
    """Values that keep activations of order one through a deep network."""
    leaf, normal = key.rsplit(".", 1)[-1], _normal(key, shape)
    if leaf == "num_batches_tracked":
        return np.zeros(tuple(shape), np.int64)
    if leaf == "running_var" and not is_norm_weight:
        return (1 + 0.1 * np.abs(normal)).astype(np.float32)
    if is_norm_weight or (leaf == "scale" and tuple(shape) == (1,)):
        return (1 + 0.1 * normal).astype(np.float32)
    if leaf != "running_mean" and len(shape) >= 2:
        return (normal * float(np.prod(shape[1:])) ** -0.5).astype(np.float32)
    return (0.1 * normal).astype(np.float32)


def state_dict(case: Mapping) -> dict[str, np.ndarray]:
    """The case's weights by the authors' names."""
    norms = set(case["norm_weight_keys"])
    return {key: _weight(key, shape, key in norms) for key, shape in case["state_dict"].items()}


def inputs_of(case: Mapping) -> dict[str, np.ndarray]:
    """The case's inputs by name, in float32: cast them to the case's dtype."""
    return {key: _normal(key, shape) for key, shape in case["inputs"].items()}


def samples(tensor, count: int = 64) -> np.ndarray:
    """The values at the flat indices i * numel // count."""
    flat = np.ascontiguousarray(np.asarray(tensor)).reshape(-1)
    return np.array([float(flat[i * flat.size // count]) for i in range(count)])


def compare(case: Mapping, output, input_gradient=None) -> dict[str, float]:
    """The largest difference over the root mean square of the reference, for `output` and, if given, for `grad`."""
    errors = {}
    for name, value in (("output", output), ("grad", input_gradient)):
        reference = case.get(f"{name}_samples")
        if value is None or reference is None:
            continue
        reference = np.array(reference)
        errors[name] = float(np.abs(samples(value) - reference).max() / max(np.sqrt((reference**2).mean()), 1e-300))
    return errors
