"""Loading a whole model's weights, by our names or as a method's authors publish them, and saying why they do not fit.

Does not live here: building the model (build.py), reading files (engine/checkpoint.py), CLIP's own weights
(weights.py), the names that authors give (a method's `from_published`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from clip.text_head import head_kind
from models.registry import MODELS, frozen_identity

logger = logging.getLogger("td4v")


class WeightsError(ValueError):
    """Weights that do not fit a model; the message is one sentence."""


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    source: str,
    drop_head: bool = False,
    backbone: Mapping[str, str] | None = None,
) -> None:
    """Load a whole model's state_dict, by our names or as a method's authors publish it, strictly.

    Args:
        model: of `build_model`.
        state_dict: our names or those that a method's `from_published` knows, with or without `module.`.
        source: the file, for messages.
        drop_head: leave out the classifier.
        backbone: of a checkpoint without the frozen weights: their identity, which the model's must have.

    Raises:
        WeightsError: another frozen backbone, another method, another number of classes or frames, any other
            difference. Nothing is loaded then.
    """
    values, named = _by_our_names({key.removeprefix("module."): value for key, value in state_dict.items()}, source)
    own = model.state_dict()
    kept = {f"head.{key}" for key in getattr(model.head, "of_names", set)()} & values.keys()
    for key in kept:
        if not torch.equal(values[key], own[key]):
            logger.info("%s: its %s is left out for that of the names in data.label_list", source, key)
        values[key] = own[key]
    projection = values.get("head.projection")
    if "head.classes" in kept and projection is not None and not torch.equal(projection, own["head.projection"]):
        raise WeightsError(
            f"{source}: its text head is of another CLIP than {model.tower.name} by network.weights, which the classes "
            "in data.label_list are made of: give the same"
        )
    if drop_head:
        values, own = ({key: each[key] for key in each if not _of_head(key)} for each in (values, own))
    if reason := getattr(model, "misfit", lambda _: None)(values) or _misfit(model, values, own, named, backbone):
        raise WeightsError(f"{source}: {reason}")
    model.load_state_dict(values, strict=backbone is None and not drop_head)
    if backbone is None:
        model.tower.weights = f"those in {source}"


def _by_our_names(values: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], Callable[[str], str]]:
    """Weights by our names, whoever published them, and what gives one of our names as the file has it."""
    for method in MODELS.values():
        try:
            renamed = method.from_published(values) if hasattr(method, "from_published") else None
        except ValueError as error:
            raise WeightsError(f"{source}: {error}") from None
        if renamed is not None:
            return renamed, getattr(method, "published_name", str)
    return values, str


def _misfit(
    model: nn.Module,
    values: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    named: Callable[[str], str],
    backbone: Mapping[str, str] | None,
) -> str | None:
    """Why `values` cannot take the place of `own`, in words; None if they can."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    missing = [key for key in own if key not in values and (backbone is None or key not in frozen)]
    unknown = [key for key in values if key not in own]
    unfit = [key for key in values if key in own and values[key].shape != own[key].shape]
    if missing or unknown:
        return _explain_names(missing, unknown, frozen, values, own, named)
    if unfit:
        return _explain_shapes(unfit, values, own, named)
    if backbone is not None and backbone["sha256"] != (ours := frozen_identity(model) or {}).get("sha256"):
        return (
            f"was trained on the frozen weights {backbone['name']}, {backbone['weights']} "
            f"(sha256 {backbone['sha256'][:12]}), here are {ours.get('name')}, {ours.get('weights')} "
            f"({str(ours.get('sha256'))[:12]}): give the same network.weights and seed"
        )
    return None


def _explain_names(
    missing: list[str],
    unknown: list[str],
    frozen: set[str],
    values: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    named: Callable[[str], str],
) -> str:
    """Say what names that are too few or too many mean to the user."""
    theirs, ours = (sorted({key.split(".")[0] for key in keys}) for keys in (values, own))
    if not unknown and frozen == set(missing):
        return f"lacks the frozen backbone{_first(missing, named)}, and does not say which it was"
    if all(map(_of_head, [*missing, *unknown])):
        if "head" not in theirs:
            return "holds no classifier: name it in pretrain and set pretrain_head: drop"
        if (kind := head_kind(values)) != (wanted := head_kind(own)):
            return (
                f"its classifier is {kind}, and the configuration asks for {wanted}; set that as it was, or, to start "
                "a new classifier, name the file in pretrain and set pretrain_head: drop"
            )
        kind = "its classifier does not fit" if unknown else "its classifier is incomplete"
    elif theirs != ours:
        kind = "holds another method's weights or another network"
    else:
        kind = "does not fit this network"
    return (
        f"{kind}: {len(missing)} keys missing{_first(missing, named)}, {len(unknown)} unknown{_first(unknown, named)}; "
        f"it has the parts {', '.join(theirs)}, network.model builds {', '.join(ours)}"
    )


def _explain_shapes(
    unfit: list[str], values: Mapping[str, Tensor], own: Mapping[str, Tensor], named: Callable[[str], str]
) -> str:
    """Say what a difference in shapes means to the user."""
    key = unfit[0]
    frames = next((k for k in unfit if k.endswith("temporal_embedding")), None)
    if frames and values[frames].shape[0] != own[frames].shape[0]:
        T = values[frames].shape[0]
        return f"was made for T = {T} frames, data.num_segments is {own[frames].shape[0]}; set data.num_segments to {T}"
    if key in ("head.weight", "head.classes") and all(map(_of_head, unfit)):
        return (
            f"its classifier has {values[key].shape[0]} classes, data.num_classes is {own[key].shape[0]}; "
            "to start a new classifier, name the file in pretrain and set pretrain_head: drop"
        )
    if frames:
        return (
            f"its network is {values[frames].shape[1]} wide at {named(frames)}, and network.arch "
            f"with network.pyramid make it {own[frames].shape[1]} wide"
        )
    if key == "head.classes.tokens" and all(map(_of_head, unfit)):
        return (
            f"its text head reads {len(values[key])} texts, and data.num_classes times network.text.templates are "
            f"{len(own[key])}: set both as they were; to train on other classes or templates, name the file in "
            "pretrain, with data.label_list, or with pretrain_head: drop for CLIP's own text tower"
        )
    return (
        f"{len(unfit)} shapes differ{_first(unfit, named)}: {tuple(values[key].shape)} in the file, "
        f"{tuple(own[key].shape)} in the model"
    )


def _of_head(key: str) -> bool:
    return key.startswith("head.")


def _first(keys: list[str], named: Callable[[str], str]) -> str:
    """The first few keys by the file's names."""
    return f" (first {', '.join(map(named, keys[:3]))})" if keys else ""
