"""ImageNet weights of ResNets and ConvNeXts, from a file or a library's tag, for models that are not built on CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn

from common.weights_file import WeightsFileError, named_tensors, read, without_wrappers
from configs.schema import ConfigError
from models.parameters import log_fresh
from models.renaming import Rule, renamed

DEFAULT_TAG = "IMAGENET1K_V1"  # torchvision's name; for both kinds of networks the weights of their authors

# timm's and torchvision's names of a ConvNeXt's weights -> its authors'.
_CONVNEXT: tuple[Rule, ...] = (
    (r"^features\.0\.([01])\.", r"downsample_layers.0.\1."),  # torchvision
    (r"^features\.([246])\.([01])\.", lambda match: f"downsample_layers.{int(match[1]) // 2}.{match[2]}."),
    (r"^features\.([1357])\.(\d+)\.", lambda match: f"stages.{int(match[1]) // 2}.{match[2]}."),
    (r"\.block\.0\.", ".dwconv."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".pwconv1."),
    (r"\.block\.5\.", ".pwconv2."),
    (r"\.layer_scale$", ".gamma"),
    (r"^classifier\.0\.", "norm."),
    (r"^classifier\.2\.", "head."),
    (r"^stem\.([01])\.", r"downsample_layers.0.\1."),  # timm
    (r"^stages\.(\d)\.downsample\.([01])\.", r"downsample_layers.\1.\2."),
    (r"^(stages\.\d)\.blocks\.", r"\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)
_CLASSIFIERS = ("fc.", "head.")


def imagenet_weights(source: str | None, name: str) -> tuple[dict[str, Tensor], str]:
    """The weights of a network without its classifier, and where they come from.

    Args:
        source: a file, a tag of torchvision (`IMAGENET1K_V1`, the default) or one of timm (`fb_in22k`).
        name: torchvision's name of the network: resnet50, convnext_tiny.

    Returns:
        Weights under torchvision's names (ResNet) or those of the authors (ConvNeXt).

    Raises:
        ConfigError: there is no such file or tag, it cannot be downloaded, or it holds another network.
    """
    source = source or DEFAULT_TAG
    looks_like_file = "/" in source or Path(source).suffix in (".pt", ".pth", ".bin", ".safetensors")
    values = _read(Path(source)) if looks_like_file else _download(source, name)
    values = _canonical(values)
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
    expected = _canonical(network.state_dict())
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    problem = next((f"has no {key}" for key in expected if key not in values and key not in optional), None)
    problem = problem or next((f"has {key}, which {name} has not" for key in values if key not in expected), None)
    for key in expected.keys() & values.keys():
        if values[key].shape != expected[key].shape:
            problem = problem or f"{key} is {tuple(values[key].shape)}, in {name} {tuple(expected[key].shape)}"
    if problem:
        raise ConfigError(f"network.weights: {source} does not hold the weights of {name}: {problem}")
    return values, source


def _canonical(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the classifier; a ConvNeXt's under its authors' names, vectors with one axis."""
    values = {renamed(key, _CONVNEXT): value for key, value in values.items()}
    values = {key: value for key, value in values.items() if not key.startswith(_CLASSIFIERS)}
    return {key: value.flatten() if key.endswith(".gamma") else value for key, value in values.items()}


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"network.weights: no file {path}")
    try:
        return without_wrappers(named_tensors(path, read(path).content))
    except WeightsFileError as error:
        raise ConfigError(f"network.weights: {error}") from None
    except OSError as error:
        raise ConfigError(f"network.weights: {path}: cannot be read ({error.strerror})") from None


def _download(tag: str, name: str) -> Mapping[str, Tensor]:
    tags = {each.name: each for each in torchvision.models.get_model_weights(name)}
    timm_tags = [each.split(".", 1)[1] for each in timm.list_pretrained(f"{name}.*")]
    if tag not in tags and tag not in timm_tags:
        known = ", ".join([*tags, *timm_tags])
        raise ConfigError(f"network.weights: {tag!r} is neither a file nor a tag of {name}; its tags are {known}")
    try:
        if tag in tags:
            return tags[tag].get_state_dict(progress=False, check_hash=True)
        return timm.create_model(f"{name}.{tag}", pretrained=True).state_dict()
    except Exception as error:  # whatever hub, network and disk raise
        raise ConfigError(
            f"network.weights: cannot download {name} {tag} ({type(error).__name__}): name a file, or set network.init "
            "to false for random weights"
        ) from None


def require_depths(depths: Sequence[int] | None) -> None:
    """Raise ConfigError where a stage has no block."""
    if depths is not None and min(depths) < 1:
        raise ConfigError(f"network.options.depths: each stage has at least one block, not {list(depths)}")


def require_image_network(options: object, *keys: str) -> None:
    """Raise ConfigError where options that change the sizes of the image network are not the defaults."""
    for key in keys:
        if getattr(options, key) != getattr(type(options), key):
            raise ConfigError(
                f"network.options.{key}: there are no ImageNet weights for another size; set network.init to false"
            )


def load_backbone(model: nn.Module, values: Mapping[str, Tensor], source: str) -> None:
    """Load weights that a model shares with an image network, under the model's names, and log what starts fresh.

    Raises:
        ConfigError: the model has no such weight, or of another shape.
    """
    current = model.state_dict()
    for key, value in values.items():
        if key not in current or current[key].shape != value.shape:
            shape = tuple(current[key].shape) if key in current else "nothing"
            raise ConfigError(f"network.weights: {source}: {key} is {tuple(value.shape)}, in the model {shape}")
    model.load_state_dict(values, strict=False)
    model.origin = model.origin._replace(weights=source)
    log_fresh(model, [name for name, _ in model.named_parameters() if name not in values])
