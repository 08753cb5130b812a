"""The costs of each model, measured once: OUTPUT/costs keeps them together with the conditions they depend on."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config
from engine.errors import EngineError
from engine.run_info import hardware, source_revision
from models.registry import build_model
from scripts.cli import write_json
from scripts.compare_models.cases import check_head, file_name, overrides_of
from scripts.profile.cases import default_batch, default_repeats, load_case
from scripts.profile.measure import measure
from scripts.profile.report import Row
from scripts.reports import short_revision

logger = logging.getLogger("td4v")

Cost = tuple[Row, str]  # and the revision of the code that measured it


def conditions(device: torch.device) -> dict[str, Any]:
    """What times and bytes depend on beside the configuration."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"]
    return {"threads": torch.get_num_threads(), "processor": processor, "torch": torch.__version__}


def cost_cases(options: argparse.Namespace, models: Sequence[str], device: torch.device) -> list[tuple[str, Config]]:
    """Model and configuration of each row of costs, none without --costs.

    Raises ConfigError and the like if one cannot be built.
    """
    cases: list[tuple[str, Config]] = []
    if options.costs is None:
        return cases
    for model in models:
        config = load_case(*overrides_of(options.costs, model, options.set), device)
        check_head(config)
        build_model(config, pretrained=False)
        cases.append((model, config))
    return cases


def measured_cost(options: argparse.Namespace, model: str, config: Config, device: torch.device) -> Cost:
    """The costs of one model, from an earlier call if it measured them under the same conditions."""
    if (cost := _read(options, model, config, device)) is not None:
        logger.info("%s: costs are already measured", model)
        return cost
    batch, repeats = _batch_and_repeats(options, config, device)
    (row,) = measure(config, model, [batch], device, repeats)
    revision = short_revision(source_revision())
    path = _path(options, model)
    path.parent.mkdir(exist_ok=True)
    question = _question(options, config, device)
    write_json(path, {"question": question, "revision": revision, "row": row.to_dict()})
    return row, revision


def measured_costs(options: argparse.Namespace, models: Sequence[str], device: torch.device) -> list[Cost]:
    """The costs that earlier calls measured, if they did so for every model; else none."""
    if options.costs is None or not all(_path(options, model).is_file() for model in models):
        return []
    try:
        configs = [load_case(*overrides_of(options.costs, model, options.set), device) for model in models]
    except (ValueError, EngineError) as error:
        logger.info("the report has no costs: %s", error)
        return []
    costs = [_read(options, model, config, device) for model, config in zip(models, configs, strict=True)]
    return [] if None in costs else costs


def _read(options: argparse.Namespace, model: str, config: Config, device: torch.device) -> Cost | None:
    path = _path(options, model)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before, row, revision = dict(content["question"]), Row.from_dict(content["row"]), content["revision"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: cannot be read (%r) and is not used", path, error)
        return None
    question = _question(options, config, device)
    if changed := [key for key, value in question.items() if before.get(key) != value]:
        logger.info("%s: the costs of an earlier call are not used: %s changed", model, ", ".join(changed))
        return None
    return row, revision


def _question(options: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Any]:
    """All that a row of costs depends on but the code, as JSON gives it back."""
    batch, repeats = _batch_and_repeats(options, config, device)
    question = {"config": config.to_dict(), "device": str(device), "batch": batch, "repeats": repeats}
    return json.loads(json.dumps(question | conditions(device)))


def _batch_and_repeats(options: argparse.Namespace, config: Config, device: torch.device) -> tuple[int, int]:
    return default_batch(config, device), options.repeats or default_repeats(device)


def _path(options: argparse.Namespace, model: str) -> Path:
    return options.output / "costs" / f"{file_name(model)}.json"
