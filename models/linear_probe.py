"""A linear probe: a classifier on what a frozen CLIP says of the frames. One method, one file; a point of reference.

Letters: B clips, T frames, N patch tokens, D the tower's width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip.towers.base import Feature, Tower
from configs.schema import Config, ConfigError
from models.parameters import Origin


@dataclass(frozen=True)
class Options:
    """`network.options` of this method."""

    feature: Feature = "class_token"


class LinearProbe(nn.Module):
    """The frozen tower runs without autograd; a linear classifier on the average over frames is all that is tuned.

    Args:
        tower: frozen trunk. num_classes: K.
        feature: a frame's class token, or the mean of all its tokens, behind the last norm; averaged over frames.
        dropout: before the classifier.

    Shape: video (B, T, 3, height, width), normalised, any T -> logits (B, K).

    Source: Radford et al. 2021, section 3.2 (with a classifier of its own before the projection to the text space).
    """

    frames_per_segment = 1

    def __init__(self, tower: Tower, num_classes: int, feature: Feature = "class_token", dropout: float = 0.0):
        super().__init__()
        tower.require(feature, "network.options.feature")
        self.feature = feature
        self.tower = tower
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(tower.width, num_classes)

    @property
    def in_clip_space(self) -> bool:
        """Whether CLIP projects such features to the space of its texts."""
        return self.feature == "class_token"

    def trainable_modules(self) -> dict[str, nn.Module]:
        """Everything that is trained, by name."""
        return {"head": self.head}

    def trainable_layers(self) -> list[list[nn.Module]]:
        """The same from input to classifier: one layer."""
        return [[self.head]]

    @torch.no_grad()
    def frozen_features(self, video: Tensor) -> Tensor:
        """What no training changes: (B, T, 3, height, width) -> (B, D)."""
        x = self.tower.embed(self.tower.patchify(video.flatten(0, 1)))  # (B*T, 1 + N, D)
        for block in self.tower.blocks:
            x = block.run(x)
        return self.tower.read(x, self.feature).unflatten(0, video.shape[:2]).mean(1)  # (B*T, D) -> (B, D)

    def from_frozen(self, features: Tensor) -> Tensor:
        """The rest: (B, D) -> logits (B, K)."""
        return self.head(self.dropout(features))

    def features(self, video: Tensor) -> Tensor:
        """What the classifier sees: (B, T, 3, height, width) -> (B, D)."""
        return self.frozen_features(video)

    def forward(self, video: Tensor) -> Tensor:
        """Of a video, or of what `frozen_features` gave of it."""
        return self.from_frozen(video if video.ndim == 2 else self.frozen_features(video))


def build(config: Config, tower: Tower, options: Options) -> LinearProbe:
    """The method as a configuration describes it. Raises ConfigError for network.recompute without a tuned text tower."""
    network = config.network
    if network.recompute and not (network.head == "text" and network.text.tuned == "tower"):
        raise ConfigError(
            "network.recompute: linear_probe keeps no activations of blocks that could be computed again, "
            "but for those of a text tower (network.text.tuned: tower)"
        )
    return LinearProbe(tower, config.data.num_classes, options.feature, network.drop_fc)
