"""TAdaConvNeXtV2: a ConvNeXt whose 7 x 7 convolutions are temporally adaptive."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.layers import light, recomputed
from clip.ops import quick_gelu_linear
from configs.schema import Config, ConfigError, training_only
from models.imagenet import imagenet_weights, load_backbone, require_depths, require_image_network
from models.parameters import Origin, Scale
from models.renaming import Rule, renamed
from models.tadaconv import (
    ROUTE_V2_NAMES,
    ROUTE_V2_TO_PUBLISHED,
    SMALLEST_T,
    RouteFunctionV2,
    TAdaConv2dV2,
    as_clips,
    as_images,
    average_over_time,
    drop_clips,
    linear_rates,
    renamed_weights,
    start_small,
)

EPS = 1e-6  # of all layer norms
PATCH = 4  # pixels that the stem's kernel is wide
SMALLEST_SIDE = 32  # pixels: the stem and three reductions leave one in 32
STRIDE = 2  # frames from one step of the stem to the next


class Size(NamedTuple):
    """Blocks and channels of each stage, and the width of an attention head of the route functions."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    head_width: int


SIZES = {
    "tiny": Size((3, 3, 9, 3), (96, 192, 384, 768), 48),
    "small": Size((3, 3, 27, 3), (96, 192, 384, 768), 48),
    "base": Size((3, 3, 27, 3), (128, 256, 512, 1024), 64),
}


@dataclass(frozen=True)
class Options:
    """`network.options` of tadaconvnextv2."""

    size: Literal["tiny", "small", "base"] = "tiny"
    depths: Optional[tuple[int, int, int, int]] = None  # blocks of each stage; null: those of `size`
    widths: Optional[tuple[int, int, int, int]] = None  # channels of each stage; null: those of `size`
    head_width: Optional[int] = None  # of the route functions; divides half of each width; null: that of `size`
    drop_path: float = training_only(0.0)  # rate of the last block, rising linearly from 0


class TAdaConvNeXtBlock(nn.Module):
    """A ConvNeXt block: TAdaConv, the mean over neighbouring frames, norms, and an MLP.

        z = conv(x);  z = norm(z) + norm_average(mean of three frames of z);  x + scale * MLP(z)

    `norm_average` starts at zero, and `scale` at 1e-6.

    Args:
        width: C.
        head_width: of the route function.
        drop_path: probability that a clip skips the block in training.

    Shape: (B*T, H, W, C) and T -> (B*T, H, W, C).

    Source: TAdaConv, branches/tadaconvnextv2.py, TAdaConvNeXtV2Block.
    """

    def __init__(self, width: int, *, head_width: int, drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path
        self.scale = nn.Parameter(torch.full((width,), 1e-6))
        self.conv = TAdaConv2dV2(width, 7)
        self.route = RouteFunctionV2(width, head_width=head_width, starts_at_one=True)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.norm_average = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        factors = self.route(as_clips(x.permute(0, 3, 1, 2), frames))
        z = light(self, self.widen, x, *map(as_images, factors), frames)
        y = quick_gelu_linear(z, self.fc2.weight, self.fc2.bias, self.scale)
        return x + drop_clips(y, self.drop_path, frames, self.training)

    def widen(self, x: Tensor, weight_factors: Tensor, bias_factors: Tensor, frames: int) -> Tensor:
        """Up to the first layer of the MLP: (B*T, H, W, C), two factors (B*T, C, 1, 1) -> (B*T, H, W, 4 * C)."""
        z = self.conv.convolve(x.permute(0, 3, 1, 2), weight_factors, bias_factors).permute(0, 2, 3, 1)
        average = average_over_time(z.unflatten(0, (-1, frames)), dim=1).flatten(0, 1)
        return self.fc1(self.norm(z) + self.norm_average(average))


class TAdaConvNeXtV2(nn.Module):
    """TAdaConvNeXtV2. All parameters are trainable. Of T frames the stem makes T' = (T + 1) // 2 steps.

    Args:
        num_classes: K.
        depths, widths: blocks and channels of each stage.
        head_width: of the route functions.
        drop_path: probability that a clip skips the last block in training, rising linearly from 0 in the first.
        dropout: probability before the classifier.
        recompute: save only the input of each block for backward.

    Shape: video (B, T, 3, height, width), normalised, T >= 5 -> logits (B, K).

    Source: Huang et al. (arXiv 2308.05787); TAdaConv, tadaconv/models/base/models.py, ConvNeXt.
    """

    frames_per_segment = 1
    mean, std = (0.45,) * 3, (0.225,) * 3

    def __init__(
        self,
        *,
        num_classes: int,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        head_width: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        self.recompute = recompute
        self.origin = Origin("ConvNeXt", "random weights")
        self.stem = nn.Conv3d(3, widths[0], (3, PATCH, PATCH), stride=(STRIDE, PATCH, PATCH), padding=(1, 0, 0))
        self.stem_norm = nn.LayerNorm(widths[0], eps=EPS)
        self.reduce = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(before, eps=EPS), "conv": nn.Conv2d(before, after, 2, stride=2)})
            for before, after in itertools.pairwise(widths)
        )
        rates = iter(linear_rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList(
            nn.ModuleList(TAdaConvNeXtBlock(width, head_width=head_width, drop_path=next(rates)) for _ in range(depth))
            for width, depth in zip(widths, depths, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights and zero biases; the last convolutions of routes are zero, the classifier PyTorch's."""
        start_small(self)
        self.head.reset_parameters()
        for block in self.blocks():
            for module in (block.route.weight_factors, block.route.bias_factors, block.norm_average):
                nn.init.zeros_(module.weight)

    def blocks(self) -> list[TAdaConvNeXtBlock]:
        """All blocks, from input to output."""
        return [block for stage in self.stages for block in stage]

    def trainable_modules(self) -> dict[str, nn.Module]:
        """All parameters, by name."""
        return {name: getattr(self, name) for name in ("stem", "stem_norm", "reduce", "stages", "norm", "head")}

    def trainable_layers(self) -> list[list[nn.Module]]:
        """From input to output: the stem, each block, what halves the map with the block behind it, the classifier."""
        layers: list[list[nn.Module]] = [[self.stem, self.stem_norm]]
        for reduce, stage in zip([None, *self.reduce], self.stages, strict=True):
            layers += [[block] for block in stage]
            if reduce is not None:
                layers[-len(stage)].append(reduce)
        return [*layers, [self.norm, self.head]]

    def parameter_scale(self, name: str, parameter: nn.Parameter) -> Scale:
        """The authors' multipliers: routes x5 (biases and bias factors x10), classifier x5 (bias x10)."""
        if ".route." in name:
            return Scale(lr=10, weight_decay=0) if "bias" in name else Scale(lr=5)
        if name.startswith("head."):
            return Scale(lr=10, weight_decay=0) if name == "head.bias" else Scale(lr=5)
        is_norm_of_block = "norm" in name.split(".")[-2] and "reduce" not in name and "stem" not in name
        return Scale(weight_decay=0) if is_norm_of_block or name.endswith(".bias") else Scale()

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(video)))

    def features(self, video: Tensor) -> Tensor:
        """The input of the classifier: (B, T, 3, height, width) -> (B, C)."""
        x = self.stem(video.transpose(1, 2))  # (B, C, T', height / 4, width / 4)
        T = x.shape[2]
        x = self.stem_norm(as_images(x).permute(0, 2, 3, 1).contiguous())  # (B*T', H, W, C)
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = self.reduce[i - 1]["norm"](x).permute(0, 3, 1, 2)
                x = self.reduce[i - 1]["conv"](x).permute(0, 2, 3, 1)  # (B*T', H / 2, W / 2, C)
            for block in stage:
                recompute = self.recompute and self.training
                x = recomputed(block, block, x, T, draws=True) if recompute else block(x, T)
        x = x.mean((1, 2)).unflatten(0, (-1, T)).mean(1)  # (B, C)
        return self.norm(x)


def chosen_size(options: Options) -> Size:
    """The size that the options name. Raises ConfigError where its numbers do not fit each other."""
    named = SIZES[options.size]
    size = Size(options.depths or named.depths, options.widths or named.widths, options.head_width or named.head_width)
    require_depths(size.depths)
    for width in size.widths:
        if size.head_width < 1 or width < 2 or width // 2 % size.head_width:
            raise ConfigError(
                f"network.options.head_width: {size.head_width} does not divide {width // 2}, half of a width of "
                f"network.options.widths {list(size.widths)}"
            )
    return size


def build(config: Config, options: Options) -> TAdaConvNeXtV2:
    """The model of a configuration.

    Raises:
        ConfigError: too few frames, a rate out of range, sizes that do not fit, weights that cannot be read or do not fit.
    """
    steps = (config.data.num_segments + 1) // STRIDE
    if steps < SMALLEST_T:
        raise ConfigError(
            f"data.num_segments: tadaconvnextv2 halves the frames and needs {2 * SMALLEST_T - 1} or more, "
            f"not {config.data.num_segments}"
        )
    if config.data.input_size < SMALLEST_SIDE:
        raise ConfigError(
            f"data.input_size: tadaconvnextv2 reduces the map to a part in {SMALLEST_SIDE} and needs as many pixels, "
            f"not {config.data.input_size}"
        )
    if not 0 <= options.drop_path < 1:
        raise ConfigError(f"network.options.drop_path: must lie in [0, 1), not {options.drop_path:g}")
    size = chosen_size(options)
    model = TAdaConvNeXtV2(
        num_classes=config.data.num_classes,
        **size._asdict(),
        drop_path=options.drop_path,
        dropout=config.network.drop_fc,
        recompute=config.network.recompute,
    )
    if config.network.init:
        require_image_network(options, "depths", "widths")
        values, source = imagenet_weights(config.network.weights, f"convnext_{options.size}")
        load_backbone(model, from_convnext(values), source)
    return model


# The names of ConvNeXt's authors, which those of TAdaConv keep -> ours
FROM_PUBLISHED: tuple[Rule, ...] = (
    (r"^backbone\.", ""),
    (r"^downsample_layers\.0\.0\.", "stem."),
    (r"^downsample_layers\.0\.1\.", "stem_norm."),
    (r"^downsample_layers\.([123])\.0\.", lambda match: f"reduce.{int(match[1]) - 1}.norm."),
    (r"^downsample_layers\.([123])\.1\.", lambda match: f"reduce.{int(match[1]) - 1}.conv."),
    (r"(^|\.)gamma$", r"\1scale"),
    (r"(^|\.)dwconv\.", r"\1conv."),
    (r"(^|\.)dwconv_rf\.", r"\1route."),
    (r"(^|\.)norm_avgpool\.", r"\1norm_average."),
    (r"(^|\.)pwconv([12])\.", r"\1fc\2."),
    *ROUTE_V2_NAMES,
    (r"^head\.out\.", "head."),
)


# Our names -> the authors', without `backbone.`
_TO_PUBLISHED: tuple[Rule, ...] = (
    (r"^head\.", "head.out."),
    (r"^stem\.", "downsample_layers.0.0."),
    (r"^stem_norm\.", "downsample_layers.0.1."),
    (r"^reduce\.(\d)\.norm\.", lambda match: f"downsample_layers.{int(match[1]) + 1}.0."),
    (r"^reduce\.(\d)\.conv\.", lambda match: f"downsample_layers.{int(match[1]) + 1}.1."),
    *ROUTE_V2_TO_PUBLISHED,
    (r"\.route\.", ".dwconv_rf."),
    (r"\.scale$", ".gamma"),
    (r"\.conv\.", ".dwconv."),
    (r"\.norm_average\.", ".norm_avgpool."),
    (r"\.fc([12])\.", r".pwconv\1."),
)


def from_convnext(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ConvNeXt's weights; the stem reads the middle one of its three frames."""
    ours = {renamed(key, FROM_PUBLISHED): value for key, value in values.items()}
    middle = ours["stem.weight"].unsqueeze(2)  # (C, 3, 1, 4, 4)
    return {**ours, "stem.weight": F.pad(middle, (0, 0, 0, 0, 1, 1))}


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The authors' weights under our names, or None if these are not theirs.

    Args:
        state_dict: of their model, or of one of its blocks.
    """
    if not any(key.endswith("dwconv_rf.qkv_proj.weight") for key in state_dict):
        return None
    return renamed_weights(state_dict, FROM_PUBLISHED)


def published_name(key: str) -> str:
    """The authors' name for one of ours."""
    name = renamed(key, _TO_PUBLISHED)
    return name if name.startswith("head.") else f"backbone.{name}"
