"""The product against a plain transcription of its formulas: equal, and how much faster and lighter, in one run.

    python -m scripts.benchmarks.model configs/hmdb51.yaml configs/hmdb51/td4v_finetune.yaml --batch 2 --precision fp32 bf16

For each configuration both models get the same random weights and the same random clips. First it is shown that they
are the same function: logits and every tuned gradient in float64 (two clips) and in float32 (the batch), and twenty
AdamW steps on a small tower. Then they are timed in turn (plain, product, plain, ...), beside a matrix product
that says what the machine can do. Unequal or non-finite values are said first, and the exit code is 1.
Does not live here: the plain models (bench_plain.py), the pair and its equality (bench_pair.py), and the account of one
configuration alone (profile.py).

Letters: B clips, T frames, K classes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from configs.schema import Config, ConfigError, load_config
from engine.errors import EngineError
from engine.optim import Precision, resolve_precision, set_tf32
from engine.profiling import count_flops, is_out_of_memory, matrix_rate, peak_bytes, saved_for_backward
from engine.run_info import run_info
from scripts.benchmarks.model.pair import (
    EXACT,
    METHOD_NAMES,
    STEPS,
    WHO,
    Pair,
    differences,
    losses,
    make_pair,
    relative_error,
    small,
)

logger = logging.getLogger("td4v")

CONFIGS = ("configs/hmdb51.yaml", "configs/hmdb51/td4v_finetune.yaml")
# Largest difference; see bench_pair.differences. In float32 a single number of a small gradient may be rounded far off:
# with few clips the last BatchNorm takes most of what reaches it away.
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


@dataclass
class Speed:
    """One precision: seconds of each repeat and the rest by "plain" and "product"."""

    training: dict[str, list[float]]  # forward and backward of a batch
    inference: dict[str, list[float]]  # forward in eval mode
    saved: dict[str, int]  # bytes kept for backward that grow with the batch
    casts: dict[str, int]  # bytes kept for backward of weights in another format
    peak: dict[str, int]  # bytes during a step beyond those before it
    rate: dict[str, list[float]]  # FLOP/s of a square matrix product in this precision, beside each repeat
    error: dict[str, dict[str, float]] | None  # of features and gradients against float32, rms over rms


@dataclass
class Result:
    """One configuration. `equality`: what was compared, the largest difference found, and where."""

    name: str
    method: str
    batch: int
    frames: int
    recompute: bool
    step_flops: int  # of the formulas for a batch, forward and backward, nothing computed twice
    forward_flops: int
    equality: dict[str, tuple[float, str]]
    curve: dict[str, list[float]]
    speed: dict[str, Speed] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """What is not equal, or not finite, as sentences."""
        found = [
            f"{self.name}: {what} differ by {value:.1e} ({where}), allowed is {ALLOWED[what]:.0e}"
            for what, (value, where) in self.equality.items()
            if not value <= ALLOWED[what]
        ]
        for precision, speed in self.speed.items():
            for who, errors in (speed.error or {}).items():
                found += [
                    f"{self.name}: {what} of {who} in {precision} are not finite"
                    for what, value in errors.items()
                    if not math.isfinite(value)
                ]
        return found


def equality(
    config: Config, pair: Pair, device: torch.device
) -> tuple[dict[str, tuple[float, str]], dict[str, list[float]]]:
    """Everything of ALLOWED, and the training curves of both in float32."""
    found: dict[str, tuple[float, str]] = {}
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        exact = dtype == torch.float64
        both = make_pair(config, 2, config.seed, device, dtype) if exact else pair
        found |= {f"{what}, {name}": value for what, value in differences(both).items()}
        tiny = make_pair(small(config), 8, config.seed, device, dtype)
        curve = {who: losses(tiny, who) for who in WHO}
        errors = [abs(b - a) / abs(a) for a, b in zip(*curve.values(), strict=True)]
        worst = max(range(STEPS), key=lambda i: errors[i] if math.isfinite(errors[i]) else math.inf)
        found[f"loss over {STEPS} steps, small tower, {name}"] = errors[worst], f"step {worst + 1}"
    return {what: found[what] for what in ALLOWED}, curve


def speed(pair: Pair, precision: Precision, repeats: int, exact: dict[str, dict[str, Tensor]]) -> Speed:
    """Time and memory of both in turn. `exact`: their values in float32, for the error of other formats."""
    device, error = pair.video.device, None
    if precision.dtype is not None:
        error = {who: relative_error(pair.values(who, precision), exact[who]) for who in WHO}
    dtype = precision.dtype or torch.float32
    times = {what: {who: [] for who in WHO} for what in ("training", "inference")}
    result = Speed(**times, saved={}, casts={}, peak={}, rate={what: [] for what in times}, error=error)
    for who in WHO:
        model = pair.train().models[who]
        with precision.autocast(device):
            kept = saved_for_backward(model, pair.video)
        result.saved[who] = sum(entry.bytes for entry in kept if not entry.copied_weights)
        result.casts[who] = sum(entry.bytes for entry in kept if entry.copied_weights)
        model.zero_grad()
        result.peak[who] = peak_bytes(lambda who=who: pair.step(who, precision), device)
        model.zero_grad()
    for what, work in (("training", pair.step), ("inference", pair.infer)):
        pair.train(what == "training")
        for repeat in tqdm(range(repeats + 1), desc=f"{precision.name} {what}", disable=None):
            for who in WHO:
                since = _now(device)
                work(who, precision)
                if repeat:  # the first warms everything up
                    times[what][who].append(_now(device) - since)
            if repeat:
                result.rate[what].append(matrix_rate(device, dtype, repeats=1))
    for model in pair.models.values():
        model.zero_grad()
    return result


def measure(config: Config, name: str, batch: int, precisions: Sequence[Precision], repeats: int,
            device: torch.device) -> Result:  # fmt: skip
    """Everything about one configuration."""
    pair = make_pair(config, batch, config.seed, device)
    found, curve = equality(config, pair, device)
    flops = [count_flops(lambda work=work: work("plain", EXACT)) for work in (pair.train().step, pair.infer)]
    result = Result(name, config.network.model_name, batch, config.data.num_segments, config.network.recompute,
                    *flops, found, curve)  # fmt: skip
    exact = {who: pair.values(who, EXACT) for who in WHO} if any(p.dtype for p in precisions) else {}
    for precision in precisions:
        result.speed[precision.name] = speed(pair, precision, repeats, exact)
    return result


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report(results: Sequence[Result]) -> str:
    """Markdown: what is wrong, if anything; equality; time; memory; errors of the short formats."""
    failures = [failure for result in results for failure in result.failures()]
    lines = [*(f"**NOT EQUAL** {failure}\n" for failure in failures)]
    lines += ["| model | compared with the plain one | largest difference | where | allowed |", "|---|---|---|---|---|"]
    lines += [
        f"| {result.name} | {what} | {value:.1e} | {where} | {ALLOWED[what]:.0e} |"
        for result in results
        for what, (value, where) in result.equality.items()
    ]
    lines += [
        "",
        "| model | format | what | plain, ms a clip | product, ms a clip | plain / product | GFLOPs a clip | "
        "matrix product, GFLOP/s | plain, share of it | product, share of it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for name, speed in result.speed.items():
            for what, times, flops in (
                ("training", speed.training, result.step_flops),
                ("inference", speed.inference, result.forward_flops),
            ):
                rates = speed.rate[what]
                both = [_spread([1000 * second / result.batch for second in times[who]]) for who in WHO]
                shares = [statistics.median(flops / s / rate for s, rate in zip(times[who], rates, strict=True))
                          for who in WHO]  # fmt: skip
                ratio = [plain / product for plain, product in zip(times["plain"], times["product"], strict=True)]
                cells = [result.name, name, what, *both, _spread(ratio, 2), f"{flops / result.batch / 1e9:.1f}",
                         _spread([rate / 1e9 for rate in rates], 0), *(f"{share:.0%}" for share in shares)]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| model | format | kept for backward, MB a clip: plain, product | ratio | and of weights in this format, MB | "
        "peak of a step beyond the weights, MB | error of features against fp32: plain, product | of gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for name, speed in result.speed.items():
            saved = [speed.saved[who] / result.batch / 1e6 for who in WHO]
            rest = [", ".join(f"{sizes[who] / 1e6:.1f}" for who in WHO) for sizes in (speed.casts, speed.peak)]
            error = speed.error or {}
            errors = [
                ", ".join(f"{error[who][what]:.1e}" for who in WHO if error) for what in ("features", "gradients")
            ]
            cells = [result.name, name, f"{saved[0]:.1f}, {saved[1]:.1f}", f"{saved[0] / saved[1]:.2f}",
                     *rest, *errors]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _configs(options: argparse.Namespace) -> list[tuple[str, Config]]:
    """What is to be measured, by name."""
    found = []
    for path in options.configs:
        config = load_config(path)
        methods = [METHOD_NAMES[name] for name in options.method or ()] or [config.network.model_name]
        for method in methods:
            network = replace(
                config.network, drop_fc=0.0, recompute=options.recompute, model=method, fine_tuning=False,
                options=config.network.options if method == config.network.model_name else {},
            )  # fmt: skip
            data = replace(config.data, num_segments=options.frames or config.data.num_segments)
            file = Path(path)
            name = f"{file.parent.name if file.stem == method else file.stem} {method}"
            name += f", {options.batch} x {data.num_segments} frames{', recomputed' if options.recompute else ''}"
            found.append((name, replace(config, network=network, data=data)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=CONFIGS, help=f"configurations (default {' '.join(CONFIGS)})")
    parser.add_argument("--method", nargs="+", choices=METHOD_NAMES, help="instead of each configuration's own")
    parser.add_argument("--batch", type=int, default=2, help="clips (default 2)")
    parser.add_argument("--frames", type=int, help="frames a clip, instead of data.num_segments")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5, help="of each time (default 5)")
    parser.add_argument("--recompute", action="store_true", help="the product with network.recompute")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, default=Path("exp/bench_model"), help="for bench_model.md, .json")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    if options.batch < 2 or options.repeats < 1 or (options.frames or 2) < 2:
        logger.error("--batch and --frames must be at least 2 and --repeats at least 1")
        return 1
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        logger.error("--device cuda: no GPU that torch can use is here")
        return 1
    set_tf32(False, device)
    results: list[Result] = []
    try:
        precisions = [resolve_precision(name, device) for name in options.precision]
        configs = _configs(options)
        options.output.mkdir(parents=True, exist_ok=True)
        for name, config in configs:
            results.append(measure(config, name, options.batch, precisions, options.repeats, device))
            _write(results, options.output)
    except (ConfigError, EngineError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.error("a batch of %d clips does not fit into memory: take a smaller --batch", options.batch)
        return 1
    failures = [failure for result in results for failure in result.failures()]
    for failure in failures:
        logger.error("%s", failure)
    print(report(results), end="")
    return 1 if failures else 0


def _write(results: Sequence[Result], folder: Path) -> None:
    """What is measured so far: the tables, and all numbers."""
    record = {
        "meta": run_info() | {"threads": torch.get_num_threads()},
        "failures": [failure for result in results for failure in result.failures()],
        "results": [asdict(result) for result in results],
    }
    (folder / "bench_model.md").write_text(report(results), encoding="utf-8")
    (folder / "bench_model.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
