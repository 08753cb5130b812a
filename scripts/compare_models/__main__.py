"""Methods side by side: what each costs, and what it reaches on small data sets under one recipe and several seeds.

Lives here: the command: which methods, configurations and seeds, what is kept of an earlier call. Does not live here:
measuring costs (profile.py), running trials (trials.py), tables, findings and the picture (compare_methods_report.py).

    python -m scripts.compare_models --output exp/methods --seeds 0 1 2
    python -m scripts.compare_models --costs configs/ssv2.yaml --skip accuracy --methods aim td4v_side
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import write_atomic
from configs.schema import Config, DataConfig, load_config
from datasets.build import class_names, train_loader, val_loader
from engine import profiling
from engine.errors import EngineError
from engine.run_info import hardware, run_info, source_revision
from engine.signals import ending_in_order
from models.registry import MODELS, build_model
from scripts.cli import default_jobs
from scripts.compare_models.report import Accuracy, Scores, about, accuracy_table, costs_caption, draw, markdown
from scripts.experiments import Experiment, ExperimentError, run_experiments
from scripts.profile import __main__ as profile
from scripts.profile.report import Row, summary
from scripts.quickstart import make_data

logger = logging.getLogger("td4v")

MADE = "frame_order"  # data.dataset of what can be made, not prepared
QUICKSTART = "configs/quickstart.yaml"
FROM_NOTHING = "network.init=false"
OWN_KEYS = ("network.options=", "network.options.")  # a method's own by nature


class CompareError(ValueError):
    """What was asked for cannot be compared; the message is one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with ending_in_order():
            compare(options, ["python", "-m", "scripts.compare_models", *(sys.argv[1:] if argv is None else argv)])
    except (ExperimentError, EngineError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not profiling.is_out_of_memory(error):
            raise
        logger.error("out of memory in counting FLOPs of %s; --skip costs leaves them out", options.costs)
        return 1
    except KeyboardInterrupt:
        logger.error("ended before all was done; the same command goes on from there")
        return 130
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare_models",
        description=__doc__.splitlines()[0],
        epilog="A configuration is a file, with overrides if need be: configs/hmdb51.yaml+data.num_segments=16. So is a "
        "method: aim+network.options={...}. Weights are random. The same command goes on where it was ended. Each call "
        "writes the report anew, for the methods and seeds that it names.",
    )
    parser.add_argument("--output", type=Path, default=Path("exp/methods"), metavar="FOLDER",
                        help="for methods.md, methods.json, methods.png and all runs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=list(MODELS), metavar="METHOD", help="default: %(default)s")
    parser.add_argument("--costs", default="configs/hmdb51.yaml", metavar="CONFIG",
                        help="whose costs are measured (default: %(default)s)")  # fmt: skip
    parser.add_argument("--accuracy", nargs="+", metavar="CONFIG",
                        default=["configs/compare_gym10.yaml", QUICKSTART],
                        help="what is trained and tested (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override in all configurations"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--jobs", type=profile.positive_number, default=default_jobs(), metavar="N",
                        help="runs at a time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--skip", choices=["costs", "accuracy"],
                        help="do nothing for one half: the report has of it what earlier calls left in FOLDER, where "
                        "that is whole for these methods, seeds and settings, and else leaves it out")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA where there is a GPU")
    parser.add_argument("--repeats", type=profile.positive_number, metavar="N",
                        help="measurements of each time (default: 3 on a CPU, 10 on a GPU)")  # fmt: skip
    return parser.parse_args(argv)


def compare(options: argparse.Namespace, command: list[str]) -> None:
    """Everything is checked before anything runs; the costs come first, while nothing else does."""
    device = profile.find_device(options.device)
    meta = run_info() | {"command": command, "device": str(device)} | conditions(device)
    methods = list(dict.fromkeys(options.methods))
    costed = [] if options.skip == "costs" else cost_cases(options, methods, device)
    paths = paths_of(options)
    plans = {} if options.skip == "accuracy" else checked_plans(options, methods, paths)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.skip == "costs":
        costs = kept_costs(options, methods, device)
    else:
        costs = [cost_row(options, method, config, device) for method, config in costed]
    rows, made_by = [row for row, _ in costs], {row.label: (revision,) for row, revision in costs}
    if rows:
        print(summary(rows) + costs_caption(made_by, meta), end="", flush=True)
    if options.skip == "accuracy":
        accuracies = kept_accuracies(options, methods, paths)
    else:
        each = [trial for plan in plans.values() for trial in plan.trials.values()]
        results = dict(zip(each, run_experiments(each, options.jobs, device.type), strict=True))
        accuracies = [accuracy_of(name, plan, results) for name, plan in plans.items()]
    for accuracy in accuracies:
        print(f"\nTop-1 on {accuracy.name}, %:\n\n{accuracy_table(accuracy)}", end="", flush=True)
    revisions = {revision for _, revision in costs}
    revisions |= {revision for accuracy in accuracies for one in accuracy.methods for revision in one.revisions}
    meta |= {"revisions": sorted(revisions)}
    record = {
        "meta": meta,
        "costs": [row.to_dict() | {"revision": revision} for row, revision in costs],
        "accuracy": [one.to_dict() for one in accuracies],
    }
    write_text(options.output / "methods.json", json.dumps(record, indent=1) + "\n")
    write_text(options.output / "methods.md", markdown(rows, made_by, options.costs, accuracies, meta))
    draw(rows, accuracies, options.output / "methods.png")
    logger.info("all weights were random; methods.md, methods.json, methods.png in %s", options.output)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def conditions(device: torch.device) -> dict[str, Any]:
    """What times and bytes depend on beside the configuration; they are compared under the same ones alone."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"]
    return {"threads": torch.get_num_threads(), "processor": processor, "torch": torch.__version__}


def overrides_of(path: str, method: str, common: Sequence[str]) -> tuple[str, list[str]]:
    """The file and the overrides that `CONFIG+KEY=VALUE` and `METHOD+KEY=VALUE` stand for. Options that the file has
    for its own method are no other one's; those of `common` and of the two are each method's."""
    file, own = profile.parse_spec(path, path)
    name, *chosen = profile.SPEC.split(method)
    options = [] if load_config(file, [*common, *own]).network.model_name == name else ["network.options={}"]
    return file, [*options, *common, *own, f"network.model={name}", *chosen]


def check_head(config: Config) -> None:
    """Raises CompareError for a head that random weights cannot give."""
    if config.network.head == "text":
        raise CompareError(
            "network.head: text needs the pretrained CLIP, and here all weights are random; compare with linear "
            "(python -m scripts.profile measures what a text head costs)"
        )


def cost_cases(options: argparse.Namespace, methods: Sequence[str], device: torch.device) -> list[tuple[str, Config]]:
    """Method and configuration of each row of costs. Raises ConfigError and the like where one cannot be built."""
    cases = []
    for method in methods:
        config = profile.load_case(*overrides_of(options.costs, method, options.set), device)
        check_head(config)
        build_model(config, pretrained=False)
        cases.append((method, config))
    return cases


def cost_row(options: argparse.Namespace, method: str, config: Config, device: torch.device) -> tuple[Row, str]:
    """What one method costs, measured once: it stands in OUTPUT/costs; and the revision of the code then."""
    if (kept := kept_cost(options, method, config, device)) is not None:
        logger.info("%s: costs are measured already, and kept", method)
        return kept
    batch, repeats = batch_and_repeats(options, config, device)
    (row,) = profile.measure(config, method, [batch], device, repeats)
    revision = short_revision(source_revision())
    path = cost_file(options, method)
    path.parent.mkdir(exist_ok=True)
    record = {"asked": asked_of(options, config, device), "revision": revision, "row": row.to_dict()}
    write_text(path, json.dumps(record, indent=1))
    return row, revision


def kept_cost(options: argparse.Namespace, method: str, config: Config, device: torch.device) -> tuple[Row, str] | None:
    """What `cost_row` left for the same question, or None."""
    path = cost_file(options, method)
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        before, row, revision = dict(kept["asked"]), Row.from_dict(kept["row"]), kept["revision"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: cannot be read (%r), and is not used", path, error)
        return None
    asked = asked_of(options, config, device)
    if changed := [key for key, value in asked.items() if before.get(key) != value]:
        logger.info("%s: kept costs are of another %s, and not used", method, ", ".join(changed))
        return None
    return row, revision


def kept_costs(options: argparse.Namespace, methods: Sequence[str], device: torch.device) -> list[tuple[Row, str]]:
    """The costs that earlier calls left, where they have every method; else nothing."""
    if not all(cost_file(options, method).is_file() for method in methods):
        return []
    try:
        cases = [profile.load_case(*overrides_of(options.costs, method, options.set), device) for method in methods]
    except (ValueError, EngineError) as error:
        logger.info("the report leaves costs out: %s", error)
        return []
    kept = [kept_cost(options, method, config, device) for method, config in zip(methods, cases, strict=True)]
    return [] if None in kept else kept


def asked_of(options: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Any]:
    """All that a row of costs depends on but the code, as JSON gives it back."""
    batch, repeats = batch_and_repeats(options, config, device)
    asked = {"config": config.to_dict(), "device": str(device), "batch": batch, "repeats": repeats}
    return json.loads(json.dumps(asked | conditions(device)))


def batch_and_repeats(options: argparse.Namespace, config: Config, device: torch.device) -> tuple[int, int]:
    return profile.usual_batch(config, device), options.repeats or profile.usual_repeats(device)


def cost_file(options: argparse.Namespace, method: str) -> Path:
    return options.output / "costs" / f"{file_name(method)}.json"


def file_name(method: str) -> str:
    """A method with its overrides as part of a path."""
    return re.sub(r"[^\w.=-]+", "_", method)


@dataclass(frozen=True)
class Plan:
    """One data configuration: its runs by method and seed, and the recipe in words up to the numbers of the data."""

    base: Config  # without what is a method's own
    recipe: str
    trials: dict[tuple[str, int], Experiment]


def plan_of(options: argparse.Namespace, methods: Sequence[str], path: str) -> Plan:
    """Nothing but the configurations is looked at. Raises ConfigError."""
    name = Path(profile.SPEC.split(path)[0]).stem
    common = [*options.set, FROM_NOTHING, "network.weights=null"]
    trials = {}
    for seed in dict.fromkeys(options.seeds):  # the outer loop: an ended comparison has whole tables of fewer seeds
        for method in methods:
            file, overrides = overrides_of(path, method, common)
            folder = options.output / "runs" / name / f"{file_name(method)}_seed{seed}"
            title, settings = f"{name}, {method}, seed {seed}", (*overrides, f"seed={seed}")
            trials[method, seed] = Experiment(title, f"{name} {method}", file, settings, folder)
    file, own = profile.parse_spec(path, path)
    return Plan(load_config(file, [*common, *own]), recipe(file, [*options.set, *own], methods), trials)


def paths_of(options: argparse.Namespace) -> dict[str, str]:
    """The data configurations by name. Raises CompareError for two of one name."""
    found: dict[str, str] = {}
    for path in dict.fromkeys(options.accuracy):
        name = Path(profile.SPEC.split(path)[0]).stem
        if name in found:
            raise CompareError(f"--accuracy: two configurations are called {name}; compare them in two calls")
        found[name] = path
    return found


def checked_plans(options: argparse.Namespace, methods: Sequence[str], paths: Mapping[str, str]) -> dict[str, Plan]:
    """By data configuration; data and models are looked at before anything runs.

    Raises:
        CompareError, ConfigError, AnnotationError and the like: what is missing or does not fit, in one sentence.
    """
    plans = {name: plan_of(options, methods, path) for name, path in paths.items()}
    for plan in plans.values():
        for trial in plan.trials.values():
            check_head(trial.config)
    for plan in plans.values():
        first = next(iter(plan.trials.values()))
        prepare(first)
        for trial in plan.trials.values():
            if trial.config.seed == first.config.seed:
                build_model(trial.config, pretrained=False)
    return plans


def kept_accuracies(options: argparse.Namespace, methods: Sequence[str], paths: Mapping[str, str]) -> list[Accuracy]:
    """The tables of the data configurations whose runs earlier calls have all finished."""
    found = []
    for name, path in paths.items():
        try:
            plan = plan_of(options, methods, path)
            results = {trial: trial.finished_results() for trial in plan.trials.values()}
            if None not in results.values():
                found.append(accuracy_of(name, plan, results))
        except (ExperimentError, ValueError, OSError) as error:
            logger.info("the report leaves top-1 on %s out: %s", name, error)
    return found


def prepare(trial: Experiment) -> None:
    """Make the quickstart's data where they are wanted and nothing is, and refuse what is missing.

    Raises:
        CompareError: names the configuration file, and what can be done where data are missing.
    """
    data, seed = trial.config.data, trial.config.seed
    folder = Path(data.train_root or "").parent
    if makes(data) and (not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))):
        logger.info("making the data of the quickstart in %s", folder)
        make_data(folder)
    try:
        class_names(data)
        train_loader(data, seed)
        val_loader(data, seed)
    except (ValueError, EngineError, OSError) as error:
        raise CompareError(f"{trial.path}: {error}{what_to_do(trial)}") from None


def makes(data: DataConfig) -> bool:
    """Whether these are data that this command makes."""
    folder = Path(data.train_root or "").parent
    lists = (str(folder / "train.txt"), str(folder / "val.txt"))
    return data.dataset == MADE and (data.train_list, data.val_list) == lists and data.val_root == data.train_root


def what_to_do(trial: Experiment) -> str:
    """Where data are missing: how they come. Empty where they are there."""
    data = trial.config.data
    if all(path and Path(path).exists() for path in (data.train_list, data.val_list, data.train_root, data.val_root)):
        return ""
    if makes(data):
        return f"; remove {Path(data.train_root).parent}, and the data are made anew"
    lines = Path(trial.path).read_text(encoding="utf-8").splitlines()
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    made = f"make the data as the head of {trial.path} says, or " if "datasets.prepare" in head else ""
    return f"; {made}choose --accuracy {QUICKSTART}, whose data are made here"


def accuracy_of(name: str, plan: Plan, results: dict[Experiment, dict[str, Any]]) -> Accuracy:
    """The table of one data configuration."""
    methods: dict[str, dict[int, dict[str, Any]]] = {}
    for (method, seed), trial in plan.trials.items():
        methods.setdefault(method, {})[seed] = results[trial]
    first = next(iter(plan.trials.values()))
    confusion, videos = results[first]["confusion"], results[first]["videos"]
    majority = 100 * max(map(sum, confusion)) / videos
    return Accuracy(
        name=name,
        about=about(plan.recipe, plan.base, videos, majority),
        chance=100 / first.config.data.num_classes,
        majority=majority,
        videos=videos,
        methods=[scores_of(method, found) for method, found in methods.items()],
    )


def scores_of(method: str, found: dict[int, dict[str, Any]]) -> Scores:
    parameters = next(iter(found.values()))["parameters"]
    revisions = Counter(short_revision(result["meta"]["git"]) for result in found.values())
    return Scores(method, {seed: result["top1"] for seed, result in sorted(found.items())}, parameters["trainable"],
                  parameters["total"], tuple(revisions))  # fmt: skip


def short_revision(git: dict[str, Any]) -> str:
    """Seven digits; a star for a tree with changes of its own."""
    return f"{git['revision'][:7]}{'*' if git['dirty'] else ''}"


def recipe(file: str, common: Sequence[str], methods: Sequence[str]) -> str:
    """Where the recipe comes from, and for which methods it is not the same."""
    given = f" with {', '.join(f'`{one}`' for one in common)}" if common else ""
    own = {method: profile.SPEC.split(method)[1:] for method in methods}
    others = {method: [one for one in several if not one.startswith(OWN_KEYS)] for method, several in own.items()}
    said = [f"`{one}` of {profile.SPEC.split(method)[0]}" for method, several in others.items() for one in several]
    but = f", and for {', '.join(said)}, which the words below leave out" if said else ""
    return (
        f"{file}{given}, the same for all methods but for `network.model` and its options{but}; the file was written "
        f"for {load_config(file).network.model_name}, and another method may do better with a recipe of its own."
    )


if __name__ == "__main__":
    sys.exit(main())
