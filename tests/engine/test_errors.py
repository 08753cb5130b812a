"""Errors of machines and libraries as sentences: real ones where a CPU can have them, else with their real texts."""

from __future__ import annotations

import datetime
import errno
import os
import resource
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import ANOTHER_ENDED, GIB, RunContext, another_ended, explain
from tests.helpers.processes import run_in_two

NOW = RunContext(
    batch_size=6, clips=12, frames=16, accumulation=2, trainable=20_406_138, precision="fp32", workers=8, world_size=4,
    memory_used=78 * GIB, memory_total=80 * GIB,
)  # fmt: skip
CUDA = (
    "CUDA out of memory. Tried to allocate 2.26 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.6 GiB is free. "
    "Process 4711 has 20.50 GiB memory in use. Including non-PyTorch memory, this process has 56.00 GiB memory in use."
)
WATCHDOG = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, "
    "NumelOut=466119168, Timeout(ms)=600000) ran for 600060 milliseconds before timing out."
)
REMOTE = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a "
    "network error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.\nLast error:\nsocketProgressOpt: Call to recv failed : Connection reset by peer"
)
SEGMENT = "NCCL error in: NCCLUtils.hpp:268\nLast error:\nError while creating shared memory segment /dev/shm/nccl-LeX (size 96)"


def raised(call, *arguments) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call(*arguments)
    return caught.value


def one_sentence(error: BaseException, context: RunContext | None = None) -> str:
    sentence = explain(error, context)
    assert sentence and "\n" not in sentence and not sentence.endswith("."), sentence
    return sentence


def test_out_of_gpu_memory():
    assert one_sentence(torch.OutOfMemoryError(CUDA), NOW) == (
        "the GPU is out of memory with 12 clips a batch, 16 frames a clip, 20,406,138 trainable parameters; 78.0 of 80.0 GiB "
        "were used at most; other programs use it, too (process 4711: 20.50 GiB): set data.batch_size=3 and "
        "solver.grad_accumulation_steps=4, the same step but for BatchNorm, or set solver.precision=bf16"
    )
    small = RunContext(batch_size=1, precision="bf16")
    assert one_sentence(torch.OutOfMemoryError("CUDA out of memory."), small).endswith(
        "lower data.num_segments or data.num_sample"
    )
    prime = one_sentence(torch.OutOfMemoryError("CUDA out of memory."), RunContext(batch_size=5))
    assert "data.batch_size=1 and solver.grad_accumulation_steps 5 times as high" in prime
    for text in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert "halve data.batch_size" in one_sentence(RuntimeError(text))


def test_out_of_memory_on_the_cpu():
    error = raised(lambda: torch.empty(1 << 60, dtype=torch.uint8))
    assert "no memory left for the 1073741824.0 GiB requested with 12 clips" in one_sentence(error, NOW)
    assert one_sentence(error, NOW).endswith("lower data.batch_size or data.workers, now 8")
    assert one_sentence(MemoryError()) and one_sentence(OSError(errno.ENOMEM, "Cannot allocate memory"))


def test_a_full_disk():
    def write():
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    assert one_sentence(raised(write)).startswith("the disk is full: make room, lower checkpoint.keep")
    assert "could not be written completely" in one_sentence(raised(torch.save, torch.ones(100000), "/dev/full"))
    named = OSError(errno.EDQUOT, "Disk quota exceeded", "/tmp/last_model.pt")
    assert "quota is used up (/tmp/last_model.pt; " in one_sentence(named)
    assert "shared memory" in one_sentence(OSError(errno.ENOSPC, "No space left on device", "/dev/shm/torch_1"))


FILES = """
import resource, torch
from torch.utils.data import DataLoader
from engine.errors import RunContext, explain
kept = []
try:
    loader = iter(DataLoader(list(torch.zeros(500, 3)), num_workers=1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    for batch in loader:
        kept.append(batch)
except Exception as error:
    print(type(error).__name__, len(kept) > 0, explain(error, RunContext(workers=1)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory by descriptors")
def test_too_many_open_files():
    """A DataLoader that runs out of them while its batches are kept."""
    found = subprocess.run([sys.executable, "-c", FILES], capture_output=True, text=True, timeout=60)
    sentence = "too many open files: a process may have 64 at once; raise that, e.g. by ulimit -n 65536"
    assert found.stdout.strip() == f"RuntimeError True {sentence}, or lower data.workers, now 1", found.stderr
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for error in (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "f"), RuntimeError("received 0 items of ancdata")):
        assert one_sentence(error).startswith(f"too many open files: a process may have {allowed} at once")
    both = "unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)"
    assert "ulimit" in one_sentence(RuntimeError(both))


@pytest.mark.parametrize(
    "text",
    [
        "unable to open shared memory object </torch_5_1> in read-write mode: No such file or directory (2)",
        "unable to allocate shared memory(shm) for file </torch_5_1>: No space left on device (28)",
        "unable to write to file </torch_5_1>: No space left on device (28)",
        "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        SEGMENT,
    ],
)
def test_out_of_shared_memory(text):
    sentence = one_sentence(RuntimeError(text), NOW)
    assert "no shared memory is left in /dev/shm" in sentence and "lower data.workers, now 8," in sentence


def test_what_the_loader_says_stays():
    assert explain(ChildProcessError("a worker of the loader was killed")) == "a worker of the loader was killed"


def wait_too_long(rank: int) -> None:
    """Process 1 comes late; both end here."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=1))
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        time.sleep(2.5)
    error = raised(dist.all_reduce, torch.ones(1))
    if rank == 0:
        assert "another process did not arrive within 1 s at a point where all wait" in one_sentence(
            error
        ) and not another_ended(error)
        assert one_sentence(error, NOW).startswith("one of the 4 processes did not arrive")
    else:
        assert one_sentence(error) == ANOTHER_ENDED and another_ended(error)
    os._exit(0)


def leave_a_parameter_out(rank: int) -> None:
    dist.init_process_group("gloo")
    wrapped = DistributedDataParallel(Half())
    wrapped(torch.ones(1, 2)).sum().backward()
    sentence = one_sentence(raised(wrapped, torch.ones(1, 2)))
    assert sentence.startswith("some trainable parameters get no gradient, numbers 2 3 of them: the model's forward"), (
        sentence
    )


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_a_process_that_does_not_arrive():
    run_in_two(wait_too_long)


def test_a_parameter_without_gradient():
    run_in_two(leave_a_parameter_out)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            WATCHDOG,
            "one of the 4 processes did not arrive within 600 s at a point where all wait for each other (ALLREDUCE)",
        ),
        ("[Rank 0]: Rank 3 failed to pass monitoredBarrier in 1000 ms", "process 3 did not arrive within 1 s"),
        (
            "Timeout at collective: ALLREDUCE\n\t - [2, 3] are the lagging ranks that caused",
            "process 2, 3 did not arrive",
        ),
        ("wait timeout after 300000ms, keys: /default_pg/0/store_based_barrier", "did not arrive within 300 s"),
        (
            "Timed out after 901 seconds waiting for clients. 1/2 clients joined.",
            "only 1 of 2 processes came within 901 s",
        ),
        ("NCCL operation timed out", "did not arrive within the time allowed"),
    ],
)
def test_time_outs_by_their_texts(text, expected):
    assert expected in one_sentence(dist.DistBackendError(text), NOW)


@pytest.mark.parametrize(
    "text",
    [
        REMOTE,
        "[pair.cc:538] Read error [127.0.0.1]:57995: Connection reset by peer",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_another_process_that_ended(text):
    assert explain(dist.DistBackendError(text), NOW) == ANOTHER_ENDED and another_ended(RuntimeError(text))


def test_names_of_parameters_where_torch_knows_them():
    text = (
        "Expected to have finished reduction in the prior iteration before starting a new one. This error indicates that "
        "your module has parameters that were not used in producing loss. \n"
        "Parameters which did not receive grad for rank 0: "
        "adapter.up.weight, adapter.up.bias\nParameter indices which did not receive grad for rank 0: 4 5"
    )
    assert "no gradient: adapter.up.weight, adapter.up.bias: the model's" in one_sentence(RuntimeError(text))


class OurError(OSError):
    """Like those of the entry scripts."""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA out of memory"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("shape mismatch: 1000 ms of something"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "list.txt"),
        OurError(errno.ENOSPC, "last_model.pt: no room"),
        KeyboardInterrupt(),
        ZeroDivisionError("of ours"),
    ],
)
def test_what_is_not_known_stays_what_it_is(error):
    assert explain(error, NOW) is None and not another_ended(error)
