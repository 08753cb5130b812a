"""The work that a profile times: the engine's training step on a random batch, in one process or several."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, nn

from configs.schema import Config
from engine import profiling
from engine.build import build_training_state
from engine.distributed import Process, barrier, start, wrap
from engine.entry import leave
from engine.optim import resolve_precision, set_tf32
from engine.train_step import TrainStep
from models.parameters import parameter_groups
from models.registry import build_model


def random_batch(config: Config, model: nn.Module, clips: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random normalised pixels for a model, (B, T*f, 3, H, W) float32, and labels (B,)."""
    data = config.data
    generator = torch.Generator().manual_seed(config.seed)
    frames = data.num_segments * getattr(model, "frames_per_segment", 1)
    video = torch.randn(clips, frames, 3, data.input_size, data.input_size, generator=generator)
    return video.to(device), torch.randint(data.num_classes, (clips,), generator=generator).to(device)


def training_step(model: nn.Module, config: Config, process: Process) -> TrainStep:
    """The engine's own optimizer step for a model and its configuration."""
    model = wrap(model, process, config.network.sync_bn, config.solver.compile).train()
    solver = replace(config.solver, mixup=False, ema_decay=None, lr_base_batch=None)
    config = replace(config, data=config.data.with_pixel_statistics(), solver=solver)
    precision = resolve_precision(solver.precision, process.device)
    state = build_training_state(config, model, parameter_groups, precision, process, steps_per_epoch=10**6)
    return TrainStep(state, process, solver.clip_grad)


def threads_of_each(processes: int) -> int:
    """Threads of one of several processes: its share of this one's, and at least one."""
    return max(1, torch.get_num_threads() // processes)


def seconds_of_processes(config: Config, clips: int, device: torch.device, repeats: int, processes: int) -> list[float]:
    """Times of a training step over several processes, each with `clips` clips, as the first one measures them.

    Raises torch.multiprocessing.ProcessRaisedException if a process fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    times = torch.multiprocessing.get_context("spawn").SimpleQueue()
    variables = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = (config, clips, device.type, repeats, variables, threads_of_each(processes), times)
    torch.multiprocessing.spawn(_time_steps, arguments, nprocs=processes)
    return times.get()


def _time_steps(
    rank: int,
    config: Config,
    clips: int,
    device_type: str,
    repeats: int,
    variables: dict[str, str],
    threads: int,
    times: Any,
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **variables}
    torch.set_num_threads(threads)
    process = start(device_type)
    set_tf32(config.solver.tf32, process.device)
    model = build_model(config, pretrained=False)
    step = training_step(model, config, process)
    video, label = random_batch(config, model, clips, process.device)
    batches = [{"video": video, "label": label}]
    # a step waits for all processes, so all must make equally many: `least` 0 leaves the number to `repeats`
    found = profiling.seconds(lambda: step(batches), process.device, repeats, least=0)
    if rank == 0:
        times.put(found)
    barrier()
    leave(0)
