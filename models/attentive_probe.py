"""An attentive probe: one learned query attends to all frozen tokens of a clip. A point of reference for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from clip.towers.base import Tower
from clip.towers.build import build_tower
from configs.schema import Config, ConfigError
from models.parameters import Origin


@dataclass(frozen=True)
class Options:
    """`network.options` of attentive_probe."""

    heads: Optional[int] = None  # of the attention; divides the tower's width; null: width // 64
    temporal_embedding: bool = True  # without it the probe does not see the order of frames


class TokenPooling(nn.Module):
    """Cross-attention of one learned query, with a residual and an MLP.

        x = query + out(attention(query, tokens));  x + MLP(norm(x))

    No key and no value of a token is computed: of each head, query . (K token) = (K' query) . token, and the weighted
    sum of values is V times the weighted sum of tokens.

    Args:
        width: D.
        heads: of the attention; must divide D.

    Shape: tokens (B, S, D), S of any number -> (B, D).

    Source: the attentive probe of Bardes et al. 2024 (arXiv 2404.08471), section 4; without a norm of its own on the
    tokens, which the tower's last norm has normalised.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(width))
        self.key = nn.Linear(width, width, bias=False)  # a bias would add the same to all scores of a head
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (x.unflatten(0, (self.heads, -1)) for x in (self.query, self.key.weight, self.value.weight))
        asked = torch.einsum("hd,hdD->hD", query, key) * query.shape[1] ** -0.5
        weights = (tokens @ asked.mT).softmax(1)  # (B, S, heads)
        pooled = weights.mT @ tokens  # (B, heads, D)
        values = torch.einsum("bhD,hdD->bhd", pooled, value).flatten(1) + self.value.bias  # (B, D)
        x = self.query + self.out(values)
        return x + self.mlp(self.norm(x))


class AttentiveProbe(nn.Module):
    """The frozen tower frame by frame, without gradients, a learned query on all tokens, and a linear classifier.

    Args:
        tower: a frozen image tower of width D.
        num_classes: K.
        frames: T.
        heads: of the attention; must divide D.
        temporal_embedding: whether a learned vector a frame, 0 at first, is added to the tokens.
        dropout: probability before the classifier.

    Shape: video (B, T, 3, height, width), normalised -> logits (B, K).

    Source: see TokenPooling.
    """

    frames_per_segment = 1

    def __init__(
        self,
        tower: Tower,
        *,
        num_classes: int,
        frames: int,
        heads: int,
        temporal_embedding: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        self.tower, self.frames = tower, frames
        self.temporal_embedding = nn.Parameter(torch.zeros(frames, tower.width)) if temporal_embedding else None
        self.pooling = TokenPooling(tower.width, heads)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(tower.width, num_classes)

    def trainable_modules(self) -> dict[str, nn.Module | nn.Parameter]:
        """The temporal embedding, the pooling, the classifier."""
        embedding = {} if self.temporal_embedding is None else {"temporal_embedding": self.temporal_embedding}
        return {**embedding, "pooling": self.pooling, "head": self.head}

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """From input to output: the temporal embedding with the pooling, the classifier."""
        *first, head = self.trainable_modules().values()
        return [first, [head]]

    def forward(self, video: Tensor) -> Tensor:
        """Logits of a video, or of what `frozen_features` gives for it (B, T*L*D)."""
        return self.from_frozen(video) if video.ndim == 2 else self.head(self.dropout(self.features(video)))

    def features(self, video: Tensor) -> Tensor:
        """The input of the classifier: (B, T, 3, height, width) -> (B, D)."""
        return self.pool(self.frozen_features(video))

    @torch.no_grad()
    def frozen_features(self, video: Tensor) -> Tensor:
        """All tokens after the last norm, which training does not change: (B, T, 3, height, width) -> (B, T*L*D)."""
        x = self.tower.embed(self.tower.patchify(video.flatten(0, 1)))  # (B*T, L, D)
        for block in self.tower.blocks:
            x = block.run(x)
        return self.tower.final_norm(x).reshape(len(video), -1)

    def from_frozen(self, features: Tensor) -> Tensor:
        """The trainable part: (B, T*L*D) -> logits (B, K)."""
        return self.head(self.dropout(self.pool(features)))

    def pool(self, features: Tensor) -> Tensor:
        """(B, T*L*D) -> (B, D)."""
        tokens = features.unflatten(1, (self.frames, -1, self.tower.width))  # (B, T, L, D)
        if self.temporal_embedding is not None:
            tokens = tokens + self.temporal_embedding.unsqueeze(1)
        return self.pooling(tokens.flatten(1, 2))


def build(config: Config, options: Options) -> AttentiveProbe:
    """The model of a configuration.

    Raises:
        ConfigError: network.recompute, which would save nothing; heads that do not divide the tower's width.
    """
    if config.network.recompute:
        raise ConfigError("network.recompute: attentive_probe saves no activations of blocks for backward")
    tower = build_tower(config)
    heads = max(1, tower.width // 64) if options.heads is None else options.heads
    if heads < 1 or tower.width % heads:
        raise ConfigError(f"network.options.heads: {heads} does not divide the width of {tower.name}, {tower.width}")
    return AttentiveProbe(
        tower,
        num_classes=config.data.num_classes,
        frames=config.data.num_segments,
        heads=heads,
        temporal_embedding=options.temporal_embedding,
        dropout=config.network.drop_fc,
    )
