"""What a run consists of: everything that a checkpoint must hold for the run to go on as if nothing had happened.

Lives here: how far training is, collecting all parts of it into plain values and tensors, and putting them back. The
keys of a checkpoint:
    epoch, place, step   finished epochs, optimizer steps in the unfinished one, optimizer steps in all
    best, stale, history best top-1 in percent, validations since then, one row an epoch
    pending              the row of an epoch that was trained, but not evaluated yet, or None
    health               steps left out in all and in a row, loss spikes and what the loss usually is
    model_state_dict     names as in the model alone, without DistributedDataParallel's "module."; only what is tuned
                         and all buffers, unless `full`
    ema_state_dict       the averaged weights under the same names, or None
    backbone             name, weights and sha256 of the frozen parameters, or None where nothing is frozen
    optimizer_state_dict, scheduler, scaler
    rng, meters          one entry a process: Python's, NumPy's, torch's and the GPU's generators; sums over the epoch
    config, meta         the resolved configuration; versions, git revision and data lists
Does not live here: files (checkpoint.py), and when anything is saved (loop.py).
"""

from __future__ import annotations

import logging
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from engine.checkpoint_file import CheckpointError, lacks_backbone
from engine.distributed import Process, gather, unwrap
from engine.ema import EmaError, ModelEma

logger = logging.getLogger("td4v")


@dataclass
class LossMonitor:
    """Steps left out because something in them was not finite, and steps whose loss stood out.

    `mean` and `variance` of the main process's loss are exponential averages over about the last 50 steps; `seen` counts steps.
    """

    left_out: int = 0
    in_a_row: int = 0
    spikes: int = 0
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0

    def note(self, loss: float) -> bool:
        """Take in the loss of a step; True if it lies more than five standard deviations above the usual."""
        spike = self.seen >= 50 and loss > self.mean + 5 * self.variance**0.5 + 1e-3 * abs(self.mean)
        self.spikes += spike
        rate = max(0.02, 1 / (self.seen + 1))
        difference = loss - self.mean
        self.mean += rate * difference
        self.variance = (1 - rate) * (self.variance + rate * difference**2)
        self.seen += 1
        return spike


@dataclass
class Progress:
    """How far training is; the names are those of a checkpoint. `best` is -1 before the first validation."""

    epoch: int = 0
    place: int = 0
    step: int = 0
    best: float = -1.0
    stale: int = 0
    pending: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    health: LossMonitor = field(default_factory=LossMonitor)

    @classmethod
    def of(cls, content: dict[str, Any]) -> Progress:
        """From a checkpoint."""
        values = {name: content[name] for name in cls.__dataclass_fields__}
        return cls(**{**values, "history": list(values["history"]), "health": LossMonitor(**values["health"])})


_PARTS = {
    "history": list, "health": dict, "model_state_dict": dict, "optimizer_state_dict": dict, "scheduler": dict,
    "scaler": dict, "rng": list, "meters": list, "config": dict, "meta": dict,
}  # fmt: skip


def is_resumable(content: dict[str, Any]) -> bool:
    """Whether a checkpoint holds a whole run, and not weights alone."""
    return not _lacking(content)


def _lacking(content: dict[str, Any]) -> list[str]:
    keys = dict.fromkeys((*Progress.__dataclass_fields__, *_PARTS))
    return [key for key in keys if key not in content or not isinstance(content[key], _PARTS.get(key, object))]


@dataclass(frozen=True)
class Parts:
    """What changes while training: the model as wrapped for the processes, and all that changes it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ema: ModelEma | None = None
    backbone: dict[str, str] | None = None


def weights(model: nn.Module, full: bool) -> dict[str, Tensor]:
    """The state dict of a model, without its frozen parameters unless `full`."""
    model = unwrap(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if full or name not in frozen}


def put_weights(model: nn.Module, content: dict[str, Any], backbone: dict[str, str] | None, path: str | Path) -> None:
    """Give `model` the weights of a checkpoint of ours; the frozen ones may be left out if they are the same.

    Raises CheckpointError where names, shapes or the frozen weights are others.
    """
    target, values = unwrap(model), content["model_state_dict"]
    own = target.state_dict()
    left_out: set[str] = set()
    if lacks_backbone(content):
        left_out = own.keys() - weights(target, full=False).keys()
        theirs, ours = content["backbone"], backbone or {}
        if theirs["sha256"] != ours.get("sha256"):
            raise CheckpointError(
                f"{path}: was trained on the frozen weights {theirs['name']}, {theirs['weights']} "
                f"({theirs['sha256'][:12]}), and here are {ours.get('name')}, {ours.get('weights')} "
                f"({str(ours.get('sha256'))[:12]})"
            )
    missing = [name for name in own if name not in values and name not in left_out]
    surplus = [name for name in values if name not in own]
    unlike = [name for name in own if name in values and own[name].shape != values[name].shape]
    faults = [f"{len(missing)} weights missing ({missing[0]}, ...)"] if missing else []
    faults += [f"{len(surplus)} unknown ({surplus[0]}, ...)"] if surplus else []
    faults += [
        f"{name} has shape {tuple(values[name].shape)} instead of {tuple(own[name].shape)}" for name in unlike[:1]
    ]
    if faults:
        raise CheckpointError(f"{path}: does not fit this model: {'; '.join(faults)}")
    target.load_state_dict(values, strict=not left_out)


def collect(parts: Parts, state: Progress, meter: dict[str, Any], process: Process, full: bool) -> dict[str, Any]:
    """The content of a checkpoint but for config and meta; every process must call it, for what is its own."""
    own = gather((rng_state(process.device), meter))
    return {
        **asdict(state),
        **bare(parts, full),
        "model_state_dict": weights(parts.model, full),
        "ema_state_dict": parts.ema.state_dict() if parts.ema is not None else None,
        "optimizer_state_dict": parts.optimizer.state_dict(),
        "scheduler": parts.scheduler.state_dict(),
        "scaler": parts.scaler.state_dict(),
        "rng": [rng for rng, _ in own],
        "meters": [meter for _, meter in own],
    }


def bare(parts: Parts, full: bool) -> dict[str, Any]:
    """The content of a checkpoint for testing: the weights that are validated, and what they stand on."""
    values = weights(parts.model, full) | (parts.ema.state_dict() if parts.ema is not None else {})
    return {"model_state_dict": values, "backbone": parts.backbone, "full": full}


def restore(content: dict[str, Any], path: str | Path, parts: Parts, process: Process) -> tuple[Progress, dict]:
    """Put all parts and this process's generators back as `collect` found them.

    Returns:
        how far training was, and this process's sums over the epoch.

    Raises:
        CheckpointError: weights only, of another model or optimizer, or of another number of processes.
    """
    if lacking := _lacking(content):
        raise CheckpointError(f"{path}: holds no run to resume, for it lacks {', '.join(lacking)}")
    if len(content["rng"]) != process.world_size:
        raise CheckpointError(
            f"{path}: was written by {len(content['rng'])} processes and cannot be resumed with {process.world_size}"
        )
    if bool(content["scaler"]) != parts.scaler.is_enabled():
        raise CheckpointError(f"{path}: was written with another precision, and cannot be resumed with this one")
    if (content["ema_state_dict"] is None) != (parts.ema is None):
        raise CheckpointError(f"{path}: was written with another solver.ema_decay, and cannot be resumed with this one")
    put_weights(parts.model, content, parts.backbone, path)
    what = "optimizer"
    try:
        parts.optimizer.load_state_dict(_fused_as(parts.optimizer, content["optimizer_state_dict"]))
        what = "run"
        parts.scheduler.load_state_dict(content["scheduler"])
        parts.scaler.load_state_dict(content["scaler"])
        if parts.ema is not None:
            parts.ema.load_state_dict(content["ema_state_dict"])
        set_rng_state(content["rng"][process.rank], process.device)
        state = Progress.of(content)
    except EmaError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {(str(error) or 'nothing').splitlines()[0]}"
        raise CheckpointError(f"{path}: does not fit this {what} ({reason})") from None
    if isinstance(parts.scheduler, LambdaLR):  # by the position in the run, of files too whose scheduler is elsewhere
        parts.scheduler.last_epoch = state.step
        rates = zip(parts.optimizer.param_groups, parts.scheduler.base_lrs, parts.scheduler.lr_lambdas, strict=True)
        for group, base, factor in rates:  # which may reach over more epochs now
            group["lr"] = base * factor(state.step)
    where = f"{state.epoch} epochs" + (f" and {state.place} steps" if state.place else "")
    logger.info("resumed from %s after %s, best top-1 %.2f", path, where, state.best)
    return state, content["meters"][process.rank]


def _fused_as(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved state with the kernels of this optimizer, which load_state_dict would replace by those of the one saved."""
    kinds = {key: optimizer.param_groups[0].get(key) for key in ("fused", "foreach")}
    return {**saved, "param_groups": [{**group, **kinds} for group in saved["param_groups"]]}


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators of this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(numpy.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back as `rng_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
