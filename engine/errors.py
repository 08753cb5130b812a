"""Errors that a user can cause and fix, and one sentence for what a machine or a library reports in a page.

Errors that are not known stay tracebacks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
ANOTHER_ENDED = "this process ends because another one has ended; its own message says why"


class EngineError(RuntimeError):
    """Something that a user can cause and fix; the message is one sentence. All errors of this package derive from it."""


@dataclass(frozen=True)
class RunContext:
    """The numbers of a run that go into a sentence; None if not known.

    Args:
        batch_size: videos a batch on this process, data.batch_size.
        clips: clips a batch on this process, repeated draws included.
        frames: T.
        accumulation: solver.grad_accumulation_steps.
        trainable: trainable parameters.
        precision: as resolved: `fp32`, `fp16` or `bf16`.
        memory_used: bytes on the GPU at the peak; None asks torch.
        memory_total: bytes of the GPU; None asks torch.
        workers: data.workers.
        world_size: processes.
        read_by: from torch's message on a killed worker to words on the video that it read.
    """

    batch_size: int | None = None
    clips: int | None = None
    frames: int | None = None
    accumulation: int | None = None
    trainable: int | None = None
    precision: str | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    workers: int | None = None
    world_size: int | None = None
    read_by: Callable[[str], str] | None = None


def explain(error: BaseException, context: RunContext | None = None) -> str | None:
    """One sentence that says what to change, with the numbers; None for an unknown error.

    Only errors of Python's and torch's classes are explained; a ChildProcessError of a data worker is a sentence
    already, as are all errors of our classes.
    """
    if type(error).__module__.partition(".")[0] not in ("builtins", "torch"):
        return None
    context = context or RunContext()
    for known in _KNOWN:
        if (sentence := known(error, str(error), context)) is not None:
            return sentence
    return None


@contextlib.contextmanager
def explain_errors(context: Callable[[], RunContext]) -> Iterator[None]:
    """Turn errors inside that `explain` knows into an EngineError of one sentence, with the numbers of `context()`."""
    try:
        yield
    except Exception as error:
        sentence = None if another_ended(error) else explain(error, context())
        if sentence is None:
            raise
        raise EngineError(sentence) from error


def another_ended(error: BaseException) -> bool:
    """Whether the error only says that another process ended; that one reports what happened."""
    return isinstance(error, (RuntimeError, OSError)) and re.search(_ENDED, str(error), re.IGNORECASE) is not None


def _worker(error: BaseException, text: str, now: RunContext) -> str | None:
    if isinstance(error, ChildProcessError) and error.errno is None:
        return text  # the loader's sentence
    if not isinstance(error, RuntimeError) or not re.search(
        r"DataLoader worker .*(killed by signal: (?!Bus)|exited unexp)", text
    ):
        return None
    workers = "" if now.workers is None else f", now {now.workers},"
    reading = "" if now.read_by is None else now.read_by(text)
    return (
        f"a worker of the loader was killed{reading}; if the machine had run out of memory, lower "
        f"data.workers{workers} or data.batch_size ({text.splitlines()[0].strip()})"
    )


def _cuda_memory(error: BaseException, text: str, now: RunContext) -> str | None:
    reported = re.search(r"CUDA (error: )?(ran )?out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED", text)
    if not isinstance(error, torch.OutOfMemoryError) and not (isinstance(error, RuntimeError) and reported):
        return None
    now = _measured(now)
    known = ((now.clips, "clips a batch"), (now.frames, "frames a clip"), (now.trainable, "trainable parameters"))
    numbers = ", ".join(f"{number:,} {what}" for number, what in known if number is not None)
    sentence = "the GPU is out of memory" + (f" with {numbers}" if numbers else "")
    if now.memory_used is not None and now.memory_total is not None:
        sentence += f"; {now.memory_used / GIB:.1f} of {now.memory_total / GIB:.1f} GiB were used at most"
    if others := re.findall(r"Process (\d+) has ([\d.]+ \w+) memory in use", text):
        sentence += f"; other programs use it, too ({', '.join(f'process {pid}: {size}' for pid, size in others)})"
    advice = []
    if now.batch_size is None:
        advice.append("halve data.batch_size and double solver.grad_accumulation_steps")
    elif now.batch_size > 1:
        share = next(number for number in range(2, now.batch_size + 1) if now.batch_size % number == 0)
        steps = f"={now.accumulation * share}" if now.accumulation is not None else f" {share} times as high"
        advice.append(f"set data.batch_size={now.batch_size // share} and solver.grad_accumulation_steps{steps}")
    if advice:
        advice[0] += ", the same step but for BatchNorm"
    if now.precision not in ("bf16", "fp16"):
        advice.append("set solver.precision=bf16")
    return f"{sentence}: {', or '.join(advice) or 'lower data.num_segments or data.num_sample'}"


def _open_files(error: BaseException, text: str, now: RunContext) -> str | None:
    if not isinstance(error, (RuntimeError, OSError)) or not re.search(r"Too many open files|items of ancdata", text):
        return None
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    fewer = "" if now.workers is None else f", or lower data.workers, now {now.workers}"
    return f"too many open files: a process may have {allowed} at once; raise that, e.g. by ulimit -n 65536{fewer}"


def _shared_memory(error: BaseException, text: str, now: RunContext) -> str | None:
    signs = (
        r"unable to (open|allocate|mmap|resize|write to|truncate|fallocate)\b.*(shared memory|/torch_|</)|bus error"
        r"|shared memory segment|out of shared memory|/dev/shm.*No space left|No space left on device.*/dev/shm"
    )
    if not isinstance(error, (RuntimeError, OSError)) or not re.search(signs, text, re.IGNORECASE):
        return None
    there = ""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(SHARED_MEMORY)
        there = f", where {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free now"
    workers = "" if now.workers is None else f", now {now.workers},"
    return (
        f"no shared memory is left in {SHARED_MEMORY}{there}: lower data.workers{workers} or data.batch_size, or enlarge "
        "it (docker: --shm-size)"
    )


def _full_disk(error: BaseException, text: str, now: RunContext) -> str | None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
        name = error.filename if isinstance(error.filename, str) else None
    elif isinstance(error, RuntimeError) and re.search(r"inline_container.*(unexpected pos|file write failed)", text):
        what, name = "a file could not be written completely, as on a full disk", None
    else:
        return None
    where = ""
    if name is not None:
        where = f" ({name}"
        with contextlib.suppress(OSError):
            where += f"; {shutil.disk_usage(os.path.dirname(os.path.abspath(name))).free / GIB:.2f} GiB are free"
        where += ")"
    return (
        f"{what}{where}: make room, lower checkpoint.keep, or choose another --output; what was saved before is "
        "complete, and the same command resumes from it"
    )


def _cpu_memory(error: BaseException, text: str, now: RunContext) -> str | None:
    requested = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", text)
    allocator = isinstance(error, RuntimeError) and (requested or re.search(r"Cannot allocate memory", text))
    system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (allocator or system or isinstance(error, MemoryError)):
        return None
    wanted = f" the {int(requested[1]) / GIB:.1f} GiB requested" if requested else ""
    with_what = "" if now.clips is None else f" with {now.clips} clips a batch"
    free = ""
    with contextlib.suppress(ValueError, OSError):
        free = f" ({os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB are free)"
    workers = "" if now.workers is None else f", now {now.workers}"
    sentence = f"the machine has no memory left for{wanted or ' more'}{with_what}{free}"
    return f"{sentence}: lower data.batch_size or data.workers{workers}"


def _time_out(error: BaseException, text: str, now: RunContext) -> str | None:
    signs = (
        r"Timed out waiting \d+ ?ms for (send|recv)|collective operation timeout|NCCL operation timed out"
        r"|monitoredBarrier in|wait timeout|waiting for clients|Timeout\(ms\)|socket has timed out|Socket Timeout"
        r"|timed out in blocking wait|Timeout at collective|operations have failed or timed out|Operation timed out"
    )
    if not isinstance(error, RuntimeError) or not re.search(signs, text, re.IGNORECASE):
        return None
    if joined := re.search(r"(\d+)/(\d+) clients joined", text):
        return (
            f"only {joined[1]} of {joined[2]} processes came within {_seconds(text)}: start the others too, and check "
            "that NNODES, NPROC and RDZV are the same on all machines"
        )
    absent = re.search(r"Rank (\d+) failed to pass", text) or re.search(r"\[([\d, ]+)\] are the lagging ranks", text)
    who = f"process {absent[1].strip()}" if absent else "another process"
    if not absent and now.world_size is not None:
        who = f"one of the {now.world_size} processes"
    kind = re.search(r"OpType=(\w+)", text)
    what = f" ({kind[1]})" if kind else ""
    return (
        f"{who} did not arrive within {_seconds(text)} at a point where all wait for each other{what}: it is "
        "dead, stuck or much slower; look at its last lines and its machine (disk and data.workers, GPU, network: "
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME); rerun the same command to resume"
    )


def _ended(error: BaseException, text: str, now: RunContext) -> str | None:
    return ANOTHER_ENDED if another_ended(error) else None


def _no_gradient(error: BaseException, text: str, now: RunContext) -> str | None:
    if not isinstance(error, RuntimeError) or "Expected to have finished reduction" not in text:
        return None
    names = re.search(r"did not receive grad for rank \d+: ([^\n]*[A-Za-z_][^\n]*)", text)
    numbers = re.search(r"did not receive grad for rank \d+: ([\d ]+)", text)
    which = f": {names[1].strip()}" if names else f", numbers {numbers[1].strip()} of them" if numbers else ""
    return (
        f"some trainable parameters get no gradient{which}: the model's forward must use each of them in every step, or "
        "not list them in trainable_modules" + ("" if names else " (TORCH_DISTRIBUTED_DEBUG=DETAIL names them)")
    )


_ENDED = (
    r"closed by peer|reset by peer|broken pipe|remote process exited|ncclRemoteError|communicator was aborted"
    r"|failed to recv, got 0 bytes|connection was likely closed|recvValue failed|sendBytes failed"
)
_KNOWN: tuple[Callable[[BaseException, str, RunContext], str | None], ...] = (
    _worker,
    _open_files,  # before the shared memory that cannot be opened for it
    _shared_memory,
    _cuda_memory,
    _full_disk,
    _cpu_memory,
    _no_gradient,
    _time_out,
    _ended,
)


def _measured(now: RunContext) -> RunContext:
    """`now` with the GPU's memory as torch reports it."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return now
    used, total = now.memory_used, now.memory_total
    with contextlib.suppress(RuntimeError):  # a device in an error state has no answer
        used = torch.cuda.max_memory_allocated() if used is None else used
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if total is None else total
    return replace(now, memory_used=used, memory_total=total)


def _seconds(text: str) -> str:
    """The length of a time-out, from the error's text."""
    patterns = ((r"Timeout\(ms\)=(\d+)", 1000), (r"(\d+) ?ms\b", 1000), (r"ran for (\d+) milliseconds", 1000))
    for pattern, unit in (*patterns, (r"(\d+) ?(?:s\b|seconds)", 1)):
        if found := re.search(pattern, text):
            return f"{int(found[1]) / unit:g} s"
    return "the time allowed"
