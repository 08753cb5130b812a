"""The runs behind the accuracy tables: which are needed, whether their data are there, and what they gave."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config, DataConfig, load_config
from datasets.build import class_names, train_loader, val_loader
from engine.errors import EngineError
from models.registry import build_model
from scripts.compare_models.cases import CompareError, check_head, file_name, overrides_of
from scripts.compare_models.command import QUICKSTART
from scripts.compare_models.report import Accuracy, Scores, about
from scripts.experiments import Experiment, ExperimentError
from scripts.profile.cases import BEFORE_OVERRIDE, parse_case
from scripts.quickstart import make_data
from scripts.reports import short_revision

logger = logging.getLogger("td4v")

MADE_DATASET = "frame_order"  # data.dataset of data that are made on demand
RANDOM_WEIGHTS = ("network.init=false", "network.weights=null")
MODELS_OWN = ("network.options=", "network.options.")  # settings that differ between models by nature


@dataclass(frozen=True)
class Plan:
    """One data configuration: its experiments by model and seed.

    Args:
        base: the configuration without what is a model's own.
        recipe: where the recipe comes from, in words.
    """

    base: Config
    recipe: str
    experiments: dict[tuple[str, int], Experiment]


def plan_of(options: argparse.Namespace, models: Sequence[str], path: str) -> Plan:
    """Reads nothing but the configurations. Raises ConfigError."""
    name = _name(path)
    common = [*options.set, *RANDOM_WEIGHTS]
    experiments = {}
    for seed in dict.fromkeys(
        options.seeds
    ):  # the outer loop: an interrupted comparison has full tables of fewer seeds
        for model in models:
            file, overrides = overrides_of(path, model, common)
            experiments[model, seed] = Experiment(
                title=f"{name}, {model}, seed {seed}",
                kind=f"{name} {model}",
                path=file,
                settings=(*overrides, f"seed={seed}"),
                folder=options.output / "runs" / name / f"{file_name(model)}_seed{seed}",
            )
    file, own = parse_case(path, path)
    return Plan(load_config(file, [*common, *own]), recipe(file, [*options.set, *own], models), experiments)


def _name(path: str) -> str:
    return Path(BEFORE_OVERRIDE.split(path)[0]).stem


def plan_paths(paths: Sequence[str]) -> dict[str, str]:
    """The data configurations by name. Raises CompareError for two with one name."""
    by_name: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        name = _name(path)
        if name in by_name:
            raise CompareError(f"--accuracy: two configurations are called {name}; compare them in two calls")
        by_name[name] = path
    return by_name


def checked_plans(options: argparse.Namespace, models: Sequence[str], paths: Mapping[str, str]) -> dict[str, Plan]:
    """The plans by name, after a look at all data and models.

    Raises CompareError, ConfigError, AnnotationError and the like: what is missing or does not fit, in one sentence.
    """
    plans = {name: plan_of(options, models, path) for name, path in paths.items()}
    for plan in plans.values():
        for experiment in plan.experiments.values():
            check_head(experiment.config)
    for plan in plans.values():
        first = next(iter(plan.experiments.values()))
        prepare(first)
        for experiment in plan.experiments.values():
            if experiment.config.seed == first.config.seed:
                build_model(experiment.config, pretrained=False)
    return plans


def prepare(experiment: Experiment) -> None:
    """Make the quickstart's data if they are wanted and their folder is empty, and check the data.

    Raises CompareError, which names the configuration file, and says what to do about missing data.
    """
    data, seed = experiment.config.data, experiment.config.seed
    folder = Path(data.train_root or "").parent
    if _is_made(data) and (not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))):
        logger.info("making the data of the quickstart in %s", folder)
        make_data(folder)
    try:
        class_names(data)
        train_loader(data, seed)
        val_loader(data, seed)
    except (ValueError, EngineError, OSError) as error:
        raise CompareError(f"{experiment.path}: {error}{_advice(experiment)}") from None


def _is_made(data: DataConfig) -> bool:
    """Whether this command makes these data."""
    folder = Path(data.train_root or "").parent
    lists = (str(folder / "train.txt"), str(folder / "val.txt"))
    return (
        data.dataset == MADE_DATASET and (data.train_list, data.val_list) == lists and data.val_root == data.train_root
    )


def _advice(experiment: Experiment) -> str:
    """How to get data that are missing; empty if they are there."""
    data = experiment.config.data
    if all(path and Path(path).exists() for path in (data.train_list, data.val_list, data.train_root, data.val_root)):
        return ""
    if _is_made(data):
        return f"; remove {Path(data.train_root).parent}, and the data are made again"
    lines = Path(experiment.path).read_text(encoding="utf-8").splitlines()
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    prepare = f"make the data as the head of {experiment.path} says, or " if "datasets.prepare" in head else ""
    return f"; {prepare}choose --accuracy {QUICKSTART}, whose data are made here"


def finished_accuracies(options: argparse.Namespace, models: Sequence[str], paths: Mapping[str, str]) -> list[Accuracy]:
    """The tables of the data configurations whose runs earlier calls finished."""
    found = []
    for name, path in paths.items():
        try:
            plan = plan_of(options, models, path)
            results = {experiment: experiment.finished_results() for experiment in plan.experiments.values()}
            if None not in results.values():
                found.append(accuracy_of(name, plan, results))
        except (ExperimentError, ValueError, OSError) as error:
            logger.info("the report has no top-1 on %s: %s", name, error)
    return found


def accuracy_of(name: str, plan: Plan, results: Mapping[Experiment, dict[str, Any]]) -> Accuracy:
    """The table of one data configuration."""
    by_model: dict[str, dict[int, dict[str, Any]]] = {}
    for (model, seed), experiment in plan.experiments.items():
        by_model.setdefault(model, {})[seed] = results[experiment]
    first = next(iter(plan.experiments.values()))
    confusion, videos = results[first]["confusion"], results[first]["videos"]
    majority = 100 * max(map(sum, confusion)) / videos
    return Accuracy(
        name=name,
        about=about(plan.recipe, plan.base, videos, majority),
        chance=100 / first.config.data.num_classes,
        majority=majority,
        videos=videos,
        models=[_scores_of(model, by_seed) for model, by_seed in by_model.items()],
    )


def _scores_of(model: str, by_seed: Mapping[int, dict[str, Any]]) -> Scores:
    parameters = next(iter(by_seed.values()))["parameters"]
    revisions = Counter(short_revision(result["meta"]["git"]) for result in by_seed.values())
    return Scores(
        model=model,
        top1={seed: result["top1"] for seed, result in sorted(by_seed.items())},
        trainable=parameters["trainable"],
        total=parameters["total"],
        revisions=tuple(revisions),
    )


def recipe(file: str, common: Sequence[str], models: Sequence[str]) -> str:
    """Where the recipe comes from, and for which models it is not the same."""
    overrides = f" with {', '.join(f'`{one}`' for one in common)}" if common else ""
    special = []
    for model in models:
        name, *own = BEFORE_OVERRIDE.split(model)
        special += [f"`{one}` of {name}" for one in own if not one.startswith(MODELS_OWN)]
    but = f", and for {', '.join(special)}, which is not described below" if special else ""
    return (
        f"{file}{overrides}, the same for all models but for `network.model` and its options{but}; the file was written "
        f"for {load_config(file).network.model_name}, and another model may do better with a recipe of its own."
    )
