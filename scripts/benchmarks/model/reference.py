"""A plain transcription of the models' formulas, as the benchmark's reference. The product does not use it.

The frozen CLIP, the TD4V module, the side network and fine-tuning as one would first write them: Conv3d and BatchNorm3d
on (B, D, T, H, W), tokens as (N, B*T, D) with a permute at each border, nn.MultiheadAttention, LayerNorm in float32;
nothing is fused or reordered. Parameters have the names of the authors' code, so clip.published carries weights and
gradients over to the product's names.

Letters: B clips, T frames, M = B*T frames in all (column b*T + t), H x W the patch grid, N = H*W, D a width, d reduced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip.published import from_authors


@dataclass(frozen=True)
class TowerSizes:
    """A CLIP vision transformer. `patch_size` in pixels, `grid` (H, W) in patches."""

    width: int
    layers: int
    heads: int
    patch_size: int
    grid: tuple[int, int]
    hidden: int  # of its MLPs
    quick_gelu: bool = True


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.LayerNorm):
    """In the format of its weights, float32 under autocast, and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class PlainTD4V(nn.Module):
    """The TD4V module, the branch alone: (N, M, D) -> (N, M, D).

    Args:
        width: D. ratio: d / D. frames: T. grid: (H, W).
        mode: "FC", convolutions before and after see one frame; "CNN", three.
    """

    def __init__(self, width: int, ratio: float, mode: Literal["FC", "CNN"], frames: int, grid: tuple[int, int]):
        super().__init__()
        self.frames, self.grid = frames, grid
        reduced, kernel = int(width * ratio), {"FC": 1, "CNN": 3}[mode]
        self.bn_down = nn.BatchNorm3d(width)
        self.conv_down = nn.Conv3d(width, reduced, (kernel, 1, 1), padding=(kernel // 2, 0, 0))
        self.conv_1 = nn.Conv3d(reduced, reduced, (1, 3, 3), padding=(0, 1, 1))
        self.conv_2 = nn.Conv3d(reduced, reduced, (1, 3, 3), padding=(0, 1, 1))
        self.conv_up = nn.Conv3d(reduced, width, (kernel, 1, 1), padding=(kernel // 2, 0, 0))
        self.scale = nn.Parameter(torch.ones(1))
        self.act = QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_down(self.bn_down(to_volume(x, self.frames, self.grid)))  # (B, d, T, H, W)
        difference = x[:, :, 1:] - x[:, :, :-1]  # (B, d, T-1, H, W)
        zero = torch.zeros_like(x[:, :, :1])
        backward = self.conv_1(self.act(torch.cat([-difference, zero], 2)))  # (B, d, T, H, W)
        forward = self.conv_2(self.act(torch.cat([zero, difference], 2)))
        x = self.conv_up(x + backward + forward)  # (B, D, T, H, W)
        return to_tokens(x * self.scale.to(x.dtype))


class PlainSideBlock(nn.Module):
    """TD4V, attention to the shifted class token and the patches, MLP: (N, M, n) and token (1, M, n) -> (N, M, n)."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        ratio: float,
        mode: Literal["FC", "CNN"],
        frames: int,
        grid: tuple[int, int],
    ):
        super().__init__()
        self.frames, self.grid = frames, grid
        self.td4v = PlainTD4V(width, ratio, mode, frames, grid)
        self.ln_1 = LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.bn_2 = nn.BatchNorm3d(width)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.mlp.fc2 = nn.Linear(int(width * mlp_ratio), width)
        self.act = nn.GELU()

    def forward(self, side: Tensor, token: Tensor | None) -> Tensor:
        side = side + self.td4v(side)
        if token is None:
            keys = queries = self.ln_1(side)  # (N, M, n)
        else:
            keys = self.ln_1(torch.cat([self.shift(token), side]))  # (1 + N, M, n)
            queries = keys[1:]  # (N, M, n)
        side = side + self.attn(queries, keys, keys, need_weights=False)[0]
        y = to_tokens(self.bn_2(to_volume(side, self.frames, self.grid)))  # (N, M, n)
        return side + self.mlp.fc2(self.act(self.mlp.fc1(y)))

    def shift(self, token: Tensor) -> Tensor:
        """token'[t, j f:(j+1) f] = token[j, t f:(t+1) f] with f = n // T, 0 past T*f: (1, M, n) -> (1, M, n)."""
        T, n = self.frames, token.shape[-1]
        f = n // T
        old = token.reshape(-1, T, n)  # (B, T, n)
        new = torch.zeros_like(old)
        for t in range(T):
            for j in range(T):
                new[:, t, j * f : (j + 1) * f] = old[:, j, t * f : (t + 1) * f]
        return new.reshape(1, -1, n)


class PlainBlock(nn.Module):
    """CLIP's residual attention block: (1 + N, M, D) -> (1 + N, M, D)."""

    def __init__(self, sizes: TowerSizes):
        super().__init__()
        self.attn = nn.MultiheadAttention(sizes.width, sizes.heads)
        self.ln_1 = LayerNorm(sizes.width)
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(sizes.width, sizes.hidden)
        self.mlp.act = QuickGELU() if sizes.quick_gelu else nn.GELU()
        self.mlp.c_proj = nn.Linear(sizes.hidden, sizes.width)
        self.ln_2 = LayerNorm(sizes.width)

    def attend(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        return x + self.attn(y, y, y, need_weights=False)[0]

    def transform(self, x: Tensor) -> Tensor:
        return x + self.mlp.c_proj(self.mlp.act(self.mlp.c_fc(self.ln_2(x))))


class PlainTower(nn.Module):
    """Frozen CLIP: images (M, 3, height, width) -> tokens behind the last block (1 + N, M, D)."""

    classifier = "fc_proj"  # of the models on it

    def __init__(self, sizes: TowerSizes):
        super().__init__()
        H, W = sizes.grid
        self.conv1 = nn.Conv2d(3, sizes.width, sizes.patch_size, sizes.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(sizes.width) * sizes.width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + H * W, sizes.width) * sizes.width**-0.5)
        self.ln_pre = LayerNorm(sizes.width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(PlainBlock(sizes) for _ in range(sizes.layers))
        self.ln_post = LayerNorm(sizes.width)
        self.requires_grad_(False)

    def embed(self, images: Tensor) -> Tensor:
        """Patches, class token, positions, ln_pre: (M, 3, height, width) -> (1 + N, M, D)."""
        x = self.conv1(images).flatten(2).permute(0, 2, 1)  # (M, N, D)
        token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([token, x], 1) + self.positional_embedding.to(x.dtype))
        return x.permute(1, 0, 2)  # (1 + N, M, D)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.transformer.resblocks:
            x = block.transform(block.attend(x))
        return x


class PlainSideTuning(PlainTower):
    """The side network beside the frozen tower: video (B, T, 3, height, width) -> logits (B, K).

    Args:
        sizes: of the tower. classes: K. frames: T. widths: n of each level, one a block of the tower.
        mlp_ratio: hidden share of the side blocks' MLPs. ratio, mode: of TD4V.
    """

    def __init__(
        self,
        sizes: TowerSizes,
        classes: int,
        frames: int,
        widths: Sequence[int],
        mlp_ratio: float = 1.0,
        ratio: float = 1 / 6,
        mode: Literal["FC", "CNN"] = "CNN",
    ):
        super().__init__(sizes)
        self.frames, self.grid, self.widths = frames, sizes.grid, list(widths)
        P, width = sizes.patch_size, sizes.width
        self.side_conv1 = nn.Conv3d(3, widths[0], (3, P, P), (1, P, P), (1, 0, 0))
        self.side_pre_bn3d = nn.BatchNorm3d(widths[0])
        changed = [i for i in range(len(widths)) if widths[i] != widths[i - 1]]  # at 0 against the last
        widened = [i for i in changed if i > 0]
        self.embedding_of = {level: number for number, level in enumerate(changed)}
        self.upsample_of = {level: number for number, level in enumerate(widened)}
        transformer = self.transformer
        transformer.side_temporal_embeddings = nn.ParameterList(torch.randn(frames, widths[i]) * 0.01 for i in changed)
        transformer.side_upsample = nn.ModuleList(nn.Linear(widths[i - 1], widths[i]) for i in widened)
        transformer.side_upsample_ln = nn.ModuleList(LayerNorm(widths[i - 1]) for i in widened)
        transformer.side_lns = nn.ModuleList(LayerNorm(width) for _ in widths)
        transformer.side_linears = nn.ModuleList(nn.Linear(width, n) for n in widths)
        transformer.side_transformer = nn.ModuleList(
            PlainSideBlock(
                n, heads=max(1, n // 64), mlp_ratio=mlp_ratio, ratio=ratio, mode=mode, frames=frames, grid=sizes.grid
            )
            for n in widths
        )
        self.side_post_bn = nn.BatchNorm3d(widths[-1])
        self.fc_proj = nn.Linear(widths[-1], classes)

    def features(self, video: Tensor) -> Tensor:
        """(B, T, 3, height, width) -> (B, n of the last level)."""
        part = self.transformer
        side = self.side_pre_bn3d(self.side_conv1(video.permute(0, 2, 1, 3, 4)))  # (B, n, T, H, W)
        side = to_tokens(side)  # (N, M, n)
        with torch.no_grad():
            x = self.embed(video.flatten(0, 1))  # (1 + N, M, D)
        for i, block in enumerate(part.resblocks):
            with torch.no_grad():
                x = block.transform(block.attend(x))
            projected = part.side_linears[i](part.side_lns[i](x))  # (1 + N, M, n)
            token, patches = projected[:1], projected[1:]
            if i in self.upsample_of:
                number = self.upsample_of[i]
                side = part.side_upsample[number](part.side_upsample_ln[number](side))
            side = 0.5 * side + 0.5 * patches
            if i in self.embedding_of:
                embedding = part.side_temporal_embeddings[self.embedding_of[i]].to(side.dtype)
                side = side + embedding.repeat(len(video), 1)  # (T, n) -> (M, n)
            side = part.side_transformer[i](side, token)
        return self.side_post_bn(to_volume(side, self.frames, self.grid)).mean((2, 3, 4))

    def forward(self, video: Tensor) -> Tensor:
        return self.fc_proj(self.features(video))


class PlainFineTuning(PlainTower):
    """TD4V inside the frozen blocks, as a residual on the patches: video (B, T, 3, height, width) -> logits (B, K).

    Args:
        sizes: of the tower. classes: K. frames: T. ratio, mode: of TD4V.
        halves: the halves of a block that get TD4V before them, of "attention" and "mlp".
        feature: of a frame, "class_token" or "mean_tokens", averaged over frames.
        embedding: whether there is a temporal embedding.
    """

    def __init__(
        self,
        sizes: TowerSizes,
        classes: int,
        frames: int,
        halves: Sequence[str] = ("attention",),
        ratio: float = 1 / 12,
        mode: Literal["FC", "CNN"] = "FC",
        feature: str = "class_token",
        embedding: bool = True,
    ):
        super().__init__(sizes)
        self.feature = feature
        self.td4v = nn.ModuleDict(
            {
                half: nn.ModuleList(
                    PlainTD4V(sizes.width, ratio, mode, frames, sizes.grid) for _ in range(sizes.layers)
                )
                for half in halves
            }
        )
        self.temporal_embedding = nn.Parameter(torch.zeros(frames, sizes.width)) if embedding else None
        self.fc_proj = nn.Linear(sizes.width, classes)

    def features(self, video: Tensor) -> Tensor:
        """(B, T, 3, height, width) -> (B, D)."""
        B, T = video.shape[:2]
        x = self.embed(video.flatten(0, 1))  # (1 + N, M, D)
        if self.temporal_embedding is not None:
            x = x + self.temporal_embedding.to(x.dtype).repeat(B, 1)  # (T, D) -> (M, D)
        for i, block in enumerate(self.transformer.resblocks):
            x = block.attend(self.adapt("attention", i, x))
            x = block.transform(self.adapt("mlp", i, x))
        y = self.ln_post(x)
        y = y[0] if self.feature == "class_token" else y.mean(0)  # (M, D)
        return y.reshape(B, T, -1).mean(1)

    def adapt(self, half: str, index: int, x: Tensor) -> Tensor:
        if half not in self.td4v:
            return x
        token, patches = x[:1], x[1:]
        return torch.cat([token, patches + self.td4v[half][index](patches)])

    def forward(self, video: Tensor) -> Tensor:
        return self.fc_proj(self.features(video))


def to_volume(x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
    """(N, M, D) -> (B, D, T, H, W)."""
    H, W = grid
    return x.reshape(H, W, -1, frames, x.shape[-1]).permute(2, 4, 3, 0, 1).contiguous()


def to_tokens(x: Tensor) -> Tensor:
    """(B, D, T, H, W) -> (N, M, D)."""
    B, D, T, H, W = x.shape
    return x.permute(3, 4, 0, 2, 1).reshape(H * W, B * T, D)


def to_product(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or gradients, of the plain models under the product's names and in its shapes.

    Args:
        values: by the plain models' parameter names; those of `PlainSideTuning` must hold the side_linears.
    """
    own = re.compile(r"^(td4v\.(?:attention|mlp)\.\d+\.)(.+)|^temporal_embedding$")  # of fine-tuning alone
    renamed = from_authors({key: value for key, value in values.items() if not own.match(key)})
    for key, value in values.items():
        found = own.match(key)
        if found and found[1]:
            renamed |= {found[1] + name: moved for name, moved in from_authors({found[2]: value}).items()}
        elif found:
            renamed[key] = value
    return renamed


def fill(model: nn.Module, seed: int) -> None:
    """Random weights and buffers that keep activations of order one and leave nothing trivial: no zeros, no ones."""
    generator = torch.Generator().manual_seed(seed)
    norms = {module.weight for module in model.modules() if isinstance(module, nn.LayerNorm | _BatchNorm)}
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if value in norms or name.endswith((".scale", ".gamma")):
                value.copy_(1 + 0.1 * noise)
            elif name.endswith("running_var"):
                value.copy_(1 + 0.1 * noise.abs())
            elif value.ndim >= 2 and "embedding" not in name:
                rows = value[0, 0] if value.ndim == 6 else value  # a TAdaConv's has two axes before the others
                value.copy_(noise * rows[0].numel() ** -0.5)
            else:
                value.copy_(0.1 * noise)
