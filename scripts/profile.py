"""What a model costs: parameters, FLOPs, bytes kept for backward, peak memory, clips a second, share of the device's matrix rate.

Lives here: the command, and what is measured of a configuration. Does not live here: how it is measured
(engine/cost.py), tables (profile_report.py) and pictures (profile_picture.py).

    python -m scripts.profile configs/hmdb51.yaml --compare +network.method=td4v_finetune +network.method=linear_probe
    python -m scripts.profile configs/hmdb51.yaml --frames 8 16 32 --batches 2 4 8

Nothing is loaded: weights are random (network.init false, whatever the configuration says) and so is the video.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from clip.build import build_model, parameter_report
from configs.schema import Config, ConfigError, load_config
from engine import cost
from engine.distributed import EngineError, Process, place
from engine.optim import resolve_precision, set_tf32
from engine.record import run_meta
from scripts.profile_picture import draw_saved, draw_scaling
from scripts.profile_report import Row, markdown, scaling, summary
from scripts.profile_work import random_batch, seconds_of_processes, training_step

logger = logging.getLogger("td4v")

ALWAYS = ("network.init=false", "network.weights=null", "resume=null", "pretrain=null", "solver.evaluate=false")
BLOCK_HALVES = ("attend", "transform")  # of the tower, whose blocks may run without their modules
COUNTED_CLIPS = 2  # FLOPs are counted with so many: side-tuning cannot train on one
SPEC = re.compile(r"\+(?=[A-Za-z_][\w.]*=)")  # before an override in CONFIG+KEY=VALUE


class ProfileError(ValueError):
    """What was asked for cannot be measured; the message is one sentence."""


def parse_spec(spec: str, first: str) -> tuple[str, list[str]]:
    """`CONFIG+KEY=VALUE+KEY=VALUE`: the file, which is `first` where none is given, and the overrides."""
    path, *overrides = SPEC.split(spec)
    return path or first, overrides


def load_case(path: str, overrides: Sequence[str], device: torch.device) -> Config:
    """A configuration that needs neither weights nor data, its precision as resolved. Raises ConfigError, OptimError."""
    config = load_config(path, [*overrides, *ALWAYS])
    precision = resolve_precision(config.solver.precision, device).name
    network = replace(config.network, cache_features="off")
    return replace(config, network=network, solver=replace(config.solver, precision=precision))


def measure(
    config: Config,
    label: str,
    batches: Sequence[int],
    device: torch.device,
    repeats: int,
    processes: Sequence[int] = (),
) -> list[Row]:
    """One row a batch. Raises ConfigError and the like where the model cannot be built."""
    name = f"{label}, T = {config.data.num_segments}"
    precision = resolve_precision(config.solver.precision, device)
    dtype = precision.dtype or torch.float32
    set_tf32(config.solver.tf32, device)
    logger.info("%s: building, from random weights", name)
    report = parameter_report(build_model(config, pretrained=False))
    flops = _flops(config, device, name)
    rows, rates = [], []
    for batch in batches:
        row = Row(
            label=label, method=config.network.method_name, frames=config.data.num_segments, batch=batch,
            precision=precision.name, recompute=config.network.recompute, total=report.total, tuned=report.tuned, **flops,
        )  # fmt: skip
        with cost.memory_limited(device):
            row.rates = rates
            rates.append(cost.matrix_rate(device, dtype))
            for part, work in (("training", _training), ("inference", _inference)):
                try:
                    work(row, config, device, repeats, f"{name}, {batch} clips")
                except ValueError as error:  # a model that does not take such a batch
                    row.notes[part] = str(error)
                except (RuntimeError, MemoryError) as error:
                    if not cost.is_out_of_memory(error):
                        raise
                    row.notes[part] = "out of memory"
                    logger.warning("%s, %d clips: out of memory in %s", name, batch, part)
                _tidy(device)
        rows.append(row)
        rows += [_with_processes(row, config, device, repeats, number) for number in processes if number > 1]
    rates.append(cost.matrix_rate(device, dtype))
    return rows


def _with_processes(row: Row, config: Config, device: torch.device, repeats: int, number: int) -> Row:
    """The same in training over several processes, each with as many clips; only the time is measured."""
    logger.info(
        "%s, T = %d, %d clips on each of %d processes: time of training steps", row.label, row.frames, row.batch, number
    )
    rates = [rate * (number if device.type == "cuda" else 1) for rate in row.rates]  # of all devices
    several = replace(
        row, processes=number, rates=rates, saved=[], held=None, beyond=None, training=[], inference=[], notes={}
    )
    if row.training:
        try:
            several.training = seconds_of_processes(config, row.batch, device, repeats, number)
        except (ProcessRaisedException, ProcessExitedException) as error:
            several.notes["training"] = str(error).strip().splitlines()[-1]
    else:
        several.notes = {"training": row.notes["training"]}
    return several


def _flops(config: Config, device: torch.device, name: str) -> dict[str, float]:
    """FLOPs a clip, forward and of a training step, of the model without recomputation."""
    logger.info("%s: counting FLOPs", name)
    model = build_model(replace(config, network=replace(config.network, recompute=False)), pretrained=False).to(device)
    video, _ = random_batch(config, COUNTED_CLIPS, device)
    with torch.no_grad():
        forward = cost.count_flops(lambda: model.eval()(video))
    training = cost.count_flops(lambda: model.train()(video).sum().backward())
    return {"forward_flops": forward / COUNTED_CLIPS, "training_flops": training / COUNTED_CLIPS}


def _training(row: Row, config: Config, device: torch.device, repeats: int, name: str) -> None:
    """Saved bytes, peak and time of training steps, into `row`."""
    logger.info("%s: bytes kept for backward", name)
    model = build_model(config, pretrained=False).to(device).train()
    video, label = random_batch(config, row.batch, device)
    with resolve_precision(config.solver.precision, device).autocast(device):
        row.saved = cost.saved_for_backward(model, video, methods=BLOCK_HALVES)
    stepper = training_step(model, config, Process(device=device))
    group = [{"video": video, "label": label}]
    stepper(group)  # brings the optimizer's state
    state = [v for values in stepper.trainee.optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
    row.held = cost.held_bytes([*model.parameters(), *model.buffers(), *state, video, label])
    logger.info("%s: peak memory of a training step", name)
    row.beyond = cost.peak_bytes(lambda: stepper(group), device)
    logger.info("%s: time of training steps", name)
    row.training = cost.seconds(lambda: stepper(group), device, repeats)


def _inference(row: Row, config: Config, device: torch.device, repeats: int, name: str) -> None:
    """Time of forward passes in evaluation, into `row`."""
    logger.info("%s: time of inference", name)
    model = place(build_model(config, pretrained=False), Process(device=device), config.solver.compile).eval()
    precision = resolve_precision(config.solver.precision, device)
    video, _ = random_batch(config, row.batch, device)

    def work() -> None:
        with torch.no_grad(), precision.autocast(device):
            model(video)

    row.inference = cost.seconds(work, device, repeats)


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        device = find_device(options.device)
        rows, shown = [], []
        specs = [options.config, *options.compare]
        cases = [case for spec in specs for case in cases_of(spec, options, device)]
        options.output.mkdir(parents=True, exist_ok=True)
        command = ["python", "-m", "scripts.profile", *(sys.argv[1:] if argv is None else argv)]
        meta = run_meta() | {"command": command, "device": str(device), "threads": torch.get_num_threads()}
        scales = len(options.frames or ()) > 1 or len(options.batches or ()) > 1 or max(options.processes) > 1
        for label, config in cases:
            batches = options.batches or [_usual_batch(config, device)]
            rows += measure(
                config,
                label,
                batches,
                device,
                options.repeats or (10 if device.type == "cuda" else 3),
                options.processes,
            )
            if label not in {row.label for row in shown}:
                shown += [row for row in reversed(rows) if row.label == label and row.saved][:1]
            write(rows, shown, meta, scales, options.output)  # what is measured stays, whatever ends the run
        if shown:
            draw_saved(shown, options.output / "saved_bytes.png")
        if scales:
            draw_scaling(rows, options.output / "scaling.png")
    except (ConfigError, EngineError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not cost.is_out_of_memory(error):
            raise
        logger.error("%s: out of memory with %d clips, before anything is timed", label, COUNTED_CLIPS)
        return 1
    print(summary(rows) + (f"\n{scaling(rows)}" if scales else ""), end="")
    files = ["profile.md", "profile.json", "saved_bytes.png", *(["scaling.png"] if scales else [])]
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
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override in all configurations"
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
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def cases_of(spec: str, options: argparse.Namespace, device: torch.device) -> list[tuple[str, Config]]:
    """Label and configuration for each T that was asked for. Raises ConfigError, OptimError."""
    path, own = parse_spec(spec, SPEC.split(options.config)[0])
    overrides = [*options.set, *([f"solver.precision={options.precision}"] if options.precision else []), *own]
    cases = []
    for frames in options.frames or (None,):
        config = load_case(path, [*overrides, *([f"data.num_segments={frames}"] if frames else [])], device)
        rest = [
            override.split("=", 1)[0].split(".")[-1] + "=" + override.split("=", 1)[1]
            for override in own
            if not override.startswith(("network.method=", "network.fine_tuning="))
        ]
        name = config.network.method_name + (f", {Path(path).stem}" if path != SPEC.split(options.config)[0] else "")
        cases.append((", ".join([name, *rest]), config))
    return cases


def find_device(name: str | None) -> torch.device:
    """Raises ProfileError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ProfileError("--device cuda: torch sees no GPU here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _usual_batch(config: Config, device: torch.device) -> int:
    return config.data.batch_size * config.data.num_sample if device.type == "cuda" else 2


def write(rows: list[Row], shown: list[Row], meta: dict[str, Any], scales: bool, folder: Path) -> None:
    """The numbers, over those of the configuration before."""
    record = {"meta": meta, "rows": [row.to_dict() for row in rows]}
    (folder / "profile.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "profile.md").write_text(markdown(rows, shown, meta, scales), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
