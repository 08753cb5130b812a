"""Small layers shared by the methods: the temporal projection, attention, the token shift, recomputation.

Lives here: what is neither a method nor the TD4V module and has no state beyond its own weights.
Does not live here: TD4V (adapter.py), the frozen tower (backbone.py), anything that reads a configuration.

Letters: B clips, T frames, N patch tokens a frame, D width, d reduced width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from clip.ops import gelu_linear, normed_linear, temporal_linear, temporal_sum


def token_shift(token: Tensor) -> Tensor:
    """Exchange channel groups of the class token between frames.

    With f = D // T: out[t, j f:(j+1) f] = token[j, t f:(t+1) f]; channels past T*f become 0.

    Args:
        token: (B, T, D), D >= T.

    Returns:
        (B, T, D), same dtype.

    Source: owlholy/TD4V clip/AttnCBlock.py, shift_token_all.
    """
    B, T, D = token.shape
    f = D // T
    shifted = token[..., : T * f].unflatten(-1, (T, f)).transpose(1, 2)  # (B, T, T, f)
    return F.pad(shifted.flatten(2), (0, D - T * f))  # (B, T, D)


def over_tokens(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a BatchNorm1d to tokens (..., D): BatchNorm3d of (B, D, T, H, W), without the permute.

    A function and not a module, so that tools which replace BatchNorm by a synchronised one find the plain layer.
    """
    return norm(x.flatten(0, -2)).view(x.shape)  # (M, D) -> (..., D)


@torch.compiler.disable
def recomputed(part: nn.Module, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, of which only the inputs are kept for the backward pass, which runs it again.

    Args:
        part: the module whose BatchNorms the function goes through: their running statistics move once, not twice.
        function: without random numbers.
    """
    return checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), _SameNorms(part)),
    )  # fmt: skip


class _SameNorms(contextlib.AbstractContextManager):
    """While it is entered, the BatchNorms of `part` are in the mode they are in now, and what they count is thrown away."""

    def __init__(self, part: nn.Module):
        self.modes = {norm: norm.training for norm in part.modules() if isinstance(norm, _BatchNorm)}
        self.former: list[tuple[nn.Module, bool, dict[str, Tensor | None]]] = []

    def __enter__(self) -> None:
        for norm, mode in self.modes.items():
            self.former.append((norm, norm.training, dict(norm._buffers)))
            norm.training = mode
            if mode:
                norm._buffers.update({name: x if x is None else x.clone() for name, x in norm._buffers.items()})

    def __exit__(self, *_: object) -> None:
        while self.former:
            norm, mode, buffers = self.former.pop()
            norm.training = mode
            norm._buffers.update(buffers)


class TemporalProjection(nn.Conv2d):
    """A convolution over time that sees one patch, nn.Conv3d(kernel (k, 1, 1)) for tokens, with what stands beside it.

    Args:
        in_width, out_width: channels.
        kernel: frames seen, odd; zero padding keeps T.

    Shape: (B, T, N, in_width) -> (B, T, N, out_width).
    """

    def __init__(self, in_width: int, out_width: int, kernel: int):
        super().__init__(in_width, out_width, kernel_size=(kernel, 1), padding=(kernel // 2, 0))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """The convolution, times `scale` (1,)."""
        return temporal_linear(x, self.weight, self.bias, scale)

    def behind(self, norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
        """The convolution of `norm(x)`."""
        weight = self.weight.squeeze(-1).permute(2, 0, 1).flatten(0, 1)  # (O, D, k, 1) -> (k*O, D)
        products = normed_linear(x, norm, weight, None)  # (B, T, N, k*O)
        return temporal_sum(products, self.kernel_size[0]) + self.bias.to(products.dtype)


class Attention(nn.Module):
    """Multi-head attention inside a frame, in which some leading tokens are only looked at.

    The first `context` tokens give keys and values but no query. Weights as in nn.MultiheadAttention; the tokens go
    through `norm` first.

    Args:
        width: D. heads: must divide D.

    Shape: (M, context + N, D) -> (M, N, D).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"attention width {width} is not divisible by its {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, norm: nn.Module, context: int = 0) -> Tensor:
        qkv = normed_linear(x, norm, self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (M, L, heads, head width)
        y = F.scaled_dot_product_attention(q[:, context:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(y.transpose(1, 2).flatten(2))  # (M, heads, N, head width) -> (M, N, D)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear, behind a norm over D. Shape: (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        hidden = normed_linear(x, norm, self.fc1.weight, self.fc1.bias)  # (..., hidden)
        return gelu_linear(hidden, self.fc2.weight, self.fc2.bias)
