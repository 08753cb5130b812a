"""From a configuration and the parameter groups of a model to everything that training changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from configs.schema import Config
from engine.distributed import Process, unwrap
from engine.ema import ModelEma
from engine.normalize import Normalizer
from engine.optim import (
    ClipMixup,
    Precision,
    build_criterion,
    build_optimizer,
    build_scheduler,
    check_groups,
    scaled_lr,
)
from engine.train_step import TrainingState


def clips_per_step(config: Config, process: Process) -> int:
    """Clips that one optimizer step averages over, on all processes together."""
    data = config.data
    return data.batch_size * data.num_sample * process.world_size * config.solver.grad_accumulation_steps


def base_lr(config: Config, process: Process) -> float:
    """solver.lr, scaled to the clips of a step if solver.lr_base_batch asks for it."""
    return scaled_lr(config.solver.lr, config.solver.lr_base_batch, clips_per_step(config, process))


def build_training_state(
    config: Config,
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    lr: float,
    precision: Precision,
    process: Process,
    steps_per_epoch: int,
    backbone: dict[str, str] | None = None,
) -> TrainingState:
    """Optimizer, scheduler, loss, loss scaler, averages and mixup of `config` for a model.

    Args:
        config: with data.mean and data.std filled in.
        model: as wrapped for the processes (distributed.wrap).
        groups: all trainable parameters, see optim.check_groups.
        lr: see optim.build_scheduler.
        backbone: identity of the frozen weights, kept in checkpoints.

    Raises:
        OptimError: the groups do not hold each trainable parameter once.
    """
    data, solver = config.data, config.solver
    check_groups(unwrap(model), groups)
    optimizer = build_optimizer(
        groups,
        optim=solver.optim,
        weight_decay=solver.weight_decay,
        betas=solver.betas,
        eps=solver.eps,
        momentum=solver.momentum,
        nesterov=solver.nesterov,
    )
    mixup = None
    if solver.mixup:
        mixup = ClipMixup(
            mixup_alpha=solver.mixup_alpha,
            cutmix_alpha=solver.cutmix_alpha,
            smoothing=solver.smoothing,
            num_classes=data.num_classes,
        )
    return TrainingState(
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, solver, lr, steps_per_epoch),
        scaler=precision.scaler(process.device),
        ema=ModelEma(model, solver.ema_decay) if solver.ema_decay is not None else None,
        backbone=backbone,
        criterion=build_criterion(solver.smoothing, solver.mixup),
        precision=precision,
        mixup=mixup,
        normalizer=Normalizer(data.mean, data.std),
    )
