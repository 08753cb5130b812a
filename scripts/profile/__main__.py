"""What a model costs: parameters, FLOPs, bytes kept for backward, peak memory, clips a second, share of the device's matrix rate.

Lives here: the command, and what is measured of a configuration. Does not live here: how it is measured
(engine/profiling.py), tables (profile_report.py) and pictures (profile_picture.py).

    python -m scripts.profile configs/hmdb51.yaml --compare +network.model=td4v_finetune +network.model=linear_probe
    python -m scripts.profile configs/hmdb51.yaml --frames 8 16 32 --batches 2 4 8

Nothing is loaded: weights are random (network.init false, whatever the configuration says) and so is the video.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from configs.schema import Config, ConfigError, load_config
from engine import profiling
from engine.distributed import Process, move_to_device
from engine.errors import EngineError
from engine.optim import resolve_precision, set_tf32
from engine.run_info import run_info
from engine.signals import ending_in_order
from models.parameters import parameter_report
from models.registry import build_model
from scripts.profile.plots import draw_saved, draw_scaling
from scripts.profile.report import Row, clips, markdown, scaling, summary
from scripts.profile.workload import random_batch, seconds_of_processes, threads_of_each, training_step

logger = logging.getLogger("td4v")

ALWAYS = ("network.init=false", "network.weights=null", "resume=null", "pretrain=null", "solver.evaluate=false")
# The halves of a tower's block and their parts, which may run without the block's module.
BLOCK_PARTS = ("attend", "transform", "norm_attention", "attention", "norm_mlp", "mlp")
COUNTED_CLIPS = 2  # FLOPs are counted with so many: side-tuning cannot train on one
SPEC = re.compile(r"\+(?=[A-Za-z_][\w.]*=)")  # before an override in CONFIG+KEY=VALUE
KEY = re.compile(r"[A-Za-z_][\w.]*=")
FILES = ("profile.md", "profile.json", "saved_bytes.png", "scaling.png")


def block_calls(model: nn.Module) -> dict[str, tuple[object, str]]:
    """The calls of a tower's blocks by name, for profiling.saved_for_backward; none for a model without a tower."""
    blocks = getattr(getattr(model, "tower", None), "blocks", ())
    return {f"tower.{i}.{part}": (block, part) for i, block in enumerate(blocks) for part in BLOCK_PARTS}


class ProfileError(ValueError):
    """What was asked for cannot be measured; the message is one sentence."""


def parse_spec(spec: str, first: str) -> tuple[str, list[str]]:
    """`CONFIG+KEY=VALUE+KEY=VALUE`: the file, which is `first` where none is given, and the overrides.

    Raises ProfileError for overrides without the plus before them.
    """
    path, *overrides = SPEC.split(spec)
    if KEY.match(path) and not Path(path).exists():
        raise ProfileError(f"--compare {spec}: is no file; to change the first configuration write +{spec}")
    return path or first, overrides


@functools.cache
def precision_name(name: str, device: torch.device) -> str:
    """What a precision setting means here, said once. Raises OptimError."""
    return resolve_precision(name, device).name


def load_case(path: str, overrides: Sequence[str], device: torch.device) -> Config:
    """A configuration that needs neither weights nor data, its precision as resolved. Raises ConfigError, OptimError."""
    config = load_config(path, [*overrides, *ALWAYS])
    precision = precision_name(config.solver.precision, device)
    network = replace(config.network, cache_features="off")
    return replace(config, network=network, solver=replace(config.solver, precision=precision))


def measure(
    config: Config,
    label: str,
    batches: Sequence[int],
    device: torch.device,
    repeats: int,
    processes: Sequence[int] = (),
) -> Iterator[Row]:
    """One row a batch and number of processes, each as soon as it is measured. Raises ConfigError and the like where the model cannot be built."""
    name = f"{label}, T = {config.data.num_segments}"
    precision = resolve_precision(config.solver.precision, device)
    dtype = precision.dtype or torch.float32
    set_tf32(config.solver.tf32, device)
    logger.info("%s: building, from random weights", name)
    report = parameter_report(build_model(config, pretrained=False))
    if report.trainable == 0:
        raise ProfileError(
            f"{name}: nothing of this model is tuned (network.text.tuned: none), and training is measured"
        )
    flops = _flops(config, device, name)
    rates: list[float] = []  # one list for all rows, in which the rate after a row counts for it too
    for batch in batches:
        row = Row(
            label=label, method=config.network.model_name, frames=config.data.num_segments, batch=batch,
            precision=precision.name, recompute=config.network.recompute, total=report.total, tuned=report.trainable,
            threads=torch.get_num_threads(), **flops,
        )  # fmt: skip
        with profiling.memory_limited(device):
            row.rates = rates
            rates.append(profiling.matrix_rate(device, dtype))
            for part, work in (("training", _training), ("inference", _inference)):
                try:
                    work(row, config, device, repeats, f"{name}, {clips(batch)}")
                except ValueError as error:  # a model that does not take such a batch
                    row.notes[part] = str(error)
                except (RuntimeError, MemoryError) as error:
                    if not profiling.is_out_of_memory(error):
                        raise
                    row.notes[part] = "out of memory"
                    logger.warning("%s, %s: out of memory in %s", name, clips(batch), part)
                _tidy(device)
        yield row
        for number in processes:
            if number > 1:
                yield _with_processes(row, config, device, repeats, number)
    rates.append(profiling.matrix_rate(device, dtype))


def _with_processes(row: Row, config: Config, device: torch.device, repeats: int, number: int) -> Row:
    """The same in training over several processes, each with as many clips; only the time is measured."""
    what = f"{row.label}, T = {row.frames}, {clips(row.batch)} on each of {number} processes"
    logger.info("%s: time of training steps", what)
    threads = number * threads_of_each(number)
    several = replace(
        row, processes=number, threads=threads, rates=[], saved=[], held=None, beyond=None, training=[], inference=[],
        notes={},
    )  # fmt: skip
    if not row.training:
        several.notes = {"training": row.notes["training"]}
        return several
    several.rates.append(_rate_of_all(row, device, number, threads))
    try:
        several.training = seconds_of_processes(config, row.batch, device, repeats, number)
    except (ProcessRaisedException, ProcessExitedException) as error:
        several.notes["training"] = str(error).strip().splitlines()[-1]
    several.rates.append(_rate_of_all(row, device, number, threads))
    return several


def _rate_of_all(row: Row, device: torch.device, processes: int, threads: int) -> float:
    """The matrix rate of all devices together; on a CPU of as many threads as the processes have."""
    if device.type == "cuda":
        return processes * max(row.rates)
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return profiling.matrix_rate(device, resolve_precision(row.precision, device).dtype or torch.float32)
    finally:
        torch.set_num_threads(former)


def _flops(config: Config, device: torch.device, name: str) -> dict[str, float]:
    """FLOPs a clip, forward and of a training step, of the model without recomputation."""
    logger.info("%s: counting FLOPs", name)
    model = build_model(replace(config, network=replace(config.network, recompute=False)), pretrained=False).to(device)
    video, _ = random_batch(config, COUNTED_CLIPS, device)
    with torch.no_grad():
        forward = profiling.count_flops(lambda: model.eval()(video))
    training = profiling.count_flops(lambda: model.train()(video).sum().backward())
    return {"forward_flops": forward / COUNTED_CLIPS, "training_flops": training / COUNTED_CLIPS}


def _training(row: Row, config: Config, device: torch.device, repeats: int, name: str) -> None:
    """Saved bytes, peak and time of training steps, into `row`."""
    logger.info("%s: bytes kept for backward", name)
    model = build_model(config, pretrained=False).to(device).train()
    video, label = random_batch(config, row.batch, device)
    with resolve_precision(config.solver.precision, device).autocast(device):
        row.saved = profiling.saved_for_backward(model, video, calls=block_calls(model))
    stepper = training_step(model, config, Process(device=device))
    group = [{"video": video, "label": label}]
    stepper(group)  # brings the optimizer's state
    state = [v for values in stepper.trainee.optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
    row.held = profiling.held_bytes([*model.parameters(), *model.buffers(), *state, video, label])
    logger.info("%s: peak memory of a training step", name)
    row.beyond = profiling.peak_bytes(lambda: stepper(group), device)
    logger.info("%s: time of training steps", name)
    row.training = profiling.seconds(lambda: stepper(group), device, repeats)


def _inference(row: Row, config: Config, device: torch.device, repeats: int, name: str) -> None:
    """Time of forward passes in evaluation, into `row`."""
    logger.info("%s: time of inference", name)
    model = move_to_device(build_model(config, pretrained=False), Process(device=device), config.solver.compile).eval()
    precision = resolve_precision(config.solver.precision, device)
    video, _ = random_batch(config, row.batch, device)

    def work() -> None:
        with torch.no_grad(), precision.autocast(device):
            model(video)

    row.inference = profiling.seconds(work, device, repeats)


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows: list[Row] = []
    label = ""
    scales = any(len(set(several)) > 1 for several in (options.frames or (), options.batches or ()))
    scales = scales or max(options.processes) > 1
    try:
        device = find_device(options.device)
        cases = all_cases(options, device)
        options.output.mkdir(parents=True, exist_ok=True)
        for name in FILES:  # none of another run stays beside the new ones
            (options.output / name).unlink(missing_ok=True)
        command = ["python", "-m", "scripts.profile", *(sys.argv[1:] if argv is None else argv)]
        meta = run_info() | {"command": command, "device": str(device), "threads": torch.get_num_threads()}
        repeats = options.repeats or usual_repeats(device)
        with ending_in_order():
            try:  # what is measured stays, whatever ends the run
                for label, config in cases:
                    batches = options.batches or [usual_batch(config, device)]
                    for row in measure(config, label, batches, device, repeats, options.processes):
                        rows.append(row)
                        write(rows, meta, scales, options.output)
                    write(rows, meta, scales, options.output)  # with the matrix rate afterwards
            finally:
                draw(rows, scales, options.output)
    except (ConfigError, EngineError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not profiling.is_out_of_memory(error):
            raise
        logger.error("%s: out of memory with %d clips, before anything is timed", label, COUNTED_CLIPS)
        return 1
    except KeyboardInterrupt:
        logger.error("ended before all was measured; %d rows are in %s", len(rows), options.output)
        return 130
    print(summary(rows) + (f"\n{scaling(rows)}" if scales else ""), end="")
    files = [name for name in FILES if (options.output / name).exists()]
    logger.info("weights and video were random; %s in %s", ", ".join(files), options.output)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.profile",
        description=__doc__.splitlines()[0],
        epilog="A configuration is a file, with overrides if need be: configs/hmdb51.yaml+network.recompute=true; without "
        "the file, +network.recompute=true, it is the first one's. Weights and video are random.",
    )
    whole, several = positive_number, {"type": positive_number, "nargs": "+"}
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
    parser.add_argument(
        "--compare", nargs="+", action="extend", default=[], metavar="CONFIG", help="others to measure in the same run"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override in all configurations"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA where there is a GPU")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16", "amp"], help="instead of solver.precision")
    parser.add_argument(
        "--frames", metavar="T", help="frames a clip, one or more (default: data.num_segments)", **several
    )
    parser.add_argument("--batch", "--batches", dest="batches", metavar="N", **several,
                        help="clips a batch, one or more (default: 2 on a CPU, data.batch_size x num_sample on a GPU)")  # fmt: skip
    parser.add_argument(
        "--processes",
        metavar="P",
        default=[1],
        help="training over so many processes too, one or more, each with N clips (default: 1)",
        **several,
    )
    parser.add_argument(
        "--repeats", type=whole, metavar="N", help="measurements of each time (default: 3 on a CPU, 10 on a GPU)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("exp/profile"),
        metavar="FOLDER",
        help="for profile.md, profile.json and the pictures (default: %(default)s)",
    )
    return parser.parse_args(argv)


def positive_number(text: str) -> int:
    """Of the command line. Raises argparse.ArgumentTypeError, which argparse tells with the option's name."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)


def all_cases(options: argparse.Namespace, device: torch.device) -> list[tuple[str, Config]]:
    """Label and configuration of all that is to be measured, T by T. Raises ConfigError, OptimError, ProfileError."""
    first = SPEC.split(options.config)[0]
    specs = [parse_spec(spec, first) for spec in (options.config, *options.compare)]
    configs = []
    for path, own in specs:
        overrides = [*options.set, *([f"solver.precision={options.precision}"] if options.precision else []), *own]
        frames = [[f"data.num_segments={T}"] if T else [] for T in dict.fromkeys(options.frames or (None,))]
        configs.append([load_case(path, [*overrides, *T], device) for T in frames])
    names = labels_of(specs, [one[0].network.model_name for one in configs], first)
    return [(name, config) for name, several in zip(names, configs, strict=True) for config in several]


def labels_of(specs: Sequence[tuple[str, list[str]]], methods: Sequence[str], first: str) -> list[str]:
    """A label a configuration, no two alike: method, file unless it is the first one's, overrides."""

    def label(spec: tuple[str, list[str]], method: str, folder: bool) -> str:
        path, own = spec
        file = Path(path).stem if not folder else f"{Path(path).resolve().parent.name}/{Path(path).stem}"
        said = [one.split("=", 1) for one in own if not one.startswith(("network.model=", "network.fine_tuning="))]
        rest = [f"{key.split('.')[-1]}={value}" for key, value in said]
        return ", ".join([method, *([file] if path != first else []), *rest])

    short, long = ([label(*one, folder) for one in zip(specs, methods, strict=True)] for folder in (False, True))
    labels = [one if short.count(one) == 1 else other for one, other in zip(short, long, strict=True)]
    before = [labels[:place].count(one) for place, one in enumerate(labels)]
    return [f"{one} #{number + 1}" if number else one for one, number in zip(labels, before, strict=True)]


def find_device(name: str | None) -> torch.device:
    """Raises ProfileError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ProfileError("--device cuda: torch sees no GPU here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def usual_batch(config: Config, device: torch.device) -> int:
    """Clips of a batch where none are given."""
    return config.data.batch_size * config.data.num_sample if device.type == "cuda" else 2


def usual_repeats(device: torch.device) -> int:
    """Measurements of each time where no number is given."""
    return 10 if device.type == "cuda" else 3


def write(rows: list[Row], meta: dict[str, Any], scales: bool, folder: Path) -> None:
    """The numbers, over those of the rows before."""
    record = {"meta": meta, "rows": [row.to_dict() for row in rows]}
    (folder / "profile.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "profile.md").write_text(markdown(rows, shown_of(rows), meta, scales), encoding="utf-8")


def draw(rows: list[Row], scales: bool, folder: Path) -> None:
    """The pictures, of as much as is measured."""
    if shown := shown_of(rows):
        draw_saved(shown, folder / "saved_bytes.png")
    if scales and rows:
        draw_scaling(rows, folder / "scaling.png")


def shown_of(rows: Sequence[Row]) -> list[Row]:
    """The rows whose saved bytes are set out: a configuration's first T with the most clips that have some."""
    shown: dict[str, Row] = {}
    for row in rows:
        if row.saved and shown.get(row.label, row).frames == row.frames:
            shown[row.label] = row
    return list(shown.values())


if __name__ == "__main__":
    sys.exit(main())
