"""The part of a configuration that a prepared dataset decides: `data:` with roots, lists and labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from datasets.prepare.lists import write_text
from datasets.prepare.plan import Plan


def write_snippet(out: Path, plan: Plan, splits: Sequence[str], root: str, extracted: bool) -> str:
    """Writes OUT/config_snippet.yaml and returns it.

    Args:
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
    data.update({f"{split}_root": root for split in splits})
    data.update({f"{split}_list": os.path.abspath(out / f"{split}.txt") for split in splits})
    data["label_list"] = os.path.abspath(out / "labels.csv")
    body = yaml.safe_dump({"data": data}, sort_keys=False, indent=4, width=1000, allow_unicode=True)
    lines = ["# Replaces the same keys under `data:` of a configuration."]
    if plan.style:
        lines.append("# style: something where the direction of a motion decides the class; then nothing is mirrored.")
    text = "\n".join([*lines, body])
    write_text(out / "config_snippet.yaml", text)
    return text
