"""Full fine-tuning: all of CLIP's vision tower is tuned, and a classifier. One method, one file; a point of reference.

Letters: B clips, T frames, N patch tokens, D the tower's width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip.towers.base import Block, Feature, Tower
from configs.schema import Config
from models.parameters import Origin


@dataclass(frozen=True)
class Options:
    """`network.options` of this method."""

    feature: Feature = "class_token"


class FullFinetune(nn.Module):
    """CLIP frame by frame, averaged over frames, and a classifier; nothing is frozen, nothing looks across frames.

    The tower stays in eval mode, in which CLIP, without dropout and BatchNorm, computes what it does in training.

    Args:
        tower: CLIP. num_classes: K.
        feature: a frame's class token, or the mean of all its tokens, behind the last norm; averaged over frames.
        dropout: before the classifier.
        recompute: run each block again in backward instead of keeping its activations.

    Shape: video (B, T, 3, height, width), normalised, any T -> logits (B, K).
    """

    frames_per_segment = 1

    def __init__(self, tower: Tower, num_classes: int, feature: Feature = "class_token", dropout: float = 0.0,
                 recompute: bool = False):  # fmt: skip
        super().__init__()
        tower.require(feature, "network.options.feature")
        self.feature, self.recompute = feature, recompute
        self.tower = tower
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(tower.width, num_classes)

    @property
    def in_clip_space(self) -> bool:
        """Whether CLIP projects such features to the space of its texts."""
        return self.feature == "class_token"

    def trainable_modules(self) -> dict[str, nn.Module | nn.Parameter]:
        """Everything that is trained, by name."""
        return {
            **self.tower.embedding(),
            "blocks": self.tower.block_modules,
            "final_norm": self.tower.final_norm,
            "head": self.head,
        }

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """The same from input to classifier: all of the embedding, each block, the last norm, the head."""
        blocks = [[block.module] for block in self.tower.blocks]
        return [list(self.tower.embedding().values()), *blocks, [self.tower.final_norm], [self.head]]

    def features(self, video: Tensor) -> Tensor:
        """What the classifier sees: (B, T, 3, height, width) -> (B, D)."""
        x = self.tower.embed(self.tower.patchify(video.flatten(0, 1)))  # (B*T, 1 + N, D)
        for block in self.tower.blocks:
            if self.recompute and self.training:
                x = checkpoint(_run, block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = _run(block, x)
        return self.tower.read(x, self.feature).unflatten(0, video.shape[:2]).mean(1)  # (B*T, D) -> (B, D)

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(video)))


def _run(block: Block, x: Tensor) -> Tensor:
    return block.transform(block.attend(x))


def build(config: Config, tower: Tower, options: Options) -> FullFinetune:
    """The method as a configuration describes it."""
    network = config.network
    return FullFinetune(tower, config.data.num_classes, options.feature, network.drop_fc, network.recompute)
