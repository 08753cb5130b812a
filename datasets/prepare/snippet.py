"""The part of a configuration that a prepared dataset decides: `data:` with roots, lists and labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from datasets.prepare.lists import write_text
from datasets.prepare.plan import SPLITS, Plan


def write_snippet(
    out: Path, plan: Plan, split: int | None, splits: Sequence[str], root: str, extracted: bool, decoder: str
) -> str:
    """Writes OUT/config_snippet.yaml and returns it.

    Args:
        split: number of the owners' split; None where they publish one.
        splits: those that have a list.
        root: of the list rows, absolute.
        extracted: the rows are folders of extracted frames; otherwise what the owners published.
    """
    frames = extracted or plan.published_frames
    data: dict[str, object] = {"dataset": plan.config_name}
    if plan.style:
        data["style"] = plan.style
    data.update(modality="RGB" if frames else "video", num_classes=len(plan.classes))
    if frames:
        data["image_tmpl"] = "{:06d}.jpg" if extracted else "{:05d}.jpg"
    else:
        data["decoder"] = decoder
    data.update({f"{name}_root": root if name in splits else None for name in SPLITS})
    data.update({f"{name}_list": os.path.abspath(out / f"{name}.txt") if name in splits else None for name in SPLITS})
    data["label_list"] = os.path.abspath(out / "labels.csv")
    body = yaml.safe_dump({"data": data}, sort_keys=False, indent=4, width=1000, allow_unicode=True)
    title = plan.title + (f", split {split}" if split else "")
    lines = [f"# {title}: replaces the same keys under `data:` of a configuration."]
    lines += [
        f"# There is no {name} list: none of its videos could be used." for name in plan.splits if name not in splits
    ]
    if plan.style:
        lines.append("# style: something where the direction of a motion decides the class; then nothing is mirrored.")
    text = "\n".join([*lines, body])
    write_text(out / "config_snippet.yaml", text)
    return text
