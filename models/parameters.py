"""Parameters of a model: which are trainable, how many, in which optimizer groups, and which frozen weights it stands on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from clip.text_head import TextHead
from configs.schema import ConfigError

logger = logging.getLogger("td4v")


class Origin(NamedTuple):
    """What a model stands on, for messages and records."""

    name: str  # of the architecture
    weights: str  # where its weights come from, in words, a tag or a file


class Scale(NamedTuple):
    """Multipliers of a parameter's learning rate and weight decay, as a model's `parameter_scale` declares them."""

    lr: float = 1.0
    weight_decay: float = 1.0


@dataclass(frozen=True)
class ParameterReport:
    """Counts of parameters: all, trainable, and trainable by module."""

    total: int
    trainable: int
    by_module: dict[str, int]

    @property
    def share(self) -> float:
        """The trainable share, 0 to 1."""
        return self.trainable / self.total

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {count:,}" for name, count in self.by_module.items())
        return f"parameters: {self.total:,} in all, {self.trainable:,} trainable ({100 * self.share:.2f} %): {parts}"


def freeze_all_but_trainable(model: nn.Module) -> nn.Module:
    """Require gradients of exactly what `trainable_modules` names."""
    model.requires_grad_(False)
    for part in model.trainable_modules().values():
        part.requires_grad_(True)
    return model


def check_trainable(model: nn.Module) -> None:
    """Raise ConfigError if nothing is trainable, or if a text head has no classes to start from."""
    if isinstance(model.head, TextHead):
        model.head.require_filled()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "network.text.tuned: none leaves nothing to train in this model: "
            "test it with test_vision.py, without --weights"
        )


def parameter_report(model: nn.Module) -> ParameterReport:
    """Count the parameters of a model."""
    by_module = {name: _count(part) for name, part in trainable_parts(model).items()}
    return ParameterReport(total=_count(model), trainable=sum(by_module.values()), by_module=by_module)


def log_fresh(model: nn.Module, fresh: Collection[str]) -> None:
    """Log where a model's weights come from and which parameters start fresh, without the numbers of blocks."""
    parameters = dict(model.named_parameters())
    parts = {name: ".".join([part for part in name.split(".") if not part.isdigit()][:2]) for name in parameters}
    loaded = {parts[name] for name in parameters if name not in fresh}
    shown = {f"{parts[name]} ({name.rpartition('.')[2]})" if parts[name] in loaded else parts[name] for name in fresh}
    logger.info(
        f"{model.origin.name}: weights from {model.origin.weights}; {sum(parameters[name].numel() for name in fresh):,} "
        f"of {_count(model):,} parameters start fresh: {', '.join(sorted(shown))}"
    )


def frozen_identity(model: nn.Module) -> dict[str, str] | None:
    """The name, the source and the sha256 of the frozen weights; None if nothing is frozen.

    The hash covers names, dtypes, shapes and bytes of all frozen parameters. It is computed once and reused until one
    of them changes in place.
    """
    frozen = {name: parameter for name, parameter in sorted(model.named_parameters()) if not parameter.requires_grad}
    if not frozen:
        return None
    versions = [(name, id(value), value._version, value.dtype) for name, value in frozen.items()]
    if getattr(model, "_frozen_hash", (None,))[0] != versions:
        model._frozen_hash = versions, _sha256(frozen)
    return {"name": model.origin.name, "weights": model.origin.weights, "sha256": model._frozen_hash[1]}


def _sha256(parameters: dict[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        value = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def trainable_parts(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """`trainable_modules` of a model, with a head that has trainable modules of its own split into those."""
    parts = model.trainable_modules()
    of_head = getattr(parts.get("head"), "trainable_modules", None)
    if of_head is None:
        return parts
    return {name: part for name, part in parts.items() if name != "head"} | of_head()


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    clip_ratio: float = 1.0,
    layer_decay: float = 1.0,
    decay_norms: bool = True,
) -> list[dict]:
    """Optimizer groups of the trainable parameters, each in one group, in the order of `trainable_parts`.

    A parameter's group follows from its part, its layer (with layer_decay), whether it is exempt from weight decay, and
    the multipliers that the model's `parameter_scale(name, parameter)` declares, if it has that.

    Args:
        model: from `models.registry.build_model`.
        lr: learning rate of the classifier (`head`).
        weight_decay: of all parameters that are not exempt.
        clip_ratio: factor on `lr` for everything but the classifier.
        layer_decay: factor on `lr` from each entry of `trainable_layers` to the one before it; the last has factor 1.
            The layers of a text tower stand beside those of the model and end with them.
        decay_norms: False exempts parameters of at most one dimension (norms, biases, scalars) from weight decay, as
            timm and open_clip do. Temporal embeddings (T, D) decay as weights do.

    Returns:
        dicts with `name`, `params`, `lr` and `weight_decay`. The name is the part's, then `_03` for layer 3,
        `_lr_x2` and `_decay_x2` for multipliers, `_no_decay` without weight decay.

    Raises:
        ConfigError: layer_decay for a model without `trainable_layers`, or whose layers are not what it trains.
    """
    layers = _layer_numbers(model) if layer_decay != 1 else {}
    last_layer = max(layers.values(), default=0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scale_of = getattr(model, "parameter_scale", lambda name, parameter: Scale())
    groups: dict[str, dict] = {}
    for part, module in trainable_parts(model).items():
        for parameter in _parameters(module):
            layer, scale = layers.get(parameter), scale_of(names[parameter], parameter)
            if not decay_norms and parameter.ndim <= 1:
                scale = scale._replace(weight_decay=0.0)
            name = part if layer is None else f"{part}_{layer:02d}"
            name += f"_lr_x{scale.lr:g}" if scale.lr != 1 else ""
            if scale.weight_decay != 1:
                name += f"_decay_x{scale.weight_decay:g}" if scale.weight_decay else "_no_decay"
            if name not in groups:
                rate = lr if part == "head" else lr * clip_ratio
                rate = rate if layer is None else rate * layer_decay ** (last_layer - layer)
                groups[name] = {
                    "name": name,
                    "params": [],
                    "lr": rate * scale.lr,
                    "weight_decay": weight_decay * scale.weight_decay,
                }
            groups[name]["params"].append(parameter)
    return list(groups.values())


def _layer_numbers(model: nn.Module) -> dict[nn.Parameter, int]:
    """The layer of each trainable parameter, counted from the input."""
    kind = type(model).__name__
    if not hasattr(model, "trainable_layers"):
        raise ConfigError(f"solver.layer_decay: {kind} does not name its layers (trainable_layers), so it must be 1")
    numbers: dict[nn.Parameter, int] = {}
    for number, layer in enumerate(_layers_with_head(model)):
        for parameter in (parameter for part in layer for parameter in _parameters(part)):
            if numbers.setdefault(parameter, number) != number:
                raise ConfigError(
                    f"solver.layer_decay: a parameter of {kind} is in its layers {numbers[parameter]} and {number}"
                )
    trainable = {parameter for part in model.trainable_modules().values() for parameter in _parameters(part)}
    if trainable != numbers.keys():
        names = {parameter: name for name, parameter in model.named_parameters()}
        odd = min(names.get(parameter, "a foreign parameter") for parameter in trainable ^ numbers.keys())
        raise ConfigError(f"solver.layer_decay: trainable_layers and trainable_modules of {kind} differ in {odd}")
    return numbers


def _layers_with_head(model: nn.Module) -> list[list[nn.Module | nn.Parameter]]:
    """`trainable_layers` of a model, merged with those of its head if it has any; both end with the classifier."""
    layers = [list(layer) for layer in model.trainable_layers()]
    head = model.trainable_modules().get("head")
    if not hasattr(head, "trainable_layers"):
        return layers
    of_head = head.trainable_layers()
    layers = [[part for part in layer if part is not head] for layer in layers]
    depth = max(len(layers), len(of_head))
    padded = [[[]] * (depth - len(each)) + each for each in (layers, of_head)]
    return [[*one, *other] for one, other in zip(*padded, strict=True)]


def _parameters(part: nn.Module | nn.Parameter) -> Iterable[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else part.parameters()


def _count(part: nn.Module | nn.Parameter) -> int:
    return sum(parameter.numel() for parameter in _parameters(part))
