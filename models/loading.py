"""Loads weights into a model, under our names or its authors', or says in one sentence why they do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip.text_head import head_kind
from common.weights_file import PREFIXES, unusable, without_wrappers
from configs.schema import ConfigError
from models.parameters import frozen_identity
from models.registry import MODELS

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
    """Load a state dict strictly, to start from it or to test it.

    A text head keeps the class names it was built with.

    Args:
        model: from `models.registry.build_model`.
        state_dict: under our names or those of a model's `from_published`, with or without a wrapper's prefix.
        source: the file, for messages.
        drop_head: ignore the classifier in the file and keep the model's.
        backbone: `frozen_identity` of the weights that the file does not hold; the model's must be the same.

    Raises:
        WeightsError: other frozen weights, another model, another number of classes or frames, any other
            difference. Nothing is loaded then.
    """
    prefixes = [prefix for prefix in PREFIXES if not any(key.startswith(prefix) for key in model.state_dict())]
    state_dict = without_wrappers(state_dict, prefixes)
    saved, name_in_file = _with_our_names(model, state_dict, source)
    current = model.state_dict()
    _keep_class_names(model, saved, current, source)
    if drop_head:
        logger.info("%s: its classifier is not used, and a new one starts", source)
        saved = {key: value for key, value in saved.items() if not _of_head(key)}
        current = {key: value for key, value in current.items() if not _of_head(key)}
    _load(model, saved, current, source, backbone, name_in_file)


def load_run_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str, backbone: Mapping[str, str] | None = None
) -> None:
    """Load the weights of a run that continues, exactly as the run saved them. See `load_weights`."""
    _load(model, state_dict, model.state_dict(), source, backbone)


def check_untrained(model: nn.Module) -> None:
    """Raise ConfigError unless a model with a text head consists of CLIP's weights alone, so that it can be tested."""
    model.head.require_filled()
    if parts := sorted({key.split(".")[0] for key in model.state_dict()} - {"tower", "head"}):
        raise ConfigError(
            f"network.model: needs a checkpoint (--weights), for it has parts that CLIP does not have: {', '.join(parts)}"
        )


def _load(
    model: nn.Module,
    saved: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    source: str,
    backbone: Mapping[str, str] | None,
    name_in_file: Callable[[str], str] = str,
) -> None:
    """Load `saved` if it fits `current`, the part of the model's state dict that it shall replace."""
    misfit = getattr(model, "misfit", lambda values: None)
    comparison = _Comparison(
        saved=saved,
        current=current,
        frozen={name for name, parameter in model.named_parameters() if not parameter.requires_grad},
        may_lack_frozen=backbone is not None,
        name_in_file=name_in_file,
    )
    if reason := misfit(saved) or comparison.misfit() or _other_backbone(model, backbone):
        raise WeightsError(f"{source}: {reason}")
    model.load_state_dict(saved, strict=False)  # all that may be missing is known by now
    if backbone is None:
        model.origin = model.origin._replace(weights=f"those in {source}")


def _with_our_names(
    model: nn.Module, values: dict[str, Tensor], source: str
) -> tuple[dict[str, Tensor], Callable[[str], str]]:
    """The weights under our names, and the function that gives the file's name for one of ours.

    Raises:
        WeightsError: keys that the authors' model does not have, or another model's.
    """
    for name, module in MODELS.items():
        try:
            renamed = module.from_published(values) if hasattr(module, "from_published") else None
        except ValueError as error:
            raise WeightsError(f"{source}: {error}") from None
        if renamed is not None:
            own = next((each for each, file in MODELS.items() if file.__name__ == type(model).__module__), name)
            if own != name:
                raise WeightsError(f"{source}: holds the weights of {name} by its authors, and network.model is {own}")
            return renamed, getattr(module, "published_name", str)
    return values, str


def _keep_class_names(model: nn.Module, saved: dict[str, Tensor], current: Mapping[str, Tensor], source: str) -> None:
    """Replace what a file's text head makes of its class names by the model's. Raises WeightsError for another CLIP."""
    kept = {f"head.{key}" for key in getattr(model.head, "of_names", set)()} & saved.keys()
    for key in kept:
        if not torch.equal(saved[key], current[key]):
            logger.info("%s: its %s is replaced by that of the names in data.label_list", source, key)
        saved[key] = current[key]
    projection = saved.get("head.projection")
    if "head.classes" in kept and projection is not None and not torch.equal(projection, current["head.projection"]):
        raise WeightsError(
            f"{source}: its text head is of another CLIP than {model.origin.name} by network.weights, which the classes "
            "in data.label_list are made of: give the same"
        )


def _other_backbone(model: nn.Module, backbone: Mapping[str, str] | None) -> str | None:
    """What differs between the frozen weights that a file was trained on and the model's."""
    if backbone is None:
        return None
    present = frozen_identity(model)
    if present is None:
        return f"was trained on the frozen weights {backbone['name']}, and nothing is frozen in this model"
    if present["sha256"] == backbone["sha256"]:
        return None
    return (
        f"was trained on the frozen weights {backbone['name']}, {backbone['weights']} "
        f"(sha256 {backbone['sha256'][:12]}), here are {present['name']}, {present['weights']} "
        f"({present['sha256'][:12]}): give the same network.weights and seed"
    )


@dataclass(frozen=True)
class _Comparison:
    """The weights of a file beside those of a model, both under our names."""

    saved: Mapping[str, Tensor]
    current: Mapping[str, Tensor]
    frozen: Collection[str]  # names of the model's frozen parameters
    may_lack_frozen: bool  # the file says by their hash which they were
    name_in_file: Callable[[str], str]

    def misfit(self) -> str | None:
        """Why the file's weights cannot replace the model's; None if they can."""
        missing = [key for key in self.current if key not in self.saved and not self._may_lack(key)]
        unexpected = [key for key in self.saved if key not in self.current]
        shared = [key for key in self.saved if key in self.current]
        reshaped = [key for key in shared if self.saved[key].shape != self.current[key].shape]
        if missing or unexpected:
            return self._explain_names(missing, unexpected)
        return self._explain_shapes(reshaped) if reshaped else unusable(self.saved, self.current)

    def _may_lack(self, key: str) -> bool:
        return self.may_lack_frozen and key in self.frozen

    def _explain_names(self, missing: list[str], unexpected: list[str]) -> str:
        """What missing and unexpected names mean to the user."""
        in_file, in_model = (sorted({key.split(".")[0] for key in keys}) for keys in (self.saved, self.current))
        if not unexpected and set(self.frozen) == set(missing):
            return f"lacks the frozen backbone{self._first(missing)}, and does not say which it was"
        if not in_file:
            return f"holds no weights of this network: {len(missing)} keys missing{self._first(missing)}"
        if all(map(_of_head, [*missing, *unexpected])):
            if "head" not in in_file:
                return "holds no classifier: name it in pretrain and set pretrain_head: drop"
            if (kind := head_kind(self.saved)) != (wanted := head_kind(self.current)):
                return (
                    f"its classifier is {kind}, and the configuration asks for {wanted}; set that as it was, or, to "
                    "start a new classifier, name the file in pretrain and set pretrain_head: drop"
                )
            problem = "its classifier does not fit" if unexpected else "its classifier is incomplete"
        elif len(in_file) == 1 and in_file[0] not in in_model:
            problem = f"all keys begin with {in_file[0]}., which is no part of this network"
        elif in_file != in_model:
            problem = "holds the weights of another model or another network"
        else:
            problem = "does not fit this network"
        return (
            f"{problem}: {len(missing)} keys missing{self._first(missing)}, {len(unexpected)} unexpected"
            f"{self._first(unexpected)}; it has the parts {', '.join(in_file)}, network.model builds {', '.join(in_model)}"
        )

    def _explain_shapes(self, keys: list[str]) -> str:
        """What other shapes mean to the user."""
        saved, current, key = self.saved, self.current, keys[0]
        embedding = next((each for each in keys if each.endswith("temporal_embedding")), None)
        if embedding and saved[embedding].shape[0] != current[embedding].shape[0]:
            T = saved[embedding].shape[0]
            return (
                f"was made for T = {T} frames, data.num_segments is {current[embedding].shape[0]}; "
                f"set data.num_segments to {T}"
            )
        if key in ("head.weight", "head.classes") and all(map(_of_head, keys)):
            return (
                f"its classifier has {saved[key].shape[0]} classes, data.num_classes is {current[key].shape[0]}; "
                "to start a new classifier, name the file in pretrain and set pretrain_head: drop"
            )
        if embedding:
            return (
                f"its network is {saved[embedding].shape[1]} wide at {self.name_in_file(embedding)}, and network.arch "
                f"with network.pyramid make it {current[embedding].shape[1]} wide"
            )
        if key == "head.classes.tokens" and all(map(_of_head, keys)):
            return (
                f"its text head reads {len(saved[key])} texts, and data.num_classes times network.text.templates are "
                f"{len(current[key])}: set both as they were; to train on other classes or templates, name the file in "
                "pretrain, with data.label_list, or with pretrain_head: drop for CLIP's current text tower"
            )
        return (
            f"{len(keys)} shapes differ{self._first(keys)}: {tuple(saved[key].shape)} in the file, "
            f"{tuple(current[key].shape)} in the model"
        )

    def _first(self, keys: list[str]) -> str:
        """The first few keys by the file's names."""
        return f" (first {', '.join(map(self.name_in_file, keys[:3]))})" if keys else ""


def _of_head(key: str) -> bool:
    return key.startswith("head.")
