"""torch.hub entry points: the models of this repository for other programs.

model = torch.hub.load("PATH/TO/THIS/REPOSITORY", "td4v_side", source="local", num_classes=174)
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

dependencies = ["torch", "torchvision", "open_clip", "timm", "safetensors", "yaml"]  # torch.hub checks these

_ROOT = Path(__file__).resolve().parent
_PACKAGES = ("clip", "common", "configs", "engine", "models")  # without `datasets`, which may be Hugging Face's


def model(
    name: str = "td4v_side",
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    overrides: Sequence[str] = (),
) -> nn.Module:
    """A model, on the CPU, in evaluation mode.

    Args:
        name: of the model, as `network.model`: a key of models.registry.MODELS, such as aim, tdn or tadaformer.
        config: a YAML file or a mapping with the same sections. None: that of `weights`, else the defaults, which are
            CLIP ViT-B/16 with 8 frames of 224 pixels.
        num_classes: K; needed where neither `config` nor `weights` says it.
        weights: a checkpoint, a run folder (its model_best.pt), or a file of the model's authors.
        pretrained: load the frozen tower's pretrained weights, which may download them; False for random ones.
        overrides: `section.key=value`, as the command line's --set takes them.

    Returns:
        A module: video (B, T, 3, H, W), normalised with its `mean` and `std` (None: CLIP's) -> logits (B, K).

    Raises:
        ImportError: a package of the same name as one of this repository is already imported.
        ConfigError, TowerError, CheckpointError, WeightsError: one sentence that says what does not fit.
    """
    _import_packages()
    from configs.compare import fill_from_checkpoint, override_keys
    from configs.schema import load_config
    from engine import checkpoint_file
    from models.function import check_function
    from models.loading import load_weights
    from models.registry import build_model, with_pixel_statistics

    checkpoint = checkpoint_file.load_weights_file(weights) if weights is not None else None
    if config is None:
        config = (checkpoint and checkpoint.config) or {
            "data": {"dataset": "hub", "style": "kinetics", "num_classes": num_classes}
        }
    settings = [f"network.model={name}", *overrides]
    settings += [f"data.num_classes={num_classes}"] if num_classes is not None else []
    settings += ["network.init=false", "network.weights=null"] if not pretrained else []
    resolved = load_config(config, settings)
    if checkpoint is not None:
        check_function(checkpoint.config, resolved, checkpoint.path, explicit=override_keys(settings))
    built = build_model(
        resolved, pretrained=checkpoint is None or (resolved.network.init and not checkpoint.has_backbone)
    )
    if checkpoint is not None:
        load_weights(built, checkpoint.weights, str(checkpoint.path), backbone=checkpoint.missing_backbone)
        pixels = with_pixel_statistics(fill_from_checkpoint(resolved, checkpoint.config), built).data
        built.mean, built.std = pixels.mean, pixels.std
    return built.eval()


def td4v_side(**arguments: Any) -> nn.Module:
    """TD4V side-tuning: a side network beside a frozen tower. Arguments: see `model`."""
    return model("td4v_side", **arguments)


def td4v_finetune(**arguments: Any) -> nn.Module:
    """TD4V fine-tuning: TD4V inside the blocks of a frozen tower. Arguments: see `model`."""
    return model("td4v_finetune", **arguments)


def _import_packages() -> None:
    """Import this repository's packages by their path, so that `sys.path` and what it holds stay as they are."""
    for name in _PACKAGES:
        folder = _ROOT / name
        known = sys.modules.get(name)
        if known is not None and str(folder) not in map(str, getattr(known, "__path__", ())):
            raise ImportError(
                f"{_ROOT} has its own package {name}, but this process has already imported another one "
                f"({getattr(known, '__file__', None) or name}): load TD4V in a process of its own"
            )
    for name in _PACKAGES:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(
                name, _ROOT / name / "__init__.py", submodule_search_locations=[str(_ROOT / name)]
            )
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
