"""Parameter groups, optimizer, learning-rate schedule, loss, mixup and number format of a training step."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from configs.schema import SolverConfig

logger = logging.getLogger("td4v")


class OptimError(ValueError):
    """Parameter groups, a batch or a number format that cannot be trained with."""


def check_groups(model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
    """Make sure that every trainable parameter of `model` is in exactly one group, and nothing else is in any.

    Args:
        groups: dicts with `name` (str), `params` (iterable of parameters) and `lr` (float).

    Raises:
        OptimError: naming the first parameter that is missing, in two groups, frozen, or not of the model.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    held: dict[nn.Parameter, str] = {}
    for group in groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise OptimError(
                    f"group {group['name']} holds a parameter of shape {tuple(parameter.shape)} that is not the model's"
                )
            if parameter in held:
                raise OptimError(f"{names[parameter]} is in the groups {held[parameter]} and {group['name']}")
            if not parameter.requires_grad:
                raise OptimError(f"{names[parameter]} is frozen, but in group {group['name']}")
            held[parameter] = group["name"]
    for parameter, name in names.items():
        if parameter.requires_grad and parameter not in held:
            raise OptimError(f"{name} is trainable, but in no group")


def build_optimizer(
    groups: Sequence[dict[str, Any]],
    optim: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 0.15,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """AdamW or SGD over `groups` (see check_groups), each with its own learning rate.

    Both are torch's fused ones, which can skip a step that only the device knows to be bad (see train_step.py).

    Args:
        weight_decay: of every group without a `weight_decay` of its own.
        betas, eps: AdamW's.
        momentum, nesterov: SGD's.

    Raises:
        OptimError: another name, or no group holds a parameter.
    """
    groups = [{**group, "params": list(group["params"])} for group in groups]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise OptimError("there is nothing to train: no group holds a parameter")
    if optim == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    if optim == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
        if momentum:
            for parameter in (parameter for group in groups for parameter in group["params"]):
                # The buffer starts as 0 instead of being made in the first step: torch would leave it unfilled if that
                # step is skipped.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    raise OptimError(f"the optimizer must be adamw or sgd, not {optim!r}")


def scaled_lr(lr: float, base_batch: int | None, batch: int) -> float:
    """The learning rate for `batch` clips a step, where `lr` is meant for `base_batch`: lr * batch / base_batch.

    Source: Goyal et al. 2017 (arXiv 1706.02677), section 2.1, linear scaling, to go with a warm-up.

    Args:
        lr: as configured. base_batch: clips a step that it is meant for; None returns `lr`.
        batch: clips that one optimizer step averages over: batch size x clips a video (num_sample) x processes x
            accumulated batches.
    """
    if base_batch is None:
        return lr
    scaled = lr * (batch / base_batch)  # exactly lr if both are equal
    logger.info("learning rate %g for %d clips a step: %g for %d, scaled linearly", scaled, batch, lr, base_batch)
    return scaled


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest of all groups, for the next step."""
    return max(group["lr"] for group in optimizer.param_groups)


def lr_factor(solver: SolverConfig, epoch: float) -> float:
    """The learning rate at a fractional epoch, as a multiple of its value at the top of the schedule.

    lr_warmup_start and lr_final are relative to solver.lr, so lr_base_batch scales all three.

    `step`: gamma ** (number of milestones up to here). `cosine`: final + (1 - final) (1 + cos(pi (e - o) / (E - o))) / 2
    with E = epochs; o is the end of the warm-up w, or 0 without cosine_after_warmup. The warm-up rises linearly from
    lr_warmup_start to the schedule's value at w.

    Source: cosine_after_warmup false is TAda2D's and TAdaConvNeXtV2's schedule, true SlowFast's, TAdaFormer's and ours;
    `step` is TDN's.
    """
    warmup = solver.lr_warmup_step
    if epoch >= warmup:
        return _decay_factor(solver, epoch)
    start = solver.lr_warmup_start / solver.lr
    end = 1.0 if solver.type == "cosine" and solver.cosine_after_warmup else _decay_factor(solver, warmup)
    return start + (end - start) * (epoch / warmup)


def _decay_factor(solver: SolverConfig, epoch: float) -> float:
    if solver.type == "step":
        return solver.gamma ** sum(epoch >= milestone for milestone in solver.milestones)
    final = solver.lr_final / solver.lr
    if epoch >= solver.epochs:
        return final
    origin = solver.lr_warmup_step if solver.cosine_after_warmup else 0.0
    cosine = 0.5 * (1 + math.cos(math.pi * (epoch - origin) / (solver.epochs - origin)))
    return final + (1 - final) * cosine


def build_scheduler(optimizer: torch.optim.Optimizer, solver: SolverConfig, steps_per_epoch: int) -> LambdaLR:
    """The schedule of `solver` by optimizer step; skipped steps count too. All groups follow it in proportion."""
    return LambdaLR(optimizer, lambda step: lr_factor(solver, step / steps_per_epoch))


def build_criterion(smoothing: float, mixing: bool) -> nn.Module:
    """Cross-entropy of logits (B, K), averaged over B.

    With `mixing` the targets are the shares (B, K) that ClipMixup returns, which are smoothed already; else they are
    labels (B,), and `smoothing` is spread over the classes.
    """
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


class ClipMixup:
    """timm's mixup and cutmix: one draw a batch, the same for all frames of a clip.

    Mixes every batch: cutmix half of the time if both alphas are above 0. Draws come from NumPy's generator.
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, smoothing: float, num_classes: int) -> None:
        self.mixup = Mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=1.0,
            switch_prob=0.5,
            mode="batch",
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def __call__(self, video: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Mix clip i with clip B - 1 - i.

        Args:
            video: (B, T, C, H, W), changed in place. label: (B,) int64.

        Returns:
            The video and (B, K) float32 target shares.

        The last clip of an odd batch has no partner and is dropped; that happens if videos were skipped.

        Raises:
            OptimError: a single clip.
        """
        if len(video) < 2:
            raise OptimError("mixup needs two clips in a batch, and only one could be read")
        video, label = video[: len(video) // 2 * 2], label[: len(label) // 2 * 2]
        frames, channels = video.shape[1:3]
        images = video.flatten(1, 2)  # (B, T*C, H, W): timm's cutmix cuts the last two of four dimensions
        images, target = self.mixup(images, label)
        return images.unflatten(1, (frames, channels)), target  # (B, T, C, H, W), (B, K)


@dataclass(frozen=True)
class Precision:
    """The number format of forward passes: `dtype` under autocast, None without; `scaled` losses for fp16."""

    name: str
    dtype: torch.dtype | None
    scaled: bool

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context to run the model in."""
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """A loss scaler, which does nothing unless `scaled`."""
        return torch.amp.GradScaler(device.type, enabled=self.scaled)


def resolve_precision(
    name: Literal["amp", "fp16", "bf16", "fp32"], device: torch.device, tf32: bool = False
) -> Precision:
    """The number format of a precision setting on a device: amp is fp16 on a GPU and fp32 on a CPU. Calls set_tf32.

    Raises:
        OptimError: fp16 on a CPU, or an unknown name.
    """
    set_tf32(tf32, device)
    chosen = name
    if name == "amp":
        chosen = "fp16" if device.type == "cuda" else "fp32"
        logger.info("precision amp on %s: %s", device.type, chosen)
    if chosen == "fp16":
        if device.type != "cuda":
            raise OptimError("precision fp16 needs a GPU; on a CPU use bf16 or fp32")
        return Precision(chosen, torch.float16, scaled=True)
    if chosen == "bf16":
        return Precision(chosen, torch.bfloat16, scaled=False)
    if chosen == "fp32":
        return Precision(chosen, None, scaled=False)
    raise OptimError(f"precision must be amp, fp16, bf16 or fp32, not {name!r}")


def set_tf32(enabled: bool, device: torch.device) -> None:
    """Whether float32 matrix products and convolutions on a GPU may round their inputs to TF32's 10 bits of mantissa.

    If not, both are float32 throughout (cudnn's own default for convolutions is TF32). This holds for the whole process.
    On a CPU nothing changes.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if enabled else "highest")
        torch.backends.cudnn.allow_tf32 = enabled
    elif enabled:
        logger.info("TF32 is a number format of GPUs: on a CPU it has no effect")
