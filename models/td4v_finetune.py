"""TD4V fine-tuning: TD4V modules inside the blocks of a frozen CLIP."""

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
from clip.towers.build import build_tower
from configs.schema import Config, ConfigError, NetworkConfig, Ratio, training_only
from models.parameters import Origin

logger = logging.getLogger("td4v")

# The halves of a block that have a TD4V before them.
PLACEMENTS = {"before_attention": ("attention",), "before_mlp": ("mlp",), "both": ("attention", "mlp")}


@dataclass(frozen=True)
class Options:
    """`network.options` of td4v_finetune. The defaults give the paper's 2.14 M trainable parameters."""

    placement: Literal["before_attention", "before_mlp", "both"] = "before_attention"
    mode: Literal["FC", "CNN"] = "FC"
    ratio: Ratio = Ratio(1 / 12)
    feature: Feature = "class_token"
    zero_init: bool = training_only(True)
    temporal_embedding: bool = True


class TD4VFinetune(nn.Module):
    """A frozen tower with residual TD4V modules on its patch tokens, a temporal embedding, and a classifier.

    The authors did not publish this model. Placement, mode, ratio and feature are INFERRED from the paper's count: for
    CLIP ViT-B/16, T = 8 and 51 classes the defaults give 2,139,711 trainable parameters, the paper's 2.14 M.

    Args:
        tower: the frozen image tower of width D. Gradients flow through it.
        num_classes: K.
        frames: T.
        placement: where TD4V stands in each block: before the attention, before the MLP, or both. Patch tokens after
            the last attention do not reach the class token: with that feature, the last TD4V before an MLP gets no
            gradient.
        mode, ratio, zero_init: see TD4V. With zero_init the model equals the frozen tower at step 0.
        feature: a frame's class token after the last norm, or the mean of all its tokens; averaged over frames.
        temporal_embedding: whether (T, D) parameters, 0 at step 0, are added to the tokens before the first block.
        dropout: probability before the classifier.
        recompute: save only the input of each block for backward.

    Shape: video (B, T, 3, height, width), normalised -> logits (B, K).

    Source: the paper's section on fine-tuning.
    """

    frames_per_segment = 1

    def __init__(
        self,
        tower: Tower,
        *,
        num_classes: int,
        frames: int,
        placement: Literal["before_attention", "before_mlp", "both"] = "before_attention",
        mode: Literal["FC", "CNN"] = "FC",
        ratio: float = 1 / 12,
        feature: Feature = "class_token",
        zero_init: bool = True,
        temporal_embedding: bool = True,
        dropout: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        tower.require(feature, "network.options.feature")
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        self.frames, self.feature, self.recompute = frames, feature, recompute
        self.in_clip_space = feature == "class_token"
        self.tower = tower
        self.td4v = nn.ModuleDict(
            {
                half: nn.ModuleList(TD4V(tower.width, ratio, mode, zero_init) for _ in tower.blocks)
                for half in PLACEMENTS[placement]
            }
        )
        self.temporal_embedding = nn.Parameter(torch.zeros(frames, tower.width)) if temporal_embedding else None
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(tower.width, num_classes)

    def trainable_modules(self) -> dict[str, nn.Module | nn.Parameter]:
        """The TD4V modules, the temporal embedding and the classifier."""
        modules = {"td4v": self.td4v, "temporal_embedding": self.temporal_embedding, "head": self.head}
        return {name: module for name, module in modules.items() if module is not None}

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """From input to output: one layer a block, the first with the temporal embedding, then the classifier."""
        layers = [list(modules) for modules in zip(*self.td4v.values(), strict=True)]
        if self.temporal_embedding is not None:
            layers[0].insert(0, self.temporal_embedding)
        return [*layers, [self.head]]

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(video)))

    def features(self, video: Tensor) -> Tensor:
        """The input of the classifier: (B, T, 3, height, width) -> (B, D)."""
        B, T = video.shape[:2]
        if T != self.frames:
            raise ValueError(f"the model was built for {self.frames} frames and got {T}")
        x = self.tower.embed(self.tower.patchify(video.flatten(0, 1)))  # (B*T, L, D)
        if self.temporal_embedding is not None:
            x = (x.unflatten(0, (B, T)) + self.temporal_embedding.to(x.dtype)[:, None]).flatten(0, 1)
        for index in range(len(self.tower.blocks)):
            if self.recompute and self.training:
                td4v = nn.ModuleList(modules[index] for modules in self.td4v.values())
                x = recomputed(td4v, self.run_block, index, x)
            else:
                x = self.run_block(index, x)
        return self.tower.read(x, self.feature).unflatten(0, (B, T)).mean(1)  # (B*T, D) -> (B, D)

    def run_block(self, index: int, x: Tensor) -> Tensor:
        """A block with its TD4V: (B*T, L, D) -> (B*T, L, D), or (B*T, 1, D) if only the class token is read."""
        block, is_last = self.tower.blocks[index], index == len(self.tower.blocks) - 1
        class_token_only = is_last and self.feature == "class_token" and "mlp" not in self.td4v
        if "attention" in self.td4v:
            x = self.add_td4v(self.td4v["attention"][index], x)
        x = block.attend(x, queries=1 if class_token_only else None)
        if "mlp" in self.td4v:
            x = self.add_td4v(self.td4v["mlp"][index], x)
        return block.transform(x)

    def add_td4v(self, td4v: nn.Module, x: Tensor) -> Tensor:
        """x + TD4V(x) for the patch tokens, the others unchanged: (B*T, L, D) -> (B*T, L, D)."""
        patches = x[:, self.tower.prefix :]  # (B*T, N, D)
        volume = patches.unflatten(1, self.tower.grid).unflatten(0, (-1, self.frames))  # (B, T, H, W, D)
        return add_to_patches(x, td4v(volume).flatten(2, 3).flatten(0, 1))  # the branch as (B*T, N, D)


def build(config: Config, options: Options) -> TD4VFinetune:
    """The model of a configuration. `DA_ratio` and `sample_mode` describe side-tuning and are not read.

    Raises:
        ConfigError: a ratio that leaves TD4V no channels.
    """
    network, default = config.network, NetworkConfig()
    for key, option in (("DA_ratio", "ratio"), ("sample_mode", "mode")):
        if getattr(network, key) != getattr(default, key):
            logger.warning("network.%s describes side-tuning: fine-tuning reads network.options.%s", key, option)
    tower = build_tower(config)
    try:
        return TD4VFinetune(
            tower,
            num_classes=config.data.num_classes,
            frames=config.data.num_segments,
            placement=options.placement,
            mode=options.mode,
            ratio=options.ratio,
            feature=options.feature,
            zero_init=options.zero_init,
            temporal_embedding=options.temporal_embedding,
            dropout=network.drop_fc,
            recompute=network.recompute,
        )
    except TowerError:
        raise
    except ValueError as error:
        raise ConfigError(f"network.options.ratio: {error}") from None
