"""Which differences between two models are told from chance: a test over the test videos and the seeds together.

Two models are tested on the same videos, and each was trained with several seeds. Another draw of either could turn a
small difference around. The bootstrap draws both again and again, videos and seeds with replacement, the same videos for
both models; the interval of 95 % of these differences says how far the measured one may be off. It is told from chance
where the interval leaves out zero. Few seeds are drawn too little apart, so an interval of three is rather narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scripts.reports import dict_table

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Top-1 of `one` minus that of `other`, in points of percent: the mean over seeds and its interval."""

    one: str
    other: str
    mean: float
    low: float
    high: float

    @property
    def is_told(self) -> bool:
        """Whether it is told from chance."""
        return self.low > 0 or self.high < 0


def difference(one: str, other: str, right: Mapping[str, np.ndarray], draws: int = DRAWS) -> Difference:
    """Compare two models.

    Args:
        right: of each model (seeds, videos) bool, whether the video was classified right; equal videos in equal order.
        draws: of the bootstrap, which always draws the same.
    """
    rng = np.random.default_rng(0)
    videos = right[one].shape[1]
    counts = rng.multinomial(videos, np.full(videos, 1 / videos), size=draws)  # (draws, videos)
    means = []
    for name in (one, other):
        seeds = len(right[name])
        per_seed = counts @ right[name].T / videos  # (draws, seeds)
        weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # (draws, seeds)
        means.append((per_seed * weights).sum(1))
    low, high = np.quantile(means[0] - means[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = right[one].mean() - right[other].mean()
    return Difference(one, other, *(100 * float(value) for value in (mean, low, high)))


def differences(names: Sequence[str], right: Mapping[str, np.ndarray]) -> list[Difference]:
    """All pairs, the better one first, the largest difference first."""
    pairs = [(one, other) for place, one in enumerate(names) for other in names[place + 1 :]]
    ordered = [pair if right[pair[0]].mean() >= right[pair[1]].mean() else pair[::-1] for pair in pairs]
    return sorted((difference(one, other, right) for one, other in ordered), key=lambda found: -found.mean)


def differences_table(found: Sequence[Difference]) -> str:
    """A line a pair."""
    return dict_table(
        [
            {
                "better": one.one,
                "worse": one.other,
                "difference, points": f"{one.mean:.1f}",
                f"{100 * LEVEL:.0f} % interval": f"{one.low:.1f} to {one.high:.1f}",
                "told from chance": "yes" if one.is_told else "no",
            }
            for one in found
        ]
    )
