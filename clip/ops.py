"""Matrix products fused with the norm, activation or convolution beside them, so that less is saved for backward.

The usual layers save the input of every one of them. Here a norm and the linear layer after it save one tensor, the
normalised input; an activation and the linear layer after it save the activation's input. What is not saved is
element-wise and is computed again in backward; no matrix product is. Results equal those of the plain layers up to
rounding.

All functions compute in autocast's dtype where autocast is on, else in the dtype of their input; the statistics of norms
are at least float32. A gradient of a gradient is not defined. Hooks on the layers whose weights are passed do not fire.

Letters: R rows (all clips, frames, patches), B clips, T frames, N patches, M images, p tokens before the patches,
D and O widths, d reduced width, k taps (frames that a convolution over time sees).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

QUICK = 1.702  # QuickGELU(x) = x * sigmoid(1.702 x) = SiLU(1.702 x) / 1.702


def working_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on and would touch `x`, else that of `x`."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if known and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def as_is(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast leaves tensors on x's device alone."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else contextlib.nullcontext()


def tensor_versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """What changes when a tensor is replaced or written in place, except through `.data`. To notice new weights."""
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def normed_linear(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(norm(x), weight, bias)` that saves the normalised x alone.

    The norm's affine part is multiplied into the weight, so that its gradients follow from the weight's gradient.

    Args:
        x: (..., D).
        norm: nn.LayerNorm or nn.BatchNorm1d over D with affine parameters and running statistics. Any other norm, such
            as a synchronised one, is called as it is, on (R, D), and the linear layer then saves its own input.
        weight: (O, D).
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    dtype = working_dtype(x)
    with as_is(x):
        x = x.to(dtype)
        if type(norm) is nn.LayerNorm and norm.bias is not None:
            return layer_normed_linear(x, norm, weight, bias)
        if not _can_be_fused(norm):
            normed = norm(x.flatten(0, -2)).view(x.shape)  # (R, D) -> (..., D)
            return F.linear(normed, weight.to(dtype), None if bias is None else bias.to(dtype))
        if norm.training:
            norm.num_batches_tracked.add_(1)
        return _NormedLinear.apply(x, norm.weight, norm.bias, weight, bias, norm)


def layer_normed_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`normed_linear` for a LayerNorm with weight and bias, or a subclass that computes the same."""
    dtype = working_dtype(x)
    with as_is(x):
        return _NormedLinear.apply(x.to(dtype), norm.weight, norm.bias, weight, bias, norm)


def _can_be_fused(norm: nn.Module) -> bool:
    is_batch_norm = type(norm) is nn.BatchNorm1d
    return is_batch_norm and norm.affine and norm.running_mean is not None and norm.momentum is not None


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear(F.gelu(x), weight, bias)` that saves x alone: (..., D) -> (..., O)."""
    dtype = working_dtype(x)
    with as_is(x):
        return _GeluLinear.apply(x.to(dtype), weight, bias, None, False)


def quick_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> Tensor:
    """`scale * F.linear(QuickGELU(x), weight, bias)` that saves x alone: (..., D) -> (..., O), with scale (O,).

    In float16 the scale is a layer of its own, in its own dtype, whose input is saved too: a small one, as networks have
    at first, would vanish in float16 weights, and without it the scaled loss's gradients leave float16's range.
    """
    dtype = working_dtype(x)
    with as_is(x):
        if scale is not None and dtype == torch.float16:
            return scale * _GeluLinear.apply(x.to(dtype), weight, bias, None, True)
        return _GeluLinear.apply(x.to(dtype), weight, bias, scale, True)


def temporal_sum(x: Tensor, taps: int) -> Tensor:
    """The second half of a convolution over time: sums the products of each tap. Saves nothing.

    out[t] = sum over j of x[t + j - k // 2, ..., j d:(j+1) d], where frames outside the clip are zero.

    Args:
        x: (B, T, N, k*d), the products of every frame with the weights of every tap.
        taps: k.

    Returns:
        (B, T, N, d).
    """
    return x if taps == 1 else _TemporalSum.apply(x, taps)


def temporal_linear(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """`scale * Conv3d(x)` with kernel (k, 1, 1) and zero padding, which saves x alone.

    Args:
        x: (B, T, N, d).
        weight: (O, d, k, 1).
        bias: (O,).
        scale: (1,).

    Returns:
        (B, T, N, O).
    """
    dtype = working_dtype(x)
    with as_is(x):
        return _TemporalLinear.apply(x.to(dtype), weight, bias, scale)


def difference_streams(x: Tensor, backward: nn.Conv2d, forward: nn.Conv2d, grid: tuple[int, int]) -> Tensor:
    """x and the two streams of TD4V: x + backward(QuickGELU(x[t] - x[t+1])) + forward(QuickGELU(x[t] - x[t-1])).

    A frame without a neighbour on one side has the difference 0 there. Both convolutions run as one, which saves x
    alone.

    Args:
        x: (B, T, N, d).
        backward, forward: d -> d channels, 3 x 3, padding 1.
        grid: (H, W), N = H*W.

    Returns:
        (B, T, N, d).
    """
    dtype = working_dtype(x)
    with as_is(x):
        weight = torch.cat([backward.weight, forward.weight], 1)  # (d, 2*d, 3, 3)
        return _DifferenceStreams.apply(x.to(dtype), weight, backward.bias + forward.bias, grid)


def add_to_patches(x: Tensor, branch: Tensor) -> Tensor:
    """Adds `branch` (M, N, D) to the last N of the tokens x (M, p + N, D) -> (M, p + N, D). Saves nothing."""
    return _AddToPatches.apply(x, branch)


class _NormedLinear(torch.autograd.Function):
    """See normed_linear. `norm` gives statistics alone; gamma and beta are its weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None, norm: nn.Module
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (R, D)
        if isinstance(norm, nn.LayerNorm):
            ctx.statistics = "row"
            normed, _, rstd = layer_norm(rows, None, None, norm.eps)  # rstd (R, 1)
        elif norm.training:
            ctx.statistics = "batch"
            running = norm.running_mean, norm.running_var
            normed, _, rstd = torch.native_batch_norm(rows, None, None, *running, True, norm.momentum, norm.eps)
        else:
            ctx.statistics = "running"
            rstd = (norm.running_var + norm.eps).rsqrt()  # (D,)
            normed = torch.addcmul(-norm.running_mean * rstd, rows, rstd).to(x.dtype)
        shift = torch.mv(weight, beta) if bias is None else torch.addmv(bias, weight, beta)
        y = torch.addmm(shift.to(x.dtype), normed, (weight * gamma).to(x.dtype).t())
        ctx.save_for_backward(normed, rstd, gamma, beta, weight)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        normed, rstd, gamma, beta, weight = ctx.saved_tensors
        shape = *dy.shape[:-1], normed.shape[-1]
        dy = dy.reshape(-1, dy.shape[-1])  # (R, O)
        dfolded = (dy.t() @ normed).to(weight.dtype)  # (O, D), of weight * gamma
        dbias = dy.sum(0, dtype=weight.dtype)
        dgamma, dbeta = (weight * dfolded).sum(0), dbias @ weight
        dweight = torch.addr(dfolded.mul_(gamma), dbias, beta) if ctx.needs_input_grad[3] else None
        dx = None
        if ctx.needs_input_grad[0] and ctx.statistics == "row":
            dx = _layer_gradient(dy @ (weight * gamma).to(dy.dtype), normed, rstd).view(shape)
        elif ctx.needs_input_grad[0]:
            dx = dy @ (weight * (gamma * rstd)).to(dy.dtype)  # times rstd already, which is constant for a channel
            dx = (_batch_gradient(dx, normed, rstd) if ctx.statistics == "batch" else dx).view(shape)
        return dx, dgamma, dbeta, dweight, dbias if ctx.needs_input_grad[4] else None, None


class _GeluLinear(torch.autograd.Function):
    """See gelu_linear and quick_gelu_linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, quick: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.quick = quick
        if scale is not None:
            weight, bias = weight * scale[:, None], bias * scale
        return F.linear(_gelu(x, quick), weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])  # (R, O)
        dweight = (rows.t() @ _gelu(x, ctx.quick).reshape(len(rows), -1)).to(weight.dtype)  # of weight * scale
        dbias, dscale, scaled = rows.sum(0, dtype=weight.dtype), None, weight
        if scale is not None:
            dscale = (dweight * weight).sum(1) + dbias * bias
            dweight, dbias, scaled = dweight.mul_(scale[:, None]), dbias * scale, weight * scale[:, None]
        dx = (rows @ scaled.to(dy.dtype)).view(x.shape)
        if ctx.quick:
            dx = torch.ops.aten.silu_backward(dx, x * QUICK)
        else:
            dx = torch.ops.aten.gelu_backward(dx, x)
        return dx, dweight, dbias, dscale, None


def _gelu(x: Tensor, quick: bool) -> Tensor:
    return F.silu(x * QUICK).div_(QUICK) if quick else F.gelu(x)


class _TemporalSum(torch.autograd.Function):
    """See temporal_sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: int) -> Tensor:
        ctx.taps = taps
        return _sum_neighbours(x, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _stack_neighbours(dy, ctx.taps, -1), None


class _TemporalLinear(torch.autograd.Function):
    """See temporal_linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        folded = (_flat_taps(weight) * scale).to(x.dtype)  # (O, k*d)
        return F.linear(_stack_neighbours(x, weight.shape[2], 1), folded, (bias * scale).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        taps, flat, rows = weight.shape[2], _flat_taps(weight), dy.reshape(-1, dy.shape[-1])  # rows (R, O)
        stacked = _stack_neighbours(x, taps, 1).reshape(len(rows), -1)  # (R, k*d)
        dflat = (rows.t() @ stacked).to(weight.dtype)
        dbias = rows.sum(0, dtype=weight.dtype)
        dscale = ((dflat * flat).sum() + dbias @ bias).view(1)
        dweight = (dflat * scale).unflatten(1, (taps, -1)).transpose(1, 2).contiguous().unsqueeze(-1)  # (O, d, k, 1)
        dx = (rows @ (flat * scale).to(dy.dtype)).view(*dy.shape[:-1], -1)  # (B, T, N, k*d)
        return _sum_neighbours(dx, taps, -1), dweight, dbias * scale, dscale


class _DifferenceStreams(torch.autograd.Function):
    """See difference_streams."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grid = grid
        y = F.conv2d(_images(_streams(x), grid), weight.to(x.dtype), bias.to(x.dtype), padding=1)
        return y.permute(0, 2, 3, 1).reshape(x.shape).add_(x)  # (B*T, d, H, W) -> (B, T, N, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        d = x.shape[-1]
        dstreams, dweight, _ = torch.ops.aten.convolution_backward(
            _images(dy, ctx.grid),
            _images(_streams(x), ctx.grid),
            weight.to(x.dtype),
            bias_sizes=None,
            stride=[1, 1],
            padding=[1, 1],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=1,
            output_mask=[True, True, False],
        )
        dstreams = dstreams.permute(0, 2, 3, 1).reshape(*x.shape[:-1], 2 * d)  # (B, T, N, 2*d)
        change = (x[:, 1:] - x[:, :-1]).mul_(QUICK)
        change = torch.ops.aten.silu_backward(dstreams[:, 1:, :, d:], change).sub_(
            torch.ops.aten.silu_backward(dstreams[:, :-1, :, :d], change.neg())
        )  # (B, T-1, N, d), of x[t+1] - x[t]
        dx = dy.clone()
        dx[:, 1:] += change
        dx[:, :-1] -= change
        return dx, dweight.to(weight.dtype), dy.sum((0, 1, 2), dtype=weight.dtype), None


class _AddToPatches(torch.autograd.Function):
    """See add_to_patches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor) -> Tensor:
        y = x.clone()
        y[:, -branch.shape[1] :] += branch
        ctx.patches = branch.shape[1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy[:, -ctx.patches :]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of (..., D): the result in x's dtype, then mean and 1/std (..., 1), at least in float32."""
    if weight is None and (ones := _float32_ones(x)) is not None:
        weight, bias = ones, torch.zeros_like(ones)
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm_gradient(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of x from that of LayerNorm's result; mean and rstd (1/std) are those of `layer_norm`."""
    weight = _float32_ones(x) if weight is None else weight
    shape = x.shape[-1:]
    return torch.ops.aten.native_layer_norm_backward(dy, x, shape, mean, rstd, weight, None, [True, False, False])[0]


def _batch_gradient(dy: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """The gradient through a BatchNorm's statistics: dy (R, D), normalised input (R, D) -> (R, D).

    It starts from dy after rounding, with sums in float32: an error of the mean would be the same in all rows.
    """
    one, zero = torch.ones_like(rstd), torch.zeros_like(rstd)
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(dy, normed, one, zero, one, zero, one, True, 0.0, [True, False, False])[0]


def _layer_gradient(dy: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """As layer_norm_gradient, but from the normalised input: as if that, of mean 0 and std 1, had been the input."""
    return layer_norm_gradient(dy, normed, torch.zeros_like(rstd), torch.ones_like(rstd), None).mul_(rstd)


def _float32_ones(x: Tensor) -> Tensor | None:
    """A weight of ones where one is needed: on a CPU a norm without weight has its statistics in x's own dtype."""
    low = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return torch.ones(x.shape[-1]) if low else None


def _flat_taps(weight: Tensor) -> Tensor:
    """(O, d, k, 1) -> (O, k*d), as `_stack_neighbours` orders them."""
    return weight.squeeze(-1).transpose(1, 2).flatten(1)


def _stack_neighbours(x: Tensor, taps: int, step: int) -> Tensor:
    """out[t, ..., j d:(j+1) d] = x[t + step (j - k // 2)], 0 outside the clip: (B, T, N, d) -> (B, T, N, k*d)."""
    if taps == 1:
        return x
    B, T, N, d = x.shape
    out = x.new_zeros(B, T, N, taps, d)
    for tap in range(taps):
        offset = step * (tap - taps // 2)
        low, high = max(0, -offset), min(T, T - offset)
        if low < high:
            out[:, low:high, :, tap] = x[:, low + offset : high + offset]
    return out.flatten(3)


def _sum_neighbours(x: Tensor, taps: int, step: int = 1) -> Tensor:
    """out[t] = sum over j of x[t + step (j - k // 2), ..., j d:(j+1) d]: (B, T, N, k*d) -> (B, T, N, d)."""
    if taps == 1:
        return x
    x = x.unflatten(3, (taps, -1))  # (B, T, N, k, d)
    T, middle = x.shape[1], taps // 2
    out = x[:, :, :, middle].clone()
    for tap in range(taps):
        offset = step * (tap - middle)
        low, high = max(0, -offset), min(T, T - offset)
        if offset and low < high:
            out[:, low:high] += x[:, low + offset : high + offset, :, tap]
    return out


def _streams(x: Tensor) -> Tensor:
    """QuickGELU of the backward and the forward differences side by side: (B, T, N, d) -> (B, T, N, 2*d)."""
    d = x.shape[-1]
    out = x.new_zeros(*x.shape[:-1], 2 * d)
    change = (x[:, 1:] - x[:, :-1]).mul_(QUICK)
    out[:, 1:, :, d:] = F.silu(change)
    out[:, :-1, :, :d] = F.silu(change.neg_())
    return out.div_(QUICK)


def _images(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, T, N, d) -> (B*T, d, H, W) in channels-last memory, without a copy where x is contiguous."""
    return x.reshape(-1, *grid, x.shape[-1]).permute(0, 3, 1, 2)
