"""TD4V fine-tuning: a frozen CLIP with TD4V inside its blocks. One method, one file.

Letters: B clips, T frames, H x W the patch grid, N = H*W, L tokens with the class token, D the tower's width, K classes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clip.adapter import TD4V
from clip.layers import recomputed
from clip.ops import add_to_patches
from clip.towers.base import Feature, Tower, TowerError
from configs.schema import Config, ConfigError, NetworkConfig, Ratio
from models.parameters import Origin

logger = logging.getLogger("td4v")

PLACEMENTS = {"before_attention": (True, False), "before_mlp": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class Options:
    """`network.options` of this method. The defaults are what gives the paper's 2.14 M."""

    placement: Literal["before_attention", "before_mlp", "both"] = "before_attention"
    mode: Literal["FC", "CNN"] = "FC"
    ratio: Ratio = Ratio(1 / 12)
    feature: Feature = "class_token"
    zero_init: bool = True
    temporal_embedding: bool = True


class TD4VFinetune(nn.Module):
    """Residual TD4V modules on the patch tokens inside the frozen blocks, a temporal embedding, and a classifier.

    The authors never published this half. Placement, mode, ratio and feature are INFERRED from the paper's count:
    for CLIP ViT-B/16, T = 8 and 51 classes the defaults give 2,139,711 tuned parameters, the paper's 2.14 M. With
    zero_init the model equals frozen CLIP at step 0 (the temporal embedding starts at 0 as well).

    Args:
        tower: frozen CLIP. num_classes: K. frames: T.
        placement: before each block's attention, its MLP, or both (patch tokens behind the last attention do not
            reach the class token, so with that feature the last module before an MLP gets no gradient). mode, ratio, zero_init: see TD4V.
        feature: a frame's class token, or the mean of all its tokens, behind the last norm; averaged over frames.
        temporal_embedding: (T, D), added to every token of a frame before the first block.
        dropout: before the classifier. recompute: keep only the input of each block.

    Shape: video (B, T, 3, height, width), normalised -> logits (B, K).

    Source: paper section on fine-tuning.
    """

    frames_per_segment = 1

    def __init__(self, tower: Tower, num_classes: int, frames: int, placement: str = "before_attention",
                 mode: Literal["FC", "CNN"] = "FC", ratio: float = 1 / 12, feature: Feature = "class_token",
                 zero_init: bool = True, temporal_embedding: bool = True, dropout: float = 0.0,
                 recompute: bool = False):  # fmt: skip
        super().__init__()
        tower.require(feature, "network.options.feature")
        self.frames, self.feature, self.recompute = frames, feature, recompute
        self.tower = tower
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        places = zip(("attention", "mlp"), PLACEMENTS[placement], strict=True)
        self.td4v = nn.ModuleDict(
            {
                place: nn.ModuleList(TD4V(tower.width, ratio, mode, zero_init) for _ in tower.blocks)
                for place, used in places
                if used
            }
        )
        self.temporal_embedding = nn.Parameter(torch.zeros(frames, tower.width)) if temporal_embedding else None
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(tower.width, num_classes)

    @property
    def in_clip_space(self) -> bool:
        """Whether CLIP projects such features to the space of its texts."""
        return self.feature == "class_token"

    def trainable_modules(self) -> dict[str, nn.Module | nn.Parameter]:
        """Everything that is trained, by name."""
        tuned = {"td4v": self.td4v, "temporal_embedding": self.temporal_embedding, "head": self.head}
        return {name: module for name, module in tuned.items() if module is not None}

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """The same from input to classifier: one layer a block, the temporal embedding with the first, then the head."""
        layers = [list(modules) for modules in zip(*self.td4v.values(), strict=True)]
        if self.temporal_embedding is not None:
            layers[0].insert(0, self.temporal_embedding)
        return [*layers, [self.head]]

    def adapt(self, place: str, index: int, x: Tensor, frames: int) -> Tensor:
        """Add TD4V to the patch tokens, if there is one at this place: (B*T, L, D) -> the same."""
        if place not in self.td4v:
            return x
        volume = x[:, self.tower.prefix :].unflatten(1, self.tower.grid).unflatten(0, (-1, frames))  # (B, T, H, W, D)
        branch = self.td4v[place][index](volume).flatten(2, 3).flatten(0, 1)  # (B*T, N, D)
        return add_to_patches(x, branch)

    def run_block(self, index: int, x: Tensor, frames: int) -> Tensor:
        """Block `index` with its TD4V: (B*T, L, D) -> the same, or (B*T, 1, D) where only the class token is read."""
        last = index == len(self.tower.blocks) - 1 and self.feature == "class_token" and "mlp" not in self.td4v
        block = self.tower.blocks[index]
        x = block.attend(self.adapt("attention", index, x, frames), queries=1 if last else None)
        return block.transform(self.adapt("mlp", index, x, frames))

    def _part(self, index: int) -> nn.ModuleList:
        return nn.ModuleList(modules[index] for modules in self.td4v.values())

    def features(self, video: Tensor) -> Tensor:
        """What the classifier sees: (B, T, 3, height, width) -> (B, D)."""
        B, T = video.shape[:2]
        if T != self.frames:
            raise ValueError(f"the model was built for {self.frames} frames and got {T}")
        x = self.tower.embed(self.tower.patchify(video.flatten(0, 1)))  # (B*T, L, D)
        if self.temporal_embedding is not None:
            x = (x.unflatten(0, (B, T)) + self.temporal_embedding.to(x.dtype)[:, None]).flatten(0, 1)
        for index in range(len(self.tower.blocks)):
            if self.recompute and self.training:
                x = recomputed(self._part(index), self.run_block, index, x, T)
            else:
                x = self.run_block(index, x, T)
        return self.tower.read(x, self.feature).unflatten(0, (B, T)).mean(1)  # (B*T, D) -> (B, D)

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(video)))


def build(config: Config, tower: Tower, options: Options) -> TD4VFinetune:
    """The method as a configuration describes it. `DA_ratio` and `sample_mode` describe side-tuning, not this."""
    usual = NetworkConfig()
    for key, own in (("DA_ratio", "ratio"), ("sample_mode", "mode")):
        if getattr(config.network, key) != getattr(usual, key):
            logger.warning("network.%s describes side-tuning: fine-tuning reads network.options.%s", key, own)
    try:
        return TD4VFinetune(
            tower, config.data.num_classes, config.data.num_segments, options.placement, options.mode, options.ratio,
            options.feature, options.zero_init, options.temporal_embedding, config.network.drop_fc, config.network.recompute,
        )  # fmt: skip
    except TowerError:
        raise
    except ValueError as error:
        raise ConfigError(f"network.options.ratio: {error}") from None
