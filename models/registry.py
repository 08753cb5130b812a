"""The MODELS table, what a method is, build_model(config), counts of parameters, which frozen weights a model has.

A method is one file in clip/methods/ and one line in MODELS. The file has

Options, a frozen dataclass: what may stand in network.options, with types and defaults.

build(config, tower, options) -> module: it hands the configuration's values to the constructor, network.drop_fc and
network.recompute among them. What it cannot honour is a ConfigError that begins with the dotted key.

The module has to have

forward(video (B, T, 3, height, width)) -> logits (B, K).

tower, the trunk that it was given, and head, the classifier, as attributes.

trainable_modules() -> {name: module or parameter}, all that is trained; the last entry is `head`.

frames_per_segment, an int: the frames that it reads at each of its T places; the loaders have 1.

It may have, each for one thing,

trainable_layers() -> lists of modules and parameters, one a layer from input to classifier, for solver.layer_decay.

in_clip_space, a bool, for network.head: text: whether `head` is given what CLIP would project to the space of its texts
(B, D). The text head then takes the place of `head`.

frozen_features(video) -> (B, F) and from_frozen(features) -> logits, for network.cache_features: all that no training
changes, and the rest. forward then takes either, a video or such features, by their dimensions.

misfit(values) -> str | None, for files of another variant of it: says in words why these weights, by our names, do not
fit, where that is known; None leaves it to clip/loading.py.

Its file may have, beside build,

from_published(state_dict) -> dict | None, for the files that its authors publish: their weights by our names, all that
the model has, or None if these are not theirs. Raises ValueError for a key that is not known.

published_name(key) -> str, for messages on such files: what the authors call a key of ours.

Does not live here: any layer, any loop, loading a model's weights (loading.py).
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import nn

from clip.text_head import TextHead, build_text_head
from clip.towers.build import build_tower
from configs.schema import Config, ConfigError, fill_options, nearest
from models import aim, full_finetune, linear_probe, td4v_finetune, td4v_side
from models.parameters import freeze_all_but_trainable

logger = logging.getLogger("td4v")

MODELS: dict[str, ModuleType] = {
    "td4v_side": td4v_side,
    "td4v_finetune": td4v_finetune,
    "full_finetune": full_finetune,
    "linear_probe": linear_probe,
    "aim": aim,
}


def build_model(config: Config, pretrained: bool = True, class_names: Sequence[str] | None = None) -> nn.Module:
    """The model of a configuration, on the CPU, in float32, with only its tuned parts requiring gradients.

    Random parts follow from config.seed, the frozen tower's first: a configuration always gives the same model, and
    torch's generators are left as they were.

    Args:
        config: of configs.schema.load_config.
        pretrained: False leaves CLIP's weights out, for a checkpoint that brings all of them; classes that are not
            tuned are made of `class_names` and of CLIP's text tower all the same.
        class_names: K of them, for network.head: text; None for a checkpoint that brings the classifier.

    Raises:
        ConfigError, TowerError, ValueError: an unknown method, weights that cannot be had, sizes that do not fit.
    """
    network = config.network
    if network.model_name not in MODELS:
        close = nearest(network.model_name, MODELS)
        hint = f"; did you mean {close}?" if close else ""
        raise ConfigError(f"network.model: {network.model_name!r} is unknown{hint} (known: {', '.join(MODELS)})")
    if network.model is not None and network.fine_tuning and network.model == "td4v_side":
        warnings.warn("network.model td4v_side overrides network.fine_tuning", stacklevel=2)
    method = MODELS[network.model_name]
    options = fill_options(method.Options, network.options, "network.options")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        init = network.init and pretrained
        tower = build_tower(dataclasses.replace(config, network=dataclasses.replace(network, init=init)))
        if pretrained and not init:
            logger.warning(
                "network.init is false: %s starts from RANDOM weights, nothing pretrained is loaded", tower.name
            )
        model = method.build(config, tower, options)
        if network.head == "text":
            model.head = _text_head(config, model, pretrained, class_names)
    if network.cache_features != "off" and not hasattr(model, "frozen_features"):
        able = ", ".join(name for name, module in MODELS.items() if _has_frozen_features(module))
        raise ConfigError(
            f"network.cache_features: {network.model_name} has no frozen features of its own to keep; only {able} have"
        )
    return freeze_all_but_trainable(model)


def with_pixel_statistics(config: Config, model: nn.Module) -> Config:
    """Fill data.mean and data.std, where they are null, with the model's own, and CLIP's where it has none.

    Raises ConfigError where data.seg_length is not what the model reads.
    """
    frames = model.frames_per_segment
    if config.data.seg_length not in (None, frames):
        raise ConfigError(
            f"data.seg_length: {config.data.seg_length} is given, but network.model {config.network.model_name} "
            f"reads {frames} frames a segment"
        )
    return dataclasses.replace(config, data=config.data.with_pixel_statistics(model.mean, model.std))


def _text_head(config: Config, model: nn.Module, pretrained: bool, class_names: Sequence[str] | None) -> TextHead:
    """The text head of a configuration. Raises ConfigError for a method whose features CLIP does not project."""
    network = config.network
    if not getattr(model, "in_clip_space", False):
        feature = f" and network.options.feature {model.feature}" if hasattr(model, "feature") else ""
        raise ConfigError(
            "network.head: text needs features in CLIP's space, "
            f"which network.model {network.model_name}{feature} does not give"
        )
    return build_text_head(config, model.tower, class_names, pretrained)


def _has_frozen_features(module: ModuleType) -> bool:
    return any(hasattr(value, "frozen_features") for value in vars(module).values() if isinstance(value, type))
