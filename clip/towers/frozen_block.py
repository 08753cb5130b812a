"""A frozen block of CLIP, run so that nothing is kept for its own weights and little for its input.

Gradients go through to the input: the norms keep their input, attention its queries, keys, values and result, the MLP
one tensor, its activation's input. In autocast's dtype everything runs low, the residual stream too, as in OpenAI's own
half-precision models (norms take their statistics in float32); the weights are cast once, not in each step, with the
norms' affine parts multiplied into them before rounding. Hooks on the layers inside do not fire.
Lives here: that block. Does not live here: the tower (backbone.py) and blocks whose weights are tuned, which run as
open_clip wrote them.

Letters: M images (B clips x T frames), L = 1 + N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clip.ops import QUICK, layer_norm, layer_norm_gradient


@dataclass(frozen=True)
class FrozenBlock:
    """The weights of a block in one dtype.

    `norms` are the two norms' weights and biases, or None where they went into the weights behind them. `steep` is the
    factor of the MLP's activation, SiLU(steep x) / steep, or None for the exact GELU; 1.0 where it went into the
    weights.
    """

    heads: int
    eps: tuple[float, float]
    norms: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    fc: tuple[Tensor, Tensor]
    proj: tuple[Tensor, Tensor]
    steep: float | None

    @classmethod
    def of(cls, block: nn.Module, dtype: torch.dtype, quick: bool, fold: bool = True) -> FrozenBlock:
        """The weights as they are, or, in another dtype than theirs, folded and cast copies.

        They must not change between a forward pass and its backward pass.

        Args:
            block: open_clip's ResidualAttentionBlock, without layer scale. quick: whether its activation is QuickGELU,
                not the exact GELU. fold: whether another dtype's copies may have the norms' affine parts in them.
        """
        attn, mlp, norms = block.attn, block.mlp, (block.ln_1, block.ln_2)
        pairs = [(attn.in_proj_weight, attn.in_proj_bias), (attn.out_proj.weight, attn.out_proj.bias),
                 (mlp.c_fc.weight, mlp.c_fc.bias), (mlp.c_proj.weight, mlp.c_proj.bias)]  # fmt: skip
        pairs = [(weight.detach(), bias.detach()) for weight, bias in pairs]
        affine = tuple((norm.weight.detach(), norm.bias.detach()) for norm in norms)
        eps = norms[0].eps, norms[1].eps
        if pairs[0][0].dtype == dtype:
            return cls(attn.num_heads, eps, affine, *pairs, QUICK if quick else None)
        steep = QUICK if quick else 1.0
        for place, (gamma, beta) in ((0, affine[0]), (2, affine[1])) if fold else ():
            weight, bias = pairs[place]
            pairs[place] = weight * gamma, torch.addmv(bias, weight, beta)
        pairs[2] = pairs[2][0] * steep, pairs[2][1] * steep
        pairs[3] = pairs[3][0] / steep, pairs[3][1]
        low = [(weight.to(dtype), bias.to(dtype)) for weight, bias in pairs]
        return cls(attn.num_heads, eps, None if fold else affine, *low, 1.0 if quick else None)

    def attend(self, x: Tensor, queries: int | None = None) -> Tensor:
        """The attention half with its residual: (M, L, D) -> (M, L, D), or (M, queries, D) of the first tokens alone."""
        return x[:, :queries] + self.attention(self.norm(0, x), queries)

    def norm(self, half: int, x: Tensor) -> Tensor:
        """The norm before attention (0) or MLP (1), without what was folded away: (..., D) -> the same."""
        return _FrozenNorm.apply(x, self.norms[half] if self.norms else (None, None), self.eps[half])

    def attention(self, x: Tensor, queries: int | None = None) -> Tensor:
        """The attention half behind its norm, without residual: (M, L, D) -> (M, L or queries, D)."""
        if queries is None:
            q, k, v = _frozen_linear(x, *self.qkv).unflatten(-1, (3, self.heads, -1)).unbind(2)
        else:
            D = x.shape[-1]
            weight, bias = self.qkv
            q = _frozen_linear(x[:, :queries], weight[:D], bias[:D]).unflatten(-1, (self.heads, -1))
            k, v = _frozen_linear(x, weight[D:], bias[D:]).unflatten(-1, (2, self.heads, -1)).unbind(2)
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))  # (M, heads, L, head width)
        return _frozen_linear(y.transpose(1, 2).flatten(2), *self.out)

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP half behind its norm, without residual, keeping its activation's input: (M, L, D) -> the same."""
        inner = _frozen_linear(x, *self.fc)  # (M, L, 4*D)
        if self.steep is None:
            return _frozen_linear(F.gelu(inner), *self.proj)
        return _frozen_linear(F.silu(inner * self.steep) / self.steep, *self.proj)

    def transform(self, x: Tensor) -> Tensor:
        """The MLP half with its residual: (M, L, D) -> the same."""
        return _FrozenMlp.apply(x, self)


def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _FrozenLinear.apply(x, weight, bias) if x.requires_grad else F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """F.linear with a constant weight (O, D), which autograd would keep as if it were a tensor of this pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        dx = dy.reshape(-1, dy.shape[-1]) @ ctx.weight  # (R, D)
        return dx.view(*dy.shape[:-1], -1), None, None


class _FrozenNorm(torch.autograd.Function):
    """LayerNorm with a constant affine part: (..., D) -> the same, keeping x and its statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, affine: tuple[Tensor | None, Tensor | None], eps: float) -> Tensor:
        y, mean, rstd = layer_norm(x, *affine, eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.weight = affine[0]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return layer_norm_gradient(dy, *ctx.saved_tensors, ctx.weight), None, None


class _FrozenMlp(torch.autograd.Function):
    """x + W2 act(W1 norm(x) + b1) + b2: (M, L, D) -> the same, keeping x and the activation's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: FrozenBlock) -> Tensor:
        affine, (weight1, bias1), (weight2, bias2) = block.norms and block.norms[1], block.fc, block.proj
        normed, mean, rstd = layer_norm(x, *(affine or (None, None)), block.eps[1])
        steep = block.steep or 1.0
        inner = torch.addmm(bias1, normed.flatten(0, -2), weight1.t(), beta=steep, alpha=steep)  # (R, 4*D)
        keeps = ctx.needs_input_grad[0]
        active = F.gelu(inner) if block.steep is None else F.silu(inner, inplace=not keeps)
        if keeps:
            ctx.save_for_backward(x, mean, rstd, inner)
            ctx.block = block
        return torch.addmm(bias2, active, weight2.t(), alpha=1 / steep).view(x.shape).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x, mean, rstd, inner), block = ctx.saved_tensors, ctx.block
        dinner = dy.flatten(0, -2) @ block.proj[0]  # (R, 4*D); the activation's factor and its inverse cancel
        aten = torch.ops.aten
        dinner = aten.gelu_backward(dinner, inner) if block.steep is None else aten.silu_backward(dinner, inner)
        dx = layer_norm_gradient((dinner @ block.fc[0]).view(x.shape), x, mean, rstd, block.norms and block.norms[1][0])
        return dx.add_(dy), None
