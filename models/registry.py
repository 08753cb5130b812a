"""The models by name, and `build_model`, which builds one from a configuration.

A model is one file in models/ and one line in MODELS. Letters: B clips, T segments, K classes, f frames a segment.

The file has

    Options                     a frozen dataclass: the keys, types and defaults of network.options
    build(config, options)      -> the model. One on an image tower imports clip.towers.build.build_tower and calls it
                                with config; one without does not read network.arch. What it cannot honour is a ConfigError that begins with the dotted key;
                                network.init: false means random weights.

and may have, for the files that its authors publish,

    from_published(state_dict)  -> their weights under our names, or None if these are not theirs; ValueError for a key
                                that their model does not have
    published_name(key)         -> the authors' name for one of ours, for messages

The model is an nn.Module. It has

    forward(video)              (B, T*f, 3, height, width), the f frames of a segment next to each other -> logits (B, K)
    head                        the classifier
    trainable_modules()         -> {name: module or parameter}, everything that is trained; the last entry is `head`
    origin                      an Origin: the name of what it stands on, and where its weights come from
    frames_per_segment          f
    mean, std                   of the pixels it was pretrained on, in 0..1, one value a channel; None for CLIP's

and may have

    trainable_layers()          -> lists of modules and parameters, one a layer from input to output: solver.layer_decay
    parameter_scale(name, parameter)  -> a Scale: multipliers of this parameter's learning rate and weight decay
    in_clip_space               whether `head` gets what CLIP would project to the space of its texts (B, D). Then
                                network.head: text can replace `head`; `tower` is CLIP's tower
    frozen_features(video), from_frozen(features)  -> (B, F), all that training does not change, and logits (B, K), the
                                rest: network.cache_features. forward then takes a video or such features
    least_clips                 clips that a training batch of one process must have; 1 without it
    misfit(values)              -> why weights under our names do not fit, if the model knows a better sentence than
                                models.loading, else None
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from clip.text_head import TextHead, build_text_head
from configs.schema import Config, ConfigError, NetworkConfig, fill_options, nearest
from models import (
    aim,
    attentive_probe,
    full_finetune,
    linear_probe,
    tada2d,
    tadaconvnextv2,
    tadaformer,
    td4v_finetune,
    td4v_side,
    tdn,
)
from models.parameters import freeze_all_but_trainable

logger = logging.getLogger("td4v")

MODELS: dict[str, ModuleType] = {
    "td4v_side": td4v_side,
    "td4v_finetune": td4v_finetune,
    "full_finetune": full_finetune,
    "linear_probe": linear_probe,
    "attentive_probe": attentive_probe,
    "aim": aim,
    "tdn": tdn,
    "tada2d": tada2d,
    "tadaformer": tadaformer,
    "tadaconvnextv2": tadaconvnextv2,
}


def uses_tower(model_name: str) -> bool:
    """Whether a model stands on an image tower (network.arch)."""
    return hasattr(MODELS[model_name], "build_tower")


def run_home(config: Config) -> Path:
    """The folder of the runs of a configuration: OUTPUT_DIR/DATASET/ARCH, or .../MODEL for one that has no tower."""
    name = config.network.model_name
    network = config.network.arch.replace("/", "-") if name not in MODELS or uses_tower(name) else name
    return Path(config.logging.output_dir, config.data.dataset, network)


def build_model(config: Config, pretrained: bool = True, class_names: Sequence[str] | None = None) -> nn.Module:
    """Build the model of a configuration on the CPU, in float32, with gradients for its trainable parts alone.

    Random weights follow from config.seed: a configuration always gives the same model. The state of torch's
    generators does not change.

    Args:
        config: from configs.schema.load_config.
        pretrained: False reads no pretrained weights, for a checkpoint that brings all of them. A text head that is not
            trained is still made of `class_names` and CLIP's text tower.
        class_names: the K names for network.head: text; None if a checkpoint brings the classifier.

    Raises:
        ConfigError, TowerError, ValueError: an unknown model, weights that cannot be read, sizes that do not fit.
    """
    network = config.network
    if network.model_name not in MODELS:
        close = nearest(network.model_name, MODELS)
        hint = f"; did you mean {close}?" if close else ""
        raise ConfigError(f"network.model: {network.model_name!r} is unknown{hint} (known: {', '.join(MODELS)})")
    file = MODELS[network.model_name]
    if not uses_tower(network.model_name):
        _warn_of_unread(network)
    options = fill_options(file.Options, network.options, "network.options")
    init = network.init and pretrained
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = file.build(dataclasses.replace(config, network=dataclasses.replace(network, init=init)), options)
        if network.head == "text":
            model.head = _text_head(config, model, pretrained, class_names)
    if pretrained and not init:
        logger.warning(
            "network.init is false: %s starts from RANDOM weights, nothing pretrained is loaded", model.origin.name
        )
    if network.cache_features != "off" and not hasattr(model, "frozen_features"):
        able = ", ".join(name for name, file in MODELS.items() if _has_frozen_features(file))
        raise ConfigError(
            f"network.cache_features: {network.model_name} has no frozen features of its own to keep; only {able} have"
        )
    return freeze_all_but_trainable(model)


def _warn_of_unread(network: NetworkConfig) -> None:
    """Log a warning if settings of image towers and of side networks are given to a model without a tower."""
    keys, default = ("arch", "vision", "DA_ratio", "sample_mode", "pyramid"), NetworkConfig()
    if given := [f"network.{key}" for key in keys if getattr(network, key) != getattr(default, key)]:
        logger.warning("%s: %s stands on no image tower and does not read this", ", ".join(given), network.model_name)


def _text_head(config: Config, model: nn.Module, pretrained: bool, class_names: Sequence[str] | None) -> TextHead:
    """The text head of a configuration. Raises ConfigError for a model whose features CLIP does not project."""
    if not getattr(model, "in_clip_space", False):
        feature = f" and network.options.feature {model.feature}" if hasattr(model, "feature") else ""
        raise ConfigError(
            "network.head: text needs features in CLIP's space, "
            f"which network.model {config.network.model_name}{feature} does not give"
        )
    return build_text_head(config, model.tower, class_names, pretrained)


def _has_frozen_features(file: ModuleType) -> bool:
    return any(hasattr(value, "frozen_features") for value in vars(file).values() if isinstance(value, type))


def with_pixel_statistics(config: Config, model: nn.Module) -> Config:
    """The configuration with data.mean and data.std filled in where they are null: the model's own, else CLIP's.

    Raises:
        ConfigError: data.seg_length is given and is not what the model reads.
    """
    frames = model.frames_per_segment
    if config.data.seg_length not in (None, frames):
        raise ConfigError(
            f"data.seg_length: {config.data.seg_length} is given, but network.model {config.network.model_name} "
            f"reads {frames} frames a segment"
        )
    return dataclasses.replace(config, data=config.data.with_pixel_statistics(model.mean, model.std))
