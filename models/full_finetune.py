"""Full fine-tuning of CLIP's vision tower, a point of reference for the other models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip.towers.base import Block, Feature, Tower
from clip.towers.build import build_tower
from configs.schema import Config
from models.parameters import Origin


@dataclass(frozen=True)
class Options:
    """`network.options` of full_finetune."""

    feature: Feature = "class_token"


class FullFinetune(nn.Module):
    """The tower frame by frame, the mean over frames, and a classifier. Everything is trainable, nothing sees time.

    The tower stays in eval mode: without dropout and BatchNorm, it computes the same in training.

    Args:
        tower: an image tower of width D.
        num_classes: K.
        feature: a frame's class token after the last norm, or the mean of all its tokens.
        dropout: probability before the classifier.
        recompute: run each block again in backward instead of saving its activations.

    Shape: video (B, T, 3, height, width), normalised, any T -> logits (B, K).
    """

    frames_per_segment = 1

    def __init__(
        self,
        tower: Tower,
        *,
        num_classes: int,
        feature: Feature = "class_token",
        dropout: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        tower.require(feature, "network.options.feature")
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        self.feature, self.recompute = feature, recompute
        self.in_clip_space = feature == "class_token"
        self.tower = tower
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(tower.width, num_classes)

    def trainable_modules(self) -> dict[str, nn.Module | nn.Parameter]:
        """All parameters, by name."""
        return {
            **self.tower.embedding(),
            "blocks": self.tower.block_modules,
            "final_norm": self.tower.final_norm,
            "head": self.head,
        }

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """From input to output: the embedding, each block, the last norm, the classifier."""
        blocks = [[block.module] for block in self.tower.blocks]
        return [list(self.tower.embedding().values()), *blocks, [self.tower.final_norm], [self.head]]

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(video)))

    def features(self, video: Tensor) -> Tensor:
        """The input of the classifier: (B, T, 3, height, width) -> (B, D)."""
        x = self.tower.embed(self.tower.patchify(video.flatten(0, 1)))  # (B*T, L, D)
        for block in self.tower.blocks:
            if self.recompute and self.training:
                x = checkpoint(_run, block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = _run(block, x)
        return self.tower.read(x, self.feature).unflatten(0, video.shape[:2]).mean(1)  # (B*T, D) -> (B, D)


def _run(block: Block, x: Tensor) -> Tensor:
    return block.transform(block.attend(x))


def build(config: Config, options: Options) -> FullFinetune:
    """The model of a configuration."""
    return FullFinetune(
        build_tower(config),
        num_classes=config.data.num_classes,
        feature=options.feature,
        dropout=config.network.drop_fc,
        recompute=config.network.recompute,
    )
