"""Two configurations beside each other: whether they are of one run, and what one takes from the other."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.parse import apply_override, flatten
from configs.schema import ALIASES, Config, ConfigError, load_config

# Settings that are null until the model is built.
FILLED_BY_MODEL = ("data.mean", "data.std", "data.seg_length")


def fill_from_checkpoint(config: Config, previous: Any) -> Config:
    """Fill settings that follow the model with those of a checkpoint's configuration, so that its weights see what they
    were trained on. A checkpoint without a configuration leaves them to the model.

    Args:
        previous: what the checkpoint has as its configuration, as `Config.to_dict` wrote it, or None.
    """
    data = previous.get("data") if isinstance(previous, Mapping) else None
    if not isinstance(data, Mapping):
        return config
    keys = [key.removeprefix("data.") for key in FILLED_BY_MODEL]
    values = {key: data[key] for key in keys if getattr(config.data, key) is None and data.get(key)}
    merged = config.to_dict()
    merged["data"] |= values
    return load_config(merged)


# What may change when a run is resumed: where things are, how fast it runs, what is logged.
_FREE_ON_RESUME = (
    "resume", "pretrain", "logging.", "checkpoint.", "data.workers", "data.on_error", "data.train_", "data.val_",
    "data.test_", "data.label_list", "network.init", "network.weights", "solver.evaluate", "solver.max_bad_steps",
    "solver.early_stop",
)  # fmt: skip


def check_same_run(previous: dict[str, Any], config: Config, path: str | Path) -> None:
    """Make sure that a resumed run has the settings it began with. More epochs only warn.

    Args:
        previous: the configuration in the checkpoint, as `Config.to_dict` wrote it.
        path: the checkpoint, for messages.

    Raises:
        ConfigError: a setting that makes another run of it, with both values.
    """
    try:
        changed = _changed_settings(previous, config, _FREE_ON_RESUME)
    except ConfigError as error:
        raise ConfigError(f"{path}: was written by another version of this code ({error})") from None
    epochs = changed.pop("solver.epochs", None)
    for key, (old, new) in changed.items():
        raise ConfigError(
            f"{path}: {key} was {old!r} in this run and is now {new!r}; "
            "to start another run from its weights, name it in pretrain instead of resume"
        )
    if epochs is not None:
        old, new = epochs
        warnings.warn(f"solver.epochs was {old} and is now {new}: the learning rate follows", stacklevel=1)


def difference(previous: dict[str, Any], config: Config, more_epochs: bool, same_start: bool) -> str | None:
    """Why a run with the configuration `previous` (as `Config.to_dict` wrote it) is another run, in words; or None.

    Args:
        more_epochs: another number of epochs does not make another run.
        same_start: another checkpoint to start from (`resume`, `pretrain`) does.
    """
    free = tuple(key for key in _FREE_ON_RESUME if not same_start or key not in ("resume", "pretrain"))
    free += ("solver.epochs",) if more_epochs else ()
    try:
        changed = _changed_settings(previous, config, free)
    except ConfigError as error:
        return f"its configuration is of another version of this code ({error})"
    return next((f"{key} was {old!r} and is now {new!r}" for key, (old, new) in changed.items()), None)


def _changed_settings(previous: dict[str, Any], config: Config, free: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, with both values, except keys that begin with one of `free`.

    A key that `previous` does not have is at its default.
    """
    old, new = (flatten(one.to_dict()) for one in (load_config(previous), config))
    return {key: values for key, values in differing(old, new).items() if not key.startswith(free)}


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys of two flat configurations whose values differ, with both.

    A setting that follows the model is null until the model is built; null equals what the other configuration has
    there.
    """
    pairs = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())}
    return {
        key: (was, now)
        for key, (was, now) in pairs.items()
        if was != now and not (key in FILLED_BY_MODEL and None in (was, now))
    }


def override_keys(overrides: Sequence[str]) -> list[str]:
    """The dotted keys of `a.b=value` strings, by their own names."""
    return [apply_override({}, override, ALIASES) for override in overrides]
