"""Measures what a model costs: parameters, FLOPs, activation memory, peak memory, clips/s, share of the matrix rate.

    python -m scripts.profile configs/hmdb51.yaml --compare +network.model=td4v_finetune +network.model=linear_probe
    python -m scripts.profile configs/hmdb51.yaml --frames 8 16 32 --batches 2 4 8

Weights and video are random; no files but the configurations are read.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import Parser, expanded, log_to_console, show
from scripts.cli import find_device, positive_int, run, write_json, write_text

if TYPE_CHECKING:
    from scripts.profile.report import Row

logger = logging.getLogger("td4v")

FILES = ("profile.md", "profile.json", "saved_bytes.png", "scaling.png")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.profile",
        description=__doc__.splitlines()[0],
        epilog="CONFIG is a YAML file, with overrides if need be: configs/hmdb51.yaml+network.recompute=true. Without the "
        "file (+network.recompute=true) it changes the first one. Weights and video are random.",
    )
    several: dict[str, Any] = {"type": positive_int, "nargs": "+"}
    parser.add_argument("config", type=expanded, metavar="CONFIG", help="a YAML file, see configs/")
    parser.add_argument(
        "--compare", type=expanded, nargs="+", action="extend", default=[], metavar="CONFIG", help="others to measure"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="overrides of all configurations")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA if there is a GPU")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16", "amp"], help="instead of solver.precision")
    parser.add_argument("--frames", metavar="T", help="frames a clip (default: data.num_segments)", **several)
    parser.add_argument("--batch", "--batches", dest="batches", metavar="N", **several,
                        help="clips a batch (default: 2 on a CPU, data.batch_size x num_sample on a GPU)")  # fmt: skip
    parser.add_argument("--processes", metavar="P", default=[1], **several,
                        help="also train over so many processes, each with N clips (default: 1)")  # fmt: skip
    parser.add_argument("--repeats", type=positive_int, metavar="N",
                        help="measurements of each time (default: 3 on a CPU, 10 on a GPU)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("exp/profile"), metavar="FOLDER",
                        help="for profile.md, profile.json and the figures (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse_arguments(argv)
    log_to_console()
    command = ["python", "-m", "scripts.profile", *(sys.argv[1:] if argv is None else argv)]
    return run(
        lambda: profile(options, command),
        out_of_memory="out of memory before anything is timed",
        interrupted=f"interrupted; what is measured is in {options.output}",
    )


def profile(options: argparse.Namespace, command: list[str]) -> None:
    """Measure all configurations and write the report after each row."""
    import torch  # here, as all that imports it, so that --help is quick

    from engine.compiler import check_compiler
    from engine.run_info import run_info
    from scripts.profile.cases import default_batch, default_repeats, load_cases
    from scripts.profile.measure import measure
    from scripts.profile.report import scaling, summary

    device = find_device(options.device)
    precision = [f"solver.precision={options.precision}"] if options.precision else []
    cases = load_cases([options.config, *options.compare], [*options.set, *precision], options.frames, device)
    for _, config in cases:
        check_compiler(config.solver.compile, device)
    repeats = options.repeats or default_repeats(device)
    several = [options.processes, *(values for values in (options.frames, options.batches) if values)]
    scales = max(options.processes) > 1 or any(len(set(values)) > 1 for values in several)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # no file of an earlier call stays beside the new ones
        (options.output / name).unlink(missing_ok=True)
    meta = run_info() | {"command": command, "device": str(device), "threads": torch.get_num_threads()}
    rows: list[Row] = []
    try:  # what is measured stays, whatever ends the run
        for label, config in cases:
            batches = options.batches or [default_batch(config, device)]
            for row in measure(config, label, batches, device, repeats, options.processes):
                rows.append(row)
                write(rows, meta, scales, options.output)
            write(rows, meta, scales, options.output)  # with the matrix rate measured last
    finally:
        draw(rows, scales, options.output)
    show(summary(rows) + (f"\n{scaling(rows)}" if scales else ""))
    files = [name for name in FILES if (options.output / name).exists()]
    logger.info("weights and video were random; %s in %s", ", ".join(files), options.output)


def write(rows: list[Row], meta: dict[str, Any], scales: bool, folder: Path) -> None:
    """Write the numbers of all rows so far."""
    from scripts.profile.report import markdown

    write_json(folder / "profile.json", {"meta": meta, "rows": [row.to_dict() for row in rows]})
    write_text(folder / "profile.md", markdown(rows, rows_with_modules(rows), meta, scales))


def draw(rows: list[Row], scales: bool, folder: Path) -> None:
    """Draw the figures of all rows so far."""
    from scripts.profile.plots import draw_saved, draw_scaling

    if detailed := rows_with_modules(rows):
        draw_saved(detailed, folder / "saved_bytes.png")
    if scales and rows:
        draw_scaling(rows, folder / "scaling.png")


def rows_with_modules(rows: Sequence[Row]) -> list[Row]:
    """The rows whose saved bytes are listed by module: each configuration's first T, with its largest batch."""
    chosen: dict[str, Row] = {}
    for row in rows:
        if row.saved and chosen.get(row.label, row).frames == row.frames:
            chosen[row.label] = row
    return list(chosen.values())
