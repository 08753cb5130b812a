"""Random generators that start from a key and leave no trace: what an item draws depends on its key alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, Python's and torch's CPU generators start from `key`; afterwards they are as before.

    NumPy's global generator is left out: restoring it takes longer than drawing a crop. rand_augment.py, which needs
    it, seeds it from Python's.
    """
    states = random.getstate(), torch.get_rng_state()
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(2)]
    random.seed(words[0])
    torch.default_generator.manual_seed(words[1])  # torch.manual_seed would reseed the GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
