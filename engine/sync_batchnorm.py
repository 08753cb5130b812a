"""BatchNorm over the batches of all processes, on any device (torch's own needs GPUs)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce by sum; its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(_BatchNorm):
    """BatchNorm whose statistics go over the batches of all processes.

    Input and output (B, D, ...), statistics per channel D. Running statistics follow torch's rule: the variance is
    unbiased over the global count. In eval mode, and without a process group, it is the usual BatchNorm.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm needs an input (B, D, ...), not one of {input.dim()} dimensions")

    @torch.compiler.disable  # torch 2.11 compiles sums over processes into wrong gradients
    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        self._check_input_dim(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        other_dims = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        local_count = x.new_tensor([x.numel() / x.shape[1]])
        sums = _SumOverProcesses.apply(torch.cat([x.sum(other_dims), local_count]))  # (D + 1,)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(other_dims)) / count  # (D,)
        if self.track_running_stats:
            self._update_running(mean.detach(), variance.detach() * (count / (count - 1)))
        x = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        rate = 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(variance.to(self.running_var.dtype), rate)


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm1d, 2d and 3d inside `module` by SyncBatchNorm; parameters and buffers are shared."""
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        synced = SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine, False)
        synced.track_running_stats = module.track_running_stats
        synced._parameters = module._parameters
        synced._buffers = module._buffers
        synced.training = module.training
        return synced
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child))
    return module
