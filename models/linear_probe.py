"""A linear classifier on frozen image features, a point of reference for the other models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip.towers.base import Feature, Tower
from clip.towers.build import build_tower
from configs.schema import Config, ConfigError
from models.parameters import Origin


@dataclass(frozen=True)
class Options:
    """`network.options` of linear_probe."""

    feature: Feature = "class_token"


class LinearProbe(nn.Module):
    """The frozen tower frame by frame, without gradients, the mean over frames, and a trainable linear classifier.

    Args:
        tower: a frozen image tower of width D.
        num_classes: K.
        feature: a frame's class token after the last norm, or the mean of all its tokens.
        dropout: probability before the classifier.

    Shape: video (B, T, 3, height, width), normalised, any T -> logits (B, K).

    Source: Radford et al. 2021, section 3.2. The classifier stands before CLIP's projection to the text space.
    """

    frames_per_segment = 1

    def __init__(self, tower: Tower, *, num_classes: int, feature: Feature = "class_token", dropout: float = 0.0):
        super().__init__()
        tower.require(feature, "network.options.feature")
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        self.feature, self.in_clip_space = feature, feature == "class_token"
        self.tower = tower
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(tower.width, num_classes)

    def trainable_modules(self) -> dict[str, nn.Module]:
        """The classifier."""
        return {"head": self.head}

    def trainable_layers(self) -> list[list[nn.Module]]:
        """One layer, the classifier."""
        return [[self.head]]

    def forward(self, video: Tensor) -> Tensor:
        """Logits of a video, or of what `frozen_features` gives for it (B, D)."""
        return self.from_frozen(video if video.ndim == 2 else self.features(video))

    def features(self, video: Tensor) -> Tensor:
        """The input of the classifier: (B, T, 3, height, width) -> (B, D)."""
        return self.frozen_features(video)

    @torch.no_grad()
    def frozen_features(self, video: Tensor) -> Tensor:
        """The part that training does not change: (B, T, 3, height, width) -> (B, D)."""
        x = self.tower.embed(self.tower.patchify(video.flatten(0, 1)))  # (B*T, L, D)
        for block in self.tower.blocks:
            x = block.run(x)
        return self.tower.read(x, self.feature).unflatten(0, video.shape[:2]).mean(1)  # (B*T, D) -> (B, D)

    def from_frozen(self, features: Tensor) -> Tensor:
        """The trainable part: (B, D) -> logits (B, K)."""
        return self.head(self.dropout(features))


def build(config: Config, options: Options) -> LinearProbe:
    """The model of a configuration. Raises ConfigError for network.recompute without a trainable text tower."""
    network = config.network
    if network.recompute and not (network.head == "text" and network.text.tuned == "tower"):
        raise ConfigError(
            "network.recompute: linear_probe saves no activations of blocks for backward, "
            "except those of a text tower (network.text.tuned: tower)"
        )
    return LinearProbe(
        build_tower(config),
        num_classes=config.data.num_classes,
        feature=options.feature,
        dropout=network.drop_fc,
    )
