"""Methods side by side: what each costs, and what it reaches on small data sets under one recipe and several seeds.

Lives here: the command: which methods, configurations and seeds, what is kept of an earlier call. Does not live here:
measuring costs (profile.py), running trials (trials.py), tables, findings and the picture (compare_methods_report.py).

    python -m scripts.compare_methods --output exp/methods --seeds 0 1 2
    python -m scripts.compare_methods --costs configs/ssv2.yaml --skip accuracy --methods aim td4v_side
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clip.build import METHODS, build_model
from configs.schema import Config, load_config
from datasets.build import class_names, train_loader, val_loader
from engine import cost
from engine.distributed import EngineError
from engine.record import run_meta, source_revision
from engine.stop import ending_in_order
from scripts import profile
from scripts.compare_methods_report import Accuracy, Scores, accuracy_table, draw, markdown
from scripts.profile_report import Row, summary
from scripts.quickstart import make_data
from scripts.trials import USUAL_JOBS, Trial, TrialError, run_trials

logger = logging.getLogger("td4v")

MADE = "frame_order"  # data.dataset of what can be made, not prepared
FROM_NOTHING = "network.init=false"


class CompareError(ValueError):
    """What was asked for cannot be compared; the message is one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with ending_in_order():
            compare(options, ["python", "-m", "scripts.compare_methods", *(sys.argv[1:] if argv is None else argv)])
    except (TrialError, EngineError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not cost.is_out_of_memory(error):
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
        prog="python -m scripts.compare_methods",
        description=__doc__.splitlines()[0],
        epilog="A configuration is a file, with overrides if need be: configs/hmdb51.yaml+data.num_segments=16. So is a "
        "method: aim+network.options={...}. Weights are random. The same command goes on where it was ended.",
    )
    parser.add_argument("--output", type=Path, default=Path("exp/methods"), metavar="FOLDER",
                        help="for methods.md, methods.json, methods.png and all runs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help="default: %(default)s")
    parser.add_argument("--costs", default="configs/hmdb51.yaml", metavar="CONFIG",
                        help="whose costs are measured (default: %(default)s)")  # fmt: skip
    parser.add_argument("--accuracy", nargs="+", metavar="CONFIG",
                        default=["configs/compare_gym10.yaml", "configs/quickstart.yaml"],
                        help="what is trained and tested (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override in all configurations"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--jobs", type=profile.positive_number, default=USUAL_JOBS, metavar="N",
                        help="runs at a time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--skip", choices=["costs", "accuracy"], help="leave one half out")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA where there is a GPU")
    parser.add_argument("--repeats", type=profile.positive_number, metavar="N",
                        help="measurements of each time (default: 3 on a CPU, 10 on a GPU)")  # fmt: skip
    return parser.parse_args(argv)


def compare(options: argparse.Namespace, command: list[str]) -> None:
    """Everything is checked before anything runs; the costs come first, while nothing else does."""
    device = profile.find_device(options.device)
    methods = dict.fromkeys(options.methods)
    costed = [] if options.skip == "costs" else cost_cases(options, methods, device)
    trials = {} if options.skip == "accuracy" else trials_of(options, methods)
    options.output.mkdir(parents=True, exist_ok=True)
    rows, revisions = [], set()
    for method, config in costed:
        row, revision = cost_row(options, method, config, device)
        rows.append(row)
        revisions.add(revision)
    if rows:
        print(summary(rows), end="", flush=True)
    each = [trial for several in trials.values() for trial in several.values()]
    results = dict(zip(each, run_trials(each, options.jobs, device.type), strict=True)) if each else {}
    accuracies = [accuracy_of(name, several, results) for name, several in trials.items()]
    revisions |= {revision for accuracy in accuracies for one in accuracy.methods for revision in one.revisions}
    for accuracy in accuracies:
        print(f"\nTop-1 on {accuracy.name}, %:\n\n{accuracy_table(accuracy)}", end="", flush=True)
    meta = run_meta() | {"command": command, "device": str(device), "revisions": sorted(revisions)}
    record = {"meta": meta, "costs": [row.to_dict() for row in rows], "accuracy": [one.to_dict() for one in accuracies]}
    (options.output / "methods.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.output / "methods.md").write_text(markdown(rows, options.costs, accuracies, meta), encoding="utf-8")
    draw(rows, accuracies, options.output / "methods.png")
    logger.info("all weights were random; methods.md, methods.json, methods.png in %s", options.output)


def overrides_of(path: str, method: str, common: Sequence[str]) -> tuple[str, list[str]]:
    """The file and the overrides that `CONFIG+KEY=VALUE` and `METHOD+KEY=VALUE` stand for. Options that the file has
    for its own method are no other one's."""
    file, own = profile.parse_spec(path, path)
    name, *chosen = profile.SPEC.split(method)
    options = [] if load_config(file, [*common, *own]).network.method_name == name else ["network.options={}"]
    return file, [*common, *own, f"network.method={name}", *options, *chosen]


def cost_cases(options: argparse.Namespace, methods: Sequence[str], device: torch.device) -> list[tuple[str, Config]]:
    """Method and configuration of each row of costs. Raises ConfigError and the like where one cannot be built."""
    cases = []
    for method in methods:
        config = profile.load_case(*overrides_of(options.costs, method, options.set), device)
        build_model(config, pretrained=False)
        cases.append((method, config))
    return cases


def cost_row(options: argparse.Namespace, method: str, config: Config, device: torch.device) -> tuple[Row, str]:
    """What one method costs, measured once: it stands in OUTPUT/costs; and the revision of the code then."""
    batch, repeats = profile.usual_batch(config, device), options.repeats or profile.usual_repeats(device)
    asked = json.loads(
        json.dumps({"config": config.to_dict(), "device": str(device), "batch": batch, "repeats": repeats})
    )
    path = options.output / "costs" / f"{file_name(method)}.json"
    if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8")))["asked"] == asked:
        logger.info("%s: costs are measured already, and kept", method)
        return Row.from_dict(kept["row"]), kept["revision"]
    (row,) = profile.measure(config, method, [batch], device, repeats)
    path.parent.mkdir(exist_ok=True)
    revision = short_revision(source_revision())
    path.write_text(
        json.dumps({"asked": asked, "revision": revision, "row": row.to_dict()}, indent=1), encoding="utf-8"
    )
    return row, revision


def file_name(method: str) -> str:
    """A method with its overrides as part of a path."""
    return re.sub(r"[^\w.=-]+", "_", method)


def trials_of(options: argparse.Namespace, methods: Sequence[str]) -> dict[str, dict[tuple[str, int], Trial]]:
    """By data configuration, then by method and seed; data and models are looked at before anything runs.

    Raises:
        CompareError, ConfigError, AnnotationError and the like: what is missing or does not fit, in one sentence.
    """
    found: dict[str, dict[tuple[str, int], Trial]] = {}
    for path in dict.fromkeys(options.accuracy):
        name = Path(profile.SPEC.split(path)[0]).stem
        if name in found:
            raise CompareError(f"--accuracy: two configurations are called {name}; compare them in two calls")
        found[name] = {}
        for method in methods:
            file, overrides = overrides_of(path, method, [*options.set, FROM_NOTHING, "network.weights=null"])
            for seed in dict.fromkeys(options.seeds):
                folder = options.output / "runs" / name / f"{file_name(method)}_seed{seed}"
                title, settings = f"{name}, {method}, seed {seed}", (*overrides, f"seed={seed}")
                found[name][method, seed] = Trial(title, f"{name} {method}", file, settings, folder)
        first = next(iter(found[name].values()))
        prepare(first.config)
        for trial in found[name].values():
            if trial.config.seed == first.config.seed:
                build_model(trial.config, pretrained=False)
    # seed by seed, so that an ended comparison has whole tables of fewer seeds
    order = {seed: place for place, seed in enumerate(options.seeds)}
    return {name: dict(sorted(several.items(), key=lambda one: order[one[0][1]])) for name, several in found.items()}


def prepare(config: Config) -> None:
    """Make the quickstart's data where they are wanted and nothing is, and refuse what is missing. Raises ConfigError and the like."""
    data = config.data
    folder = Path(data.train_root or "").parent
    if data.dataset == MADE and data.train_list == str(folder / "train.txt") and not folder.exists():
        logger.info("making the data of the quickstart in %s", folder)
        make_data(folder)
    class_names(data)
    train_loader(data, config.seed)
    val_loader(data, config.seed)


def accuracy_of(name: str, trials: dict[tuple[str, int], Trial], results: dict[Trial, dict[str, Any]]) -> Accuracy:
    """The table of one data configuration."""
    methods: dict[str, dict[int, dict[str, Any]]] = {}
    for (method, seed), trial in trials.items():
        methods.setdefault(method, {})[seed] = results[trial]
    first = next(iter(trials.values()))
    confusion, videos = results[first]["confusion"], results[first]["videos"]
    majority = 100 * max(map(sum, confusion)) / videos
    return Accuracy(
        name=name,
        about=about(first.config, first.path, videos, majority),
        chance=100 / first.config.data.num_classes,
        majority=majority,
        videos=videos,
        methods=[scores_of(method, found) for method, found in methods.items()],
    )


def scores_of(method: str, found: dict[int, dict[str, Any]]) -> Scores:
    parameters = next(iter(found.values()))["parameters"]
    revisions = Counter(short_revision(result["meta"]["git"]) for result in found.values())
    return Scores(method, {seed: result["top1"] for seed, result in sorted(found.items())}, parameters["tuned"],
                  parameters["total"], tuple(revisions))  # fmt: skip


def short_revision(git: dict[str, Any]) -> str:
    """Seven digits; a star for a tree with changes of its own."""
    return f"{git['revision'][:7]}{'*' if git['dirty'] else ''}"


def about(config: Config, path: str, videos: int, majority: float) -> str:
    """The recipe, which is one for all methods, in words."""
    data, solver = config.data, config.solver
    rows = sum(1 for line in Path(data.train_list).read_text(encoding="utf-8").splitlines() if line.strip())
    vision = config.network.vision
    tower = config.network.arch if vision is None else f"{vision.layers} layers of width {vision.width}"
    epochs = f"{solver.epochs} epoch{'s' * (solver.epochs != 1)}"
    return (
        f"{path}, the same for all methods but `network.method` and its options; it was written for "
        f"{load_config(path).network.method_name}, and another method may do better with a recipe of its own. The tower "
        f"({tower}, {data.input_size} px) starts from RANDOM weights, nothing of CLIP is in it; {rows} training and "
        f"{videos} test videos, {data.num_classes} classes, T = {data.num_segments}, {epochs}, lr {solver.lr:g}, weight "
        f"decay {solver.weight_decay:g}. Top-1 of the last epoch's checkpoint on one clip and one centre crop. Chance is "
        f"{100 / data.num_classes:.1f} %, always naming the most frequent class gives {majority:.1f} %. This shows what "
        "the methods learn from so little data on such towers, not how good they are on CLIP."
    )


if __name__ == "__main__":
    sys.exit(main())
