"""TensorBoard's event files of a run, and what a resumed run takes back from them.

A resumed run rewrites the event files without the points that it will log again. SummaryWriter's `purge_step` cannot
replace that: it hides only points of later steps, so the row of an epoch that is validated again at the same step
appears twice; a row that was saved but not logged before a kill has to be found missing; and TensorBoard's default
loader (tensorboard-data-server) ignores it, so points of the future stay until the run passes them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.text import plural

logger = logging.getLogger("td4v")


class EventLog:
    """Curves and images in a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    @property
    def writer(self) -> Any:
        """TensorBoard's writer, made at its first use."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._writer = SummaryWriter(str(self.folder))
        return self._writer

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Add one point to each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def add_row(self, row: dict[str, Any]) -> None:
        """Add the numbers of an epoch under `epoch/`, at its last optimizer step."""
        self.add_scalars(_points(row), row["step"])

    def add_image(self, name: str, image: Tensor, step: int) -> None:
        """Add an image (3, H, W) in 0..1."""
        self.writer.add_image(name, image, step)

    def flush(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def rewind(self, history: Sequence[dict[str, Any]], step: int, complete: bool = False) -> None:
        """Make the curves what they were at a checkpoint: the rows of `history`, and points up to `step`.

        Args:
            complete: the files should hold the rows before `step`; a warning says if they do not. A process that is
                killed between saving and writing leaves the row of that step out.
        """
        found = _rewrite(self.folder, history, step)
        before = [row for row in history if row["step"] < step]
        lost = [row for row in before if any((name, row["step"]) not in found for name in _points(row))]
        if complete and lost:
            logger.warning(
                "%s: the event files miss points of %s, which are written again from the checkpoint; those of single "
                "steps are lost where the files are",
                *(self.folder, plural(len(lost), "epoch")),
            )
        for row in history:
            for name, value in _points(row).items():
                if (name, row["step"]) not in found:
                    self.add_scalars({name: value}, row["step"])


def _points(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by the names of their curves."""
    return {f"epoch/{name}": value for name, value in row.items() if value is not None}


def _rewrite(folder: Path, history: Sequence[dict[str, Any]], step: int) -> set[tuple[str, int]]:
    """Join the event files into one, without points after `step`, of epochs outside `history`, or logged twice.

    Returns the (name, step) of all points that are left. Whenever this is interrupted, no such point is lost.
    """
    files = sorted(folder.glob("events.out.tfevents.*"), key=_age)
    if not files:
        return set()
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    epoch_points = {(name, row["step"]) for row in history for name in _points(row)}
    kept: dict[tuple[str, int], bytes] = {}
    header = b""
    for file in files:
        records, damages = _records(file.read_bytes())
        if damages:
            logger.warning("%s: damaged in %s: the points of curves there are lost", file, plural(damages, "place"))
        for record in records:
            event = Event.FromString(record)
            header = header or (record if event.file_version else b"")
            for value in event.summary.value:
                point = (value.tag, event.step)
                if event.step <= step and (not value.tag.startswith("epoch/") or point in epoch_points):
                    kept[point] = record
    partial = folder / ".events.partial"
    with open(partial, "wb") as file:
        writer = RecordWriter(file)
        in_order = sorted(kept.items(), key=lambda item: item[0][1])
        for record in ([header] if header else []) + [record for _, record in in_order]:
            writer.write(record)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, files[-1])
    for file in files[:-1]:
        file.unlink()
    return set(kept)


def _records(data: bytes) -> tuple[list[bytes], int]:
    """The whole records of an event file, and in how many places it is damaged; a last record cut short is none.

    TensorBoard's own reader ends at the first damage without a word.
    """
    place, records, damages = 0, [], 0
    while place < len(data):
        if (record := _record_at(data, place)) is None:
            following = (later for later in range(place + 1, len(data) - 15) if _record_at(data, later) is not None)
            later = next(following, None)
            damages += later is not None or not _is_cut(data, place)
            if later is None:
                break
            place = later
        else:
            records.append(record)
            place += len(record) + 16
    return records, damages


def _record_at(data: bytes, place: int) -> bytes | None:
    """The record that begins there, if it is whole: its length (8 bytes), checksum (4), content, checksum (4)."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = int.from_bytes(data[place : place + 8], "little")
    if place + length + 16 > len(data) or masked_crc32c(data[place : place + 8]) != _number(data, place + 8):
        return None
    content = data[place + 12 : place + 12 + length]
    return content if masked_crc32c(content) == _number(data, place + 12 + length) else None


def _is_cut(data: bytes, place: int) -> bool:
    """Whether the file ends inside the record that begins there."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    header = data[place : place + 8]
    if place + 12 > len(data):
        return True
    return (
        masked_crc32c(header) == _number(data, place + 8) and int.from_bytes(header, "little") + 16 > len(data) - place
    )


def _number(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 4], "little")


def _age(file: Path) -> tuple[float, float]:
    """When an event file was begun, according to its name, and when it was last written."""
    begun = file.name.split(".")[3]
    return (float(begun) if begun.isdigit() else 0.0, file.stat().st_mtime)
