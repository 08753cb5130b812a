"""Batches through shared buffers: the same as without, never overwritten while in use, and in any order of events."""

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc  # noqa: F401, pytest would import it where no file can be opened
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from datasets import loader as module
from datasets.loader import INDEX, MAIN_SIGNALS, SharedBuffers, Slot, VideoLoader
from datasets.sampler import ShuffledSampler, StridedSampler
from datasets.video_dataset import BadVideo, collate
from engine.signals import StopSignals, WaitInterrupted


class Numbers(Dataset):
    """Item i of epoch e: two clips of 3 frames of 4 x 4 pixels, filled by value."""

    def __init__(self, length=20, dtype=torch.uint8, bad=()):
        self.length, self.dtype, self.bad = length, dtype, bad

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        epoch, index = key
        if index in self.bad:
            return BadVideo(f"video {index}", index, True)
        video = torch.full((2, 3, 4, 4, 3), (10 * epoch + index) % 256, dtype=self.dtype)
        video += torch.arange(3, dtype=self.dtype)  # the colours differ
        both = {"label": torch.tensor([1, 2]), "index": torch.tensor([index, index])}
        return {**both, "video": video, "path": f"video {index}"}

    def __getitems__(self, keys):
        return [key if isinstance(key, Slot) else self[key] for key in keys]


class Collecting(Numbers):
    def __getitem__(self, key):
        gc.collect()
        return super().__getitem__(key)


def make(workers, dataset=None, batch_size=4, sampler=None, **options):
    dataset = dataset or Numbers()
    sampler = sampler or ShuffledSampler(len(dataset), batch_size, seed=1)
    size = 2 * 3 * 4 * 4 * 3 * dataset.dtype.itemsize
    return VideoLoader(dataset, sampler, batch_size, size, collate, workers, **options)


def same(one, other):
    return (
        len(one) == len(other)
        and all(
            torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype
            for a, b in zip(one, other, strict=True)
            for key in ("video", "label", "index")
        )
        and [batch["path"] for batch in one] == [batch["path"] for batch in other]
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(workers, dtype):
    here, there = make(0, Numbers(dtype=dtype)), make(workers, Numbers(dtype=dtype))
    for epoch in range(3):
        for loader in (here, there):
            loader.set_epoch(epoch)
        batches = [{**batch, "video": batch["video"].clone()} for batch in there]
        assert same(list(here), batches)
        assert batches[0]["video"].shape == (8, 3, 3, 4, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_channels_move_once_and_lie_together_in_memory(workers):
    video = next(iter(make(workers)))["video"]
    assert video.movedim(-3, -1).is_contiguous() and (video[0, 0, :, 0, 0].diff() == 1).all()


def test_kept_batches_are_not_overwritten():
    """Far more batches are held than there are buffers; views of them count, too."""
    loader, held = make(1, Numbers(100)), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            held.append((batch["video"].flatten(0, 1)[:, 0], batch["video"].clone()))
            del batch
    assert len(held) == 50 > len(loader.buffers.memory)
    for view, copy in held:
        assert torch.equal(view, copy.flatten(0, 1)[:, 0])
    assert not loader.buffers.free
    held.clear()
    del view, copy
    gc.collect()
    assert sorted(loader.buffers.free) == list(range(len(loader.buffers.memory)))


def test_a_simple_loop_always_finds_a_buffer(monkeypatch):
    loader = make(2, Numbers(80))
    sent = []
    monkeypatch.setattr(loader.buffers, "open", lambda ref, real=loader.buffers.open: sent.append(1) or real(ref))
    assert [len(batch["video"]) for batch in loader] == [8] * 20 and len(sent) == 20


def test_an_abandoned_iteration_gives_its_buffers_back():
    loader = make(2, Numbers(40))
    for epoch in range(6):
        loader.set_epoch(epoch)
        assert next(iter(loader))["video"] is not None
    loader.set_epoch(6)
    found = [{**batch, "video": batch["video"].clone()} for batch in loader]
    reference = make(0, Numbers(40))
    reference.set_epoch(6)
    assert same(list(reference), found)
    gc.collect()
    assert sorted(loader.buffers.free) == list(range(len(loader.buffers.memory)))


def test_batches_without_videos_give_their_buffers_back():
    loader = make(1, Numbers(20, bad=range(4, 12)), sampler=StridedSampler(20))
    for _ in range(4):
        found = [None if batch["video"] is None else batch["index"].tolist()[::2] for batch in loader]
        assert found == [[0, 1, 2, 3], None, None, [12, 13, 14, 15], [16, 17, 18, 19]]
    gc.collect()
    assert sorted(loader.buffers.free) == list(range(len(loader.buffers.memory)))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_an_epoch(workers):
    loader = make(workers)
    loader.set_epoch(2)
    whole = [{**batch, "video": batch["video"].clone()} for batch in loader]
    for done in range(len(whole) + 1):
        loader = make(workers)
        loader.set_epoch(2, first_batch=done)
        assert len(loader) == len(whole) - done
        assert same(whole[done:], [{**batch, "video": batch["video"].clone()} for batch in loader])
    with pytest.raises(ValueError, match="20 videos a process"):
        loader.set_epoch(2, first_batch=6)


def test_too_little_shared_memory(monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 20))
    monkeypatch.setattr(module, "SHARED_MEMORY", module.Path("/"))
    with pytest.raises(ValueError, match=r"need 3 MiB of shared memory, / has 1: lower data\.workers"):
        SharedBuffers(3, 1 << 20)


class Fatal(Numbers):
    """One item kills its worker, another fails in it."""

    def __init__(self, kill):
        super().__init__()
        self.kill = kill

    def __getitem__(self, key):
        self.in_work[INDEX] = key[1]
        if key[1] == 9:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("of ours")
        return super().__getitem__(key)

    def location(self, index):
        return f"video {index} (list, line {index + 1})"


def test_a_worker_that_is_killed_is_one_sentence_with_its_video():
    sentence = r"killed while it read video 9 \(list, line 10\); .* lower data\.workers"
    with pytest.raises(OSError, match=sentence) as caught:
        list(make(2, Fatal(kill=True)))
    assert "\n" not in str(caught.value)


class Blocked(Numbers):
    """Video 9 is a pipe that nobody writes to, as on a disk that does not answer."""

    def __init__(self, pipe):
        super().__init__()
        self.pipe = pipe

    def __getitem__(self, key):
        self.in_work[INDEX] = key[1]
        if key[1] == 9:
            self.pipe.read_bytes()
        return super().__getitem__(key)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_wait_names_its_video_and_ends_at_a_signal(workers, tmp_path, caplog):
    os.mkfifo(tmp_path / "pipe")
    loader = make(workers, Blocked(tmp_path / "pipe"), sampler=StridedSampler(20), notice_s=0.1)
    with StopSignals() as signals:
        batches = signals.interruptible(loader)
        assert [next(batches)["index"][0].item() for _ in range(2)] == [0, 4]
        threading.Timer(0.25, os.kill, [os.getpid(), signal.SIGTERM]).start()
        with caplog.at_level("WARNING", "td4v"), pytest.raises(WaitInterrupted):
            next(batches)
    with open(tmp_path / "pipe", "wb"):  # the disk answers, and the reader can end
        pass
    notices = [record.getMessage() for record in caplog.records]
    assert notices[:2] == [f"waiting for {seconds} s for 9: the disk may not answer" for seconds in ("0.1", "0.2")]


def test_an_error_of_ours_in_a_worker_stays_what_it_is():
    with pytest.raises(ZeroDivisionError, match="of ours"):
        list(make(1, Fatal(kill=False)))


def test_no_shared_memory_for_a_batch_without_a_buffer(monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    loader = make(1)
    loader.buffers.free.clear()
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # workers are forks of this process
    with pytest.raises(OSError, match=r"found no shared memory in /dev/shm: lower data\.workers"):
        list(loader)


def workers_of(loader):
    return loader._iterator._workers


def test_workers_take_signals_from_the_main_process_alone():
    loader, reference = make(2, Numbers(40)), list(make(0, Numbers(40)))
    heard = []
    previous = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in MAIN_SIGNALS}
    try:
        batches, found = iter(loader), []
        for batch in batches:
            found.append({**batch, "video": batch["video"].clone()})
            for worker in workers_of(loader) if len(found) < 4 else ():
                subprocess.run(["bash", "-c", f"kill -INT {worker.pid}; kill {worker.pid}; kill -USR1 {worker.pid}"])
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert heard == [signal.SIGUSR1] and same(reference, found)
    for worker in workers_of(loader):
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


def test_there_is_no_moment_at_which_a_signal_kills_a_worker():
    """What reaches all processes of a run while workers start is for the main process, and is not lost."""
    heard = []
    loader = make(2, Numbers(40))
    began = loader._get_iterator

    def struck():
        os.kill(os.getpid(), signal.SIGTERM)
        iterator = began()
        for worker in iterator._workers:
            subprocess.run(["kill", str(worker.pid)])
        return iterator

    previous = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    loader._get_iterator = struck
    try:
        assert len(list(loader)) == 10
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert heard == [signal.SIGTERM] and all(worker.is_alive() for worker in workers_of(loader))


ORPHANS = """
import time
from tests.datasets.test_loader import Numbers, make, workers_of
class Stuck(Numbers):
    def __getitem__(self, key):
        if key[1] == 9:
            time.sleep(100)
        return super().__getitem__(key)
loader = make(2, Stuck())
batches = iter(loader)
next(batches)
print(*[worker.pid for worker in workers_of(loader)], flush=True)
list(batches)
"""


def test_no_worker_outlives_a_main_process_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as main:
        workers = [int(pid) for pid in main.stdout.readline().split()]
        assert len(workers) == 2
        main.kill()
    end = time.monotonic() + 15
    while alive := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < end, alive
        time.sleep(0.2)


@pytest.mark.parametrize("more", [2, 40])
def test_too_many_open_files_are_one_sentence(more, monkeypatch):
    """At the start of the workers, and where the main process keeps what it receives of them."""
    monkeypatch.setattr(
        torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5
    )  # s that its end waits for each worker
    gc.collect()  # what earlier tests left to the collector would give files back on the way
    os.close(files := os.open(os.devnull, os.O_RDONLY))  # the lowest free number
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    loader, kept = make(2, Numbers(400)), []
    loader.buffers.free.clear()  # each batch now comes in a file of its own
    resource.setrlimit(resource.RLIMIT_NOFILE, (files + more, allowed[1]))
    try:
        with pytest.raises(
            OSError, match=r"a process may have \d+ at once; .* ulimit -n \d+, or lower data\.workers, now 2$"
        ):
            kept.extend(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    assert kept or more == 2


class Thread:
    """Like an opened video of decord: its end waits for a thread of the process that made it."""

    def __init__(self):
        self.me, self.maker = self, os.getpid()

    def __del__(self):
        while os.getpid() != self.maker:
            time.sleep(1)


def test_workers_do_not_collect_what_they_inherit():
    def give_up(*_):
        raise TimeoutError("the worker waits for a thread that it does not have")

    gc.collect()
    gc.disable()
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        Thread()
        loader = make(1, Collecting())
        assert len(list(loader)) == 5
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()


def test_shared_buffers_by_hand():
    buffers = SharedBuffers(2, 64)
    assert buffers.free.popleft() == 0
    ref = buffers.put(Slot(0), [torch.arange(6, dtype=torch.float32).view(1, 6)] * 2, torch.cat)
    video = buffers.open(ref)
    assert video.shape == (2, 6) and list(buffers.free) == [1] and np.array_equal(video[1].numpy(), np.arange(6))
    row = video[1]
    del video
    assert list(buffers.free) == [1]  # a view is enough to keep it
    del row
    assert list(buffers.free) == [1, 0]
