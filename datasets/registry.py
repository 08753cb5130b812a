"""The table of datasets: how clips of each are resized and augmented. Edit it to add a dataset.

The sampling style of each name is in configs.schema.STYLES, which checks the configuration.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from configs.schema import STYLES, DataConfig

log = logging.getLogger("td4v")


@dataclass(frozen=True)
class Traits:
    """Pixels and labels of a dataset's clips; the arguments of the same names of `TrainTransform`."""

    scale_size: int | tuple[int, int]
    flip: bool
    flip_pairs: tuple[tuple[int, int], ...]
    gray_prob: float


# Something-Something: mirroring turns "left to right" into "right to left". The pairs are those of version 2's labels.
# Lists of version 1 number its classes in one of two orders, so it is mirrored only with data.flip_pairs.
MIRRORED_LABELS = {name: ((86, 87), (93, 94), (166, 167)) for name in ("somethingv2", "something-v2", "ssv2", "sthv2")}
MIRRORED_CLASSES = 174
KINETICS_GRAY = 0.2


def dataset_traits(data: DataConfig) -> Traits:
    """The dataset's own traits; data.flip, data.flip_pairs and data.gray_prob override them where they are set.

    kinetics style: short side `scale_size`, mirrored, grey with probability 0.2. something style: exactly `scale_size`
    high and 5/4 of it wide (256 x 320), never grey, mirrored only with known pairs of labels. A dataset that is not in
    the table follows data.style.
    """
    something = next((style for style, names in STYLES.items() if data.dataset in names), data.style) == "something"
    pairs = data.flip_pairs
    if pairs is None:
        pairs = MIRRORED_LABELS.get(data.dataset, ())
        if pairs and data.num_classes != MIRRORED_CLASSES:
            log.warning(
                "data.dataset %s has %d classes, but its mirrored labels are known for %d: %s",
                *(data.dataset, data.num_classes, MIRRORED_CLASSES),
                "not mirrored, set data.flip_pairs" if data.flip is None else "data.flip decides, labels stay",
            )
            pairs = ()
    scale = data.short_side_size
    return Traits(
        scale_size=(scale, scale * 5 // 4) if data.sampling_style == "something" else scale,
        flip=data.flip if data.flip is not None else bool(pairs) or not something,
        flip_pairs=pairs,
        gray_prob=data.gray_prob if data.gray_prob is not None else (0.0 if something else KINETICS_GRAY),
    )
