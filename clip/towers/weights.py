"""CLIP's weights in the formats people have them in: finding, fetching and reading them. No module lives here.

Lives here: open_clip's tags, OpenAI's archives, local files in the layouts of open_clip and Hugging Face's
transformers, and what such files say of their activation. Does not live here: the towers they go into (backbone.py,
text.py).
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from clip.towers.base import TowerError

# OpenAI's names, the open_clip models that have their activation, and the archives users put into clip_pretrain/.
OPENAI = {
    "ViT-B/32": ("ViT-B-32-quickgelu", "ViT-B-32.pt"),
    "ViT-B/16": ("ViT-B-16-quickgelu", "ViT-B-16.pt"),
    "ViT-L/14": ("ViT-L-14-quickgelu", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("ViT-L-14-336-quickgelu", "ViT-L-14-336px.pt"),
}

# What stands beside the towers in a whole CLIP's file: of its loss, and numbers that OpenAI's archives keep.
NOT_TEXT = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size")


def find_weights(arch: str, weights: str | None, folder: str | Path = "clip_pretrain") -> str:
    """Where the weights of a tower come from: what is asked for, else OpenAI's archive in `folder`, else its tag.

    Returns:
        a path to a file, or an open_clip tag.

    Raises:
        TowerError: a missing file, or an arch without a default.
    """
    if weights is not None:
        looks_like_file = "/" in weights or Path(weights).suffix in (".pt", ".pth", ".bin", ".safetensors")
        if looks_like_file and not Path(weights).is_file():
            raise TowerError(f"network.weights: no file {weights}")
        return weights
    if arch not in OPENAI:
        raise TowerError(
            f"network.weights: {arch} needs an open_clip tag or a file, or set network.init to false for random weights"
        )
    archive = Path(folder) / OPENAI[arch][1]
    return str(archive) if archive.is_file() else "openai"


def stated_activation(name: str, source: str) -> bool | None:
    """Whether weights say that they are for QuickGELU: True, False (for GELU), or None if nothing says it.

    Args:
        name: of open_clip's model. source: of `find_weights`.

    Raises:
        TowerError: neither a file nor a tag of `name`.
    """
    if Path(source).is_file():
        return _stated_by_file(Path(source))
    return bool(_tag(name, source).get("quick_gelu", False))


def stated_pixels(name: str, source: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of the pixels that weights were trained on, or None for a file, which does not say them.

    Arguments as `stated_activation`. Raises TowerError for neither a file nor a tag of `name`.
    """
    if Path(source).is_file():
        return None
    tag = _tag(name, source)
    return (tuple(tag["mean"]), tuple(tag["std"])) if tag.get("mean") and tag.get("std") else None


def clip_tags(name: str) -> list[str]:
    """open_clip's tags of a model's weights, by its own name."""
    return open_clip.list_pretrained_tags_by_model(name)


def fetch_weights(name: str, source: str) -> Path:
    """The file of a model's weights, downloaded if `source` is a tag. Arguments as `stated_activation`.

    Raises:
        TowerError: neither a file nor a tag of `name`, or a download that fails.
    """
    if Path(source).is_file():
        return Path(source)
    try:
        return Path(open_clip.download_pretrained(_tag(name, source)))
    except TowerError:
        raise
    except Exception as error:
        raise TowerError(
            f"cannot download {name} {source} ({type(error).__name__}): put the file into clip_pretrain/ or name it in "
            "network.weights, or set network.init to false"
        ) from None


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All weights in a file, under open_clip's names, in the file's dtypes.

    Reads safetensors and torch files (`.bin`, `.pt`; bare or under `state_dict`, with or without `module.`) in the
    layouts of open_clip and of Hugging Face's transformers (CLIPModel, CLIPVisionModel), and OpenAI's own TorchScript
    archives in half precision.

    Raises:
        TowerError: unreadable file, a pickle with code, no state_dict.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            values = load_file(path)
        elif _is_torchscript(path):
            values = torch.jit.load(str(path), map_location="cpu").state_dict()
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TowerError(
            f"{path}: cannot be read as CLIP weights ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        ) from None
    values = values.get("state_dict", values) if isinstance(values, Mapping) else values
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise TowerError(f"{path}: holds no state_dict")
    values = {key.removeprefix("module."): value for key, value in values.items()}
    if "vision_model.embeddings.class_embedding" in values:
        values = _from_transformers(values)
    return values


def read_visual_weights(path: str | Path) -> dict[str, Tensor]:
    """The vision tower's weights in a file, under open_clip's names without `visual.`, in float32.

    Formats as in `read_state_dict`. Raises TowerError too for a file without a vision tower.
    """
    values = read_state_dict(path)
    visual = {key.removeprefix("visual."): value.float() for key, value in values.items() if key.startswith("visual.")}
    if not visual and "conv1.weight" in values:
        visual = {key: value.float() for key, value in values.items()}
    if "conv1.weight" not in visual:
        raise TowerError(f"{path}: holds no CLIP vision transformer (no visual.conv1.weight)")
    return visual


@dataclass(frozen=True)
class TextWeights:
    """What a CLIP has besides its vision tower, in float32.

    text: the text tower's weights under the names of open_clip's TextTransformer. projection: (D, E), from the vision
    tower's width to the space that it shares with the text tower. logit_scale: (), a logarithm.
    """

    text: dict[str, Tensor]
    projection: Tensor
    logit_scale: Tensor


def read_text_weights(path: str | Path) -> TextWeights:
    """What a file holds of CLIP besides the vision tower. Formats as in `read_state_dict`.

    A bias of the logits (`logit_bias`), the same for all classes, changes no share of a class and is left out.

    Raises:
        TowerError: a file of the vision tower alone, or as `read_state_dict`.
    """
    values = read_state_dict(path)
    text = {key.removeprefix("text."): value for key, value in values.items() if key.startswith("text.")}
    if not text:  # beside the vision tower, not in a module of its own
        text = {key: value for key, value in values.items() if not key.startswith("visual.") and key not in NOT_TEXT}
    for key, found in (("token_embedding.weight", text), ("visual.proj", values), ("logit_scale", values)):
        if key not in found:
            raise TowerError(f"{path}: network.head text needs a whole CLIP, and this file has no {key}")
    text = {key: value.float() for key, value in text.items()}
    return TextWeights(text, values["visual.proj"].float(), values["logit_scale"].float().reshape(()))


def check_fit(values: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path, name: str) -> None:
    """Make sure that `values` of a file has the names and shapes of `own`, a model's. Raises TowerError."""
    unfit = [key for key in own if key not in values or values[key].shape != own[key].shape]
    unknown = [key for key in values if key not in own]
    if unfit or unknown:
        key = (unfit or unknown)[0]
        found = tuple(values[key].shape) if key in values else "nothing"
        wanted = tuple(own[key].shape) if key in own else "nothing"
        raise TowerError(
            f"{path}: does not fit {name}: {len(unfit) + len(unknown)} keys differ, first {key}: "
            f"{found} in the file, {wanted} in the model"
        )


def _tag(name: str, source: str) -> dict:
    """open_clip's account of the tag `source` of a model."""
    tag = open_clip.pretrained.get_pretrained_cfg(name, source)
    if not tag:
        tags = ", ".join(clip_tags(name)) or "none"
        raise TowerError(f"network.weights: {source!r} is neither a file nor a tag of {name}; its tags are {tags}")
    return tag


def _from_transformers(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's CLIPModel, or its vision tower alone, under open_clip's names."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",  # their spelling
        "post_layernorm": "ln_post",
        "final_layer_norm": "ln_final",
        "encoder.layers": "transformer.resblocks",
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    towers = {"vision_model": "visual.", "text_model": ""}
    projections = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
    renamed = {projections[key]: value.T for key, value in values.items() if key in projections}
    renamed |= {key: value for key, value in values.items() if key == "logit_scale"}
    for key, value in values.items():
        tower, _, new = key.partition(".")
        if tower not in towers or key.endswith("position_ids") or re.search(r"\.[kv]_proj\.", key):
            continue  # keys and values are taken together with their queries
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        if ".q_proj." in key:
            value = torch.cat([values[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            new = re.sub(r"self_attn\.q_proj\.(weight|bias)", r"attn.in_proj_\1", new)
        renamed[towers[tower] + new] = value
    return renamed


def _is_torchscript(path: Path) -> bool:
    """Whether a torch file is a TorchScript archive: those hold code and constants beside the tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())


def _stated_by_file(path: Path) -> bool | None:
    """QuickGELU or not, where it is said: by OpenAI's archives, by open_clip_config.json or transformers' config.json
    beside the file."""
    if path.suffix != ".safetensors" and _is_torchscript(path):
        return True
    ours, theirs = path.with_name("open_clip_config.json"), path.with_name("config.json")
    if ours.is_file():
        values = json.loads(ours.read_text())
        return bool(values.get("model_cfg", values).get("quick_gelu", False))
    if theirs.is_file():
        activation = json.loads(theirs.read_text()).get("vision_config", {}).get("hidden_act")
        return None if activation is None else activation == "quick_gelu"
    return None
