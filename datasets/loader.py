"""A DataLoader whose workers write videos into shared memory that is used again for later batches.

Lives here: the ring of such memory, how a batch travels through it, and which signals workers obey. Does not live here:
what an item is and how items become a batch (video_dataset.py), nor the order of videos (sampler.py).

A usual worker puts each batch into newly made shared memory, and the kernel has to find, clear and map every page of
it, twice: for pixels that costs about as much as resizing them. Here the main process keeps a ring of shared buffers.
With the keys of a batch it sends a claim on a free one, the worker joins the items right in it, and what comes back is
a parcel: which buffer, which shape. A buffer is free again when the last tensor that looks at it is gone, so a batch
may be kept as long as one likes: while no buffer is free, batches travel the usual way.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

PREFETCH = 2  # batches that each worker works ahead
SPARE = 2  # buffers beyond those of batches on their way: the batch in use, and the one that has just arrived
SHARED_MEMORY = Path("/dev/shm")
MIB = 1 << 20
NOT_FOR_WORKERS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # the main process answers them
_TOO_MANY_FILES = ("Too many open files", "items of ancdata")  # what torch and multiprocessing say
PARENT_GONE_S = 5.0  # how often a worker looks whether its main process still lives


@dataclass(frozen=True)
class Slot:
    """Comes before the keys of a batch, and before its items: the buffer that its videos go to."""

    buffer: int


@dataclass(frozen=True)
class BufferRef:
    """Stands for videos that lie in a buffer."""

    buffer: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SharedBuffers:
    """Buffers of shared memory, handed out by number.

    Args:
        buffers: how many.
        size: of each, bytes.
    Raises:
        ValueError: the machine has not enough shared memory.
    """

    def __init__(self, buffers: int, size: int):
        needed = buffers * size
        if SHARED_MEMORY.is_dir() and (there := shutil.disk_usage(SHARED_MEMORY).free) < needed:
            raise ValueError(_too_little(needed, there))
        try:
            self.memory = torch.empty(buffers, size, dtype=torch.uint8).share_memory_()
        except RuntimeError:  # another process was quicker
            raise ValueError(_too_little(needed, shutil.disk_usage(SHARED_MEMORY).free)) from None
        self.free = deque(range(buffers))  # lives in the main process; threads may append to it

    def put(self, claim: Slot, videos: Sequence[torch.Tensor], join: Callable[..., torch.Tensor]) -> BufferRef:
        """In a worker: join videos (torch.cat or torch.stack) in a buffer."""
        first = videos[0]
        shape = (len(videos), *first.shape)
        if join is torch.cat:
            shape = (sum(len(video) for video in videos), *first.shape[1:])
        parcel = BufferRef(claim.buffer, first.dtype, shape)
        join(videos, out=self._tensor(parcel, self.memory[claim.buffer]))
        return parcel

    def open(self, parcel: BufferRef) -> torch.Tensor:
        """In the main process: the videos of a parcel, (..., S, S, 3).

        The buffer is free again when nothing looks at them any more.
        """
        owner = self.memory[parcel.buffer].numpy()
        weakref.finalize(owner, self.free.append, parcel.buffer)
        return self._tensor(parcel, torch.from_numpy(owner))  # its storage, shared by all views, keeps `owner`

    @staticmethod
    def _tensor(parcel: BufferRef, buffer: torch.Tensor) -> torch.Tensor:
        size = math.prod(parcel.shape) * parcel.dtype.itemsize
        return buffer[:size].view(parcel.dtype).view(parcel.shape)


def _too_little(needed: int, there: int) -> str:
    return (
        f"the loader's workers need {-(-needed // MIB)} MiB of shared memory, {SHARED_MEMORY} has {there // MIB}: "
        "lower data.workers or data.batch_size, or enlarge it (docker: --shm-size)"
    )


class _Slots(BatchSampler):
    """The batches of a sampler, each with a claim before its keys while there are free buffers."""

    def __init__(self, sampler: Sampler, batch_size: int, ring: SharedBuffers):
        super().__init__(sampler, batch_size, drop_last=False)
        self.ring = ring
        self.claimed: set[int] = set()  # by batches that have not come back

    def __iter__(self) -> Iterator[list[Any]]:
        for keys in super().__iter__():
            if self.ring.free:
                buffer = self.ring.free.popleft()
                self.claimed.add(buffer)
                keys = [Slot(buffer), *keys]
            yield keys


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started inside never get the signals that the main process answers; it gets them afterwards.

    A terminal's Ctrl-C and a scheduler's SIGTERM go to every process of a run. The main process then finishes its step,
    for which it needs its workers.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _begin(worker: int) -> None:
    """What a worker does first.

    It inherits the garbage of the process that it is a copy of: an opened video in there, whose threads were not copied,
    would wait for them for ever if it were collected here.
    """
    gc.freeze()
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=_serve, args=(multiprocessing.parent_process().pid,), daemon=True).start()
    else:  # macOS does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _serve(main: int) -> None:
    """In a thread of a worker: end it when the main process sends SIGTERM, or is gone; nobody else's SIGTERM counts.

    It does so however long the worker's own thread waits for a file.
    """
    parent = os.getppid()
    while True:
        sent = signal.sigtimedwait({signal.SIGTERM}, PARENT_GONE_S)
        if (sent is not None and sent.si_pid == main) or os.getppid() != parent:
            os._exit(0)


class VideoLoader(DataLoader):
    """Batches of a dataset, in the order of a sampler, made by worker processes that stay alive between epochs.

    Args:
        dataset: its items are those of video_dataset.py.
        sampler: of keys of the dataset.
        batch_size: videos.
        item_bytes: of the videos of one item, at most.
        collate: (items, ring=) -> batch, with a BufferRef for `video` if the first item is a Slot.
        workers: processes; 0 works in the calling one.
        pin_memory: put videos into page-locked memory, from which a GPU fetches them while it computes.
        seed: of what the workers draw; nothing of ours depends on it.

    Raises:
        ValueError: not enough shared memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        batch_size: int,
        item_bytes: int,
        collate: Callable[..., dict[str, Any]],
        workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ):
        self.order, self.pin = sampler, pin_memory
        self.ring = SharedBuffers(workers * PREFETCH + SPARE, batch_size * item_bytes) if workers else None
        own = BatchSampler(sampler, batch_size, drop_last=False)
        super().__init__(
            dataset,
            batch_sampler=own if self.ring is None else _Slots(sampler, batch_size, self.ring),
            collate_fn=partial(collate, ring=self.ring),
            num_workers=workers,  # each on one thread, which is torch's own rule for workers
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_begin,
            generator=torch.Generator().manual_seed(seed),  # or torch's global one is drawn from
        )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Give the batches of `epoch` from the next iteration on, without the first ones, which were seen already."""
        self.order.set_epoch(epoch, first_batch * self.batch_sampler.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.ring is None:
            for batch in super().__iter__():
                yield self._finished(batch)
            return
        claimed = self.batch_sampler.claimed
        abandoned = tuple(claimed)
        claimed.clear()
        try:
            with _deaf() if self._iterator is None else contextlib.nullcontext():  # the first time starts the workers
                batches = super().__iter__()  # which waits until workers have done what they were asked for before
            self.ring.free.extend(abandoned)
            while (batch := next(batches, None)) is not None:
                yield self._arrived(batch)
        except (RuntimeError, OSError) as error:
            if (sentence := _reason(error, self.num_workers)) is None:
                raise
            raise ChildProcessError(sentence) from error

    def _arrived(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Unpack what a worker sent."""
        claim, video = batch["claim"], batch["video"]
        if claim is not None:
            self.batch_sampler.claimed.discard(claim.buffer)
        if isinstance(video, BufferRef):
            batch["video"] = self.ring.open(video).movedim(-1, -3)
        elif claim is not None:
            self.ring.free.append(claim.buffer)
        batch |= {key: torch.from_numpy(batch[key]) for key in ("label", "index")}
        return self._finished(batch)

    def _finished(self, batch: dict[str, Any]) -> dict[str, Any]:
        del batch["claim"]
        if self.pin and batch["video"] is not None:
            batch["video"] = batch["video"].pin_memory()
        return batch


def too_many_files(workers: int | None = None) -> str:
    """What to do where a process may open no more files."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    fewer = "" if workers is None else f", or lower data.workers, now {workers}"
    return f"too many open files: a process may have {allowed} at once; raise that, e.g. by ulimit -n 65536{fewer}"


def _reason(error: RuntimeError | OSError, workers: int) -> str | None:
    """One sentence for what torch says of workers in pages; None for errors of ours."""
    text = str(error)
    advice = "lower data.workers or data.batch_size"
    if getattr(error, "errno", None) == errno.EMFILE or any(sign in text for sign in _TOO_MANY_FILES):
        return too_many_files(workers)
    if "exited unexpectedly" in text or "killed by signal" in text:
        return f"a worker of the loader was killed; if it was for want of memory, {advice} ({text.splitlines()[0]})"
    if "shared memory" in text or "unable to write to file" in text:
        return f"a worker of the loader found no shared memory in {SHARED_MEMORY}: {advice} (docker: --shm-size)"
    return None
