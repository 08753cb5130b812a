"""The configurations that a command measures, from words such as configs/hmdb51.yaml+network.recompute=true."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from configs.schema import Config, load_config
from engine.optim import resolve_precision

# Weights are random and nothing is loaded, whatever the configuration says.
FIXED = ("network.init=false", "network.weights=null", "resume=null", "pretrain=null", "solver.evaluate=false")
BEFORE_OVERRIDE = re.compile(r"\+(?=[A-Za-z_][\w.]*=)")
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
MODEL_KEYS = ("network.model=", "network.method=", "network.fine_tuning=")


def parse_case(text: str, first: str) -> tuple[str, list[str]]:
    """`CONFIG+KEY=VALUE+KEY=VALUE`: the file, which is `first` if none is given, and the overrides.

    Raises ValueError for overrides without the plus before them.
    """
    path, *overrides = BEFORE_OVERRIDE.split(text)
    if OVERRIDE.match(path) and not Path(path).exists():
        raise ValueError(f"--compare {text}: is not a file; to change the first configuration write +{text}")
    return path or first, overrides


def load_case(path: str, overrides: Sequence[str], device: torch.device) -> Config:
    """A configuration that needs neither weights nor data, with its precision resolved. Raises ConfigError, OptimError."""
    config = load_config(path, [*overrides, *FIXED])
    precision = _precision_name(config.solver.precision, device)
    network = replace(config.network, cache_features="off")
    return replace(config, network=network, solver=replace(config.solver, precision=precision))


@functools.cache
def _precision_name(name: str, device: torch.device) -> str:
    """What a precision setting means on this device; cached, because it is logged each time. Raises OptimError."""
    return resolve_precision(name, device).name


def load_cases(
    texts: Sequence[str], overrides: Sequence[str], frames: Sequence[int] | None, device: torch.device
) -> list[tuple[str, Config]]:
    """Label and configuration of all cases, T by T. Raises ConfigError, OptimError, ValueError.

    Args:
        texts: as `parse_case` takes them; the first one names a file.
        overrides: of all cases; a case's own override them.
        frames: values of T; None takes each configuration's own.
    """
    first = BEFORE_OVERRIDE.split(texts[0])[0]
    cases = [parse_case(text, first) for text in texts]
    lengths = [[f"data.num_segments={T}"] for T in dict.fromkeys(frames)] if frames else [[]]
    configs = [[load_case(path, [*overrides, *own, *length], device) for length in lengths] for path, own in cases]
    labels = labels_of(cases, [of_case[0].network.model_name for of_case in configs], first)
    return [(label, config) for label, of_case in zip(labels, configs, strict=True) for config in of_case]


def labels_of(cases: Sequence[tuple[str, list[str]]], models: Sequence[str], first: str) -> list[str]:
    """A label a case, no two alike: the model, the file unless it is the first one's, the overrides."""

    def label(case: tuple[str, list[str]], model: str, with_folder: bool) -> str:
        path, overrides = case
        file = f"{Path(path).resolve().parent.name}/{Path(path).stem}" if with_folder else Path(path).stem
        settings = [one.split("=", 1) for one in overrides if not one.startswith(MODEL_KEYS)]
        shown = [f"{key.split('.')[-1]}={value}" for key, value in settings]
        return ", ".join([model, *([file] if path != first else []), *shown])

    short, long = ([label(*one, folder) for one in zip(cases, models, strict=True)] for folder in (False, True))
    labels = [one if short.count(one) == 1 else other for one, other in zip(short, long, strict=True)]
    earlier = [labels[:index].count(one) for index, one in enumerate(labels)]
    return [f"{one} #{number + 1}" if number else one for one, number in zip(labels, earlier, strict=True)]


def default_batch(config: Config, device: torch.device) -> int:
    """Clips of a batch."""
    return config.data.batch_size * config.data.clips_per_video if device.type == "cuda" else 2


def default_repeats(device: torch.device) -> int:
    """Measurements of each time."""
    return 10 if device.type == "cuda" else 3
