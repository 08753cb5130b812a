"""What scripts/profile.py measured, to be read: a row's own figures, Markdown tables.

Lives here: the row, clips a second and shares from it, grouping of modules, all text. Does not live here: measuring
(engine/cost.py), pictures (profile_picture.py). MB are 10^6 bytes, GFLOPs 10^9 with 2 FLOPs a multiply-add.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.profiling import Saved
from scripts.reports import dict_table

PARTS = ("training", "inference")
DEPTH = 2  # names kept below a layer's number, and of modules that are in no layer
COPIES = "copies of weights"

NOTES = """\
GFLOPs: matrix products and convolutions, 2 FLOPs a multiply-add, of one eager pass that is really made; training is
forward and backward. They are the model's own: nothing that is computed a second time counts (`network.recompute` is off
for the count, fused attention's scores count once), so MFU is work of the model over time, whatever the kernels do besides.
Saved: storages that autograd saves in one forward pass in training mode, each once, without parameters and buffers.
Peak: of tensors in one training step (forward, backward, optimizer); "standing" are weights, buffers, optimizer state and
the batch, which live all the time. On a GPU by torch's allocator, on a CPU by torch.profiler's note of every allocation.
Clips/s: median of the repeats (lowest to highest). MFU: GFLOPs a clip x median clips/s over the rate of a square matrix
product in the same number format, the best of those measured in between; of several processes on a CPU, with as many
threads as they have together; of several GPUs, that of one times their number.
With solver.compile GFLOPs and saved bytes are the eager model's, the rest the compiled one's. Clips are those of one
batch of one process. Weights are random (network.init false), the video too; BatchNorm is in training mode in training.
"""


@dataclass
class Row:
    """One configuration with T frames and one number of clips. Sizes in bytes, times in seconds, FLOPs a clip.

    Empty or None is what was not measured; `notes` says why, by part. `held` lives all the time, `beyond` is the peak
    above it. `batch` counts the clips of one process, `threads` those of all.
    """

    label: str
    method: str
    frames: int
    batch: int
    precision: str
    recompute: bool
    total: int
    tuned: int
    forward_flops: float
    training_flops: float
    processes: int = 1
    threads: int | None = None
    saved: list[Saved] = field(default_factory=list)
    held: int | None = None
    beyond: int | None = None
    training: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """What `to_dict` gave. Raises TypeError for another version's."""
        own = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        return cls(**own | {"saved": [Saved(**entry) for entry in own["saved"]]})

    @property
    def saved_a_clip(self) -> float | None:
        return sum(entry.bytes for entry in self.saved) / self.batch if self.saved else None

    @property
    def peak(self) -> int | None:
        return None if self.beyond is None else self.held + self.beyond

    def clips_per_s(self, part: str) -> tuple[float, float, float] | None:
        """Median, lowest, highest, of all processes together."""
        rates = [self.batch * self.processes / time for time in getattr(self, part)]
        return (statistics.median(rates), min(rates), max(rates)) if rates else None

    def mfu(self, part: str) -> float | None:
        """Share of the matrix rate, 0..1."""
        rate, flops = self.clips_per_s(part), {"training": self.training_flops, "inference": self.forward_flops}[part]
        return flops * rate[0] / max(self.rates) if rate and self.rates else None

    def to_dict(self) -> dict[str, Any]:
        """All of it, raw and derived, as plain values."""
        derived = {"saved_bytes_a_clip": self.saved_a_clip, "peak_bytes": self.peak}
        for part in PARTS:
            derived |= {f"{part}_clips_per_s": self.clips_per_s(part), f"{part}_mfu": self.mfu(part)}
        return asdict(self) | derived


def place(module: str) -> tuple[int | None, str]:
    """Where a module belongs: the number of its layer, and what it is in it.

    `side.layers.4.block.attn.qkv` is (4, "side.layers.*.block.attn"), `side.stem.conv` is (None, "side.stem").
    """
    names = module.split(".")
    at = next((index for index, name in enumerate(names) if name.isdigit()), None)
    if at is None:
        return None, ".".join(names[:DEPTH]) or "the model itself"
    above = names[:at] if at <= DEPTH else [names[0], "…", names[at - 1]]
    return int(names[at]), ".".join([*above, "*", *names[at + 1 : at + 1 + DEPTH]]).replace(".….", "…")


def by_place(row: Row) -> dict[str, dict[int | None, float]]:
    """Saved MB a clip by part and layer, in the order of the forward pass, copies of weights last."""
    table: dict[str, dict[int | None, float]] = {}
    for entry in row.saved:
        layer, part = place(entry.module)
        cells = table.setdefault(COPIES if entry.copied_weights else part, {})
        cells[layer] = cells.get(layer, 0.0) + entry.bytes / row.batch / 1e6
    return {part: table[part] for part in sorted(table, key=lambda part: part == COPIES)}


def summary(rows: Sequence[Row]) -> str:
    """The efficiency table, one line a row, and below it why some of it could not be measured."""
    reasons = list(dict.fromkeys(note for row in rows for note in row.notes.values()))
    signs = {note: f"({place})" for place, note in enumerate(reasons, start=1)}
    below = "".join(f"\n{sign} {note}\n" for note, sign in signs.items())
    return dict_table(_without_single([_line(row, signs) for row in rows])) + below


def _without_single(lines: list[dict[str, str | None]]) -> list[dict[str, str | None]]:
    """The numbers of processes and threads are told only where there are several processes."""
    if all(line["processes"] == "1" for line in lines):
        return [line | {"processes": None, "threads": None} for line in lines]
    return lines


def _line(row: Row, signs: dict[str, str]) -> dict[str, str | None]:
    reasons = {part: signs[note] for part, note in row.notes.items()}
    return {
        "configuration": row.label,
        "precision": row.precision,
        "processes": str(row.processes),
        "threads": None if row.threads is None else str(row.threads),
        "T": str(row.frames),
        "clips": str(row.batch),
        "parameters, M": number(row.total / 1e6),
        "tuned, M": number(row.tuned / 1e6),
        "GFLOPs a clip, forward": number(row.forward_flops / 1e9),
        "GFLOPs a clip, training": number(row.training_flops / 1e9),
        "saved, MB a clip": None if row.saved_a_clip is None else number(row.saved_a_clip / 1e6),
        "peak, MB": reasons.get("training") if row.peak is None else number(row.peak / 1e6),
        "of it standing": None if row.held is None else number(row.held / 1e6),
        **{key: text for part in PARTS for key, text in _speed(row, part, reasons.get(part)).items()},
    }


def _speed(row: Row, part: str, reason: str | None) -> dict[str, str | None]:
    rate, share = row.clips_per_s(part), row.mfu(part)
    text = reason if rate is None else "{} ({} to {})".format(*map(number, rate))
    return {f"{part}, clips/s": text, f"{part} MFU": None if share is None else f"{100 * share:.0f} %"}


def number(value: float) -> str:
    """Three digits or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def scaling(rows: Sequence[Row]) -> str:
    """Time and memory by T and clips, and how they grow: 1.00 is in proportion to T, below is slower."""
    lines = []
    for row in rows:
        first = next(other for other in rows if _series(other) == _series(row))
        lines.append(
            {
                "configuration": row.label,
                "processes": str(row.processes),
                "clips": str(row.batch),
                "T": str(row.frames),
                **{f"{part}, ms a clip": _milliseconds(row, part) for part in PARTS},
                "saved, MB a clip": None if not row.saved else number(row.saved_a_clip / 1e6),
                "peak beyond standing, MB a clip": None if row.beyond is None else number(row.beyond / row.batch / 1e6),
                f"to T = {first.frames}, by T: training": _growth(row, first, milliseconds(row, "training"), milliseconds(first, "training")),
                "inference": _growth(row, first, milliseconds(row, "inference"), milliseconds(first, "inference")),
                "saved": _growth(row, first, row.saved_a_clip, first.saved_a_clip),
                "peak": _growth(row, first, row.beyond, first.beyond),
                "": None if not row.notes else ", ".join(f"no {part}" for part in row.notes),
            }
        )  # fmt: skip
    return dict_table(_without_single(lines))


def _series(row: Row) -> tuple[str, int, int]:
    return row.label, row.batch, row.processes


def milliseconds(row: Row, part: str) -> float | None:
    """Of one clip, the median."""
    rate = row.clips_per_s(part)
    return None if rate is None else 1000 / rate[0]


def _milliseconds(row: Row, part: str) -> str | None:
    value = milliseconds(row, part)
    return None if value is None else number(value)


def _growth(row: Row, first: Row, value: float | None, before: float | None) -> str | None:
    if not value or not before or row.frames == first.frames:
        return None
    return f"{value / before * first.frames / row.frames:.2f}"


def saved_table(row: Row) -> str:
    """Saved MB a clip: one line a part of the model, one column a layer."""
    table = by_place(row)
    layers = sorted({layer for cells in table.values() for layer in cells if layer is not None})
    whole = sum(sum(cells.values()) for cells in table.values())
    lines = [
        {
            "module": part,
            "MB a clip": number(sum(cells.values())),
            "%": f"{100 * sum(cells.values()) / whole:.1f}",
            **{str(layer): number(cells[layer]) if layer in cells else "" for layer in layers},
        }
        for part, cells in sorted(table.items(), key=lambda item: -sum(item[1].values()))
    ]
    sums = {layer: sum(cells.get(layer, 0.0) for cells in table.values()) for layer in layers}
    lines.append(
        {"module": "all", "MB a clip": number(whole), "%": "100"} | {str(k): number(v) for k, v in sums.items()}
    )
    return dict_table(lines)


def markdown(rows: Sequence[Row], shown: Sequence[Row], meta: dict[str, Any], scales: bool) -> str:
    """The whole report. `shown` are the rows whose saved bytes are set out by module."""
    rates = {row.precision: max(row.rates) for row in rows if row.rates and row.processes == 1}
    parts = ["# What it costs\n", summary(rows)]
    parts += [NOTES]
    parts += [
        "Matrix rate: " + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items()) + ".\n"
    ]
    if scales:
        parts += ["## By T and clips\n\n![](scaling.png)\n", scaling(rows)]
    parts += ["## Saved for backward, by module\n\n![](saved_bytes.png)\n"]
    parts += [f"{title(row)}; columns: layers.\n\n{saved_table(row)}" for row in shown]
    hardware, revision = meta["hardware"], meta["git"]
    gpus = ", ".join(gpu["name"] for gpu in hardware["gpus"]) or "none"
    parts += [
        "## Where\n",
        f"- `{' '.join(meta['command'])}`",
        f"- revision {revision['revision']}{' with uncommitted changes' if revision['dirty'] else ''}, {meta['started']}",
        f"- {hardware['cpu']}, {hardware['cores']} cores, {meta['threads']} threads, {hardware['memory_gib']} GiB; GPUs: {gpus}; device: {meta['device']}",
        f"- {', '.join(f'{name} {version}' for name, version in meta['versions'].items())}\n",
    ]
    return "\n".join(parts)


def title(row: Row) -> str:
    """What a row is, with the bytes it keeps."""
    size = f": {number(row.saved_a_clip / 1e6)} MB a clip" if row.saved else ""
    return f"{row.label}, T = {row.frames}, {clips(row.batch)}, {row.precision}{size}"


def clips(count: int) -> str:
    return f"{count} clip{'s' * (count != 1)}"
