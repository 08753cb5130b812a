"""TAdaFormer: CLIP's vision tower, all of it trained, with temporally adaptive convolutions in its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip.layers import TemporalProjection, light, recomputed
from clip.ops import add_to_patches
from clip.towers.base import Block
from clip.towers.build import build_tower
from clip.towers.openclip_vit import OpenClipTower
from configs.schema import Config, ConfigError, training_only
from models.parameters import Origin, Scale, log_fresh
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
    quick_gelu,
    renamed_weights,
    start_small,
)

STRIDE = 2  # frames from one step of the stem to the next


@dataclass(frozen=True)
class Options:
    """`network.options` of tadaformer. The defaults are those of Kinetics-400; Something-Something has both true."""

    temporal_projection: bool = False  # the projection before a TAdaConv sees three frames
    two_convolutions: bool = False  # a second TAdaConv in each block, before the MLP
    head_width: int = 64  # of an attention head of the route functions; divides a quarter of the tower's width
    drop_path: float = training_only(0.0)  # rate of the last block, rising linearly from 0


class TAdaModule(nn.Module):
    """A branch on the patch tokens: reduce D -> d, TAdaConv 3 x 3, norms, QuickGELU, expand d -> D, which starts at zero.

        z = conv(reduce(x));  expand(quick_gelu(norm(z) + norm_average(mean of three frames of z)))

    Args:
        width: D; d is half of it, and the route function's width a quarter, which must be a multiple of `head_width`.
        grid: (H, W) patches.
        head_width: of an attention head of the route function.
        temporal: whether the reduction sees three frames.

    Shape: patch tokens (B*T, N, D) and T, N = H*W -> (B*T, N, D), to be added to them.

    Raises:
        ValueError: D is no multiple of 4 * head_width.

    Source: TAdaConv, branches/tadaformer.py, TAdaFormerBlock, and ops/tadaconv_v2.py, TAdaConv2dV2.
    """

    def __init__(self, width: int, grid: tuple[int, int], *, head_width: int, temporal: bool):
        super().__init__()
        reduced, self.grid = width // 2, grid
        self.reduce = TemporalProjection(width, reduced, 3) if temporal else nn.Linear(width, reduced)
        self.conv = TAdaConv2dV2(reduced, 3)
        self.norm = nn.BatchNorm2d(reduced)
        self.norm_average = nn.BatchNorm2d(reduced)
        self.route = RouteFunctionV2(reduced, head_width=head_width)
        self.expand = nn.Linear(reduced, width)
        start_small(self)
        nn.init.zeros_(self.norm_average.weight)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x = x.unflatten(0, (-1, frames))  # (B, T, N, D)
        x = self.reduce(x, x.new_ones(1)) if isinstance(self.reduce, TemporalProjection) else self.reduce(x)
        images = x.flatten(0, 1).transpose(1, 2).unflatten(2, self.grid)  # (B*T, d, H, W)
        factors = self.route(as_clips(images, frames))
        return light(self, self.adapt, images, *map(as_images, factors), frames)

    def adapt(self, images: Tensor, weight_factors: Tensor, bias_factors: Tensor, frames: int) -> Tensor:
        """All behind the reduction: (B*T, d, H, W), two factors (B*T, d, 1, 1) -> (B*T, N, D)."""
        z = self.conv.convolve(images, weight_factors, bias_factors)
        average = as_images(average_over_time(as_clips(z, frames)))
        z = quick_gelu(self.norm(z) + self.norm_average(average))
        return self.expand(z.flatten(2).transpose(1, 2))


class TAdaFormer(nn.Module):
    """CLIP's vision tower with TAda modules on the patch tokens of every block. All parameters are trainable.

        x = x + tada(patches of x);  x = x + attention(x);  x = x + MLP(x)

    The stem sees three frames at a time: of T frames it makes T' = (T + 1) // 2 steps. At the start the network is CLIP
    on every second frame. The feature is the last norm of the mean of the class tokens.

    Args:
        tower: open_clip's vision transformer of width D, a multiple of 4 * head_width.
        num_classes: K.
        temporal_projection: whether the modules' reduction sees three frames.
        two_convolutions: whether each block has a second module, before its MLP.
        head_width: of the route functions.
        drop_path: probability that a clip skips a branch of the last block in training, rising linearly from 0.
        dropout: probability before the classifier.
        recompute: save only the input of each block for backward.

    Shape: video (B, T, 3, height, width), normalised, T >= 5 -> logits (B, K).

    Raises:
        ValueError: D is no multiple of 4 * head_width.

    Source: Huang et al. (arXiv 2308.05787); TAdaConv, tadaconv/models/base/models.py, VisionTransformer.
    """

    frames_per_segment = 1

    def __init__(
        self,
        tower: OpenClipTower,
        *,
        num_classes: int,
        temporal_projection: bool = False,
        two_convolutions: bool = False,
        head_width: int = 64,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        self.recompute = recompute
        tower.keep_norms()
        self.origin, self.mean, self.std = Origin(tower.name, tower.weights), tower.mean, tower.std
        D, P = tower.width, tower.patch_size
        self.stem = nn.Conv3d(3, D, (3, P, P), stride=(STRIDE, P, P), padding=(1, 0, 0), bias=False)
        nn.init.zeros_(self.stem.weight)
        with torch.no_grad():
            self.stem.weight[:, :, 1] = tower.visual.conv1.weight
        tower.visual.conv1 = None  # the stem takes its place
        self.tower = tower
        count = len(tower.blocks)
        self.drop_paths = linear_rates(drop_path, count)
        names = ("first", "second") if two_convolutions else ("first",)
        self.tada = nn.ModuleList(
            nn.ModuleDict(
                {name: TAdaModule(D, tower.grid, head_width=head_width, temporal=temporal_projection) for name in names}
            )
            for _ in range(count)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(D, num_classes)

    def embedding(self) -> dict[str, nn.Module | nn.Parameter]:
        """Everything with weights before the first block, by name."""
        names = ("class_embedding", "positional_embedding", "ln_pre")
        return {"stem": self.stem, **{name: getattr(self.tower.visual, name) for name in names}}

    def trainable_modules(self) -> dict[str, nn.Module | nn.Parameter]:
        """All parameters, by name."""
        return {
            **self.embedding(),
            "blocks": self.tower.block_modules,
            "tada": self.tada,
            "final_norm": self.tower.final_norm,
            "head": self.head,
        }

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """From input to output: the embedding, each block with its TAda modules, the last norm with the classifier."""
        blocks = [[block.module, tada] for block, tada in zip(self.tower.blocks, self.tada, strict=True)]
        return [list(self.embedding().values()), *blocks, [self.tower.final_norm, self.head]]

    def parameter_scale(self, name: str, parameter: nn.Parameter) -> Scale:
        """The authors' multiplier of everything that CLIP does not have: x10."""
        return Scale(lr=10) if name.startswith(("tada.", "head.")) else Scale()

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(video)))

    def features(self, video: Tensor) -> Tensor:
        """The input of the classifier: (B, T, 3, height, width) -> (B, D)."""
        x, T = self.embed(video)  # (B*T', L, D)
        for block, tada, drop_path in zip(self.tower.blocks, self.tada, self.drop_paths, strict=True):
            if self.recompute and self.training:
                x = recomputed(tada, self.run_block, block, tada, x, T, drop_path, draws=True)
            else:
                x = self.run_block(block, tada, x, T, drop_path)
        return self.tower.final_norm(x[:, 0].unflatten(0, (-1, T)).mean(1))  # (B*T', D) -> (B, D)

    def embed(self, video: Tensor) -> tuple[Tensor, int]:
        """The input of the first block, and T': (B, T, 3, height, width) -> (B*T', L, D)."""
        visual, size = self.tower.visual, tuple(video.shape[-2:])
        if size != tuple(self.tower.image_size):
            raise ValueError(f"the tower was built for {self.tower.image_size} pixels and got {size}")
        x = self.stem(video.transpose(1, 2))  # (B, D, T', H, W)
        T = x.shape[2]
        x = as_images(x).flatten(2).transpose(1, 2)  # (B*T', N, D)
        x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
        return visual.ln_pre(x + visual.positional_embedding.to(x.dtype)), T

    def run_block(self, block: Block, tada: nn.ModuleDict, x: Tensor, frames: int, drop_path: float) -> Tensor:
        """A block with its TAda modules: (B*T', L, D) -> (B*T', L, D)."""

        def drop(branch: Tensor) -> Tensor:
            return drop_clips(branch, drop_path, frames, self.training)

        x = add_to_patches(x, drop(tada["first"](x[:, 1:], frames)))
        x = x + drop(block.attention_of(x))
        if "second" in tada:
            x = add_to_patches(x, drop(tada["second"](x[:, 1:], frames)))
        return x + drop(block.mlp_of(x))


def build(config: Config, options: Options) -> TAdaFormer:
    """The model of a configuration.

    Raises:
        ConfigError: a tower that is not open_clip's or whose width does not fit, too few frames, a rate out of range.
    """
    steps = (config.data.num_segments + 1) // STRIDE
    if steps < SMALLEST_T:
        raise ConfigError(
            f"data.num_segments: tadaformer halves the frames and needs {2 * SMALLEST_T - 1} or more, "
            f"not {config.data.num_segments}"
        )
    if not 0 <= options.drop_path < 1:
        raise ConfigError(f"network.options.drop_path: must lie in [0, 1), not {options.drop_path:g}")
    tower = build_tower(config)
    if not isinstance(tower, OpenClipTower):
        raise ConfigError(
            f"network.arch: tadaformer needs a vision transformer of open_clip, which {tower.name} is not"
        )
    if options.head_width < 1 or tower.width % (4 * options.head_width):
        raise ConfigError(
            f"network.options.head_width: the route functions of tadaformer have a quarter of the width of {tower.name}, "
            f"{tower.width} / 4, which must be a multiple of {options.head_width}"
        )
    model = TAdaFormer(
        tower,
        num_classes=config.data.num_classes,
        temporal_projection=options.temporal_projection,
        two_convolutions=options.two_convolutions,
        head_width=options.head_width,
        drop_path=options.drop_path,
        dropout=config.network.drop_fc,
        recompute=config.network.recompute,
    )
    if config.network.init:
        log_fresh(model, [name for name, _ in model.named_parameters() if name.startswith(("tada.", "head."))])
    return model


# The authors' names -> ours
FROM_PUBLISHED: tuple[Rule, ...] = (
    (r"^backbone\.conv1\.", "stem."),
    (r"^backbone\.(class_embedding|positional_embedding|ln_pre|ln_post)\b", r"tower.visual.\1"),
    (r"^backbone\.layers\.(\d+)\.tada\.", r"tada.\1.first."),
    (r"^backbone\.layers\.(\d+)\.tada2\.", r"tada.\1.second."),
    (r"^backbone\.layers\.", "tower.visual.transformer.resblocks."),
    (r"(^|\.)tada_pre_proj\.", r"\1reduce."),
    (r"(^|\.)tada_proj\.", r"\1expand."),
    (r"(^|\.)tadaconv\.bn_a\.", r"\1norm."),
    (r"(^|\.)tadaconv\.bn_b\.", r"\1norm_average."),
    (r"(^|\.)tadaconv\.rf_func\.", r"\1route."),
    (r"(^|\.)tadaconv\.", r"\1conv."),
    *ROUTE_V2_NAMES,
    (r"^head\.out\.", "head."),
)


# Our names -> the authors'
_TO_PUBLISHED: tuple[Rule, ...] = (
    (r"^head\.", "head.out."),
    (r"^stem\.", "backbone.conv1."),
    (r"^tower\.visual\.transformer\.resblocks\.", "backbone.layers."),
    (r"^tower\.visual\.", "backbone."),
    *ROUTE_V2_TO_PUBLISHED,
    (r"\.(first|second)\.route\.", r".\1.tadaconv.rf_func."),
    (r"\.(first|second)\.reduce\.", r".\1.tada_pre_proj."),
    (r"\.(first|second)\.expand\.", r".\1.tada_proj."),
    (r"\.(first|second)\.norm\.", r".\1.tadaconv.bn_a."),
    (r"\.(first|second)\.norm_average\.", r".\1.tadaconv.bn_b."),
    (r"\.(first|second)\.conv\.", r".\1.tadaconv."),
    (r"^tada\.(\d+)\.first\.", r"backbone.layers.\1.tada."),
    (r"^tada\.(\d+)\.second\.", r"backbone.layers.\1.tada2."),
)


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The authors' weights under our names, or None if these are not theirs.

    Args:
        state_dict: of their model, or of one of its TAda modules.
    """
    if not any(key.endswith("tadaconv.rf_func.qkv_proj.weight") for key in state_dict):
        return None
    return renamed_weights(state_dict, FROM_PUBLISHED)


def published_name(key: str) -> str:
    """The authors' name for one of ours."""
    return renamed(key, _TO_PUBLISHED)
