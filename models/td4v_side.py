"""TD4V side-tuning: a pyramid side network with TD4V beside a frozen CLIP. One method, one file.

Letters: B clips, T frames, H x W the patch grid, D the tower's width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clip.layers import recomputed
from clip.published import from_authors, is_authors_layout
from clip.side_network import SideNetwork
from clip.towers.base import Feature, Tower, TowerError
from configs.schema import Config, ConfigError
from models.parameters import Origin


@dataclass(frozen=True)
class Options:
    """`network.options` of this method: the temporal parts, each of which can be turned off to see what it gives."""

    td4v: bool = True
    stem_kernel: Literal[1, 3] = 3  # frames that the stem convolution sees
    token_shift: bool = True
    temporal_embedding: bool = True
    token: Feature = "class_token"  # what stands for a frame in the side blocks' attention


class TD4VSide(nn.Module):
    """The frozen tower runs without autograd; its features feed the side network, which alone is tuned.

    Args:
        tower: frozen CLIP. num_classes: K. frames: T. widths: side widths, one a tower block.
        mlp_ratio, ratio, mode, td4v, stem_kernel, token_shift, temporal_embedding: see SideNetwork.
        dropout: before the classifier. recompute: keep only the input of each level of the side network.
        token: what the side blocks' attention looks at beside the patches: the trunk's class token, or, for trunks without
            one, the mean of its patch tokens.

    Shape: video (B, T, 3, height, width), normalised -> logits (B, K).

    Raises:
        ValueError: not as many widths as tower blocks; clips of another length than T; a training batch of one clip (the last BatchNorm
            followed by the mean would be constant) without synchronised BatchNorm over several processes.

    Source: paper section on side-tuning; owlholy/TD4V clip/VisualTransformer.py, VisualTransformer.
    """

    frames_per_segment = 1

    def __init__(self, tower: Tower, num_classes: int, frames: int, widths: Sequence[int], mlp_ratio: float = 1.0,
                 ratio: float = 1 / 6, mode: Literal["FC", "CNN"] = "CNN", dropout: float = 0.0, td4v: bool = True,
                 stem_kernel: int = 3, token_shift: bool = True, temporal_embedding: bool = True, recompute: bool = False,
                 token: Feature = "class_token"):  # fmt: skip
        super().__init__()
        if len(widths) != len(tower.blocks):
            raise ValueError(f"{len(widths)} side widths for {len(tower.blocks)} blocks of the tower")
        tower.require(token, "network.options.token")
        self.frames, self.recompute, self.token = frames, recompute, token
        self.tower = tower
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        self.side = SideNetwork(tower.width, tower.patch_size, frames, widths, mlp_ratio, ratio, mode, td4v,
                                stem_kernel, token_shift, temporal_embedding)  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def trainable_modules(self) -> dict[str, nn.Module]:
        """Everything that is trained, by name."""
        return {"side": self.side, "head": self.head}

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """The same from input to classifier: stem, levels of the pyramid, last norm, head."""
        return [[part] for part in (self.side.stem, *self.side.layers, self.side.norm, self.head)]

    def tokens(self, patches: Tensor) -> Iterator[Tensor]:
        """What each block of the frozen tower gives, as it is asked for: (B*T, N, 3*P*P) -> each (B*T, 1 + N, D)."""
        with torch.no_grad():
            x = self.tower.embed(patches)
        for block in self.tower.blocks:
            x = block.run(x)
            yield self.tower.without_registers(x, self.token)

    def tune(self, patches: Tensor, tokens: Iterable[Tensor], clips: int) -> Tensor:
        """What the classifier sees, from the patches' pixels and the tower's tokens: -> (B, n of the last level)."""
        if self.training and clips == 1 and type(self.side.norm) is nn.BatchNorm1d:
            raise ValueError(
                "side-tuning needs at least two clips a process in training (data.batch_size), or network.sync_bn over several processes: the features of one clip are constant behind the last BatchNorm"
            )
        side = self.side.stem(patches.view(clips, self.frames, *self.tower.grid, -1))  # (B, T, H, W, n)
        for layer, x in zip(self.side.layers, tokens, strict=True):
            side = recomputed(layer, layer, side, x) if self.recompute and self.training else layer(side, x)
        return self.side.pool(side)

    def features(self, video: Tensor) -> Tensor:
        """What the classifier sees: (B, T, 3, height, width) -> (B, n of the last level)."""
        patches = self._patches(video)
        return self.tune(patches, self.tokens(patches), len(video))

    def frozen_features(self, video: Tensor) -> Tensor:
        """All that does not change in training: patches and tokens of each layer, (B, T, 3, height, width) -> (B, F)."""
        patches = self._patches(video)
        return torch.cat([part.reshape(len(video), -1) for part in (patches, *self.tokens(patches))], 1)

    def from_frozen(self, features: Tensor) -> Tensor:
        """What `frozen_features` gave (B, F) -> logits (B, K). Raises ValueError for another F."""
        (H, W), images = self.tower.grid, len(features) * self.frames
        sizes = [self.frames * H * W * 3 * self.tower.patch_size**2]
        sizes += [self.frames * (1 + H * W) * self.tower.width] * len(self.side.layers)
        if features.shape[1:] != (sum(sizes),):
            raise ValueError(f"the model's frozen features are {sum(sizes)} numbers a clip, not {features.shape[1]}")
        patches, *tokens = features.split(sizes, 1)
        tokens = [x.reshape(images, 1 + H * W, -1) for x in tokens]
        return self._classify(self.tune(patches.reshape(images, H * W, -1), tokens, len(features)))

    def forward(self, video: Tensor) -> Tensor:
        """A video, or in its place what `frozen_features` gave for it."""
        return self.from_frozen(video) if video.ndim == 2 else self._classify(self.features(video))

    def _patches(self, video: Tensor) -> Tensor:
        if video.shape[1] != self.frames:
            raise ValueError(f"the model was built for {self.frames} frames and got {video.shape[1]}")
        return self.tower.patchify(video.flatten(0, 1))  # (B*T, N, 3*P*P)

    def _classify(self, features: Tensor) -> Tensor:
        return self.head(self.dropout(features))


def build(config: Config, tower: Tower, options: Options) -> TD4VSide:
    """The method as a configuration describes it. Raises ConfigError for sizes that do not fit."""
    network = config.network
    try:
        return TD4VSide(
            tower, config.data.num_classes, config.data.num_segments, network.pyramid.n_embs,
            network.pyramid.mlp_ratio, network.DA_ratio, network.sample_mode, network.drop_fc, options.td4v,
            options.stem_kernel, options.token_shift, options.temporal_embedding, network.recompute, options.token,
        )  # fmt: skip
    except TowerError:
        raise
    except ValueError as error:
        key = "network.DA_ratio" if "ratio" in str(error) else "network.pyramid.n_embs"
        raise ConfigError(f"{key}: {error}") from None


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The authors' weights by our names, or None if these are not theirs. Raises ValueError for a strange key.

    Their tower may lack its last norm, which nothing here reads: it is then one that does nothing.

    Args:
        state_dict: see clip/authors.py.
    """
    if not is_authors_layout(state_dict):
        return None
    values = from_authors(state_dict)
    for part, fill in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
        if (like := values.get(f"tower.visual.ln_pre.{part}")) is not None:
            values.setdefault(f"tower.visual.ln_post.{part}", fill(like))
    return values
