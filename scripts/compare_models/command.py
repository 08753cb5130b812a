"""Compares models: what each costs, and what it reaches on small datasets with one recipe and several seeds.

python -m scripts.compare_models --output exp/models
python -m scripts.compare_models --study configs/studies/full_size.yaml --output exp/costs
python -m scripts.compare_models --costs configs/ssv2.yaml --skip accuracy --models aim td4v_side
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.console import Parser, expanded, log_to_console, show
from configs.parse import ConfigError
from scripts.cli import default_jobs, find_device, positive_int, run, write_json, write_text
from scripts.compare_models.study import Study, read_study

logger = logging.getLogger("td4v")

QUICKSTART = "configs/quickstart.yaml"
STUDY = "configs/studies/small.yaml"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; those that the command line does not have are the study's."""
    parser = make_parser()
    study = parser.parse_args(argv).study
    parser.set_defaults(**vars(study) | {"set": list(study.set)})
    return parser.parse_args(argv)


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m scripts.compare_models",
        description=__doc__.splitlines()[0],
        epilog="A CONFIG or MODEL may carry overrides: configs/hmdb51.yaml+data.num_segments=16, "
        "aim+network.options={...}. Weights are random. Rerunning the command resumes it; each call writes the report "
        "for the models and seeds that it names. A MODEL that the study has and that carries no overrides has the "
        "study's.",
    )
    parser.add_argument("--study", type=_study, default=STUDY, metavar="FILE",
                        help="models, costs, accuracy, set and seeds as a YAML file (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("exp/models"), metavar="FOLDER",
                        help="for models.md, models.json, models.png and all runs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="default: the study's")
    parser.add_argument("--costs", type=expanded, metavar="CONFIG",
                        help="whose costs are measured (default: the study's)")  # fmt: skip
    parser.add_argument("--accuracy", type=expanded, nargs="+", metavar="CONFIG",
                        help="what is trained and tested (default: the study's)")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE",
                        help="overrides of all configurations, beside the study's")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: the study's")
    parser.add_argument("--jobs", type=positive_int, default=default_jobs(), metavar="N",
                        help="runs at a time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--skip", choices=["costs", "accuracy"],
                        help="run nothing for this half; the report shows what earlier calls left in FOLDER, if it is "
                        "complete for these models, seeds and settings")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA if there is a GPU")
    parser.add_argument("--repeats", type=positive_int, metavar="N",
                        help="measurements of each time (default: 3 on a CPU, 10 on a GPU)")  # fmt: skip
    return parser


def _study(text: str) -> Study:
    """An argparse type: the file of a study."""
    try:
        return read_study(Path(expanded(text)))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse_arguments(argv)
    log_to_console()
    command = ["python", "-m", "scripts.compare_models", *(sys.argv[1:] if argv is None else argv)]
    no_memory = f"out of memory in counting FLOPs of {options.costs}; --skip costs does without them"
    return run(
        lambda: compare(options, command),
        out_of_memory=no_memory,
        interrupted="interrupted; rerun the command to resume it",
    )


def compare(options: argparse.Namespace, command: list[str]) -> None:
    """Check everything, then measure the costs while nothing else runs, then train and test, then report."""
    from engine.run_info import run_info
    from models.registry import MODELS
    from scripts.compare_models.accuracy import accuracy_of, checked_plans, finished_accuracies, plan_paths
    from scripts.compare_models.cases import chosen_models, labels_of
    from scripts.compare_models.costs import conditions, cost_cases, measured_cost, measured_costs
    from scripts.compare_models.report import accuracy_table, costs_caption, draw, markdown
    from scripts.experiments import run_experiments
    from scripts.profile.report import summary

    if options.costs is None and not options.accuracy:
        raise ValueError("costs, accuracy: neither is given, by the study or by --costs and --accuracy")
    device = find_device(options.device)
    meta = run_info() | {"command": command, "device": str(device)} | conditions(device)
    models = chosen_models(options.models or MODELS, options.study.models)
    labels = labels_of(models)
    cases = [] if options.skip == "costs" else cost_cases(options, models, device)
    paths = plan_paths(options.accuracy)
    plans = {} if options.skip == "accuracy" else checked_plans(options, models, paths)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.skip == "costs":
        costs = measured_costs(options, models, device)
    else:
        costs = [measured_cost(options, model, config, device) for model, config in cases]
    costs = [(replace(row, label=labels[row.label]), revision) for row, revision in costs]
    rows, made_by = [row for row, _ in costs], {row.label: (revision,) for row, revision in costs}
    if rows:
        show(summary(rows) + costs_caption(made_by, meta))
    if options.skip == "accuracy":
        accuracies = finished_accuracies(options, models, paths)
    else:
        experiments = [experiment for plan in plans.values() for experiment in plan.experiments.values()]
        results = dict(zip(experiments, run_experiments(experiments, options.jobs, device.type), strict=True))
        accuracies = [accuracy_of(name, plan, results) for name, plan in plans.items()]
    accuracies = [accuracy.relabelled(labels) for accuracy in accuracies]
    for accuracy in accuracies:
        show(f"\nTop-1 on {accuracy.name}, %:\n\n{accuracy_table(accuracy)}")
    revisions = {revision for _, revision in costs}
    revisions |= {revision for accuracy in accuracies for scores in accuracy.models for revision in scores.revisions}
    meta |= {"revisions": sorted(revisions), "models": {label: model for model, label in labels.items()}}
    record = {
        "meta": meta,
        "costs": [row.to_dict() | {"revision": revision} for row, revision in costs],
        "accuracy": [accuracy.to_dict() for accuracy in accuracies],
    }
    write_json(options.output / "models.json", record)
    write_text(options.output / "models.md", markdown(rows, made_by, options.costs, accuracies, meta))
    draw(rows, accuracies, options.output / "models.png")
    logger.info("all weights were random; models.md, models.json, models.png in %s", options.output)
