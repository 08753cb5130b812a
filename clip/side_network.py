"""The pyramid side network: it runs beside a frozen tower, reads the tower's features, and carries TD4V.

Letters: B clips, T frames, H x W patches a frame, N = H*W, D the tower's width, n a level's side width, P patch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.adapter import TD4V
from clip.layers import Attention, Mlp, over_tokens, token_shift
from clip.ops import normed_linear, temporal_sum


class SideBlock(nn.Module):
    """TD4V, then attention inside each frame with the shifted class token as context, then an MLP; all with residuals.

    Args:
        width: n.
        heads: must divide n.
        mlp_ratio: hidden width of the MLP / n.
        ratio, mode: of TD4V.
        td4v: false leaves TD4V out.
        shift: exchange the class token's channels between frames.

    Shape: side (B, T, H, W, n), class token (B, T, n) or None -> (B, T, H, W, n).

    Source: owlholy/TD4V clip/AttnCBlock.py, AttnCBlock.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        ratio: float,
        mode: Literal["FC", "CNN"],
        td4v: bool = True,
        shift: bool = True,
    ):
        super().__init__()
        self.shift = shift
        self.td4v = TD4V(width, ratio, mode) if td4v else None
        self.norm_attn = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm_mlp = nn.BatchNorm1d(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation that the authors intend; norms, TD4V and biases of the MLP keep PyTorch's defaults."""
        width, attn, mlp = self.attn.proj.in_features, self.attn, self.mlp
        residual_std = width**-0.5 * (2 * 12) ** -0.5
        nn.init.normal_(attn.qkv.weight, std=width**-0.5)
        nn.init.normal_(attn.proj.weight, std=residual_std)
        nn.init.normal_(mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(mlp.fc2.weight, std=residual_std)
        nn.init.zeros_(attn.qkv.bias)
        nn.init.zeros_(attn.proj.bias)

    def forward(self, side: Tensor, token: Tensor | None) -> Tensor:
        if self.td4v is not None:
            side = side + self.td4v(side)
        tokens = side.flatten(2, 3)  # (B, T, N, n)
        if token is not None:
            token = token_shift(token) if self.shift else token
            tokens = torch.cat([token.unsqueeze(2).to(side.dtype), tokens], 2)  # (B, T, 1 + N, n)
        context = int(token is not None)
        side = side + self.attn(tokens.flatten(0, 1), self.norm_attn, context).view(side.shape)  # from (B*T, N, n)
        return side + self.mlp(side, self.norm_mlp)


class Stem(nn.Module):
    """The side network's input: Conv3d with kernel (k, P, P) and stride (1, P, P) on the video, then BatchNorm.

    Args:
        width: n.
        patch_size: P.
        kernel: k, the number of frames that it sees; odd.

    Shape: pixels of patches (B, T, H, W, 3*P*P) -> (B, T, H, W, n).
    """

    def __init__(self, width: int, patch_size: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv3d(
            3, width, (kernel, patch_size, patch_size), (1, patch_size, patch_size), (kernel // 2, 0, 0)
        )
        self.norm = nn.BatchNorm1d(width)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.conv.weight.transpose(1, 2).flatten(2)  # (n, k, 3*P*P)
        weight = weight.transpose(0, 1)  # (k, n, 3*P*P)
        products = F.linear(patches.flatten(2, 3), weight.flatten(0, 1))  # (B, T, N, k*n)
        x = temporal_sum(products, taps=len(weight)) + self.conv.bias.to(products.dtype)  # (B, T, N, n)
        return over_tokens(self.norm, x.view(*patches.shape[:-1], -1))


class SideLayer(nn.Module):
    """One level of the pyramid: the mean of side features and projected tower features goes through the side block.

    Args:
        tower_width: D.
        previous, width: n of the previous level and of this one.
        upsample: whether the side features are widened here.
        embedding: T for a temporal embedding, 0 for none.
        block: the side block.

    Shape: side (B, T, H, W, previous), tower features (B*T, 1 + N, D) -> (B, T, H, W, width).
    """

    def __init__(self, tower_width: int, previous: int, width: int, upsample: bool, embedding: int, block: SideBlock):
        super().__init__()
        self.norm = nn.LayerNorm(tower_width)
        self.project = nn.Linear(tower_width, width)
        self.upsample = nn.Sequential(nn.LayerNorm(previous), nn.Linear(previous, width)) if upsample else None
        self.temporal_embedding = nn.Parameter(torch.randn(embedding, width) * 0.01) if embedding else None
        self.block = block

    def forward(self, side: Tensor, features: Tensor) -> Tensor:
        B, T, H, W, _ = side.shape
        projected = normed_linear(features, self.norm, self.project.weight, self.project.bias)  # (B*T, 1 + N, n)
        token, patches = projected.unflatten(0, (B, T)).split([1, H * W], 2)  # (B, T, 1, n), (B, T, N, n)
        if self.upsample is not None:
            norm, linear = self.upsample
            side = normed_linear(side, norm, linear.weight, linear.bias)  # (B, T, H, W, n)
        side = torch.lerp(side, patches.unflatten(2, (H, W)), 0.5)
        if self.temporal_embedding is not None:
            side = side + self.temporal_embedding.to(side.dtype)[:, None, None]
        return self.block(side, token.squeeze(2))


class SideNetwork(nn.Module):
    """Stem and pyramid, one level for each block of the tower.

    By the authors' rule a level has a temporal embedding if its width differs from the previous level's, where level 0
    compares with the last: a pyramid of equal widths has none, and [96, 96, 192, 96] has them at levels 2 and 3. Each
    level takes the class token from the tower again: it is neither fused nor widened.

    Args:
        tower_width: D.
        patch_size: P, in pixels.
        frames: T.
        widths: n of each level.
        mlp_ratio, ratio, mode: of the side blocks and their TD4V.
        td4v, stem_kernel, shift, temporal_embedding: the temporal parts, each of which can be turned off.

    Raises:
        ValueError: a width that its heads (n // 64, at least one) do not divide, or below T with the token shift.

    Source: paper section on side-tuning; owlholy/TD4V clip/VisualTransformer.py and clip/Transformer.py, repaired.
    """

    def __init__(
        self,
        tower_width: int,
        patch_size: int,
        frames: int,
        widths: Sequence[int],
        mlp_ratio: float = 1.0,
        ratio: float = 1 / 6,
        mode: Literal["FC", "CNN"] = "CNN",
        td4v: bool = True,
        stem_kernel: int = 3,
        shift: bool = True,
        temporal_embedding: bool = True,
    ):
        super().__init__()
        self.stem = Stem(widths[0], patch_size, stem_kernel)
        self.layers = nn.ModuleList()
        for level, width in enumerate(widths):
            heads, previous = max(1, width // 64), widths[level - 1]
            changed = width != previous
            _check_width(width, level, heads, frames if shift else 0)
            block = SideBlock(width, heads, mlp_ratio=mlp_ratio, ratio=ratio, mode=mode, td4v=td4v, shift=shift)
            layer = SideLayer(
                tower_width,
                previous=previous,
                width=width,
                upsample=changed and level > 0,
                embedding=frames if changed and temporal_embedding else 0,
                block=block,
            )
            self.layers.append(layer)
        self.norm = nn.BatchNorm1d(widths[-1])

    def pool(self, side: Tensor) -> Tensor:
        """BatchNorm, then the mean over frames and patches: (B, T, H, W, n) -> (B, n)."""
        return over_tokens(self.norm, side).mean((1, 2, 3))


def _check_width(width: int, level: int, heads: int, least: int) -> None:
    if width % heads:
        raise ValueError(
            f"side width {width} at level {level} is not divisible by its {heads} heads (one for each 64 channels)"
        )
    if width < least:
        raise ValueError(f"side width {width} at level {level} is below the {least} frames that the token shift needs")
