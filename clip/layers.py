"""Small layers that models share: temporal projection, attention, MLP, token shift, recomputation.

Letters: B clips, T frames, N patch tokens a frame, L tokens of a frame, M images, D width, O output width, k taps.
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

    With f = D // T: out[t, j f:(j+1) f] = token[j, t f:(t+1) f]. Channels past T*f become 0.

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
    """A BatchNorm1d over D on tokens (..., D): the BatchNorm3d of (B, D, T, H, W) without the permute.

    It is a function and not a module, so that tools which replace BatchNorm by a synchronised one find the plain layer.
    """
    return norm(x.flatten(0, -2)).view(x.shape)


@torch.compiler.disable
def recomputed(part: nn.Module, function: Callable[..., Tensor], *inputs: Any, draws: bool = False) -> Tensor:
    """`function(*inputs)`, of which only the inputs are saved for backward. The backward pass runs the function again.

    torch.utils.checkpoint alone would update the running statistics of BatchNorms twice. Hooks on the modules inside fire
    in both runs.

    Args:
        part: the module with the BatchNorms that the function uses.
        function, inputs: what is called with what.
        draws: whether the function draws random numbers.
    """

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), _SameNorms(part)

    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts)


def light(part: nn.Module, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`recomputed`, for norms, activations and the like up to one convolution or linear layer, which is the last.

    What comes before it is cheap and is computed again in backward; the last layer itself is not, because all that its
    gradient needs is there before it runs. torch.compile decides itself what it computes again, so it sees the plain
    function.

    Args:
        part, function: see `recomputed`.
        inputs: tensors, which are saved, and plain values.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*inputs)
    return recomputed(part, function, *inputs)


class _SameNorms(contextlib.AbstractContextManager):
    """Inside the context the BatchNorms of `part` have their present mode, and updates of their statistics are lost."""

    def __init__(self, part: nn.Module):
        self.modes = {norm: norm.training for norm in part.modules() if isinstance(norm, _BatchNorm)}
        self.previous: list[tuple[nn.Module, bool, dict[str, Tensor | None]]] = []

    def __enter__(self) -> None:
        for norm, mode in self.modes.items():
            self.previous.append((norm, norm.training, dict(norm._buffers)))
            norm.training = mode
            if mode:
                norm._buffers.update({name: x if x is None else x.clone() for name, x in norm._buffers.items()})

    def __exit__(self, *_: object) -> None:
        while self.previous:
            norm, mode, buffers = self.previous.pop()
            norm.training = mode
            norm._buffers.update(buffers)


class TemporalProjection(nn.Conv2d):
    """A convolution over time at each patch: nn.Conv3d with kernel (k, 1, 1), for tokens.

    Args:
        in_width, out_width: channels.
        kernel: k, the number of frames that it sees; odd. Zero padding keeps T.

    Shape: (B, T, N, in_width) -> (B, T, N, out_width).
    """

    def __init__(self, in_width: int, out_width: int, kernel: int):
        super().__init__(in_width, out_width, kernel_size=(kernel, 1), padding=(kernel // 2, 0))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """The convolution, times `scale` (1,)."""
        return temporal_linear(x, self.weight, self.bias, scale)

    def after_norm(self, norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
        """The convolution of `norm(x)`."""
        weight = self.weight.squeeze(-1).permute(2, 0, 1).flatten(0, 1)  # (O, D, k, 1) -> (k*O, D)
        products = normed_linear(x, norm, weight, None)  # (B, T, N, k*O)
        return temporal_sum(products, self.kernel_size[0]) + self.bias.to(products.dtype)


class Attention(nn.Module):
    """Multi-head attention of norm(x) inside a frame. The first `context` tokens give keys and values but no queries.

    The weights are those of nn.MultiheadAttention.

    Args:
        width: D.
        heads: must divide D.

    Shape: (M, context + N, D) -> (M, N, D).

    Raises:
        ValueError: heads that do not divide D.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"attention width {width} is not divisible by its {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, norm: nn.Module, context: int = 0) -> Tensor:
        qkv = normed_linear(x, norm, self.qkv.weight, self.qkv.bias)  # (M, L, 3*D)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (M, L, heads, head width)
        y = F.scaled_dot_product_attention(q[:, context:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(y.transpose(1, 2).flatten(2))  # (M, heads, N, head width) -> (M, N, D)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear, of norm(x).

    Args:
        width: D.
        hidden: width between the two linear layers.

    Shape: (..., D) -> (..., D).
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        hidden = normed_linear(x, norm, self.fc1.weight, self.fc1.bias)  # (..., hidden)
        return gelu_linear(hidden, self.fc2.weight, self.fc2.bias)
