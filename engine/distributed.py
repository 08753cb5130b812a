"""Processes: who am I, what do the others hold, and how a model is spread over them.

Lives here: start and stop of the process group, gathering of Python objects, wrapping in DistributedDataParallel,
BatchNorm over all processes, the shell around an entry script's main.
Does not live here: anything about training. One process without a process group is the normal case and works everywhere.

    process = start()                     # torchrun's environment, or one process
    model = wrap(model, process, sync_bn=True)
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from engine.errors import ANOTHER_ENDED, RunContext, another_ended, explain
from engine.signals import INTERRUPTED, Stopped, leaving_at_once

logger = logging.getLogger("td4v")


class EngineError(RuntimeError):
    """What a user can cause and mend; the message is one sentence. The errors of this room derive from it."""


class DistributedError(EngineError):
    """The processes or the device asked for cannot be had."""


@dataclass(frozen=True)
class Process:
    """This process among all. `rank` counts over all machines, `local_rank` over this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files."""
        return self.rank == 0


def start(device: str | None = None) -> Process:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device: `cuda` or `cpu`; None takes CUDA where there is a GPU. With CUDA each process takes the GPU of its
            local rank and talks over nccl, on a CPU over gloo.

    Raises:
        DistributedError: incomplete environment, unknown device, or fewer GPUs than processes on this machine.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise DistributedError(f"the environment sets {', '.join(given)} but not {missing}: start it with torchrun")
    rank, world_size, local_rank = (int(os.environ[name]) for name in names) if given else (0, 1, 0)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise DistributedError(f"the device must be cuda or cpu, not {kind!r}")
    place = torch.device("cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise DistributedError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} can be seen"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if world_size > 1:
        if kind == "cuda":
            dist.init_process_group("nccl", device_id=place)
        else:
            dist.init_process_group("gloo")
    return Process(rank, world_size, local_rank, place)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run(main: Callable[[], None], errors: tuple[type[Exception], ...]) -> None:
    """Call an entry script's main so that no process waits for one that failed.

    One of `errors`, which a user can cause, is logged as its one sentence, as is what health.py can explain; any other
    exception with its traceback. Then this process exits with status 1, at once where there are others: torchrun ends
    them. A run that was stopped on request exits with the status that says so (stop.py).
    """
    status = 0
    try:
        with leaving_at_once():
            main()
            barrier()
    except KeyboardInterrupt:
        logger.error("interrupted: last_model.pt, if there is one, holds what was saved last")
        status = INTERRUPTED
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            logger.warning("%s", stopped)
        status = stopped.status
    except Exception as error:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(2)  # where rank 0 failed alike it has said so, and torchrun ends this process meanwhile
        sentence = explain(error)
        if sentence == ANOTHER_ENDED:
            logger.warning("%s", sentence)
        elif sentence is not None or isinstance(error, errors):
            logger.error("%s", sentence or error)
        else:
            logger.exception("%s", type(error).__name__)
        status = 1
    leave(status)


@contextlib.contextmanager
def explained(situation: Callable[[], RunContext]) -> Iterator[None]:
    """Errors inside that health.py knows become an EngineError of one sentence, with the numbers of `situation()`."""
    try:
        yield
    except Exception as error:
        sentence = None if another_ended(error) else explain(error, situation())
        if sentence is None:
            raise
        raise EngineError(sentence) from error


def leave(status: int) -> None:
    """End this process if there are others, else return, or raise SystemExit where `status` is not 0.

    DistributedDataParallel keeps gloo's threads alive after the group is destroyed, and an orderly interpreter exit
    then sometimes aborts; after a failure it would also wait for the others. So both are left out.
    """
    if dist.is_initialized():
        if status == 0:
            stop()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status != 0:
        raise SystemExit(status)


def seed_everything(seed: int, process: Process) -> None:
    """Seed Python's, NumPy's and torch's generators with seed + rank, so that processes draw differently."""
    random.seed(seed + process.rank)
    numpy.random.seed(seed + process.rank)
    torch.manual_seed(seed + process.rank)


def gather(value: Any) -> list[Any]:
    """The `value` of every process, by rank, on every process. It must be picklable; tensors should be on the CPU."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def place(model: nn.Module, process: Process, compile: bool = False) -> nn.Module:
    """Move `model` to the process's device, as it is used by one process.

    Args:
        compile: have torch.compile translate it when it is first called with a kind of input, in training and in
            evaluation. It stays the same module under the same names; results differ by the order of sums, and the
            draws of dropout.
    """
    model = model.to(process.device)
    if compile:
        model.compile()
    return model


def wrap(model: nn.Module, process: Process, sync_bn: bool = False, compile: bool = False) -> nn.Module:
    """Move `model` to the process's device and, with several processes, average its gradients over them.

    Args:
        sync_bn: replace each BatchNorm by one whose statistics go over the clips of all processes. Names in the
            state dict stay as they are.
        compile: see `place`.
    """
    if process.world_size == 1 and sync_bn:
        logger.warning("BatchNorm is not synchronised: there is only one process, whose clips it sees anyway")
    elif process.world_size > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        seen = f"all {process.world_size} processes" if sync_bn else "one process"
        logger.info("BatchNorm takes its statistics over the clips of one forward pass on %s", seen)
    if process.world_size > 1 and sync_bn:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm if process.device.type == "cuda" else convert_sync_batchnorm
        model = convert(model)
    model = place(model, process, compile)
    if process.world_size == 1:
        return model
    devices = [process.device.index] if process.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=devices, find_unused_parameters=False, gradient_as_bucket_view=True
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Average gradients over the processes in the backward passes inside this context only if `enabled`."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def sync_buffers(model: nn.Module) -> None:
    """Give every process the buffers of rank 0 (BatchNorm statistics drift apart where they are not synchronised)."""
    if dist.is_initialized():
        for buffer in unwrap(model).buffers():
            dist.broadcast(buffer, src=0)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce by sum, whose gradient is the sum of the gradients of all processes."""

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
    """BatchNorm over the batches of all processes, for any device and backend (torch's refuses CPU tensors).

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
        other = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        local = x.new_tensor([x.numel() / x.shape[1]])
        sums = _SumOverProcesses.apply(torch.cat([x.sum(other), local]))  # (D + 1,)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(other)) / count  # (D,)
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
    """Replace every BatchNorm1d, 2d and 3d inside `module` by SyncBatchNorm, sharing parameters and buffers."""
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
