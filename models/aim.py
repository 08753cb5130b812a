"""AIM: adapters in a frozen CLIP, whose attention is applied over time and then over space."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clip.layers import recomputed
from clip.ops import gelu_linear
from clip.towers.base import Block, Feature, Tower, TowerError
from clip.towers.build import build_tower
from configs.schema import Config, ConfigError, Ratio, training_only
from models.parameters import Origin

MAX_SEQUENCES = 65_535  # the most that one call of a GPU's attention takes


@dataclass(frozen=True)
class Options:
    """`network.options` of aim. The defaults are those of Kinetics-400; Something-Something has 2 adapters, scale 1."""

    temporal_adapters: Literal[1, 2] = 1  # after the attention over time, or before it too
    scale: float = 0.5  # of the adapter beside the MLP
    drop_path: float = training_only(0.2)  # rate of the last block, rising linearly from 0
    ratio: Ratio = Ratio(1 / 4)
    feature: Feature = "class_token"


class Adapter(nn.Module):
    """Linear D -> d, exact GELU, Linear d -> D, which starts at zero.

    Args:
        width: D.
        ratio: d / D, above 0.
        skip: whether the input is added to the output.

    Shape: (..., D) -> (..., D).

    Raises:
        ValueError: d below 1.
    """

    def __init__(self, width: int, ratio: float = 1 / 4, skip: bool = True):
        super().__init__()
        reduced = int(width * ratio)
        if reduced < 1:
            raise ValueError(f"an adapter of width {width} and ratio {ratio:g} has no channels left")
        self.skip = skip
        self.down = nn.Linear(width, reduced)
        self.up = nn.Linear(reduced, width)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        for value in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(value)

    def forward(self, x: Tensor) -> Tensor:
        branch = gelu_linear(self.down(x), self.up.weight, self.up.bias)
        return x + branch if self.skip else branch


class AIM(nn.Module):
    """A frozen tower with trainable adapters in its blocks, a temporal embedding, and a classifier.

    With A the block's frozen attention, a block computes

        x = x + drop(temporal(A(temporal_in(ln_1 x))))          A over the T frames of each token; temporal_in if there are two
        x = x + spatial(A(ln_1 x))                              A over the L tokens of each frame
        x = x + MLP(ln_2 x) + drop(scale * joint(ln_2 x))

    The adapters `temporal` and `joint` have no skip, the others have one, so the model equals the frozen tower at
    step 0. In training, drop sets the branch of a clip to zero in all of its frames; the authors' code instead draws
    once for each token position, the same for all clips of the batch.

    Args:
        tower: the frozen image tower of width D. Its last norm is trained.
        num_classes: K.
        frames: T.
        temporal_adapters: 1 or 2.
        scale: factor of the joint adapter.
        drop_path: probability of drop in the last block, rising linearly from 0 in the first.
        ratio: d / D of all adapters.
        feature: a frame's class token after the last norm, or the mean of all its tokens; averaged over frames.
        dropout: probability before the classifier.
        recompute: save only the input of each block for backward.

    Shape: video (B, T, 3, height, width), normalised -> logits (B, K).

    Source: Yang et al., ICLR 2023 (arXiv 2302.03024), section 3; taoyang1122/adapt-image-models
    mmaction/models/backbones/vit_clip.py, ViT_CLIP.
    """

    frames_per_segment = 1

    def __init__(
        self,
        tower: Tower,
        *,
        num_classes: int,
        frames: int,
        temporal_adapters: Literal[1, 2] = 1,
        scale: float = 0.5,
        drop_path: float = 0.2,
        ratio: float = 1 / 4,
        feature: Feature = "class_token",
        dropout: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        tower.require(feature, "network.options.feature")
        tower.keep_norms()
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        self.frames, self.scale, self.drop_path = frames, scale, drop_path
        self.feature, self.recompute = feature, recompute
        self.in_clip_space = feature == "class_token"
        self.tower = tower
        skips = {"temporal_in": True, "temporal": False, "spatial": True, "joint": False}
        if temporal_adapters == 1:
            del skips["temporal_in"]
        self.adapters = nn.ModuleList(
            nn.ModuleDict({name: Adapter(tower.width, ratio, skip) for name, skip in skips.items()})
            for _ in tower.blocks
        )
        self.temporal_embedding = nn.Parameter(torch.zeros(frames, tower.width))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(tower.width, num_classes)

    def trainable_modules(self) -> dict[str, nn.Module | nn.Parameter]:
        """The adapters, the temporal embedding, the tower's last norm and the classifier."""
        return {
            "adapters": self.adapters,
            "temporal_embedding": self.temporal_embedding,
            "final_norm": self.tower.final_norm,
            "head": self.head,
        }

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """From input to output: one layer a block, the first with the temporal embedding, the norm, the classifier."""
        blocks: list[list[nn.Module | nn.Parameter]] = [[adapters] for adapters in self.adapters]
        blocks[0].insert(0, self.temporal_embedding)
        return [*blocks, [self.tower.final_norm], [self.head]]

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(video)))

    def features(self, video: Tensor) -> Tensor:
        """The input of the classifier: (B, T, 3, height, width) -> (B, D)."""
        return self.frame_features(video).mean(1)

    def frame_features(self, video: Tensor) -> Tensor:
        """The feature of each frame after the last norm: (B, T, 3, height, width) -> (B, T, D)."""
        B, T = video.shape[:2]
        if T != self.frames:
            raise ValueError(f"the model was built for {self.frames} frames and got {T}")
        embedding = self.temporal_embedding.repeat(B, 1)[:, None]  # (B*T, 1, D)
        x = self.tower.embed(self.tower.patchify(video.flatten(0, 1)), embedding)  # (B*T, L, D)
        for block, adapters, factors in zip(
            self.tower.blocks, self.adapters, self.draw_drops(B, x.device), strict=True
        ):
            if self.recompute and self.training:
                x = recomputed(adapters, self.run_block, block, adapters, x, factors)
            else:
                x = self.run_block(block, adapters, x, factors)
        return self.tower.read(x, self.feature).unflatten(0, (B, T))

    def run_block(self, block: Block, adapters: nn.ModuleDict, x: Tensor, factors: Tensor | None) -> Tensor:
        """A block with its adapters: (B*T, L, D) -> (B*T, L, D), or (B*T, 1, D) if only the class token is read.

        `factors`: an entry of `draw_drops`.
        """
        class_token_only = block is self.tower.blocks[-1] and self.feature == "class_token"
        queries = 1 if class_token_only else None  # the attention is the last to read the other tokens
        x = x + _drop(self.attend_over_time(block, adapters, x), factors, 0)
        y = block.attention(block.norm_attention(x))[:, :queries].contiguous()
        x = x[:, :queries] + adapters["spatial"](y)
        y = block.norm_mlp(x)
        return x + block.mlp(y) + _drop(self.scale * adapters["joint"](y), factors, 1)

    def attend_over_time(self, block: Block, adapters: nn.ModuleDict, x: Tensor) -> Tensor:
        """The branch whose attention is over the frames of each token: (B*T, L, D) -> (B*T, L, D)."""
        L = x.shape[1]
        y = block.norm_attention(x).unflatten(0, (-1, self.frames))  # (B, T, L, D)
        y = y.transpose(1, 2).flatten(0, 1)  # (B*L, T, D)
        if "temporal_in" in adapters:
            y = adapters["temporal_in"](y)
        parts = [block.attention(part, in_space=False) for part in y.split(MAX_SEQUENCES)]
        y = adapters["temporal"](parts[0] if len(parts) == 1 else torch.cat(parts))
        return y.unflatten(0, (-1, L)).transpose(1, 2).flatten(0, 1)  # (B*T, L, D)

    def draw_drops(self, clips: int, device: torch.device) -> list[Tensor | None]:
        """The factors of the temporal and the joint branch, (2, B*T, 1, 1) a block; None where nothing drops."""
        count = len(self.tower.blocks)
        if not self.training or self.drop_path == 0:
            return [None] * count
        rates = torch.linspace(0, self.drop_path, count, device=device)[:, None, None]
        factors = (torch.rand(count, 2, clips, device=device) >= rates) / (1 - rates)
        return list(factors.repeat_interleave(self.frames, 2)[..., None, None])

    def misfit(self, values: Mapping[str, Tensor]) -> str | None:
        """Why weights under our names do not fit, if they have another number of temporal adapters."""
        in_file, in_model = ("adapters.0.temporal_in.up.bias" in keys for keys in (values, self.state_dict()))
        if in_file == in_model or "adapters.0.temporal.up.bias" not in values:
            return None
        count = "two temporal adapters" if in_file else "one temporal adapter"
        return f"has {count} a block, network.options.temporal_adapters is {1 + in_model}"


def _drop(branch: Tensor, factors: Tensor | None, index: int) -> Tensor:
    return branch if factors is None else branch * factors[index].to(branch.dtype)


def build(config: Config, options: Options) -> AIM:
    """The model of a configuration. Raises ConfigError for options out of range."""
    if not 0 <= options.drop_path < 1:
        raise ConfigError(f"network.options.drop_path: must lie in [0, 1), not {options.drop_path:g}")
    tower = build_tower(config)
    try:
        return AIM(
            tower,
            num_classes=config.data.num_classes,
            frames=config.data.num_segments,
            temporal_adapters=options.temporal_adapters,
            scale=options.scale,
            drop_path=options.drop_path,
            ratio=options.ratio,
            feature=options.feature,
            dropout=config.network.drop_fc,
            recompute=config.network.recompute,
        )
    except TowerError:
        raise
    except ValueError as error:
        raise ConfigError(f"network.options.ratio: {error}") from None


# The start of the authors' key names (without `backbone.`) and of ours. The 0 stands for the number of any block.
_ADAPTERS = {"T_Adapter_in": "temporal_in", "T_Adapter": "temporal", "S_Adapter": "spatial", "MLP_Adapter": "joint"}
_FROM_PUBLISHED = {
    "temporal_embedding": "temporal_embedding",
    "cls_head.fc_cls.weight": "head.weight",
    "cls_head.fc_cls.bias": "head.bias",
    **{name: f"tower.visual.{name}" for name in ("class_embedding", "positional_embedding", "conv1.weight")},
    **{f"{name}.": f"tower.visual.{name}." for name in ("ln_pre", "ln_post")},
    **{
        f"transformer.resblocks.0.{part}.": f"tower.visual.transformer.resblocks.0.{part}."
        for part in ("attn", "ln_1", "ln_2", "mlp")
    },
    **{
        f"transformer.resblocks.0.{published}.{published_layer}.": f"adapters.0.{name}.{layer}."
        for published, name in _ADAPTERS.items()
        for published_layer, layer in (("D_fc1", "down"), ("D_fc2", "up"))
    },
}
_TO_PUBLISHED = {name: published for published, name in _FROM_PUBLISHED.items()}


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The authors' weights under our names, or None if these are not theirs.

    Args:
        state_dict: of an mmaction recognizer (`backbone.`, `cls_head.fc_cls.`), or of its ViT_CLIP alone.

    Raises:
        ValueError: a key that the authors' model does not have.
    """
    if not any(re.search(r"\.[ST]_Adapter\.D_fc1\.weight$", key) for key in state_dict):
        return None
    names = {key: _rename(key.removeprefix("backbone."), _FROM_PUBLISHED) for key in state_dict}
    if unknown := [key for key, name in names.items() if name is None]:
        raise ValueError(f"{len(unknown)} keys are not of the authors' AIM (first {', '.join(unknown[:3])})")
    values = {names[key]: value for key, value in state_dict.items()}
    if "temporal_embedding" in values:
        values["temporal_embedding"] = values["temporal_embedding"].squeeze(0)  # (1, T, D) -> (T, D)
    return values


def published_name(key: str) -> str:
    """The authors' name for one of ours; a name that they do not have is unchanged."""
    published = _rename(key, _TO_PUBLISHED)
    if published is None:
        return key
    return published if published.startswith("cls_head.") else f"backbone.{published}"


def _rename(key: str, names: Mapping[str, str]) -> str | None:
    """A key under the other names of a table; None if it is not in the table."""
    block = re.search(r"\.(\d+)\.", key)
    in_block_0 = re.sub(r"\.\d+\.", ".0.", key, count=1)
    for old, new in names.items():
        if in_block_0 == old or (old.endswith(".") and in_block_0.startswith(old)):
            renamed = new + in_block_0.removeprefix(old)
            return renamed.replace(".0.", block[0], 1) if block else renamed
    return None
