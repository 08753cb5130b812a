"""Which videos a process sees, in which order. Samplers yield (epoch, index), so that workers know the epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class ShuffledSampler(Sampler[tuple[int, int]]):
    """A new permutation each epoch, cut to full global batches and dealt to the processes in turn.

    Every process has the same number of full batches; the remaining videos are not seen in that epoch. `seed` must be
    the same in every process, or their shares overlap. Call `set_epoch` before each epoch.

    Raises:
        ValueError: fewer videos than one batch in each process.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        batches = length // (batch_size * world_size)
        if batches == 0:
            raise ValueError(
                f"data.train_list: {length} videos are fewer than one batch of data.batch_size {batch_size} "
                f"in each of {world_size} processes"
            )
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.share = batches * batch_size
        self.epoch, self.first = 0, 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Give the videos of `epoch` from now on, without the `first` ones of this process, which were seen already."""
        if not 0 <= first <= self.share:
            raise ValueError(f"an epoch has {self.share} videos a process, so {first} of them cannot have been seen")
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        """Videos of this process in the rest of the epoch."""
        return self.share - self.first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        order = order[: self.share * self.world_size]
        return iter([(self.epoch, index) for index in order[self.rank :: self.world_size][self.first :].tolist()])


class StridedSampler(Sampler[tuple[int, int]]):
    """Videos rank, rank + world_size, ...: together the processes see each video once. Shares may be uneven."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(0, index) for index in self.indices])
