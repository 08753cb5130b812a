"""A study: a YAML file that says what a comparison compares, with the keys of the command's options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from configs.parse import Filler, PathText, locate, read_yaml


@dataclass(frozen=True)
class Study:
    """What is compared. A half whose configuration is not named is left out.

    Args:
        models: MODEL or MODEL+KEY=VALUE; empty for all models.
        costs: the configuration whose costs are measured.
        accuracy: the configurations that are trained and tested.
        set: KEY=VALUE, overrides of all configurations.
    """

    models: tuple[str, ...] = ()
    costs: Optional[PathText] = None
    accuracy: tuple[PathText, ...] = ()
    set: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)


def read_study(path: Path) -> Study:
    """Read a study. It may build on another (`base: other.yaml`).

    Raises:
        ConfigError: a file that cannot be read, unknown keys, values of a wrong type; the message names the place.
    """
    values, places = read_yaml(path, {})
    try:
        return Filler(Study).fill(values)
    except ValueError as error:
        raise locate(error, places, str(path)) from None
