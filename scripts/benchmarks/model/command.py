"""Compares the models with a plain transcription of their formulas: equal, and how much faster and lighter.

    python -m scripts.benchmarks.model configs/hmdb51.yaml configs/hmdb51/td4v_finetune.yaml --batch 2 --precision fp32 bf16
    python -m scripts.benchmarks.model configs/ssv2/{tdn,tada2d,tadaformer,tadaconvnextv2}.yaml --precision fp32

For each configuration the product's model and the plain one get the same random weights and clips. First they are
compared: logits and all gradients in float64 (two clips) and in float32 (the batch), and twenty AdamW steps on a small
tower. Then they are timed in turn (plain, product, plain, ...), beside a matrix product that shows what the machine can
do. Values that differ or are not finite are reported first, and the exit code is 1.

Letters: B clips, T frames, K classes.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.console import Parser, expanded, log_to_console, show
from common.tables import markdown_table
from scripts.cli import find_device, positive_int, run, write_json, write_text
from scripts.reports import spread

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from configs.schema import Config
    from engine.optim import Precision
    from scripts.benchmarks.model.pair import Pair

logger = logging.getLogger("td4v")

CONFIGS = ("configs/hmdb51.yaml", "configs/hmdb51/td4v_finetune.yaml")
MODEL_NAMES = {
    "side": "td4v_side",
    "fine": "td4v_finetune",
    **{name: name for name in ("tdn", "tada2d", "tadaformer", "tadaconvnextv2")},
}
SIDES = ("plain", "product")
STEPS = 20  # of a training curve
# Largest differences, see pair.differences. In float32 a single number of a small gradient may be far off: with few
# clips the last BatchNorm cancels most of what reaches it.
ALLOWED = {
    "logits, float64": 1e-9,
    "inference, float64": 1e-9,
    "gradients, float64": 1e-9,
    "logits, float32": 1e-4,
    "inference, float32": 1e-4,
    "gradients, float32": 5e-2,
    "gradients as one vector, float32": 1e-3,
    f"loss over {STEPS} steps, small tower, float64": 1e-8,
    f"loss over {STEPS} steps, small tower, float32": 1e-3,
}
# ReLUs and max-pooling switch between two roundings: float32 gradients are off by some per cent in any arrangement.
WITH_SWITCHES = ("tdn", "tada2d")


@dataclass
class Speed:
    """One precision; every dict is by "plain" and "product", but for `rate`.

    Args:
        training: seconds of forward and backward of a batch, of each repeat. inference: of forward in eval mode.
        saved: bytes saved for backward that grow with the batch. casts: those of weights in another format.
        peak: bytes during a step beyond those before it.
        rate: by "training" and "inference": FLOP/s of a square matrix product, measured beside each repeat.
        error: of features and gradients against float32, rms over rms.
    """

    training: dict[str, list[float]]
    inference: dict[str, list[float]]
    saved: dict[str, int]
    casts: dict[str, int]
    peak: dict[str, int]
    rate: dict[str, list[float]]
    error: dict[str, dict[str, float]] | None


@dataclass
class Result:
    """One configuration.

    Args:
        step_flops, forward_flops: of the formulas for a batch; nothing counts twice.
        equality: what was compared -> the largest difference, and where it is.
        curve: the losses of both in float32.
    """

    name: str
    model: str
    batch: int
    frames: int
    recompute: bool
    step_flops: int
    forward_flops: int
    equality: dict[str, tuple[float, str]]
    curve: dict[str, list[float]]
    speed: dict[str, Speed] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """What differs or is not finite, as sentences."""
        found = [
            f"{self.name}: {what} differ by {value:.1e} ({where}), allowed is {ALLOWED[what]:.0e}"
            for what, (value, where) in self.equality.items()
            if not value <= ALLOWED[what]
        ]
        for precision, speed in self.speed.items():
            for side, errors in (speed.error or {}).items():
                found += [
                    f"{self.name}: {what} of {side} in {precision} are not finite"
                    for what, value in errors.items()
                    if not math.isfinite(value)
                ]
        return found


def measure(
    config: Config, name: str, batch: int, precisions: Sequence[Precision], repeats: int, device: torch.device
) -> Result:
    """All measurements of one configuration."""
    from engine.profiling import count_flops
    from scripts.benchmarks.model.pair import EXACT, make_pair

    pair = make_pair(config, batch, config.seed, device)
    found, curve = equality(config, pair, device)
    result = Result(
        name=name,
        model=config.network.model_name,
        batch=batch,
        frames=config.data.num_segments,
        recompute=config.network.recompute,
        step_flops=count_flops(lambda: pair.train().step("plain", EXACT)),
        forward_flops=count_flops(lambda: pair.infer("plain", EXACT)),
        equality=found,
        curve=curve,
    )
    exact = {side: pair.values(side, EXACT) for side in SIDES} if any(p.dtype for p in precisions) else {}
    for precision in precisions:
        result.speed[precision.name] = measure_speed(pair, precision, repeats, exact)
    return result


def equality(
    config: Config, pair: Pair, device: torch.device
) -> tuple[dict[str, tuple[float, str]], dict[str, list[float]]]:
    """The differences of ALLOWED, and the training curves of both in float32."""
    import torch

    from scripts.benchmarks.model.pair import differences, losses, make_pair, small

    found: dict[str, tuple[float, str]] = {}
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        both = make_pair(config, 2, config.seed, device, dtype) if dtype == torch.float64 else pair
        found |= {f"{what}, {name}": value for what, value in differences(both).items()}
        tiny = make_pair(small(config), 8, config.seed, device, dtype)
        curve = {side: losses(tiny, side, STEPS) for side in SIDES}
        errors = [abs(b - a) / abs(a) for a, b in zip(*curve.values(), strict=True)]
        worst = max(range(STEPS), key=lambda i: errors[i] if math.isfinite(errors[i]) else math.inf)
        found[f"loss over {STEPS} steps, small tower, {name}"] = errors[worst], f"step {worst + 1}"
    ignored = ("gradients", "loss") if config.network.model_name in WITH_SWITCHES else ()
    kept = [what for what in ALLOWED if not (what.startswith(ignored) and what.endswith("float32"))]
    return {what: found[what] for what in kept}, curve


def measure_speed(pair: Pair, precision: Precision, repeats: int, exact: dict[str, dict[str, Tensor]]) -> Speed:
    """Time and memory of both in turn. `exact`: their values in float32, for the error of other formats."""
    import torch
    from tqdm import tqdm

    from engine.profiling import matrix_rate, now, peak_bytes, saved_for_backward
    from scripts.benchmarks.model.pair import relative_error

    device, error = pair.video.device, None
    if precision.dtype is not None:
        error = {side: relative_error(pair.values(side, precision), exact[side]) for side in SIDES}
    times = {what: {side: [] for side in SIDES} for what in ("training", "inference")}
    speed = Speed(**times, saved={}, casts={}, peak={}, rate={what: [] for what in times}, error=error)
    for side in SIDES:
        model = pair.train().models[side]
        with precision.autocast(device):
            saved = saved_for_backward(model, pair.video)
        speed.saved[side] = sum(entry.bytes for entry in saved if not entry.copied_weights)
        speed.casts[side] = sum(entry.bytes for entry in saved if entry.copied_weights)
        model.zero_grad()
        speed.peak[side] = peak_bytes(lambda side=side: pair.step(side, precision), device)
        model.zero_grad()
    for what, work in (("training", pair.step), ("inference", pair.infer)):
        pair.train(what == "training")
        for repeat in tqdm(range(repeats + 1), desc=f"{precision.name} {what}", disable=None):
            for side in SIDES:
                start = now(device)
                work(side, precision)
                if repeat:  # the first warms up
                    times[what][side].append(now(device) - start)
            if repeat:
                speed.rate[what].append(matrix_rate(device, precision.dtype or torch.float32, repeats=1))
    for model in pair.models.values():
        model.zero_grad()
    return speed


def report(results: Sequence[Result]) -> str:
    """Markdown: failures, equality, time, memory."""
    failures = [f"**NOT EQUAL** {failure}\n" for result in results for failure in result.failures()]
    return "\n".join([*failures, equality_table(results), time_table(results), memory_table(results)])


def equality_table(results: Sequence[Result]) -> str:
    columns = ["model", "compared with the plain one", "largest difference", "where", "allowed"]
    rows = [
        [result.name, what, f"{value:.1e}", where, f"{ALLOWED[what]:.0e}"]
        for result in results
        for what, (value, where) in result.equality.items()
    ]
    return markdown_table(columns, rows)


def time_table(results: Sequence[Result]) -> str:
    columns = ["model", "format", "what", "plain, ms a clip", "product, ms a clip", "plain / product", "GFLOPs a clip"]
    columns += ["matrix product, GFLOP/s", "plain, share of it", "product, share of it"]
    rows = []
    for result in results:
        for name, speed in result.speed.items():
            for what, flops in (("training", result.step_flops), ("inference", result.forward_flops)):
                times, rates = getattr(speed, what), speed.rate[what]
                shares = [
                    statistics.median(flops / seconds / rate for seconds, rate in zip(times[side], rates, strict=True))
                    for side in SIDES
                ]
                ratios = [plain / product for plain, product in zip(times["plain"], times["product"], strict=True)]
                rows.append(
                    [
                        result.name,
                        name,
                        what,
                        *(spread([1000 * seconds / result.batch for seconds in times[side]], 1) for side in SIDES),
                        spread(ratios, 2),
                        f"{flops / result.batch / 1e9:.1f}",
                        spread([rate / 1e9 for rate in rates], 0),
                        *(f"{share:.0%}" for share in shares),
                    ]
                )
    return markdown_table(columns, rows)


def memory_table(results: Sequence[Result]) -> str:
    columns = ["model", "format", "saved for backward, MB a clip: plain, product", "ratio"]
    columns += ["and of weights in this format, MB", "peak of a step beyond the weights, MB"]
    columns += ["error of features against fp32: plain, product", "of gradients"]
    rows = []
    for result in results:
        for name, speed in result.speed.items():
            plain, product = (speed.saved[side] / result.batch / 1e6 for side in SIDES)
            casts, peaks = (
                ", ".join(f"{sizes[side] / 1e6:.1f}" for side in SIDES) for sizes in (speed.casts, speed.peak)
            )
            errors = [
                speed.error and ", ".join(f"{speed.error[side][what]:.1e}" for side in SIDES)
                for what in ("features", "gradients")
            ]
            saved = [f"{plain:.1f}, {product:.1f}", f"{plain / product:.2f}"]
            rows.append([result.name, name, *saved, casts, peaks, *errors])
    return markdown_table(columns, rows)


def configurations(options: argparse.Namespace) -> list[tuple[str, Config]]:
    """Name and configuration of all that is measured. Raises ConfigError."""
    from configs.schema import load_config

    found = []
    for path in map(Path, options.configs):
        config = load_config(path)
        deterministic = {key: value for key, value in config.network.options.items() if key != "drop_path"}
        for model in [MODEL_NAMES[name] for name in options.models or ()] or [config.network.model_name]:
            network = replace(
                config.network,
                drop_fc=0.0,
                recompute=options.recompute,
                model=model,
                fine_tuning=False,
                options=deterministic if model == config.network.model_name else {},
            )
            data = replace(config.data, num_segments=options.frames or config.data.num_segments)
            name = f"{path.parent.name if path.stem == model else path.stem} {model}"
            name += f", {options.batch} x {data.num_segments} frames{', recomputed' if options.recompute else ''}"
            found.append((name, replace(config, network=network, data=data)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(prog="python -m scripts.benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument(
        "configs", type=expanded, nargs="*", default=CONFIGS, metavar="CONFIG", help=f"default: {' '.join(CONFIGS)}"
    )
    parser.add_argument("--models", nargs="+", choices=MODEL_NAMES, help="instead of each configuration's own")
    parser.add_argument("--batch", type=positive_int, default=2, help="clips (default: %(default)s)")
    parser.add_argument("--frames", type=positive_int, help="frames a clip, instead of data.num_segments")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=positive_int, default=5, help="of each time (default: %(default)s)")
    parser.add_argument("--recompute", action="store_true", help="the product with network.recompute")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA if there is a GPU")
    parser.add_argument("--output", type=Path, default=Path("exp/bench_model"), metavar="FOLDER",
                        help="for bench_model.md and bench_model.json (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.batch < 2 or options.frames == 1:
        parser.error("--batch and --frames must be at least 2")
    log_to_console(logging.WARNING)
    no_memory = f"a batch of {options.batch} clips does not fit into memory: choose a smaller --batch"
    return run(lambda: benchmark(options), out_of_memory=no_memory)


def benchmark(options: argparse.Namespace) -> int:
    """Measure all configurations, write the report after each, and return the exit status."""
    from engine.optim import resolve_precision, set_tf32

    device = find_device(options.device)
    set_tf32(False, device)
    precisions = [resolve_precision(name, device) for name in options.precision]
    cases = configurations(options)
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for name, config in cases:
        results.append(measure(config, name, options.batch, precisions, options.repeats, device))
        write(results, options.output)
    failures = [failure for result in results for failure in result.failures()]
    for failure in failures:
        logger.error("%s", failure)
    show(report(results))
    return 1 if failures else 0


def write(results: Sequence[Result], folder: Path) -> None:
    """Write the tables and all numbers so far."""
    import torch

    from engine.run_info import run_info

    record = {
        "meta": run_info() | {"threads": torch.get_num_threads()},
        "failures": [failure for result in results for failure in result.failures()],
        "results": [asdict(result) for result in results],
    }
    write_text(folder / "bench_model.md", report(results))
    write_json(folder / "bench_model.json", record)
