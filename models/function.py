"""Settings that change what a model computes or sees although no weight shows it, compared with a checkpoint's.

A checkpoint loads into a model with another activation, another number of heads or other pixel statistics without a
word from the weights: names and shapes are the same. So whoever loads a checkpoint compares its configuration too.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from configs.compare import differing
from configs.parse import flatten
from configs.schema import Config, ConfigError, fill_options, load_config
from models.registry import MODELS, uses_tower

logger = logging.getLogger("td4v")

# Every key of a configuration begins with an entry of one of the two; a test holds that against the schema.
FUNCTION = (
    "data.task", "data.reversed_classes",
    "data.num_segments", "data.seg_length", "data.input_size", "data.scale_size", "data.style", "data.interval",
    "data.dense", "data.eval_crop", "data.mean", "data.std", "network.model", "network.fine_tuning", "network.arch", "network.vision", "network.head",
    "network.text", "network.DA_ratio", "network.sample_mode", "network.pyramid", "network.options",
)  # fmt: skip
# Where things are, how a run goes, what the weights' names and shapes show.
FREE = (
    "data.dataset", "data.num_classes", "data.modality", "data.batch_size", "data.workers", "data.image_tmpl",
    "data.index_base", "data.train_", "data.val_", "data.test_", "data.label_list", "data.random_shift", "data.augment",
    "data.num_sample", "data.rand_", "data.shot", "data.flip", "data.gray_prob", "data.crop", "data.short_side",
    "data.static_mask", "data.fps", "data.on_error", "data.decoder", "network.init", "network.weights", "network.drop_fc", "network.sync_bn",
    "network.recompute", "network.cache_features", "solver.", "logging.", "checkpoint.", "resume", "pretrain", "seed",
)  # fmt: skip
_OF_SIDE_TUNING = ("network.DA_ratio", "network.sample_mode", "network.pyramid")
_OF_TOWERS = ("network.arch", "network.vision")
# Settings that follow these where they are null: who names the one means the other too.
_FOLLOWS = {
    "network.model": "network.fine_tuning",
    "data.style": "data.dataset",
    "data.scale_size": "data.input_size",
}


def function_settings(config: Config) -> dict[str, Any]:
    """The settings of FUNCTION that this configuration's model reads, by dotted key, with defaults filled in.

    Raises:
        ConfigError: options that the model does not have.
    """
    network, data = config.network, config.data
    values = {key: value for key, value in flatten(config.to_dict()).items() if key.startswith(FUNCTION)}
    del values["network.fine_tuning"]
    values = {key: value for key, value in values.items() if not key.startswith("network.options")}
    values["network.model"] = network.model_name
    values["network.arch"] = _same_name(network.arch)
    values["data.style"] = data.sampling_style
    values["data.scale_size"] = data.short_side_size
    if network.model_name != "td4v_side":
        values = {key: value for key, value in values.items() if not key.startswith(_OF_SIDE_TUNING)}
    if network.head != "text":
        values = {key: value for key, value in values.items() if not key.startswith("network.text")}
    if network.model_name in MODELS:
        if not uses_tower(network.model_name):
            values = {key: value for key, value in values.items() if not key.startswith(_OF_TOWERS)}
        options = MODELS[network.model_name].Options
        filled = dataclasses.asdict(fill_options(options, network.options, "network.options"))
        training_only = {field.name for field in dataclasses.fields(options) if field.metadata.get("training_only")}
        values |= {f"network.options.{key}": value for key, value in filled.items() if key not in training_only}
    return values


def differences(previous: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings of FUNCTION that differ: key -> the checkpoint's value and the configuration's.

    Args:
        previous: the configuration in a checkpoint, as `Config.to_dict` wrote it.

    Raises:
        ConfigError: it is of another version of this code.
    """
    old, new = function_settings(load_config(previous)), function_settings(config)
    if old["network.model"] != new["network.model"]:  # what only one of the two models reads has no other value
        both = {key for key in old.keys() & new.keys() if not key.startswith("network.options.")}
        old, new = ({key: values[key] for key in both} for values in (old, new))
    return differing(old, new)


def check_function(
    previous: Mapping[str, Any] | None,
    config: Config,
    path: object,
    *,
    explicit: Sequence[str] = (),
    warn_only: bool = False,
) -> None:
    """Compare the configuration that a checkpoint's weights were trained with and the one that they are used with.

    Args:
        previous: the checkpoint's, or None if it holds none, which is logged.
        path: the checkpoint, for messages.
        explicit: dotted keys that the user named on the command line: they win, with a warning each.
        warn_only: differences are intended, as where training starts from other weights: they are warnings.

    Raises:
        ConfigError: settings differ that were not named; the message has all of them with both values.
    """
    if previous is None:
        logger.info(
            "%s: holds no configuration, so whether its weights were trained with these settings is unknown", path
        )
        return
    try:
        changed = differences(previous, config)
    except ConfigError as error:
        logger.warning("%s: its configuration is of another version of this code and is not compared (%s)", path, error)
        return
    forced = {key: values for key, values in changed.items() if warn_only or _is_named(key, explicit)}
    for key, (was, now) in forced.items():
        logger.warning("%s: its weights were trained with %s %s and are used with %s", path, key, was, now)
    if refused := [f"{key} was {was} and is now {now}" for key, (was, now) in changed.items() if key not in forced]:
        raise ConfigError(
            f"{path}: its weights were trained for another function: {'; '.join(refused)}. "
            "Without --config the checkpoint's own settings are used; --set KEY=VALUE forces one"
        )


def check_class_names(
    saved: Sequence[str] | None, names: Sequence[str] | None, path: object, *, explicit: bool = False
) -> tuple[str, ...] | None:
    """The names of the classes of a checkpoint's classifier, after a comparison with those of the configuration.

    Args:
        saved: the names that it was trained with, if it holds them.
        names: those in data.label_list, if there is one.
        explicit: the user named data.label_list on the command line: other names for the same classes are a warning.

    Raises:
        ConfigError: the names or their order differ. The same names in another order are never meant.
    """
    if saved is None or names is None or tuple(saved) == tuple(names):
        return tuple(saved) if names is None and saved is not None else names
    label = next((i for i, (one, other) in enumerate(zip(saved, names, strict=False)) if one != other), None)
    if label is None:
        return names  # another number of classes, which the classifier's shape shows
    sentence = f"class {label} was trained as {saved[label]!r} and is {names[label]!r} in data.label_list"
    known = {_spelling(name) for name in saved}
    moved = any(
        _spelling(one) != _spelling(other) and _spelling(other) in known
        for one, other in zip(saved, names, strict=False)
    )
    if explicit and not moved:
        logger.warning("%s: %s", path, sentence)
        return names
    raise ConfigError(f"{path}: {sentence}: give the names in the order of the training, or no data.label_list")


def _is_named(key: str, explicit: Sequence[str]) -> bool:
    names = [*explicit, *(follower for follower, key in _FOLLOWS.items() if key in explicit)]
    return any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in names)


def _spelling(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _same_name(arch: str) -> str:
    """open_clip's name of one of OpenAI's models, so that `ViT-B/16` equals `ViT-B-16-quickgelu`."""
    return f"{arch.replace('/', '-').replace('@', '-').removesuffix('px')}-quickgelu" if "/" in arch else arch
