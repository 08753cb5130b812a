"""The processes of a run: who am I, what do the others hold, and how a model is spread over them.

One process without a process group is the normal case and works everywhere.

    process = start()                     # torchrun's environment, or one process
    model = wrap(model, process, sync_bn=True)
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from engine.errors import EngineError
from engine.signals import end_after_launcher
from engine.sync_batchnorm import convert_sync_batchnorm

logger = logging.getLogger("td4v")


class DistributedError(EngineError):
    """The requested processes or device are not available."""


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
        device: `cuda` or `cpu`; None takes CUDA if there is a GPU. With CUDA each process takes the GPU of its
            local rank and communicates over nccl, on a CPU over gloo.

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
    own_device = torch.device("cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise DistributedError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} can be seen"
            )
        own_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(own_device)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a launcher is the parent
        end_after_launcher(float(os.environ.get("TD4V_GRACE", 120)))
    if world_size > 1:
        if kind == "cuda":
            dist.init_process_group("nccl", device_id=own_device)
        else:
            dist.init_process_group("gloo")
    return Process(rank, world_size, local_rank, own_device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


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


def cpu_group() -> dist.ProcessGroup | None:
    """A group for `all_reduce_max`, made once by all processes; None if the default group is on the CPU already."""
    if not dist.is_initialized() or dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo")


def all_reduce_max(values: Sequence[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """The maximum of each of `values` over all processes, exchanged on the CPU, so that no GPU is waited for.

    Every process must call it, with the group of `cpu_group`.
    """
    if not dist.is_initialized():
        return [int(value) for value in values]
    tensor = torch.tensor([int(value) for value in values])
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor.tolist()


def move_to_device(model: nn.Module, process: Process, compile: bool = False) -> nn.Module:
    """Move `model` to the process's device, for use by one process.

    Args:
        compile: torch.compile the model in place, in training and in evaluation. Names stay the same. Results differ
            by the order of sums and the draws of dropout.
    """
    model = model.to(process.device)
    if compile:
        model.compile()
    return model


def wrap(model: nn.Module, process: Process, sync_bn: bool = False, compile: bool = False) -> nn.Module:
    """Move `model` to the process's device and, with several processes, average its gradients over them.

    Args:
        sync_bn: replace each BatchNorm by one whose statistics go over the clips of all processes. Names in the
            state dict stay the same.
        compile: see `move_to_device`.
    """
    if process.world_size == 1 and sync_bn:
        logger.warning("BatchNorm is not synchronised: there is only one process, which sees all clips anyway")
    elif process.world_size > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        seen = f"all {process.world_size} processes" if sync_bn else "one process"
        logger.info("BatchNorm takes its statistics over the clips of one forward pass on %s", seen)
    if process.world_size > 1 and sync_bn:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm if process.device.type == "cuda" else convert_sync_batchnorm
        model = convert(model)
    model = move_to_device(model, process, compile)
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
    """Give every process the buffers of rank 0 (unsynchronised BatchNorm statistics drift apart)."""
    if dist.is_initialized():
        for buffer in unwrap(model).buffers():
            dist.broadcast(buffer, src=0)
