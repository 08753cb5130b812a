"""What scripts/profile.py has run: the engine's own training step on a random batch, on one process or several.

Does not live here: which costs are taken of it (profile.py), and how (engine/profiling.py).
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import Any

import torch
import torch.multiprocessing
from torch import nn

from configs.schema import Config
from engine import profiling
from engine.build import build_training_state
from engine.distributed import Process, barrier, start, unwrap, wrap
from engine.entry import leave
from engine.optim import resolve_precision, set_tf32
from engine.train_step import TrainStep
from models.parameters import parameter_groups
from models.registry import build_model


def random_batch(config: Config, clips: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A random video (B, T, 3, H, W) float32 and labels (B,)."""
    data = config.data
    random = torch.Generator().manual_seed(config.seed)
    video = torch.randn(clips, data.num_segments, 3, data.input_size, data.input_size, generator=random)
    return video.to(device), torch.randint(data.num_classes, (clips,), generator=random).to(device)


def training_step(model: nn.Module, config: Config, process: Process) -> TrainStep:
    """The engine's own optimizer step for a model and its configuration."""
    model = wrap(model, process, config.network.sync_bn, config.solver.compile).train()
    solver = replace(config.solver, mixup=False, ema_decay=None)
    config = replace(config, data=config.data.with_pixel_statistics(), solver=solver)
    groups = parameter_groups(
        unwrap(model),
        lr=solver.lr,
        weight_decay=solver.weight_decay,
        clip_ratio=solver.clip_ratio,
        layer_decay=solver.layer_decay,
        decay_norms=solver.decay_norms,
    )
    state = build_training_state(
        config,
        model,
        groups,
        lr=solver.lr,
        precision=resolve_precision(solver.precision, process.device),
        process=process,
        steps_per_epoch=10**6,
    )
    return TrainStep(state, process, solver.clip_grad)


def threads_of_each(processes: int) -> int:
    """Threads of one of several processes: its share of this one's, and at least one."""
    return max(1, torch.get_num_threads() // processes)


def seconds_of_processes(config: Config, clips: int, device: torch.device, repeats: int, processes: int) -> list[float]:
    """Times of a training step over `processes`, each with `clips` clips and `threads_of_each`, as the first one sees
    it. Raises torch.multiprocessing.ProcessRaisedException where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    times = torch.multiprocessing.get_context("spawn").SimpleQueue()
    work = (config, clips, device.type, repeats, processes, port, threads_of_each(processes), times)
    torch.multiprocessing.spawn(_one_of_them, work, nprocs=processes)
    return times.get()


def _one_of_them(rank: int, config: Config, clips: int, kind: str, repeats: int, processes: int, port: int, threads: int,
                 times: Any) -> None:  # fmt: skip
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(threads)
    process = start(kind)
    set_tf32(config.solver.tf32, process.device)
    stepper = training_step(build_model(config, pretrained=False), config, process)
    video, label = random_batch(config, clips, process.device)
    # every step waits for the others, so all make as many
    found = profiling.seconds(lambda: stepper([{"video": video, "label": label}]), process.device, repeats, least=0)
    if rank == 0:
        times.put(found)
    barrier()
    leave(0)
