"""TD4V side-tuning: a pyramid side network with TD4V beside a frozen CLIP."""

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
from clip.towers.build import build_tower
from configs.schema import Config, ConfigError
from models.parameters import Origin


@dataclass(frozen=True)
class Options:
    """`network.options` of td4v_side: its temporal parts, which can be switched off one by one."""

    td4v: bool = True
    stem_kernel: Literal[1, 3] = 3  # frames that the stem convolution reads
    token_shift: bool = True
    temporal_embedding: bool = True
    token: Feature = "class_token"  # the token that stands for a frame in the side blocks' attention


class TD4VSide(nn.Module):
    """A frozen tower that runs without gradients, and a trainable side network on the features of its blocks.

    Args:
        tower: the frozen image tower of width D.
        num_classes: K.
        frames: T.
        widths: channels of the side network's levels, one level a block of the tower.
        mlp_ratio, ratio, mode, td4v, stem_kernel, token_shift, temporal_embedding: see SideNetwork.
        token: what the side blocks' attention reads beside the patches: the tower's class token, or the mean of its
            patch tokens, for towers without a class token.
        dropout: probability before the classifier.
        recompute: save only the input of each level of the side network for backward.

    Shape: video (B, T, 3, height, width), normalised -> logits (B, K).

    Raises:
        ValueError: another number of widths than of tower blocks; in forward, a clip of another length than T, or one
            clip a process in training without synchronised BatchNorm, whose features the last BatchNorm makes constant.

    Source: the paper's section on side-tuning; owlholy/TD4V clip/VisualTransformer.py, VisualTransformer.
    """

    frames_per_segment = 1

    def __init__(
        self,
        tower: Tower,
        *,
        num_classes: int,
        frames: int,
        widths: Sequence[int],
        mlp_ratio: float = 1.0,
        ratio: float = 1 / 6,
        mode: Literal["FC", "CNN"] = "CNN",
        td4v: bool = True,
        stem_kernel: int = 3,
        token_shift: bool = True,
        temporal_embedding: bool = True,
        token: Feature = "class_token",
        dropout: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        if len(widths) != len(tower.blocks):
            raise ValueError(f"{len(widths)} side widths for {len(tower.blocks)} blocks of the tower")
        tower.require(token, "network.options.token")
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        self.frames, self.recompute, self.token = frames, recompute, token
        self.tower = tower
        self.side = SideNetwork(
            tower_width=tower.width,
            patch_size=tower.patch_size,
            frames=frames,
            widths=widths,
            mlp_ratio=mlp_ratio,
            ratio=ratio,
            mode=mode,
            td4v=td4v,
            stem_kernel=stem_kernel,
            shift=token_shift,
            temporal_embedding=temporal_embedding,
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def trainable_modules(self) -> dict[str, nn.Module]:
        """The side network and the classifier."""
        return {"side": self.side, "head": self.head}

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """From input to output: the stem, the levels of the pyramid, the last norm, the classifier."""
        return [[part] for part in (self.side.stem, *self.side.layers, self.side.norm, self.head)]

    def forward(self, video: Tensor) -> Tensor:
        """Logits of a video, or of what `frozen_features` gives for it (B, F)."""
        return self.from_frozen(video) if video.ndim == 2 else self.head(self.dropout(self.features(video)))

    def features(self, video: Tensor) -> Tensor:
        """The input of the classifier: (B, T, 3, height, width) -> (B, n), n channels of the last level."""
        patches = self.patchify(video)
        return self.run_side_network(patches, self.run_tower(patches))

    def patchify(self, video: Tensor) -> Tensor:
        """(B, T, 3, height, width) -> (B*T, N, 3*P*P)."""
        if video.shape[1] != self.frames:
            raise ValueError(f"the model was built for {self.frames} frames and got {video.shape[1]}")
        return self.tower.patchify(video.flatten(0, 1))

    @property
    def least_clips(self) -> int:
        """Clips that a training batch of a process must have; synchronised BatchNorm sees those of all processes."""
        return 2 if type(self.side.norm) is nn.BatchNorm1d else 1

    def run_tower(self, patches: Tensor) -> Iterator[Tensor]:
        """The output of each block in turn, without gradients: (B*T, N, 3*P*P) -> (B*T, 1 + N, D) a block."""
        with torch.no_grad():
            x = self.tower.embed(patches)
        for block in self.tower.blocks:
            x = block.run(x)
            yield self.tower.without_registers(x, self.token)

    def run_side_network(self, patches: Tensor, tower_tokens: Iterable[Tensor]) -> Tensor:
        """The stem on the pixels, then one level for each block of the tower: (B*T, N, 3*P*P) -> (B, n)."""
        volume = patches.unflatten(1, self.tower.grid).unflatten(0, (-1, self.frames))  # (B, T, H, W, 3*P*P)
        if self.training and len(volume) < self.least_clips:
            raise ValueError(
                "side-tuning needs at least two clips a process in training (data.batch_size), or network.sync_bn over "
                "several processes: the features of one clip are constant after the last BatchNorm"
            )
        x = self.side.stem(volume)  # (B, T, H, W, n)
        for layer, tokens in zip(self.side.layers, tower_tokens, strict=True):
            x = recomputed(layer, layer, x, tokens) if self.recompute and self.training else layer(x, tokens)
        return self.side.pool(x)

    def frozen_features(self, video: Tensor) -> Tensor:
        """The part that training does not change, patches and tower tokens: (B, T, 3, height, width) -> (B, F)."""
        patches = self.patchify(video)
        return torch.cat([part.reshape(len(video), -1) for part in (patches, *self.run_tower(patches))], 1)

    def from_frozen(self, features: Tensor) -> Tensor:
        """The trainable part: (B, F) -> logits (B, K). Raises ValueError for another F."""
        (H, W), images = self.tower.grid, len(features) * self.frames
        sizes = [self.frames * H * W * 3 * self.tower.patch_size**2]
        sizes += [self.frames * (1 + H * W) * self.tower.width] * len(self.side.layers)
        if features.shape[1:] != (sum(sizes),):
            raise ValueError(f"the model's frozen features are {sum(sizes)} numbers a clip, not {features.shape[1]}")
        patches, *tokens = features.split(sizes, 1)
        patches = patches.reshape(images, H * W, -1)  # (B*T, N, 3*P*P)
        tokens = [x.reshape(images, 1 + H * W, -1) for x in tokens]  # (B*T, 1 + N, D) a block
        return self.head(self.dropout(self.run_side_network(patches, tokens)))


def build(config: Config, options: Options) -> TD4VSide:
    """The model of a configuration. Raises ConfigError for sizes that do not fit."""
    network, tower = config.network, build_tower(config)
    try:
        return TD4VSide(
            tower,
            num_classes=config.data.num_classes,
            frames=config.data.num_segments,
            widths=network.pyramid.n_embs,
            mlp_ratio=network.pyramid.mlp_ratio,
            ratio=network.DA_ratio,
            mode=network.sample_mode,
            td4v=options.td4v,
            stem_kernel=options.stem_kernel,
            token_shift=options.token_shift,
            temporal_embedding=options.temporal_embedding,
            token=options.token,
            dropout=network.drop_fc,
            recompute=network.recompute,
        )
    except TowerError:
        raise
    except ValueError as error:
        key = "network.DA_ratio" if "ratio" in str(error) else "network.pyramid.n_embs"
        raise ConfigError(f"{key}: {error}") from None


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The authors' weights under our names, or None if these are not theirs.

    A tower without the last norm, which this model does not use, gets one that changes nothing.

    Args:
        state_dict: see clip/published.py.

    Raises:
        ValueError: a key that the authors' model does not have.
    """
    if not is_authors_layout(state_dict):
        return None
    values = from_authors(state_dict)
    for part, fill in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
        if (like := values.get(f"tower.visual.ln_pre.{part}")) is not None:
            values.setdefault(f"tower.visual.ln_post.{part}", fill(like))
    return values
