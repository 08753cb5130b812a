"""A plain transcription of TDN and of the TAdaConv family, as the benchmark's reference. The product does not use it.

The networks as their papers and published code compute them: a weight for every frame and one grouped convolution over
all of them, convolutions over time on permuted copies, an operation of autograd for every term; nothing is fused or
reordered. Parameters have the names of the published checkpoints, so `from_published` of the product's models carries
weights and gradients over.

Letters: B clips, T frames or segments, C and O channels, c reduced channels, H x W a map's size, K classes, D width,
M = B*T images in all, N patches. A clip is (B, C, T, H, W).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.benchmarks.model.reference import LayerNorm, PlainBlock, QuickGELU, TowerSizes


class PlainExcitation(nn.Module):
    """TDN's mSE: (M, C, H, W) -> (M, C, H, W)."""

    def __init__(self, channels: int, segments: int):
        super().__init__()
        self.segments, r = segments, channels // 16
        self.conv1, self.bn1 = nn.Conv2d(channels, r, 1, bias=False), nn.BatchNorm2d(r)
        self.conv2 = nn.Conv2d(r, r, 3, padding=1, groups=r, bias=False)
        self.conv3, self.bn3 = nn.Conv2d(r, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv3_smallscale2, self.bn3_smallscale2 = nn.Conv2d(r, r, 3, padding=1, bias=False), nn.BatchNorm2d(r)
        self.conv3_smallscale4, self.bn3_smallscale4 = nn.Conv2d(r, r, 3, padding=1, bias=False), nn.BatchNorm2d(r)

    def forward(self, x: Tensor) -> Tensor:
        u = self.bn1(self.conv1(x))
        c = self.conv2(u)
        u, c = (part.reshape(-1, self.segments, *part.shape[1:]) for part in (u, c))  # (B, T, r, H, W)
        zero = torch.zeros_like(u[:, :1])
        forward = torch.cat([c[:, 1:] - u[:, :-1], zero], 1).flatten(0, 1)
        backward = torch.cat([zero, c[:, :-1] - u[:, 1:]], 1).flatten(0, 1)
        gates = [torch.sigmoid(self.weigh(difference)) - 0.5 for difference in (forward, backward)]
        return x + x * (0.5 * gates[0] + 0.5 * gates[1])

    def weigh(self, difference: Tensor) -> Tensor:
        half = self.bn3_smallscale2(self.conv3_smallscale2(F.avg_pool2d(difference, 2, 2)))
        half = F.interpolate(half, difference.shape[2:])
        full = self.bn3_smallscale4(self.conv3_smallscale4(difference))
        return self.bn3(self.conv3(difference / 3 + half / 3 + full / 3))


class PlainShift(nn.Module):
    """TDN's shift, a depthwise convolution over time: (M, C, H, W) -> (M, C, H, W)."""

    def __init__(self, channels: int, segments: int):
        super().__init__()
        self.segments = segments
        self.conv = nn.Conv1d(channels, channels, 3, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        M, C, H, W = x.shape
        x = x.reshape(-1, self.segments, C, H, W).permute(0, 3, 4, 2, 1).reshape(-1, C, self.segments)
        x = self.conv(x).reshape(-1, H, W, C, self.segments)
        return x.permute(0, 4, 3, 1, 2).reshape(M, C, H, W)


class PlainBottleneck(nn.Module):
    """TDN's block; the first of a stage has a convolution as its shortcut."""

    def __init__(self, in_width: int, width: int, stride: int, first: bool, segments: int, temporal: bool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_width, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        if first:
            self.downsample = nn.Sequential(nn.Conv2d(in_width, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))
        self.first, self.temporal = first, temporal
        if temporal:
            self.mse, self.shift = PlainExcitation(width, segments), PlainShift(width, segments)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.shift(self.mse(y)) if self.temporal else y
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.downsample(x) if self.first else x), inplace=True)


class PlainTDN(nn.Module):
    """TDN: video (B, T*5, 3, height, width) -> logits (B, K)."""

    classifier = "new_fc"

    def __init__(self, classes: int, segments: int, depths: Sequence[int], width: int):
        super().__init__()
        self.segments, self.share = segments, 0.5 if segments == 8 else 0.75
        base = self.base_model = nn.Module()
        base.conv1, base.bn1 = nn.Conv2d(3, width, 7, 2, 3), nn.BatchNorm2d(width)
        base.conv1_5 = nn.Sequential(nn.Conv2d(12, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width))
        base.resnext_layer1 = self.stage(width, width, depths[0], 1, temporal=False)
        in_width = width
        for i, depth in enumerate(depths):
            inside = width * 2**i
            stage = self.stage(in_width, inside, depth, 2 if i else 1, temporal=i > 0)
            setattr(base, f"layer{i + 1}_bak", stage)
            in_width = 4 * inside
        self.new_fc = nn.Linear(in_width, classes)

    def stage(self, in_width: int, width: int, depth: int, stride: int, temporal: bool) -> nn.Sequential:
        first = PlainBottleneck(in_width, width, stride, True, self.segments, temporal)
        rest = (PlainBottleneck(4 * width, width, 1, False, self.segments, temporal) for _ in range(depth - 1))
        return nn.Sequential(first, *rest)

    def forward(self, video: Tensor) -> Tensor:
        base, a = self.base_model, self.share
        frames = video.reshape(-1, 5, *video.shape[2:]).unbind(1)
        d = torch.cat([after - before for before, after in itertools.pairwise(frames)], 1)  # (M, 12, height, width)
        d = F.max_pool2d(F.relu(base.conv1_5(F.avg_pool2d(d, 2, 2)), inplace=True), 3, 2, 1)
        x = F.max_pool2d(F.relu(base.bn1(base.conv1(frames[2])), inplace=True), 3, 2, 1)
        x = a * x + (1 - a) * F.interpolate(d, x.shape[2:])
        d, x = base.resnext_layer1(d), base.layer1_bak(x)
        x = a * x + (1 - a) * F.interpolate(d, x.shape[2:])
        x = base.layer4_bak(base.layer3_bak(base.layer2_bak(x)))
        logits = self.new_fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # (M, K)
        return logits.reshape(-1, self.segments, logits.shape[1]).mean(1)


def average(x: Tensor) -> Tensor:
    """The mean of three frames, zeros outside: (B, C, T, H, W) -> (B, C, T, H, W)."""
    return F.avg_pool3d(x, (3, 1, 1), 1, (1, 0, 0))


class PlainTAdaConv(nn.Module):
    """A convolution with a weight for each frame: clip (B, C, T, H, W), factors (B, C, T, 1, 1) -> (B, O, T, H', W').

    The first version has factors on the input channels; the second is depthwise and has them on weight and bias.
    """

    def __init__(self, channels: int, kernel: int, stride: int = 1, second: bool = False):
        super().__init__()
        self.stride, self.padding, self.groups = stride, kernel // 2, channels if second else 1
        self.weight = nn.Parameter(torch.empty(1, 1, channels, channels // self.groups, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(1, 1, channels)) if second else None

    def forward(self, x: Tensor, factors: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        B, C, T, H, W = x.shape
        if self.bias is None:
            weight = self.weight * factors.permute(0, 2, 1, 3, 4).unsqueeze(2)  # (B, T, O, C, k, k)
            bias = None
        else:
            weight = self.weight * factors[0].permute(0, 2, 1, 3, 4).unsqueeze(3)  # (B, T, C, 1, k, k)
            bias = (self.bias * factors[1].permute(0, 2, 1, 3, 4).flatten(2)).reshape(-1)
        x = x.permute(0, 2, 1, 3, 4).reshape(1, -1, H, W)
        y = F.conv2d(x, weight.flatten(0, 2), bias, self.stride, self.padding, groups=B * T * self.groups)
        return y.reshape(B, T, C, *y.shape[2:]).permute(0, 2, 1, 3, 4)


class PlainRoute(nn.Module):
    """The factors of the first version: (B, C, T, H, W) -> (B, C, T, 1, 1)."""

    def __init__(self, channels: int):
        super().__init__()
        reduced = channels // 4
        self.g = nn.Conv3d(channels, channels, 1)
        self.a, self.bn = nn.Conv3d(channels, reduced, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(reduced)
        self.b = nn.Conv3d(reduced, channels, (3, 1, 1), padding=(1, 0, 0), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        frames = F.adaptive_avg_pool3d(x, (x.shape[2], 1, 1))
        y = self.bn(self.a(frames + self.g(F.adaptive_avg_pool3d(x, 1))))
        return self.b(F.relu(y, inplace=True)) + 1


class PlainTAdaBlock(nn.Module):
    """TAda2D's block on clips."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        out = 4 * width
        self.has_shortcut = stride != 1 or in_width != out
        if self.has_shortcut:
            self.short_cut = nn.Conv3d(in_width, out, 1, (1, stride, stride), bias=False)
            self.short_cut_bn = nn.BatchNorm3d(out)
        branch = self.conv_branch = nn.Module()
        branch.a, branch.a_bn = nn.Conv3d(in_width, width, 1, bias=False), nn.BatchNorm3d(width)
        branch.b, branch.b_rf = PlainTAdaConv(width, 3, stride), PlainRoute(width)
        branch.b_bn, branch.b_avgpool_bn = nn.BatchNorm3d(width), nn.BatchNorm3d(width)
        branch.c, branch.c_bn = nn.Conv3d(width, out, 1, bias=False), nn.BatchNorm3d(out)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv_branch
        y = F.relu(branch.a_bn(branch.a(x)), inplace=True)
        y = branch.b(y, branch.b_rf(y))
        y = F.relu(branch.b_bn(y) + branch.b_avgpool_bn(average(y)), inplace=True)
        y = branch.c_bn(branch.c(y))
        return F.relu((self.short_cut_bn(self.short_cut(x)) if self.has_shortcut else x) + y)


class PlainTAda2D(nn.Module):
    """TAda2D: video (B, T, 3, height, width) -> logits (B, K)."""

    classifier = "head.out"

    def __init__(self, classes: int, depths: Sequence[int], width: int):
        super().__init__()
        stem = nn.Module()
        stem.a, stem.a_bn = nn.Conv3d(3, width, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False), nn.BatchNorm3d(width)
        self.backbone, in_width = nn.Module(), width
        self.backbone.conv1 = stem
        for i, depth in enumerate(depths):
            inside = width * 2**i
            stage = nn.Module()
            for j in range(depth):
                setattr(stage, f"res_{j + 1}", PlainTAdaBlock(4 * inside if j else in_width, inside, 1 if j else 2))
            setattr(self.backbone, f"conv{i + 2}", stage)
            in_width = 4 * inside
        self.head = nn.Module()
        self.head.out = nn.Linear(in_width, classes)

    def forward(self, video: Tensor) -> Tensor:
        stem, *stages = self.backbone.children()
        x = F.relu(stem.a_bn(stem.a(video.transpose(1, 2))), inplace=True)
        for block in itertools.chain.from_iterable(stage.children() for stage in stages):
            x = block(x)
        return self.head.out(x.mean((2, 3, 4)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, T, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class PlainRouteV2(nn.Module):
    """The factors of the second version: (B, C, T, H, W) -> two (B, C, T, 1, 1)."""

    def __init__(self, channels: int, head_width: int, start: int):
        super().__init__()
        c, time = channels // 2, {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)}
        self.heads, self.start = c // head_width, start
        self.a, self.norm, self.norm_transformer = nn.Conv3d(channels, c, **time), ChannelNorm(c), ChannelNorm(c)
        self.qkv_proj, self.attn_out, self.act = nn.Conv3d(c, 3 * c, 1), nn.Conv3d(c, c, 1), QuickGELU()
        self.b, self.b_bias = nn.Conv3d(c, channels, **time, bias=False), nn.Conv3d(c, channels, **time, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.act(self.norm(self.a(F.adaptive_avg_pool3d(x, (x.shape[2], 1, 1)))))  # (B, c, T, 1, 1)
        B, c, T = y.shape[:3]
        q, k, v = self.qkv_proj(self.norm_transformer(y)).reshape(B, 3, -1, self.heads, T).permute(1, 0, 3, 4, 2)
        o = (q @ k.transpose(2, 3) * c**-0.5).softmax(3) @ v  # (B, heads, T, c / heads)
        y = y + self.attn_out(o.transpose(2, 3).reshape(B, c, T, 1, 1))
        return self.b(y) + self.start, self.b_bias(y) + self.start


class PlainTAda(nn.Module):
    """TAdaFormer's branch on patch tokens: (N, M, D) -> (N, M, D)."""

    def __init__(self, width: int, frames: int, grid: tuple[int, int], head_width: int, temporal: bool):
        super().__init__()
        self.frames, self.grid, self.temporal = frames, grid, temporal
        reduced = width // 2
        if temporal:
            self.tada_pre_proj = nn.Conv3d(width, reduced, (3, 1, 1), padding=(1, 0, 0))
            self.tada_proj = nn.Conv3d(reduced, width, 1)
        else:
            self.tada_pre_proj, self.tada_proj = nn.Linear(width, reduced), nn.Linear(reduced, width)
        self.tadaconv, self.act = PlainTAdaConv(reduced, 3, second=True), QuickGELU()
        self.tadaconv.rf_func = PlainRouteV2(reduced, head_width, start=0)
        self.tadaconv.bn_a, self.tadaconv.bn_b = nn.BatchNorm3d(reduced), nn.BatchNorm3d(reduced)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.tadaconv
        y = self.tada_pre_proj(self.clips(x)) if self.temporal else self.clips(self.tada_pre_proj(x))
        z = conv(y, conv.rf_func(y))
        z = self.act(conv.bn_a(z) + conv.bn_b(average(z)))
        return self.tokens(self.tada_proj(z)) if self.temporal else self.tada_proj(self.tokens(z))

    def clips(self, x: Tensor) -> Tensor:
        return x.reshape(*self.grid, -1, self.frames, x.shape[-1]).permute(2, 4, 3, 0, 1)

    def tokens(self, x: Tensor) -> Tensor:
        return x.permute(3, 4, 0, 2, 1).flatten(2, 3).flatten(0, 1)


class PlainTAdaFormer(nn.Module):
    """TAdaFormer on CLIP's tower: video (B, T, 3, height, width) -> logits (B, K)."""

    classifier = "head.out"

    def __init__(self, sizes: TowerSizes, classes: int, frames: int, head_width: int, temporal: bool, double: bool):
        super().__init__()
        D, P, (H, W) = sizes.width, sizes.patch_size, sizes.grid
        self.frames = (frames + 1) // 2
        base = self.backbone = nn.Module()
        base.conv1 = nn.Conv3d(3, D, (3, P, P), (2, P, P), (1, 0, 0), bias=False)
        base.class_embedding = nn.Parameter(torch.empty(D))
        base.positional_embedding = nn.Parameter(torch.empty(1 + H * W, D))
        base.ln_pre, base.ln_post = LayerNorm(D), LayerNorm(D)
        base.layers = nn.ModuleList(PlainBlock(sizes) for _ in range(sizes.layers))
        for layer in base.layers:
            layer.tada = PlainTAda(D, self.frames, sizes.grid, head_width, temporal)
            layer.tada2 = PlainTAda(D, self.frames, sizes.grid, head_width, temporal) if double else None
        self.head = nn.Module()
        self.head.out = nn.Linear(D, classes)

    def forward(self, video: Tensor) -> Tensor:
        base = self.backbone
        x = base.conv1(video.transpose(1, 2)).transpose(1, 2).flatten(0, 1)  # (M, D, H, W)
        x = x.flatten(2).transpose(1, 2)  # (M, N, D)
        token = base.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = base.ln_pre(torch.cat([token, x], 1) + base.positional_embedding).transpose(0, 1)  # (1 + N, M, D)
        for layer in base.layers:
            x = layer.attend(self.adapt(x, layer.tada))
            x = layer.transform(x if layer.tada2 is None else self.adapt(x, layer.tada2))
        return self.head.out(base.ln_post(x[0].reshape(-1, self.frames, x.shape[-1]).mean(1)))

    def adapt(self, x: Tensor, tada: nn.Module) -> Tensor:
        return x + torch.cat([torch.zeros_like(x[:1]), tada(x[1:])])


class PlainConvNeXtBlock(nn.Module):
    """TAdaConvNeXtV2's block on clips."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))
        self.dwconv, self.dwconv_rf = PlainTAdaConv(width, 7, second=True), PlainRouteV2(width, head_width, start=1)
        self.norm, self.norm_avgpool = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2, self.act = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        z = self.dwconv(x, self.dwconv_rf(x))
        z = self.norm(z.permute(0, 2, 3, 4, 1)) + self.norm_avgpool(average(z).permute(0, 2, 3, 4, 1))
        z = self.gamma * self.pwconv2(self.act(self.pwconv1(z)))
        return x + z.permute(0, 4, 1, 2, 3)


class PlainTAdaConvNeXt(nn.Module):
    """TAdaConvNeXtV2: video (B, T, 3, height, width) -> logits (B, K)."""

    classifier = "head.out"

    def __init__(self, classes: int, depths: Sequence[int], widths: Sequence[int], head_width: int):
        super().__init__()
        stem = nn.Sequential(nn.Conv3d(3, widths[0], (3, 4, 4), (2, 4, 4), (1, 0, 0)), ChannelNorm(widths[0]))
        between = (
            nn.Sequential(ChannelNorm(before), nn.Conv3d(before, after, (1, 2, 2), (1, 2, 2)))
            for before, after in itertools.pairwise(widths)
        )
        self.backbone = nn.Module()
        self.backbone.downsample_layers = nn.ModuleList([stem, *between])
        self.backbone.stages = nn.ModuleList(
            nn.Sequential(*(PlainConvNeXtBlock(width, head_width) for _ in range(depth)))
            for width, depth in zip(widths, depths, strict=True)
        )
        self.backbone.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Module()
        self.head.out = nn.Linear(widths[-1], classes)

    def forward(self, video: Tensor) -> Tensor:
        x = video.transpose(1, 2)
        for reduce, stage in zip(self.backbone.downsample_layers, self.backbone.stages, strict=True):
            x = stage(reduce(x))
        return self.head.out(self.backbone.norm(x.mean((2, 3, 4))))
