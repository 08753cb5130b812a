"""A DataLoader whose workers write videos into shared memory that is used again for later batches.

A usual worker puts each batch into newly made shared memory, and the kernel has to find, clear and map every page of
it, twice: for pixels that costs about as much as resizing them. Here the main process keeps a few shared buffers. With
the keys of a batch it sends the slot of a free one, the worker joins the items right in that buffer, and what comes
back is a reference: which buffer, which shape. A buffer is free again when the last tensor that looks at it is gone, so
a batch may be kept as long as one likes: while no buffer is free, batches travel the usual way.

A disk may not answer. The calling thread never waits for it itself, so signals end its wait, and it names the videos that
it waits for.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import math
import multiprocessing
import os
import queue
import re
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
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, get_worker_info

PREFETCH = 2  # batches that each worker prepares ahead
SPARE = 2  # more buffers than batches in the making: the batch in use, and the one that has just arrived
SHARED_MEMORY = Path("/dev/shm")
MIB = 1 << 20
MAIN_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # the main process handles them, workers do not
PARENT_CHECK_S = 5.0  # how often a worker checks that its main process is alive
NOTICE_S = 30.0  # how often the videos are named that are waited for
NAMED = 4  # videos, at most
PID, INDEX = 0, 1  # of a process that reads, and of the video in the list; -1 while it reads none
_TOO_MANY_FILES = ("Too many open files", "items of ancdata")  # in the messages of torch and multiprocessing
_END = object()

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Slot:
    """The buffer that the videos of a batch go to; it comes before the keys of the batch, and before its items."""

    buffer: int


@dataclass(frozen=True)
class BufferRef:
    """Videos that lie in a buffer: which one, and how to look at them."""

    buffer: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SharedBuffers:
    """Buffers of shared memory, handed out by number.

    Args:
        buffers: how many.
        size: of each, bytes.
    Raises:
        ValueError: the machine has too little shared memory.
    """

    def __init__(self, buffers: int, size: int):
        needed = buffers * size
        if SHARED_MEMORY.is_dir() and (available := shutil.disk_usage(SHARED_MEMORY).free) < needed:
            raise ValueError(_too_little_memory(needed, available))
        try:
            self.memory = torch.empty(buffers, size, dtype=torch.uint8).share_memory_()
        except RuntimeError:  # another process took it meanwhile
            raise ValueError(_too_little_memory(needed, shutil.disk_usage(SHARED_MEMORY).free)) from None
        self.free = deque(range(buffers))  # used in the main process alone; its threads may append

    def put(self, slot: Slot, videos: Sequence[torch.Tensor], join: Callable[..., torch.Tensor]) -> BufferRef:
        """In a worker: join videos (torch.cat or torch.stack) in the slot's buffer."""
        first = videos[0]
        shape = (len(videos), *first.shape)
        if join is torch.cat:
            shape = (sum(len(video) for video in videos), *first.shape[1:])
        ref = BufferRef(slot.buffer, first.dtype, shape)
        join(videos, out=self._view(self.memory[slot.buffer], ref))
        return ref

    def open(self, ref: BufferRef) -> torch.Tensor:
        """In the main process: the videos of a reference. The buffer is free again when no tensor looks at it."""
        owner = self.memory[ref.buffer].numpy()
        weakref.finalize(owner, self.free.append, ref.buffer)
        return self._view(torch.from_numpy(owner), ref)  # its storage, shared by all views, keeps `owner` alive

    @staticmethod
    def _view(buffer: torch.Tensor, ref: BufferRef) -> torch.Tensor:
        size = math.prod(ref.shape) * ref.dtype.itemsize
        return buffer[:size].view(ref.dtype).view(ref.shape)


def _too_little_memory(needed: int, available: int) -> str:
    return (
        f"the loader's workers need {-(-needed // MIB)} MiB of shared memory, {SHARED_MEMORY} has {available // MIB}: "
        "lower data.workers or data.batch_size, or enlarge it (docker: --shm-size)"
    )


class _SlotSampler(BatchSampler):
    """The batches of a sampler, each with a slot before its keys while there are free buffers."""

    def __init__(self, sampler: Sampler, batch_size: int, buffers: SharedBuffers | None):
        super().__init__(sampler, batch_size, drop_last=False)
        self.buffers = buffers
        self.in_use: set[int] = set()  # buffers of batches that have not come back
        self.awaited: deque[list[Any]] = deque()  # keys of batches that have not come back, the next one first

    def __iter__(self) -> Iterator[list[Any]]:
        for keys in super().__iter__():
            self.awaited.append(keys)
            if self.buffers is not None and self.buffers.free:
                buffer = self.buffers.free.popleft()
                self.in_use.add(buffer)
                keys = [Slot(buffer), *keys]
            yield keys


@contextlib.contextmanager
def _main_signals_blocked() -> Iterator[None]:
    """Processes started inside never get MAIN_SIGNALS; those that arrive meanwhile reach this process afterwards.

    A terminal's Ctrl-C and a scheduler's SIGTERM go to every process of a run. The main process then finishes its step,
    for which it needs its workers.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, MAIN_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _interruptible(batches: Iterator[Any], notice: Callable[[float], None], every: float) -> Iterator[Any]:
    """The same batches, each fetched in a thread of its own while the calling one waits, so that a signal reaches it.

    A thread that waits for a disk runs no signal handler.

    Args:
        notice: called with the seconds so far, each `every` seconds that a batch is waited for.
    """
    requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def fetch() -> None:
        while requests.get():
            try:
                answers.put((next(batches, _END), None))
            except BaseException as error:
                answers.put((None, error))

    with _main_signals_blocked():
        threading.Thread(target=fetch, daemon=True).start()
    try:
        while True:
            requests.put(True)
            batch, error = _answer(answers, notice, every)
            if error is not None:
                raise error
            if batch is _END:
                return
            yield batch
    finally:
        requests.put(False)


def _answer(answers: queue.SimpleQueue[Any], notice: Callable[[float], None], every: float) -> Any:
    waited = 0.0
    while True:
        try:
            return answers.get(timeout=every)
        except queue.Empty:
            waited += every
            notice(waited)


def _start_worker(worker: int, in_work: torch.Tensor) -> None:
    """What a worker does first.

    It inherits the garbage of the process that it is a copy of. An opened video in there, whose threads were not
    copied, would wait for them for ever if it were collected here.
    """
    gc.freeze()
    get_worker_info().dataset.in_work = in_work[worker].numpy()
    in_work[worker, PID] = os.getpid()
    if hasattr(signal, "sigtimedwait"):
        main = multiprocessing.parent_process().pid
        threading.Thread(target=_end_with_main_process, args=(main,), daemon=True).start()
    else:  # macOS does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_with_main_process(main: int) -> None:
    """In a thread of a worker: end it when the main process sends SIGTERM, or is gone. Nobody else's SIGTERM counts.

    It does so however long the worker's own thread waits for a file.
    """
    parent = os.getppid()
    while True:
        sent = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_S)
        if (sent is not None and sent.si_pid == main) or os.getppid() != parent:
            os._exit(0)


class VideoLoader(DataLoader):
    """Batches of a dataset, in the order of a sampler, made by worker processes that stay alive between epochs.

    A batch is what `collate` gives, with the channels of `video` before its rows and columns: (..., T * f, 3, S, S).
    That is a view; in memory, the three colours of a pixel lie together.

    Args:
        dataset: its items are those of video_dataset.py. It gets `in_work`, where it notes the video that it reads, and
            may have `location(index)`, a video's name for messages.
        sampler: of keys of the dataset.
        batch_size: videos.
        item_bytes: of the videos of one item, at most.
        collate: (items, buffers=) -> batch, with a BufferRef for `video` if the first item is a Slot.
        workers: processes; 0 works in the calling one.
        pin_memory: put videos into page-locked memory, from which a GPU fetches them while it computes.
        seed: of what the workers draw; nothing of ours depends on it.
        notice_s: a batch that is waited for longer is logged with its videos, and again each time so much later.

    Raises:
        ValueError: too little shared memory.
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
        notice_s: float = NOTICE_S,
    ):
        self.order, self.pin, self.notice_s = sampler, pin_memory, notice_s
        self.buffers = SharedBuffers(workers * PREFETCH + SPARE, batch_size * item_bytes) if workers else None
        self.in_work = torch.full((max(1, workers), 2), -1, dtype=torch.int64).share_memory_()  # PID and INDEX of each
        dataset.in_work = self.in_work[0].numpy()  # in the main process; each worker gets its own row
        super().__init__(
            dataset,
            batch_sampler=_SlotSampler(sampler, batch_size, self.buffers),
            collate_fn=partial(collate, buffers=self.buffers),
            num_workers=workers,  # each on one thread, which is torch's own rule for workers
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=partial(_start_worker, in_work=self.in_work),
            generator=torch.Generator().manual_seed(seed),  # or torch's global one is drawn from
        )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Give the batches of `epoch` from the next iteration on, without the first ones, which were seen already."""
        self.order.set_epoch(epoch, first_batch * self.batch_sampler.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        in_use, awaited = self.batch_sampler.in_use, self.batch_sampler.awaited
        abandoned = tuple(in_use)
        in_use.clear()
        awaited.clear()
        starts_workers = self.num_workers > 0 and self._iterator is None
        try:
            with _main_signals_blocked() if starts_workers else contextlib.nullcontext():
                batches = super().__iter__()  # waits until the workers have finished what they were at
            if self.buffers is not None:
                self.buffers.free.extend(abandoned)
            for batch in _interruptible(batches, self._name_awaited, self.notice_s):
                awaited.popleft()
                yield self._finished(batch if self.buffers is None else self._received(batch))
        except (RuntimeError, OSError) as error:
            sentence = _reason(error, self.num_workers, self.read_by(str(error))) if self.num_workers else None
            if sentence is None:
                raise
            raise ChildProcessError(sentence) from error

    def read_by(self, killed: str) -> str:
        """What the workers that torch's message `killed` names by their process ids were reading, as words to add."""
        named = re.search(r"pid(?:\(s\))? ([\d, ]+)", killed)
        pids = {int(pid) for pid in re.findall(r"\d+", named[1])} if named else set()
        indices = [index for pid, index in self.in_work.tolist() if pid in pids and index >= 0]
        return f" while it read {self._names(indices)}" if indices else ""

    def _name_awaited(self, seconds: float) -> None:
        """Log the videos that the next batch waits for: those of it that are being read, else all of it."""
        indices = [key[1] if isinstance(key, tuple) else key for key in next(iter(self.batch_sampler.awaited), [])]
        reading = set(self.in_work[:, INDEX].tolist())
        names = self._names([index for index in indices if index in reading] or indices)
        logger.warning("waiting for %g s for %s: the disk may not answer", seconds, names or "the loader")

    def _names(self, indices: Sequence[int]) -> str:
        names = [getattr(self.dataset, "location", str)(index) for index in indices[:NAMED]]
        return ", ".join(names) + (f" and {len(indices) - NAMED} more" if len(indices) > NAMED else "")

    def _received(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn what a worker sent into tensors."""
        slot, video = batch["slot"], batch["video"]
        if slot is not None:
            self.batch_sampler.in_use.discard(slot.buffer)
        if isinstance(video, BufferRef):
            batch["video"] = self.buffers.open(video)
        elif slot is not None:
            self.buffers.free.append(slot.buffer)
        return batch | {key: torch.from_numpy(batch[key]) for key in ("label", "index")}

    def _finished(self, batch: dict[str, Any]) -> dict[str, Any]:
        del batch["slot"]
        if batch["video"] is not None:
            video = batch["video"].pin_memory() if self.pin else batch["video"]
            batch["video"] = video.movedim(-1, -3)  # (..., T * f, 3, S, S)
        return batch


def too_many_files(workers: int | None = None) -> str:
    """The message where a process may open no more files."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    fewer = "" if workers is None else f", or lower data.workers, now {workers}"
    return f"too many open files: a process may have {allowed} at once; raise that, e.g. by ulimit -n 65536{fewer}"


def _reason(error: RuntimeError | OSError, workers: int, reading: str) -> str | None:
    """One sentence for torch's pages of text about a failed worker; None for errors of our own.

    Args:
        reading: of `VideoLoader.read_by`.
    """
    text = str(error)
    advice = "lower data.workers or data.batch_size"
    if getattr(error, "errno", None) == errno.EMFILE or any(sign in text for sign in _TOO_MANY_FILES):
        return too_many_files(workers)
    if "exited unexpectedly" in text or "killed by signal" in text:
        return f"a worker of the loader was killed{reading}; if memory ran out, {advice} ({text.splitlines()[0]})"
    if "shared memory" in text or "unable to write to file" in text:
        return f"a worker of the loader found no shared memory in {SHARED_MEMORY}: {advice} (docker: --shm-size)"
    return None
