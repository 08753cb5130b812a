"""Which tuned parameter learns at which rate: the groups that an optimizer takes.

Lives here: factors of the learning rate (classifier, layers) and exemptions from weight decay, by module.
Does not live here: what is tuned (`trainable_modules` and `trainable_layers` of a method say so), the optimizer itself
(engine/optim.py, whose `check_groups` makes sure that nothing is missing).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from configs.schema import ConfigError


def trainable_parts(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """`trainable_modules` of a method, in which a head that has such of its own is told in its parts; `head` stays last."""
    parts = model.trainable_modules()
    own = getattr(parts.get("head"), "trainable_modules", None)
    return parts if own is None else {**{name: part for name, part in parts.items() if name != "head"}, **own()}


def parameter_groups(
    model: nn.Module, lr: float, clip_ratio: float, layer_decay: float = 1.0, decay_norms: bool = True
) -> list[dict]:
    """The tuned parameters, each once, in the order of `trainable_parts`; one group a part by default.

    Args:
        model: a method, as `models.registry.build_model` gives it.
        lr: of the classifier (`head`). clip_ratio: factor of everything else.
        layer_decay: factor from each entry of the method's `trainable_layers` to the one before it; the last has factor 1.
            A text tower has layers of its own, which stand beside those of the method and end with them.
        decay_norms: False exempts what has no or one dimension from weight decay: norms, biases and scalars, as timm
            (param_groups_weight_decay) and open_clip do. Temporal embeddings (T, D) decay as weights do.

    Returns:
        Dicts with `name`, `params` and `lr`, and with `weight_decay` 0.0 where there is to be none. Names are the
        module's, then `_` and the layer's number with layer_decay, then `_no_decay` for the exempt.

    Raises:
        ConfigError: layer_decay for a method without `trainable_layers`, or one whose layers are not what it tunes.
    """
    layers = _layers(model) if layer_decay != 1 else {}
    last = max(layers.values(), default=0)
    groups: dict[tuple, dict] = {}
    for part, module in trainable_parts(model).items():
        for parameter in _parameters(module):
            layer = layers.get(parameter)
            exempt = not decay_norms and parameter.ndim <= 1
            if (part, layer, exempt) not in groups:
                rate = lr if part == "head" else lr * clip_ratio
                group = {"name": part, "params": [], "lr": rate}
                if layer is not None:
                    group |= {"name": f"{part}_{layer:02d}", "lr": rate * layer_decay ** (last - layer)}
                if exempt:
                    group |= {"name": f"{group['name']}_no_decay", "weight_decay": 0.0}
                groups[part, layer, exempt] = group
            groups[part, layer, exempt]["params"].append(parameter)
    return list(groups.values())


def _layers(model: nn.Module) -> dict[nn.Parameter, int]:
    """The number of its layer for every tuned parameter, counted from the input."""
    method = type(model).__name__
    if not hasattr(model, "trainable_layers"):
        raise ConfigError(f"solver.layer_decay: {method} does not say its layers (trainable_layers), so it must be 1")
    numbers: dict[nn.Parameter, int] = {}
    for number, layer in enumerate(_joined(model)):
        for parameter in (parameter for part in layer for parameter in _parameters(part)):
            if numbers.setdefault(parameter, number) != number:
                raise ConfigError(
                    f"solver.layer_decay: a parameter of {method} is in its layers {numbers[parameter]} and {number}"
                )
    tuned = {parameter for part in model.trainable_modules().values() for parameter in _parameters(part)}
    if tuned != numbers.keys():
        names = {parameter: name for name, parameter in model.named_parameters()}
        odd = min(names.get(parameter, "a foreign parameter") for parameter in tuned ^ numbers.keys())
        raise ConfigError(f"solver.layer_decay: trainable_layers and trainable_modules of {method} differ in {odd}")
    return numbers


def _joined(model: nn.Module) -> list[list[nn.Module | nn.Parameter]]:
    """`trainable_layers` of a method, and beside them those that its head has of its own; both end with the classifier."""
    layers = [list(layer) for layer in model.trainable_layers()]
    head = model.trainable_modules().get("head")
    if not hasattr(head, "trainable_layers"):
        return layers
    others = head.trainable_layers()
    layers = [[part for part in layer if part is not head] for layer in layers]
    longest = max(len(layers), len(others))
    rows = [[[]] * (longest - len(each)) + each for each in (layers, others)]
    return [[*one, *other] for one, other in zip(*rows, strict=True)]


def _parameters(part: nn.Module | nn.Parameter) -> Iterable[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else part.parameters()
