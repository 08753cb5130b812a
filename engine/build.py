"""From a configuration and a model to everything that training changes."""

from __future__ import annotations

from collections.abc import Callable
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
    return data.batch_size * data.clips_per_video * process.world_size * config.solver.grad_accumulation_steps


def build_training_state(
    config: Config,
    model: nn.Module,
    parameter_groups: Callable[..., list[dict[str, Any]]],
    precision: Precision,
    process: Process,
    steps_per_epoch: int,
    backbone: dict[str, str] | None = None,
) -> TrainingState:
    """Optimizer, scheduler, loss, loss scaler, averages and mixup of `config` for a model.

    Args:
        config: with data.mean and data.std filled in.
        model: as wrapped for the processes (distributed.wrap).
        parameter_groups: makes the optimizer's groups (see optim.check_groups) from the model and, by keyword, the
            solver's lr, weight_decay, clip_ratio, layer_decay and decay_norms.
        backbone: identity of the frozen weights, kept in checkpoints.

    Raises:
        OptimError: the groups do not hold each trainable parameter once.
    """
    data, solver = config.data, config.solver
    lr = scaled_lr(solver.lr, solver.lr_base_batch, clips_per_step(config, process))
    groups = parameter_groups(
        unwrap(model),
        lr=lr,
        weight_decay=solver.weight_decay,
        clip_ratio=solver.clip_ratio,
        layer_decay=solver.layer_decay,
        decay_norms=solver.decay_norms,
    )
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
        scheduler=build_scheduler(optimizer, solver, steps_per_epoch),
        scaler=precision.scaler(process.device),
        ema=ModelEma(model, solver.ema_decay) if solver.ema_decay is not None else None,
        backbone=backbone,
        criterion=build_criterion(solver.smoothing, solver.mixup),
        precision=precision,
        mixup=mixup,
        normalizer=Normalizer(data.mean, data.std),
    )
