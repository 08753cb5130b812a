"""AIM: a frozen CLIP with adapters, whose own attention looks across frames, then across space. One method, one file.

Lives here too: the names of the authors' published weights, and ours. Letters: B clips, T frames, N patch tokens,
L tokens of a frame with those before the patches, D the tower's width, d reduced width, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clip.layers import recomputed
from clip.ops import gelu_linear
from clip.towers.base import Feature, Tower, TowerError
from configs.schema import Config, ConfigError, Ratio
from models.parameters import Origin

MOST_SEQUENCES = 65_535  # that one call of a GPU's attention takes


@dataclass(frozen=True)
class Options:
    """`network.options` of this method. Defaults are those of Kinetics-400; Something-Something has 2 and scale 1."""

    temporal_adapters: Literal[1, 2] = 1  # behind the attention over time, or before it too
    scale: float = 0.5  # of the adapter beside the MLP
    drop_path: float = 0.2  # rate of the last block, rising linearly from 0
    ratio: Ratio = Ratio(1 / 4)
    feature: Feature = "class_token"


class Adapter(nn.Module):
    """Linear D -> d, exact GELU, Linear d -> D, which starts at zero; with `skip` added to its input.

    Args:
        width: D. ratio: d / D, above 0. skip: whether the input is added.

    Shape: (..., D) -> the same. Raises ValueError for a d below 1.
    """

    def __init__(self, width: int, ratio: float = 1 / 4, skip: bool = True):
        super().__init__()
        if int(width * ratio) < 1:
            raise ValueError(f"an adapter of width {width} and ratio {ratio:g} has no channels left")
        self.skip = skip
        self.down = nn.Linear(width, int(width * ratio))
        self.up = nn.Linear(int(width * ratio), width)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        for value in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(value)

    def forward(self, x: Tensor) -> Tensor:
        branch = gelu_linear(self.down(x), self.up.weight, self.up.bias)
        return x + branch if self.skip else branch


class AIM(nn.Module):
    """Adapters in the frozen blocks, whose attention serves time and space, a temporal embedding, and a classifier.

    A block: x = x + drop(temporal(A(ln_1 x))), A over the T frames of each token position, with two temporal adapters
    temporal(A(temporal_in(ln_1 x))); x = x + spatial(A(ln_1 x)), A over the tokens of each frame;
    x = x + MLP(ln_2 x) + drop(scale * joint(ln_2 x)). Temporal and joint adapters have no skip, the others have one, so
    that the model equals frozen CLIP at step 0.

    Dropped paths: in training a clip loses a branch as a whole, with all its frames; the authors' code draws for each
    token position, for all clips of the batch alike.

    Args:
        tower: frozen trunk; its last norm is tuned. num_classes: K. frames: T.
        temporal_adapters: 1 or 2. scale: of the joint adapter. drop_path: probability in the last block, rising
            linearly from 0 in the first. ratio: d / D of all adapters.
        feature: a frame's class token, or the mean of all its tokens, behind the last norm; averaged over frames.
        dropout: before the classifier. recompute: keep only the input of each block.

    Shape: video (B, T, 3, height, width), normalised -> logits (B, K).

    Source: Yang et al., ICLR 2023 (arXiv 2302.03024), section 3; taoyang1122/adapt-image-models
    mmaction/models/backbones/vit_clip.py, ViT_CLIP.
    """

    frames_per_segment = 1

    def __init__(self, tower: Tower, num_classes: int, frames: int, temporal_adapters: Literal[1, 2] = 1,
                 scale: float = 0.5, drop_path: float = 0.2, ratio: float = 1 / 4, feature: Feature = "class_token",
                 dropout: float = 0.0, recompute: bool = False):  # fmt: skip
        super().__init__()
        tower.require(feature, "network.options.feature")
        tower.keep_norms()
        self.frames, self.scale, self.drop_path = frames, scale, drop_path
        self.feature, self.recompute = feature, recompute
        self.tower = tower
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
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

    @property
    def in_clip_space(self) -> bool:
        """Whether CLIP projects such features to the space of its texts."""
        return self.feature == "class_token"

    def trainable_modules(self) -> dict[str, nn.Module | nn.Parameter]:
        """Everything that is trained, by name."""
        return {
            "adapters": self.adapters,
            "temporal_embedding": self.temporal_embedding,
            "final_norm": self.tower.final_norm,
            "head": self.head,
        }

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """The same from input to classifier: one layer a block, the temporal embedding with the first, norm, head."""
        blocks: list[list[nn.Module | nn.Parameter]] = [[adapters] for adapters in self.adapters]
        blocks[0].insert(0, self.temporal_embedding)
        return [*blocks, [self.tower.final_norm], [self.head]]

    def over_time(self, index: int, x: Tensor, frames: int) -> Tensor:
        """The branch whose attention goes over the frames of each token position: (B*T, L, D) -> the same."""
        adapters, L = self.adapters[index], x.shape[1]
        y = self.tower.blocks[index].norm_attention(x).unflatten(0, (-1, frames))  # (B, T, L, D)
        y = y.transpose(1, 2).flatten(0, 1)  # (B*L, T, D)
        if "temporal_in" in adapters:
            y = adapters["temporal_in"](y)
        parts = [self.tower.blocks[index].attention(part, in_space=False) for part in y.split(MOST_SEQUENCES)]
        y = adapters["temporal"](parts[0] if len(parts) == 1 else torch.cat(parts))
        return y.unflatten(0, (-1, L)).transpose(1, 2).flatten(0, 1)  # (B*T, L, D)

    def run_block(self, index: int, x: Tensor, frames: int, kept: Tensor | None = None) -> Tensor:
        """Block `index`: (B*T, L, D) -> the same, or (B*T, 1, D) where only the class token is read.

        `kept` are the factors of `draw_kept` for it.
        """
        last = index == len(self.tower.blocks) - 1 and self.feature == "class_token"
        queries = 1 if last else None  # attention is the last that looks at other tokens
        block, adapters = self.tower.blocks[index], self.adapters[index]
        x = x + _kept(self.over_time(index, x, frames), kept, 0)
        y = block.attention(block.norm_attention(x))[:, :queries].contiguous()
        x = x[:, :queries] + adapters["spatial"](y)
        y = block.norm_mlp(x)
        return x + block.mlp(y) + _kept(self.scale * adapters["joint"](y), kept, 1)

    def draw_kept(self, clips: int, device: torch.device) -> list[Tensor | None]:
        """What the two branches of each block are multiplied by, (2, B*T, 1, 1) a block; None where nothing drops."""
        count = len(self.tower.blocks)
        if not self.training or self.drop_path == 0:
            return [None] * count
        rates = torch.linspace(0, self.drop_path, count, device=device)[:, None, None]
        kept = (torch.rand(count, 2, clips, device=device) >= rates) / (1 - rates)
        return list(kept.repeat_interleave(self.frames, 2)[..., None, None])

    def frame_features(self, video: Tensor) -> Tensor:
        """Of each frame, behind the last norm: (B, T, 3, height, width) -> (B, T, D)."""
        B, T = video.shape[:2]
        if T != self.frames:
            raise ValueError(f"the model was built for {self.frames} frames and got {T}")
        x = self.tower.embed(self.tower.patchify(video.flatten(0, 1)), self.temporal_embedding.repeat(B, 1)[:, None])
        for index, kept in enumerate(self.draw_kept(B, x.device)):  # x (B*T, L, D)
            if self.recompute and self.training:
                x = recomputed(self.adapters[index], self.run_block, index, x, T, kept)
            else:
                x = self.run_block(index, x, T, kept)
        return self.tower.read(x, self.feature).unflatten(0, (B, T))

    def features(self, video: Tensor) -> Tensor:
        """What the classifier sees: (B, T, 3, height, width) -> (B, D)."""
        return self.frame_features(video).mean(1)

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(video)))

    def misfit(self, values: Mapping[str, Tensor]) -> str | None:
        """Why weights by our names do not fit, where that can be said in words."""
        theirs, ours = ("adapters.0.temporal_in.up.bias" in keys for keys in (values, self.state_dict()))
        if theirs == ours or "adapters.0.temporal.up.bias" not in values:
            return None
        count = ("one temporal adapter", "two temporal adapters")[theirs]
        return f"has {count} a block, network.options.temporal_adapters is {1 + ours}"


def _kept(branch: Tensor, kept: Tensor | None, number: int) -> Tensor:
    return branch if kept is None else branch * kept[number].to(branch.dtype)


def build(config: Config, tower: Tower, options: Options) -> AIM:
    """The method as a configuration describes it. Raises ConfigError for options out of range."""
    if not 0 <= options.drop_path < 1:
        raise ConfigError(f"network.options.drop_path: must lie in [0, 1), not {options.drop_path:g}")
    try:
        return AIM(
            tower, config.data.num_classes, config.data.num_segments, options.temporal_adapters, options.scale,
            options.drop_path, options.ratio, options.feature, config.network.drop_fc, config.network.recompute,
        )  # fmt: skip
    except TowerError:
        raise
    except ValueError as error:
        raise ConfigError(f"network.options.ratio: {error}") from None


# Beginnings of the authors' key names, without `backbone.`, and of ours; the 0 stands for any block.
_ADAPTERS = {"T_Adapter_in": "temporal_in", "T_Adapter": "temporal", "S_Adapter": "spatial", "MLP_Adapter": "joint"}
_PUBLISHED = {
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
        f"transformer.resblocks.0.{theirs}.{layer}.": f"adapters.0.{ours}.{own}."
        for theirs, ours in _ADAPTERS.items()
        for layer, own in (("D_fc1", "down"), ("D_fc2", "up"))
    },
}
_OURS = {ours: theirs for theirs, ours in _PUBLISHED.items()}


def _renamed(key: str, names: Mapping[str, str]) -> str | None:
    """A key by the other names of a table, None for one that is not in it."""
    block = re.search(r"\.(\d+)\.", key)
    plain = re.sub(r"\.\d+\.", ".0.", key, count=1)
    for old, new in names.items():
        if plain == old or (old.endswith(".") and plain.startswith(old)):
            renamed = new + plain.removeprefix(old)
            return renamed.replace(".0.", block[0], 1) if block else renamed
    return None


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The authors' weights by our names, or None if these are not theirs.

    Args:
        state_dict: of an mmaction recognizer (`backbone.`, `cls_head.fc_cls.`), or of their ViT_CLIP alone.

    Raises:
        ValueError: keys that are of neither.
    """
    if not any(re.search(r"\.[ST]_Adapter\.D_fc1\.weight$", key) for key in state_dict):
        return None
    names = {key: _renamed(key.removeprefix("backbone."), _PUBLISHED) for key in state_dict}
    if unknown := [key for key, name in names.items() if name is None]:
        raise ValueError(f"{len(unknown)} keys are not of the authors' AIM (first {', '.join(unknown[:3])})")
    values = {names[key]: value for key, value in state_dict.items()}
    if "temporal_embedding" in values:
        values["temporal_embedding"] = values["temporal_embedding"].squeeze(0)  # theirs is (1, T, D)
    return values


def published_name(key: str) -> str:
    """What the authors call a key of ours; a key that they have not, as it is."""
    theirs = _renamed(key, _OURS)
    return key if theirs is None else theirs if theirs.startswith("cls_head.") else f"backbone.{theirs}"
