"""Measures what any nn.Module costs: FLOPs, activation memory, peak memory, time, and the device's matrix rate.

One multiply-add counts as 2 FLOPs; only matrix products and convolutions count. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import gc
import math
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
Address = tuple[str, int]  # of a storage: device, pointer

FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Two products. query (B, heads, L, d), key (B, heads, S, d), value (B, heads, S, dv)."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward_flops(
    _: Any, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any
) -> int:
    """Four products; that kernels compute the scores again is not the model's work."""
    return 2 * _attention_flops(query, key, value)


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of what `work` computes, eagerly, backward passes included.

    Fused attention counts as its matrix products, whichever kernel runs; the scores that its backward pass computes
    again do not count. Activations that `work` itself recomputes (checkpointing) count again.
    """
    formulas = {
        getattr(aten, name + suffix): formula
        for name in FUSED_ATTENTION
        for suffix, formula in (("", _attention_flops), ("_backward", _attention_backward_flops))
        if hasattr(aten, name + suffix)
    }
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operation, whose products are not counted
    try:
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops()


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of storages that autograd first saved while `module` was the innermost running module.

    `copied_weights`: copies of parameters in another number format, whose size does not depend on the batch.
    """

    module: str
    bytes: int
    copied_weights: bool = False


def saved_for_backward(
    model: nn.Module, *inputs: Tensor, calls: Mapping[str, tuple[object, str]] | None = None
) -> list[SavedBytes]:
    """The activation memory of one forward pass, one entry a module, in the order of the pass.

    It counts the storages that autograd saves for backward, each once and in full however many views of it are saved,
    without the model's parameters and buffers. The model runs twice as it is (training mode, autocast of the caller);
    outputs and graphs are dropped.

    Args:
        calls: methods that count as modules, by the name they count under: (object, name of its method).
    """
    own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    storages = [weakref.ref(tensor.untyped_storage()) for _, tensor in _saved(model, inputs, own, {}).values()]
    gc.collect()
    # What outlives the first run is not an activation: a copy of weights that the model caches.
    cached = {(str(storage.device), storage.data_ptr()) for ref in storages if (storage := ref()) is not None}
    copies = _WeightCopies(own, cached - {_address(tensor) for tensor in inputs})
    with copies:
        saved = _saved(model, inputs, own, calls or {})
    sums: dict[tuple[str, bool], int] = {}
    for address, (module, tensor) in saved.items():
        key = module, address in copies
        sums[key] = sums.get(key, 0) + tensor.untyped_storage().nbytes()
    return [SavedBytes(module, size, copied) for (module, copied), size in sums.items()]


def _saved(
    model: nn.Module, inputs: Sequence[Tensor], own: set[Address], calls: Mapping[str, tuple[object, str]]
) -> dict[Address, tuple[str, Tensor]]:
    """Module and tensor of each saved storage. The tensors are kept alive, so that no address is used twice."""
    running: list[str] = [""]
    saved: dict[Address, tuple[str, Tensor]] = {}

    def save(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # with its graph, which holds what is returned here, it would keep itself alive
        if _address(tensor) not in own and tensor.untyped_storage().nbytes():
            saved.setdefault(_address(tensor), (running[-1], tensor))
        return tensor

    def as_module(method: Callable, name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            running.append(name)
            try:
                return method(*args, **kwargs)
            finally:
                running.pop()

        return call

    with ExitStack() as undo:
        for name, module in model.named_modules():
            begin = module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
            end = module.register_forward_hook(lambda *_: [running.pop(), None][1], always_call=True)
            undo.callback(begin.remove)
            undo.callback(end.remove)
        for name, (owner, method) in calls.items():
            vars(owner)[method] = as_module(getattr(owner, method), name)
            undo.callback(vars(owner).pop, method)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model(*inputs)
    return saved


class _WeightCopies(TorchDispatchMode):
    """Addresses of copies of parameters: cached ones, and casts made inside this context, which stay alive."""

    def __init__(self, weights: set[Address], cached: set[Address]):
        super().__init__()
        self.weights, self.cached, self.casts = weights, cached, {}

    def __contains__(self, address: Address) -> bool:
        return address in self.cached or address in self.casts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and _address(args[0]) in self.weights:
            self.casts[_address(result)] = result
        return result


def _address(tensor: Tensor) -> Address:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that were alive at once during `work`, beyond those that were alive before.

    Measured by torch's allocator: on a GPU by its statistics, on a CPU by torch.profiler's record of each allocation
    and release. That is exact and includes buffers inside torch's operations, but not memory that libraries allocate
    themselves. On a CPU, memory that was alive before and is released during `work` is not subtracted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no warning that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def seconds(work: Callable[[], object], device: torch.device, repeats: int, least: float = 0.2) -> list[float]:
    """`repeats` times of one `work`, each the mean over as many calls in a row as take `least` seconds.

    Two calls before warm up and choose that number.
    """
    work()
    number = max(1, min(1000, math.ceil(least / max(_time_calls(work, device, 1), 1e-9))))
    return [_time_calls(work, device, number) / number for _ in range(repeats)]


def _time_calls(work: Callable[[], object], device: torch.device, number: int) -> float:
    start = now(device)
    for _ in range(number):
        work()
    return now(device) - start


def now(device: torch.device) -> float:
    """The time in seconds when all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 3) -> float:
    """FLOP/s of a product of two square matrices by torch.mm, the best of `repeats`.

    Args:
        size: rows of the matrices; None: 8192 on a GPU, 2048 on a CPU.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    return 2 * size**3 / min(seconds(lambda: torch.mm(left, right, out=result), device, repeats))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that the GPU or the machine is out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    messages = ("can't allocate memory", "Cannot allocate memory", "out of memory", "std::bad_alloc", "_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


@contextmanager
def memory_limited(device: torch.device) -> Iterator[None]:
    """Limit this process to the memory that is free now, so that too large a batch raises an error and kills nothing.

    Does nothing on a GPU, nor where the system does not report its memory.
    """
    free, used = _free_memory(), _kilobytes("/proc/self/status", "VmData")
    if device.type != "cpu" or free is None or used is None:
        yield
        return
    import resource  # Unix only

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [used + free, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _free_memory() -> int | None:
    """Free bytes of the machine, or of the container (cgroup 2) if that is less."""
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    try:
        most, now = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if most == "max" or free is None else min(free, int(most) - int(now))
    except (OSError, ValueError):
        return free


def _kilobytes(path: str, name: str) -> int | None:
    """The bytes of a line such as `MemAvailable: 123 kB`."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:")), None)
    except OSError:
        return None
