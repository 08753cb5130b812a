"""A frozen block of CLIP that saves almost nothing for the backward pass, since its weights need no gradient.

Gradients go through to the input: the norms save their input, attention its queries, keys, values and result, the MLP
its activation's input. In autocast's dtype everything runs in low precision, the residual stream too, as in OpenAI's own
half-precision models (norms take their statistics in float32); the weights are cast once, not in each step, with the
norms' affine parts multiplied into them before rounding. Hooks on the layers inside do not fire.

Letters: M images (B clips x T frames), L = 1 + N tokens, D width, R rows (M*L).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clip.ops import QUICK, layer_norm, layer_norm_gradient


class Norm(NamedTuple):
    """A LayerNorm; weight and bias are None where they went into the layer after it."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Linear(NamedTuple):
    weight: Tensor  # (O, D)
    bias: Tensor  # (O,)

    def folded(self, norm: Norm) -> Linear:
        """The same layer with the affine part of the norm before it in its weights."""
        return Linear(self.weight * norm.weight, torch.addmv(self.bias, self.weight, norm.bias))

    def to(self, dtype: torch.dtype) -> Linear:
        return Linear(self.weight.to(dtype), self.bias.to(dtype))


@dataclass(frozen=True)
class FrozenBlock:
    """The weights of a block in one dtype. They must not change between a forward pass and its backward pass.

    Attributes:
        factor: a of the MLP's activation SiLU(a x) / a, which is QuickGELU; None for the exact GELU. It is 1.0 where a
            went into the weights.
    """

    heads: int
    norm1: Norm
    qkv: Linear
    out: Linear
    norm2: Norm
    fc: Linear
    proj: Linear
    factor: float | None

    @classmethod
    def of(cls, block: nn.Module, dtype: torch.dtype, quick_gelu: bool, fold: bool = True) -> FrozenBlock:
        """The block's weights as they are or, in another dtype than theirs, as folded and cast copies.

        Args:
            block: open_clip's ResidualAttentionBlock, without layer scale.
            quick_gelu: whether its activation is QuickGELU, not the exact GELU.
            fold: whether copies in another dtype may have the norms' affine parts in them.
        """

        def linear(weight: Tensor, bias: Tensor) -> Linear:
            return Linear(weight.detach(), bias.detach())

        attn, mlp, ln_1, ln_2 = block.attn, block.mlp, block.ln_1, block.ln_2
        frozen = cls(
            heads=attn.num_heads,
            norm1=Norm(ln_1.weight.detach(), ln_1.bias.detach(), ln_1.eps),
            qkv=linear(attn.in_proj_weight, attn.in_proj_bias),
            out=linear(attn.out_proj.weight, attn.out_proj.bias),
            norm2=Norm(ln_2.weight.detach(), ln_2.bias.detach(), ln_2.eps),
            fc=linear(mlp.c_fc.weight, mlp.c_fc.bias),
            proj=linear(mlp.c_proj.weight, mlp.c_proj.bias),
            factor=QUICK if quick_gelu else None,
        )
        return frozen if frozen.qkv.weight.dtype == dtype else frozen._cast(dtype, fold)

    def _cast(self, dtype: torch.dtype, fold: bool) -> FrozenBlock:
        norm1, norm2, qkv, fc = self.norm1, self.norm2, self.qkv, self.fc
        if fold:
            qkv, fc = qkv.folded(norm1), fc.folded(norm2)
            norm1, norm2 = Norm(None, None, norm1.eps), Norm(None, None, norm2.eps)
        factor = self.factor or 1.0
        return dataclasses.replace(
            self,
            norm1=norm1,
            qkv=qkv.to(dtype),
            out=self.out.to(dtype),
            norm2=norm2,
            fc=Linear(fc.weight * factor, fc.bias * factor).to(dtype),
            proj=Linear(self.proj.weight / factor, self.proj.bias).to(dtype),
            factor=None if self.factor is None else 1.0,
        )

    def norm_attention(self, x: Tensor) -> Tensor:
        """The norm before attention, without what was folded away: (..., D) -> (..., D)."""
        return _FrozenNorm.apply(x, *self.norm1)

    def attention(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Attention on normalised tokens, without the residual: (M, L, D) -> (M, L or queries, D)."""
        if queries is None:
            q, k, v = _frozen_linear(x, *self.qkv).unflatten(-1, (3, self.heads, -1)).unbind(2)
        else:
            D, (weight, bias) = x.shape[-1], self.qkv
            q = _frozen_linear(x[:, :queries], weight[:D], bias[:D]).unflatten(-1, (self.heads, -1))
            k, v = _frozen_linear(x, weight[D:], bias[D:]).unflatten(-1, (2, self.heads, -1)).unbind(2)
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))  # (M, heads, L, head width)
        return _frozen_linear(y.transpose(1, 2).flatten(2), *self.out)  # (M, L, D)

    def norm_mlp(self, x: Tensor) -> Tensor:
        """The norm before the MLP, without what was folded away: (..., D) -> (..., D)."""
        return _FrozenNorm.apply(x, *self.norm2)

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP on normalised tokens, without the residual: (M, L, D) -> (M, L, D)."""
        inner = _frozen_linear(x, *self.fc)  # (M, L, 4*D)
        if self.factor is None:
            return _frozen_linear(F.gelu(inner), *self.proj)
        return _frozen_linear(F.silu(inner * self.factor) / self.factor, *self.proj)

    def attend(self, x: Tensor, queries: int | None = None) -> Tensor:
        """The attention half with its residual: (M, L, D) -> (M, L, D), or (M, queries, D) of the first tokens."""
        return x[:, :queries] + self.attention(self.norm_attention(x), queries)

    def transform(self, x: Tensor) -> Tensor:
        """The MLP half with its residual: (M, L, D) -> (M, L, D)."""
        return _FrozenMlp.apply(x, self)


def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _FrozenLinear.apply(x, weight, bias) if x.requires_grad else F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """F.linear with a constant weight (O, D), which autograd would save as if it were a tensor of this pass."""

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
    """LayerNorm with a constant affine part, saving x and its statistics: (..., D) -> (..., D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.weight = weight
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return layer_norm_gradient(dy, *ctx.saved_tensors, ctx.weight), None, None, None


class _FrozenMlp(torch.autograd.Function):
    """x + W2 act(W1 norm(x) + b1) + b2, saving x and the activation's input: (M, L, D) -> (M, L, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: FrozenBlock) -> Tensor:
        fc, proj, factor = block.fc, block.proj, block.factor or 1.0
        normed, mean, rstd = layer_norm(x, *block.norm2)
        inner = torch.addmm(fc.bias, normed.flatten(0, -2), fc.weight.t(), beta=factor, alpha=factor)  # (R, 4*D)
        saves = ctx.needs_input_grad[0]
        active = F.gelu(inner) if block.factor is None else F.silu(inner, inplace=not saves)
        if saves:
            ctx.save_for_backward(x, mean, rstd, inner)
            ctx.block = block
        return torch.addmm(proj.bias, active, proj.weight.t(), alpha=1 / factor).view(x.shape).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x, mean, rstd, inner), block = ctx.saved_tensors, ctx.block
        dinner = dy.flatten(0, -2) @ block.proj.weight  # (R, 4*D); the activation's factor and its inverse cancel
        aten = torch.ops.aten
        dinner = aten.gelu_backward(dinner, inner) if block.factor is None else aten.silu_backward(dinner, inner)
        dnormed = (dinner @ block.fc.weight).view(x.shape)
        return layer_norm_gradient(dnormed, x, mean, rstd, block.norm2.weight).add_(dy), None
