"""Small layers shared by the methods: activations, the temporal projection, attention, the token shift.

Lives here: what is neither a method nor the TD4V module and has no state beyond its own weights.
Does not live here: TD4V (adapter.py), the frozen tower (backbone.py), anything that reads a configuration.

Letters: B clips, T frames, N patch tokens a frame, D width, d reduced width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP (openai/CLIP clip/model.py, QuickGELU)."""
    return x * torch.sigmoid(1.702 * x)


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


class TemporalProjection(nn.Conv2d):
    """A convolution over time that sees one patch: nn.Conv3d(kernel (k, 1, 1)) for tokens.

    Args:
        in_width, out_width: channels.
        kernel: frames seen, odd; zero padding keeps T.

    Shape: (B, T, N, in_width) -> (B, T, N, out_width).
    """

    def __init__(self, in_width: int, out_width: int, kernel: int):
        super().__init__(in_width, out_width, kernel_size=(kernel, 1), padding=(kernel // 2, 0))

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1):
            return F.linear(x, self.weight.flatten(1), self.bias)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, T, N, d), channels last


class Attention(nn.Module):
    """Multi-head attention inside a frame, in which some leading tokens are only looked at.

    The first `context` tokens give keys and values but no query. Weights as in nn.MultiheadAttention.

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

    def forward(self, x: Tensor, context: int = 0) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (M, L, 3, heads, head width)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (M, heads, L, head width)
        y = F.scaled_dot_product_attention(q[:, :, context:], k, v)
        return self.proj(y.transpose(1, 2).flatten(2))  # (M, N, D)


class Mlp(nn.Sequential):
    """Linear, exact GELU, Linear. Shape: (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
