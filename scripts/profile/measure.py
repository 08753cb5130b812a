"""Measures the costs of one configuration: FLOPs, saved bytes, peak memory, and the time of training and inference."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from common.text import plural
from configs.schema import Config
from engine import profiling
from engine.distributed import Process, move_to_device
from engine.optim import resolve_precision, set_tf32
from models.parameters import parameter_report
from models.registry import build_model
from scripts.profile.report import Row
from scripts.profile.workload import random_batch, seconds_of_processes, threads_of_each, training_step

logger = logging.getLogger("td4v")

# The halves of a tower's block and their parts, which may run without the block's module.
BLOCK_PARTS = ("attend", "transform", "attention_of", "mlp_of", "norm_attention", "attention", "norm_mlp", "mlp")
COUNTED_CLIPS = 2  # FLOPs are counted with two clips: side-tuning cannot train on one


def measure(
    config: Config,
    label: str,
    batches: Sequence[int],
    device: torch.device,
    repeats: int,
    processes: Sequence[int] = (),
) -> Iterator[Row]:
    """Yield a row for each batch and number of processes as soon as it is measured.

    Raises ConfigError and the like if the model cannot be built, ValueError if none of its parameters is trainable.
    """
    name = f"{label}, T = {config.data.num_segments}"
    precision = resolve_precision(config.solver.precision, device)
    dtype = precision.dtype or torch.float32
    set_tf32(config.solver.tf32, device)
    logger.info("%s: building, from random weights", name)
    report = parameter_report(build_model(config, pretrained=False))
    if report.trainable == 0:
        raise ValueError(f"{name}: no parameter is trainable (network.text.tuned: none), and training is measured")
    flops = _flops(config, device, name)
    rates: list[float] = []  # shared by all rows: the rate measured after a row counts for it too
    for batch in batches:
        row = Row(
            label=label,
            model=config.network.model_name,
            frames=config.data.num_segments,
            batch=batch,
            precision=precision.name,
            recompute=config.network.recompute,
            total=report.total,
            trainable=report.trainable,
            threads=torch.get_num_threads(),
            **flops,
        )
        what = f"{name}, {plural(batch, 'clip')}"
        with profiling.memory_limited(device):
            row.rates = rates
            rates.append(profiling.matrix_rate(device, dtype))
            for part, work in (("training", _training), ("inference", _inference)):
                try:
                    work(row, config, device, repeats, what)
                except ValueError as error:  # the model refuses such a batch
                    row.notes[part] = str(error)
                except (RuntimeError, MemoryError) as error:
                    if not profiling.is_out_of_memory(error):
                        raise
                    row.notes[part] = "out of memory"
                    logger.warning("%s: out of memory in %s", what, part)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        yield row
        for number in processes:
            if number > 1:
                yield _with_processes(row, config, device, repeats, number)
    rates.append(profiling.matrix_rate(device, dtype))


def block_calls(model: nn.Module) -> dict[str, tuple[object, str]]:
    """The calls of a tower's blocks by name, for profiling.saved_for_backward; none for a model without a tower."""
    blocks = getattr(getattr(model, "tower", None), "blocks", ())
    return {f"tower.{i}.{part}": (block, part) for i, block in enumerate(blocks) for part in BLOCK_PARTS}


def _flops(config: Config, device: torch.device, name: str) -> dict[str, float]:
    """FLOPs a clip, forward and of a training step, of the model without recomputation."""
    logger.info("%s: counting FLOPs", name)
    model = build_model(replace(config, network=replace(config.network, recompute=False)), pretrained=False).to(device)
    video, _ = random_batch(config, model, COUNTED_CLIPS, device)
    with torch.no_grad():
        forward = profiling.count_flops(lambda: model.eval()(video))
    training = profiling.count_flops(lambda: model.train()(video).sum().backward())
    return {"forward_flops": forward / COUNTED_CLIPS, "training_flops": training / COUNTED_CLIPS}


def _training(row: Row, config: Config, device: torch.device, repeats: int, what: str) -> None:
    """Add saved bytes, peak and time of training steps to `row`."""
    logger.info("%s: bytes saved for backward", what)
    model = build_model(config, pretrained=False).to(device).train()
    video, label = random_batch(config, model, row.batch, device)
    with resolve_precision(config.solver.precision, device).autocast(device):
        row.saved = profiling.saved_for_backward(model, video, calls=block_calls(model))
    step = training_step(model, config, Process(device=device))
    batches = [{"video": video, "label": label}]
    step(batches)  # makes the optimizer's state
    state = [v for values in step.state.optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
    row.standing = profiling.held_bytes([*model.parameters(), *model.buffers(), *state, video, label])
    logger.info("%s: peak memory of a training step", what)
    row.beyond = profiling.peak_bytes(lambda: step(batches), device)
    logger.info("%s: time of training steps", what)
    row.training = profiling.seconds(lambda: step(batches), device, repeats)


def _inference(row: Row, config: Config, device: torch.device, repeats: int, what: str) -> None:
    """Add the time of forward passes in evaluation mode to `row`."""
    logger.info("%s: time of inference", what)
    model = move_to_device(build_model(config, pretrained=False), Process(device=device), config.solver.compile).eval()
    precision = resolve_precision(config.solver.precision, device)
    video, _ = random_batch(config, model, row.batch, device)

    def work() -> None:
        with torch.no_grad(), precision.autocast(device):
            model(video)

    row.inference = profiling.seconds(work, device, repeats)


def _with_processes(row: Row, config: Config, device: torch.device, repeats: int, number: int) -> Row:
    """The row for training over several processes, each with as many clips; only the time is measured."""
    what = f"{row.label}, T = {row.frames}, {plural(row.batch, 'clip')} on each of {number} processes"
    logger.info("%s: time of training steps", what)
    threads = number * threads_of_each(number)
    several = replace(
        row,
        processes=number,
        threads=threads,
        rates=[],
        saved=[],
        standing=None,
        beyond=None,
        training=[],
        inference=[],
        notes={},
    )
    if not row.training:
        several.notes = {"training": row.notes["training"]}
        return several
    several.rates.append(_rate_of_all(row, device, number, threads))
    try:
        several.training = seconds_of_processes(config, row.batch, device, repeats, number)
    except (ProcessRaisedException, ProcessExitedException) as error:
        several.notes["training"] = str(error).strip().splitlines()[-1]
    several.rates.append(_rate_of_all(row, device, number, threads))
    return several


def _rate_of_all(row: Row, device: torch.device, processes: int, threads: int) -> float:
    """The matrix rate of all devices together; on a CPU with as many threads as the processes have."""
    if device.type == "cuda":
        return processes * max(row.rates)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return profiling.matrix_rate(device, resolve_precision(row.precision, device).dtype or torch.float32)
    finally:
        torch.set_num_threads(before)
