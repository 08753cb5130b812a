"""A model, with overrides of its own if need be, in a configuration that was written for another."""

from __future__ import annotations

import re
from collections.abc import Sequence

from configs.schema import Config, load_config
from models.registry import MODELS, uses_tower
from scripts.profile.cases import BEFORE_OVERRIDE, parse_case

# The defaults of what describes image towers and side networks, for models that read none of it.
WITHOUT_TOWER = ("network.arch=null", "network.vision=null", "network.pyramid=null")


class CompareError(ValueError):
    """What cannot be compared; the message is one sentence."""


def overrides_of(path: str, model: str, common: Sequence[str]) -> tuple[str, list[str]]:
    """The file and the overrides that `CONFIG+KEY=VALUE` and `MODEL+KEY=VALUE` mean.

    network.options of the file hold for the file's own model alone; those of `common` and of the two for every model.
    """
    file, own = parse_case(path, path)
    name, *chosen = BEFORE_OVERRIDE.split(model)
    is_files_model = load_config(file, [*common, *own]).network.model_name == name
    options = [] if is_files_model else ["network.options={}"]
    if name in MODELS and not uses_tower(name):
        options += WITHOUT_TOWER
    return file, [*options, *common, *own, f"network.model={name}", *chosen]


def check_head(config: Config) -> None:
    """Raises CompareError for a head that random weights cannot give."""
    if config.network.head == "text":
        raise CompareError(
            "network.head: text needs the pretrained CLIP, and here all weights are random; compare with linear "
            "(python -m scripts.profile measures what a text head costs)"
        )


def chosen_models(names: Sequence[str], study: Sequence[str]) -> list[str]:
    """The models of a comparison, each once: a name without overrides means the study's models of that name, if any."""
    of_study: dict[str, list[str]] = {}
    for model in study:
        of_study.setdefault(_name(model), []).append(model)
    return list(dict.fromkeys(model for name in names for model in of_study.get(name, [name])))


def labels_of(models: Sequence[str]) -> dict[str, str]:
    """What tables call each model: its name, with its overrides if another one has the same name."""
    names = [_name(model) for model in models]
    return {model: name if names.count(name) == 1 else model for model, name in zip(models, names, strict=True)}


def _name(model: str) -> str:
    return BEFORE_OVERRIDE.split(model)[0]


def file_name(model: str) -> str:
    """A model with its overrides as part of a path."""
    return re.sub(r"[^\w.=-]+", "_", model)
