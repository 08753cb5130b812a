"""TAdaConv: a convolution of frames whose weight is multiplied, for each frame, by factors that are read off the clip.

In a network of your own, for `nn.Conv2d(64, 64, 3, padding=1)` on frames x (B, 64, T, H, W):

    self.route = RouteFunction(64)
    self.conv = TAdaConv2d(64, 64, 3, padding=1)
    y = self.conv(x, self.route(x))

The factors are 1 at first, so the network starts as it was. No weight is built for a frame: a factor on the input or
output channels of a weight is the same factor on the channels of the convolution's input or output.

Letters: B clips, T frames, C input channels, O output channels, c reduced channels, H x W a map's size, k kernel size.
A clip is (B, C, T, H, W); it costs no copy where the memory is that of images (B*T, C, H, W), as `as_clips` gives it.

Source: Huang et al., ICLR 2022 (arXiv 2110.06178), and arXiv 2308.05787 for the second version;
alibaba-mmai-research/TAdaConv, tadaconv/models/module_zoo/ops/tadaconv.py and tadaconv_v2.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.layers import light
from clip.ops import QUICK
from models.renaming import Rule, renamed

SMALLEST_T = 3  # frames that the average over neighbouring frames needs


def as_images(clips: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)."""
    return clips.transpose(1, 2).flatten(0, 1)


def as_clips(images: Tensor, frames: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W), a view."""
    return images.unflatten(0, (-1, frames)).transpose(1, 2)


def average_over_time(x: Tensor, dim: int = 2) -> Tensor:
    """The mean of each frame and its two neighbours. A neighbour outside the clip is zero and counts in the mean.

    Args:
        x: a clip, whose dimension `dim` is T >= 3.

    Raises:
        ValueError: T below 3, as in the authors' code.
    """
    T = x.shape[dim]
    if T < SMALLEST_T:
        raise ValueError(f"a temporally adaptive network needs at least {SMALLEST_T} frames, not {T}")
    return _AverageOverTime.apply(x, dim)


class _AverageOverTime(torch.autograd.Function):
    """See average_over_time. It is its own transpose and saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim, T = dim, x.shape[dim]
        mean = x / 3
        mean.narrow(dim, 1, T - 1).add_(x.narrow(dim, 0, T - 1), alpha=1 / 3)
        mean.narrow(dim, 0, T - 1).add_(x.narrow(dim, 1, T - 1), alpha=1 / 3)
        return mean

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _AverageOverTime.apply(dy, ctx.dim), None


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return F.silu(QUICK * x) / QUICK


def linear_rates(highest: float, count: int) -> list[float]:
    """The DropPath probabilities of `count` blocks, from 0 to `highest`."""
    return [highest * i / max(1, count - 1) for i in range(count)]


def drop_clips(branch: Tensor, probability: float, frames: int, training: bool) -> Tensor:
    """DropPath: in training, sets a residual branch to zero in all frames of a clip, and scales those it keeps.

    Args:
        branch: (B*T, ...), T = `frames`.
        probability: of zero, in [0, 1).
    """
    if not training or probability == 0:
        return branch
    kept = torch.rand(len(branch) // frames, device=branch.device) >= probability  # (B,)
    factors = kept.to(branch.dtype) / (1 - probability)
    return branch * factors.repeat_interleave(frames).view(-1, *[1] * (branch.ndim - 1))


def start_small(module: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases in all convolutions and linear layers of a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class RouteFunction(nn.Module):
    """The factors of `TAdaConv2d`, from the means of the frames, of their neighbours and of the clip.

    Args:
        channels: C, those of the input and of the factors.
        ratio: C / c.
        kernels: frames that the two convolutions over time see, odd.

    Shape: (B, C, T, H, W) -> (B, C, T, 1, 1), all 1 at first.

    Source: TAdaConv, RouteFuncMLP.
    """

    def __init__(self, channels: int, *, ratio: int = 4, kernels: Sequence[int] = (3, 3)):
        super().__init__()
        reduced = channels // ratio
        self.clip = nn.Linear(channels, channels)
        self.reduce = nn.Conv1d(channels, reduced, kernels[0], padding=kernels[0] // 2)
        self.norm = nn.BatchNorm1d(reduced)
        self.expand = nn.Conv1d(reduced, channels, kernels[1], padding=kernels[1] // 2, bias=False)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.mean((3, 4))  # (B, C, T)
        y = self.reduce(frames + self.clip(frames.mean(2)).unsqueeze(2))  # (B, c, T)
        factors = 1 + self.expand(F.relu(self.norm(y)))  # (B, C, T)
        return factors[..., None, None]


class TAdaConv2d(nn.Conv2d):
    """The first version: a convolution whose weight is multiplied by factors on its input or output channels.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as nn.Conv2d's; a bias gets no factors.
        factors_on: the channels of the weight that the factors belong to: "input" (C of them) or "output" (O).

    Shape: clip (B, C, T, H, W), factors (B, C or O, T, 1, 1) -> (B, O, T, H', W').

    Source: TAdaConv, TAdaConv2d (`cal_dim` cin or cout).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
        factors_on: Literal["input", "output"] = "input",
    ):
        self.factors_on = factors_on
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(O*C*k*k), which follows from the authors' six dimensions of the weight."""
        _uniform(self.weight, self.weight.numel())
        if self.bias is not None:
            _uniform(self.bias, self.weight.numel())

    def forward(self, x: Tensor, factors: Tensor) -> Tensor:
        y = light(self, self.convolve, as_images(x), as_images(factors))  # of (B*T, C, H, W), (B*T, C or O, 1, 1)
        return as_clips(y, x.shape[2])

    def convolve(self, images: Tensor, scale: Tensor) -> Tensor:
        """The same on images."""
        if self.factors_on == "input":
            return F.conv2d(images * scale, self.weight, self.bias, self.stride, self.padding)
        y = F.conv2d(images, self.weight, None, self.stride, self.padding)
        y = scale.to(y.dtype) * y
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


class RouteFunctionV2(nn.Module):
    """The factors of `TAdaConv2dV2`: self-attention over the frames, described by their means and their neighbours.

    Args:
        channels: C, those of the input and of the factors.
        ratio: C / c.
        kernels: frames that the two convolutions over time see, odd.
        head_width: channels of an attention head; must divide c.
        starts_at_one: whether the factors are 1 at first (ConvNeXt); else they start near 0 (the transformer).

    Shape: (B, C, T, H, W) -> the factors of the weight and those of the bias, each (B, C, T, 1, 1).

    Raises:
        ValueError: head_width does not divide c.

    Source: TAdaConv, RouteFuncwTransformer (`zero_init_cal`).
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: int = 2,
        kernels: Sequence[int] = (3, 3),
        head_width: int = 64,
        starts_at_one: bool = False,
    ):
        super().__init__()
        reduced = channels // ratio
        if reduced % head_width:
            raise ValueError(f"the route function has {reduced} channels, which heads of {head_width} do not divide")
        self.heads, self.starts_at_one = reduced // head_width, starts_at_one
        self.reduce = nn.Conv1d(channels, reduced, kernels[0], padding=kernels[0] // 2)
        self.norm = nn.LayerNorm(reduced, eps=1e-6)
        self.norm_attention = nn.LayerNorm(reduced, eps=1e-6)
        self.qkv = nn.Linear(reduced, 3 * reduced)
        self.out = nn.Linear(reduced, reduced)
        self.weight_factors = nn.Conv1d(reduced, channels, kernels[1], padding=kernels[1] // 2, bias=False)
        self.bias_factors = nn.Conv1d(reduced, channels, kernels[1], padding=kernels[1] // 2, bias=False)
        if starts_at_one:
            nn.init.zeros_(self.weight_factors.weight)
            nn.init.zeros_(self.bias_factors.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.reduce(x.mean((3, 4))).transpose(1, 2)  # (B, T, c)
        y = quick_gelu(self.norm(y))
        y = (y + self.attend(y)).transpose(1, 2)  # (B, c, T)
        weight, bias = self.weight_factors(y), self.bias_factors(y)  # (B, C, T)
        if self.starts_at_one:
            weight, bias = weight + 1, bias + 1
        return weight[..., None, None], bias[..., None, None]

    def attend(self, y: Tensor) -> Tensor:
        """Attention over the frames, without the residual: (B, T, c) -> (B, T, c)."""
        qkv = self.qkv(self.norm_attention(y)).unflatten(2, (3, -1, self.heads))  # (B, T, 3, c / heads, heads)
        q, k, v = qkv.permute(2, 0, 4, 1, 3)  # each (B, heads, T, c / heads)
        attended = F.scaled_dot_product_attention(q, k, v, scale=y.shape[-1] ** -0.5)  # by c, as published
        return self.out(attended.transpose(1, 2).flatten(2))


class TAdaConv2dV2(nn.Conv2d):
    """The second version: a convolution of each channel on its own, with factors on its weight and on its bias.

    Args:
        channels: C.
        kernel_size: k, odd; the map keeps its size.

    Shape: clip (B, C, T, H, W), factors of weight and bias, each (B, C, T, 1, 1) -> (B, C, T, H, W).

    Source: TAdaConv, TAdaConv2dV2.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def reset_parameters(self) -> None:
        start_small(self)

    def forward(self, x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        y = light(self, self.convolve, as_images(x), *map(as_images, factors))
        return as_clips(y, x.shape[2])

    def convolve(self, images: Tensor, weight_factors: Tensor, bias_factors: Tensor) -> Tensor:
        """The same on images (B*T, C, H, W), with factors (B*T, C, 1, 1), for a caller that is computed again itself."""
        y = F.conv2d(images, self.weight, None, 1, self.padding, 1, self.groups)
        return weight_factors.to(y.dtype) * y + (bias_factors * self.bias[:, None, None]).to(y.dtype)


# The authors' names inside a route function -> ours, first and second version; what comes before is `route.`. And back.
ROUTE_NAMES: tuple[Rule, ...] = (
    (r"(^|\.)route\.g\.", r"\1route.clip."),
    (r"(^|\.)route\.a\.", r"\1route.reduce."),
    (r"(^|\.)route\.bn\.", r"\1route.norm."),
    (r"(^|\.)route\.b\.", r"\1route.expand."),
)
ROUTE_V2_NAMES: tuple[Rule, ...] = (
    (r"(^|\.)route\.a\.", r"\1route.reduce."),
    (r"(^|\.)route\.norm_transformer\.", r"\1route.norm_attention."),
    (r"(^|\.)route\.qkv_proj\.", r"\1route.qkv."),
    (r"(^|\.)route\.attn_out\.", r"\1route.out."),
    (r"(^|\.)route\.b\.", r"\1route.weight_factors."),
    (r"(^|\.)route\.b_bias\.", r"\1route.bias_factors."),
)
ROUTE_V2_TO_PUBLISHED: tuple[Rule, ...] = (
    (r"\broute\.reduce\.", "route.a."),
    (r"\broute\.norm_attention\.", "route.norm_transformer."),
    (r"\broute\.qkv\.", "route.qkv_proj."),
    (r"\broute\.out\.", "route.attn_out."),
    (r"\broute\.weight_factors\.", "route.b."),
    (r"\broute\.bias_factors\.", "route.b_bias."),
)


def reshaped(name: str, value: Tensor) -> Tensor:
    """A weight of the authors in the shape that it has here, by our name. Theirs are kernels of 3D convolutions."""
    if value.ndim == 6 or (value.ndim == 3 and name.endswith("bias")):
        return value.flatten(0, 2)  # a TAdaConv's weight (1, 1, O, C, k, k) and bias (1, 1, O)
    if value.ndim != 5 or (name.startswith("stem.") and value.shape[2] > 1):
        return value
    if re.search(r"(^|\.)(route\.(clip|qkv|out)|(?<!route\.)expand)\.", name):
        return value.flatten(1)  # a linear layer
    if "route." in name:
        return value.flatten(2)  # a convolution over time, of one frame or more
    if value.shape[3:] == (1, 1) and value.shape[2] > 1:
        return value.squeeze(4)  # a convolution over time at each patch
    return value.squeeze(2)


def renamed_weights(state_dict: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """The authors' weights under our names and in our shapes."""
    rules = tuple(rules)
    names = {key: renamed(key, rules) for key in state_dict}
    return {names[key]: reshaped(names[key], value) for key, value in state_dict.items()}


def _uniform(values: Tensor, fan_in: int) -> None:
    nn.init.uniform_(values, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
