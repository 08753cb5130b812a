"""What a model costs: FLOPs, bytes kept for backward, peak memory, time, and the matrix rate of the device.

Lives here: the measuring, of any nn.Module and any input; it knows no method, no configuration and no data.
Does not live here: what is measured, tables and pictures (scripts/profile.py, scripts/profile_report.py).

One multiply-add counts as 2 FLOPs, and only products of matrices and convolutions count. Sizes are in bytes, times in
seconds.
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
Address = tuple[str, int]  # of a storage: device, place

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
    """Four products; kernels make the scores once more, which is no work of the model."""
    return 2 * _attention_flops(query, key, value)


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of what `work` computes, eagerly, backward passes included.

    Fused attention counts as its matrix products do, whichever kernel runs, so that the scores that its backward makes
    once more are left out. Activations that `work` itself computes again (checkpointing) are counted again.
    """
    formulas = {
        getattr(aten, name + suffix): formula
        for name in FUSED_ATTENTION
        for suffix, formula in (("", _attention_flops), ("_backward", _attention_backward_flops))
        if hasattr(aten, name + suffix)
    }
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation, in which nothing can be counted
    try:
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops()


@dataclass(frozen=True)
class Saved:
    """Bytes that were first kept while `module` was the innermost running one.

    `copied_weights`: copies of parameters in another number format, which are as large for one clip as for many.
    """

    module: str
    bytes: int
    copied_weights: bool = False


def saved_for_backward(
    model: nn.Module, *inputs: Tensor, calls: Mapping[str, tuple[object, str]] | None = None
) -> list[Saved]:
    """What one forward pass keeps for backward: storages that autograd saves, each once and whole however many views
    of it are saved, without the model's parameters and buffers. In the order of the pass, one entry a module.

    The model runs twice as it is (training mode, autocast of the caller); outputs and graphs are dropped.

    Args:
        calls: methods that count as modules, by the name they count under: (object, name of its method).
    """
    own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    storages = [weakref.ref(tensor.untyped_storage()) for _, tensor in _kept(model, inputs, own, {}).values()]
    gc.collect()
    standing = {(str(storage.device), storage.data_ptr()) for ref in storages if (storage := ref()) is not None}
    copies = _WeightCopies(own, standing - {_address(tensor) for tensor in inputs})
    with copies:
        kept = _kept(model, inputs, own, calls or {})
    sums: dict[tuple[str, bool], int] = {}
    for address, (module, tensor) in kept.items():
        key = module, address in copies
        sums[key] = sums.get(key, 0) + tensor.untyped_storage().nbytes()
    return [Saved(module, size, copied) for (module, copied), size in sums.items()]


def _kept(
    model: nn.Module, inputs: Sequence[Tensor], own: set[Address], calls: Mapping[str, tuple[object, str]]
) -> dict[Address, tuple[str, Tensor]]:
    """Module and tensor of each storage that is saved. The tensors are held too, so that memory which is given back and
    taken again does not pass for the same."""
    running: list[str] = [""]
    kept: dict[Address, tuple[str, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # with its graph, which holds what is returned here, it would hold itself for ever
        if _address(tensor) not in own and tensor.untyped_storage().nbytes():
            kept.setdefault(_address(tensor), (running[-1], tensor))
        return tensor

    def named(method: Callable, name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            running.append(name)
            try:
                return method(*args, **kwargs)
            finally:
                running.pop()

        return call

    with ExitStack() as undo:
        for prefix, module in model.named_modules():
            begin = module.register_forward_pre_hook(lambda *_, prefix=prefix: running.append(prefix))
            end = module.register_forward_hook(lambda *_: [running.pop(), None][1], always_call=True)
            undo.callback(begin.remove)
            undo.callback(end.remove)
        for name, (owner, method) in calls.items():
            vars(owner)[method] = named(getattr(owner, method), name)
            undo.callback(vars(owner).pop, method)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(*inputs)
    return kept


class _WeightCopies(TorchDispatchMode):
    """Addresses of copies of parameters: those that stand from before, and the casts that are made while this is
    entered, which are held so that their addresses stay theirs."""

    def __init__(self, weights: set[Address], standing: set[Address]):
        super().__init__()
        self.weights, self.standing, self.made = weights, standing, {}

    def __contains__(self, address: Address) -> bool:
        return address in self.standing or address in self.made

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and _address(args[0]) in self.weights:
            self.made[_address(result)] = result
        return result


def _address(tensor: Tensor) -> Address:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that lived at once during `work`, beyond those that lived before.

    On a GPU by torch's allocator. On a CPU by the same, from each allocation and release that torch.profiler notes:
    exact, inner buffers of torch's operations included, memory that libraries take for themselves not. Memory that
    lived before and is given back during `work` is not subtracted on a CPU.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its remarks that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as noted:
        work()
    events = [event for event in noted.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def seconds(work: Callable[[], object], device: torch.device, repeats: int, least: float = 0.2) -> list[float]:
    """Time of one `work`, `repeats` times, each the mean over so many in a row that they last `least` seconds. It runs
    twice before."""
    work()
    number = max(1, min(1000, math.ceil(least / max(_lasts(work, device, 1), 1e-9))))
    return [_lasts(work, device, number) / number for _ in range(repeats)]


def _lasts(work: Callable[[], object], device: torch.device, number: int) -> float:
    _wait(device)
    since = time.perf_counter()
    for _ in range(number):
        work()
    _wait(device)
    return time.perf_counter() - since


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    """Whether an error says that the GPU's or the machine's memory does not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    lacks = ("can't allocate memory", "Cannot allocate memory", "out of memory", "std::bad_alloc", "_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in lacks)


@contextmanager
def memory_limited(device: torch.device) -> Iterator[None]:
    """Let the process ask for no more memory than is free now, so that too large a batch is an error that can be
    caught, and not the end of the process. Does nothing with a GPU, and where the system does not tell or cannot."""
    free, used = _free_memory(), _own_memory()
    if device.type != "cpu" or free is None or used is None:
        yield
        return
    import resource  # of Unix alone

    former = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [used + free, *(limit for limit in former if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, former)


def _own_memory() -> int | None:
    return _kilobytes("/proc/self/status", "VmData")


def _free_memory() -> int | None:
    """Of the machine, or of the container (cgroup 2) where that is less."""
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    try:
        most, now = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if most == "max" or free is None else min(free, int(most) - int(now))
    except (OSError, ValueError):
        return free


def _kilobytes(path: str, name: str) -> int | None:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:")), None)
    except OSError:
        return None
