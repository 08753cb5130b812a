"""A measured row, and the Markdown tables of rows. MB are 10^6 bytes, GFLOPs 10^9 with 2 FLOPs a multiply-add."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from common.text import plural
from engine.profiling import SavedBytes
from scripts.reports import dict_table, environment, megabytes, number, short_revision

PARTS = ("training", "inference")
DEPTH = 2  # names shown below a layer's number, and of modules outside all layers
COPIES = "copies of weights"

NOTES = """\
GFLOPs: matrix products and convolutions of one eager pass, 2 FLOPs a multiply-add; training is forward and backward.
Nothing that is computed a second time counts (`network.recompute` is off for the count, attention scores count once), so
MFU is the model's work over time, whatever else the kernels do.
Saved: storages that autograd saves in one forward pass in training mode, each once, without parameters and buffers.
Peak: of tensors in one training step (forward, backward, optimizer). "Standing" are weights, buffers, optimizer state and
the batch, which live all the time. Measured by torch's allocator on a GPU, by torch.profiler on a CPU.
Clips/s: median of the repeats (lowest to highest). MFU: GFLOPs a clip x median clips/s over the rate of a square matrix
product in the same number format, the best of those measured in between; for several processes on a CPU, with as many
threads as they have together; for several GPUs, that of one times their number.
With solver.compile, GFLOPs and saved bytes are the eager model's, the rest the compiled one's. Clips are those of one
batch of one process. Weights (network.init false) and video are random; BatchNorm trains in training.
"""


@dataclass
class Row:
    """One configuration with T frames and one batch size. Sizes in bytes, times in seconds, FLOPs a clip.

    Args:
        batch: clips of one process. threads: of all processes.
        standing: bytes that live all the time. beyond: the peak above them.
        training, inference: times of the repeats.
        rates: FLOP/s of a matrix product, measured before and after.
        notes: by part, why it could not be measured; its values are then empty or None.
    """

    label: str
    model: str
    frames: int
    batch: int
    precision: str
    recompute: bool
    total: int
    trainable: int
    forward_flops: float
    training_flops: float
    processes: int = 1
    threads: int | None = None
    saved: list[SavedBytes] = field(default_factory=list)
    standing: int | None = None
    beyond: int | None = None
    training: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of `to_dict`. Raises KeyError, TypeError for the dict of another version."""
        own = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        return cls(**own | {"saved": [SavedBytes(**entry) for entry in own["saved"]]})

    @property
    def saved_a_clip(self) -> float | None:
        return sum(entry.bytes for entry in self.saved) / self.batch if self.saved else None

    @property
    def peak(self) -> int | None:
        return None if self.beyond is None else self.standing + self.beyond

    @property
    def beyond_a_clip(self) -> float | None:
        return None if self.beyond is None else self.beyond / self.batch

    def clips_per_s(self, part: str) -> tuple[float, float, float] | None:
        """Median, lowest, highest, of all processes together."""
        rates = [self.batch * self.processes / time for time in getattr(self, part)]
        return (statistics.median(rates), min(rates), max(rates)) if rates else None

    def milliseconds(self, part: str) -> float | None:
        """Of one clip, the median."""
        rate = self.clips_per_s(part)
        return None if rate is None else 1000 / rate[0]

    def mfu(self, part: str) -> float | None:
        """Model FLOPs utilisation: the share of the matrix rate, 0..1."""
        rate, flops = self.clips_per_s(part), {"training": self.training_flops, "inference": self.forward_flops}[part]
        return flops * rate[0] / max(self.rates) if rate and self.rates else None

    def to_dict(self) -> dict[str, Any]:
        """All values, measured and derived."""
        derived: dict[str, Any] = {"saved_bytes_a_clip": self.saved_a_clip, "peak_bytes": self.peak}
        for part in PARTS:
            derived |= {f"{part}_clips_per_s": self.clips_per_s(part), f"{part}_mfu": self.mfu(part)}
        return asdict(self) | derived


def locate(module: str) -> tuple[int | None, str]:
    """The number of a module's layer, and its name within the layer.

    `side.layers.4.block.attn.qkv` is (4, "side.layers.*.block.attn"), `side.stem.conv` is (None, "side.stem").
    """
    names = module.split(".")
    at = next((index for index, name in enumerate(names) if name.isdigit()), None)
    if at is None:
        return None, ".".join(names[:DEPTH]) or "the model itself"
    above = names[:at] if at <= DEPTH else [names[0], "…", names[at - 1]]
    return int(names[at]), ".".join([*above, "*", *names[at + 1 : at + 1 + DEPTH]]).replace(".….", "…")


def saved_by_part(row: Row) -> dict[str, dict[int | None, float]]:
    """Saved MB a clip by part and layer, in the order of the forward pass, copies of weights last."""
    table: dict[str, dict[int | None, float]] = {}
    for entry in row.saved:
        layer, part = locate(entry.module)
        cells = table.setdefault(COPIES if entry.copied_weights else part, {})
        cells[layer] = cells.get(layer, 0.0) + entry.bytes / row.batch / 1e6
    return {part: table[part] for part in sorted(table, key=lambda part: part == COPIES)}


def summary(rows: Sequence[Row]) -> str:
    """One line a row, and below the table why some of it could not be measured."""
    reasons = list(dict.fromkeys(note for row in rows for note in row.notes.values()))
    marks = {note: f"({index})" for index, note in enumerate(reasons, start=1)}
    below = "".join(f"\n{mark} {note}\n" for note, mark in marks.items())
    return dict_table(_without_single_process([_line(row, marks) for row in rows])) + below


def _without_single_process(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns of processes and threads are shown only if some row has several processes."""
    if all(line["processes"] == 1 for line in lines):
        return [line | {"processes": None, "threads": None} for line in lines]
    return lines


def _line(row: Row, marks: dict[str, str]) -> dict[str, Any]:
    missing = {part: marks[note] for part, note in row.notes.items()}
    line = {
        "configuration": row.label,
        "precision": row.precision,
        "processes": row.processes,
        "threads": row.threads,
        "T": row.frames,
        "clips": row.batch,
        "parameters, M": number(row.total / 1e6),
        "trainable, M": number(row.trainable / 1e6),
        "GFLOPs a clip, forward": number(row.forward_flops / 1e9),
        "GFLOPs a clip, training": number(row.training_flops / 1e9),
        "saved, MB a clip": megabytes(row.saved_a_clip),
        "peak, MB": megabytes(row.peak) or missing.get("training"),
        "standing, MB": megabytes(row.standing),
    }
    for part in PARTS:
        rate, share = row.clips_per_s(part), row.mfu(part)
        line[f"{part}, clips/s"] = missing.get(part) if rate is None else "{} ({} to {})".format(*map(number, rate))
        line[f"{part} MFU"] = None if share is None else f"{100 * share:.0f} %"
    return line


def scaling(rows: Sequence[Row]) -> str:
    """Time and memory by T and clips, and their growth over the growth of T: 1.00 is in proportion, below is slower."""
    lines = []
    for row in rows:
        first = next(other for other in rows if _series(other) == _series(row))
        lines.append(
            {
                "configuration": row.label,
                "processes": row.processes,
                "clips": row.batch,
                "T": row.frames,
                **{f"{part}, ms a clip": number(row.milliseconds(part)) for part in PARTS},
                "saved, MB a clip": megabytes(row.saved_a_clip),
                "peak beyond standing, MB a clip": megabytes(row.beyond_a_clip),
                f"growth from T = {first.frames}: training": _growth(
                    row, first, lambda row: row.milliseconds("training")
                ),
                "inference": _growth(row, first, lambda row: row.milliseconds("inference")),
                "saved": _growth(row, first, lambda row: row.saved_a_clip),
                "peak": _growth(row, first, lambda row: row.beyond),
                "not measured": ", ".join(row.notes) or None,
            }
        )
    return dict_table(_without_single_process(lines))


def _growth(row: Row, first: Row, value: Callable[[Row], float | None]) -> str | None:
    """How much a value grew, over the growth of T."""
    now, before = value(row), value(first)
    return f"{now / before * first.frames / row.frames:.2f}" if now and before and row.frames != first.frames else None


def _series(row: Row) -> tuple[str, int, int]:
    return row.label, row.batch, row.processes


def saved_table(row: Row) -> str:
    """Saved MB a clip: one line a part of the model, one column a layer."""
    table = saved_by_part(row)
    layers = sorted({layer for cells in table.values() for layer in cells if layer is not None})
    sums = {part: sum(cells.values()) for part, cells in table.items()}
    total = sum(sums.values())
    lines = []
    for part in sorted(table, key=lambda part: -sums[part]):
        by_layer = {str(layer): number(table[part][layer]) if layer in table[part] else "" for layer in layers}
        share = f"{100 * sums[part] / total:.1f}"
        lines.append({"module": part, "MB a clip": number(sums[part]), "%": share, **by_layer})
    by_layer = {str(layer): number(sum(cells.get(layer, 0.0) for cells in table.values())) for layer in layers}
    lines.append({"module": "all", "MB a clip": number(total), "%": "100", **by_layer})
    return dict_table(lines)


def markdown(rows: Sequence[Row], detailed: Sequence[Row], meta: dict[str, Any], scales: bool) -> str:
    """The complete report. `detailed` are the rows whose saved bytes are listed by module."""
    rates = {row.precision: max(row.rates) for row in rows if row.rates and row.processes == 1}
    rate = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items())
    parts = ["# Costs\n", summary(rows), NOTES, f"Matrix rate: {rate}.\n"]
    if scales:
        parts += ["## By T and clips\n\n![](scaling.png)\n", scaling(rows)]
    parts += ["## Saved for backward, by module\n\n![](saved_bytes.png)\n"]
    parts += [f"{title(row)}; one column a layer.\n\n{saved_table(row)}" for row in detailed]
    parts += [environment(meta, [short_revision(meta["git"])])]
    return "\n".join(parts)


def title(row: Row) -> str:
    """What a row is, with the bytes it saves."""
    size = f": {megabytes(row.saved_a_clip)} MB a clip" if row.saved else ""
    return f"{row.label}, T = {row.frames}, {plural(row.batch, 'clip')}, {row.precision}{size}"
