"""The golden vectors of tests/golden and of the folder that GOLDEN_DIR adds: their files, and how they are filled."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from datasets.sampling import ClipSampling, val_indices
from datasets.sampling import test_indices as clip_indices

GOLDEN = Path(__file__).parents[1] / "golden"
ADDED = os.environ.get("GOLDEN_DIR")
FOLDERS = [GOLDEN / "td4v", GOLDEN / "aim", GOLDEN / "tadn", *([Path(ADDED)] if ADDED is not None else [])]
CASES = [path for folder in FOLDERS for path in sorted(folder.glob("*.json"))]
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}  # of the reference's root mean square


def fill_file(folder: Path, default: Path = GOLDEN) -> Path:
    """The fill rule of a folder: its own fill.py, that of the folder `golden` beside it, or the default one."""
    folders = [folder, folder.resolve().parent / "golden", default]
    found = [each / "fill.py" for each in folders if (each / "fill.py").is_file()]
    assert found, f"there is no fill.py in {', '.join(map(str, folders))}"
    return found[0]


@functools.cache
def load_fill(path: Path) -> ModuleType:
    """The module fill.py. Its draws are cached: the large cases share names and shapes."""
    spec = importlib.util.spec_from_file_location("golden_fill", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    normal = functools.cache(module._normal)
    module._normal = lambda key, shape: normal(key, tuple(shape))
    return module


def tensor(values: np.ndarray, case: dict) -> Tensor:
    """An input in the dtype of its case."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, case["dtype"]))


def check_sampling(cases: list[dict]) -> None:
    """Compare frame indices, which the cases number from 1."""
    assert cases
    for case in cases:
        style = case["style"].split("-")[0]
        length, frames, dense = case["num_frames"], case["T"], case["dense"]
        if style.startswith(("tdn", "tada")):
            sampling = ClipSampling(
                num_segments=frames,
                style=style,
                frames_per_segment=5 if style == "tdn" else 1,
                interval=case.get("interval", 8),
            )
            indices = sampling.test(length, case["clips"], fps=case.get("fps")).reshape(-1)
            if case["split"] == "val":
                assert sampling.val(length, fps=case.get("fps")).tolist() == indices.tolist()
            assert (indices + 1).tolist() == case["indices"], case
            continue
        if case["split"] == "val":
            indices = val_indices(length, frames, style, dense)
        else:
            indices = clip_indices(length, frames, case["clips"], style, dense).reshape(-1)
        assert (indices + 1).tolist() == case["indices"], case
