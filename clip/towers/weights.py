"""CLIP's weights in the formats people have them in: where they are, and one handle that reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from clip.towers.base import TowerError
from common import weights_file
from common.weights_file import WeightsFile, WeightsFileError, named_tensors, unusable, without_wrappers

# OpenAI's names, the open_clip models that have their activation, and the archives users put into clip_pretrain/.
OPENAI = {
    "ViT-B/32": ("ViT-B-32-quickgelu", "ViT-B-32.pt"),
    "ViT-B/16": ("ViT-B-16-quickgelu", "ViT-B-16.pt"),
    "ViT-L/14": ("ViT-L-14-quickgelu", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("ViT-L-14-336-quickgelu", "ViT-L-14-336px.pt"),
}

# Keys of a complete CLIP's file that belong to neither tower: the loss's, and numbers in OpenAI's archives.
_NOT_TEXT = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size")


def find_weights(arch: str, weights: str | None, folder: str | Path = "clip_pretrain") -> str:
    """Where the weights of a tower are: `weights` if given, else OpenAI's archive in `folder`, else OpenAI's tag.

    Returns:
        A path to a file, or an open_clip tag.

    Raises:
        TowerError: the file is missing, or `arch` has no default.
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


def clip_tags(name: str) -> list[str]:
    """open_clip's tags of a model's weights, by open_clip's name."""
    return open_clip.list_pretrained_tags_by_model(name)


@dataclass(frozen=True)
class TextWeights:
    """What a CLIP has besides its vision tower, in float32.

    Attributes:
        text: the text tower's weights under the names of open_clip's TextTransformer.
        projection: (D, E), from the vision tower's width to the space shared with the text tower.
        logit_scale: (), a logarithm.
    """

    text: dict[str, Tensor]
    projection: Tensor
    logit_scale: Tensor


class ClipWeights:
    """The weights of one CLIP, from a file or from one of open_clip's tags.

    A tag's file is downloaded, and a file is read, once, when they are first needed.

    Reads safetensors and torch files, whatever common.weights_file finds in them, in the layouts of open_clip and of
    Hugging Face's transformers (CLIPModel, CLIPVisionModel), and OpenAI's own TorchScript archives in half precision,
    whose code is not run.

    Args:
        arch: OpenAI's or open_clip's name of the model.
        source: a path or a tag, as `find_weights` returns it.

    Raises:
        TowerError: `source` is neither a file nor a tag of the model. Every property and method that reads raises it
            too, for a failed download and for a file that cannot be read.
    """

    def __init__(self, arch: str, source: str | Path):
        self.name = OPENAI[arch][0] if arch in OPENAI else arch
        self.source = str(source)
        self._tag: Mapping[str, Any] | None = None
        if not Path(source).is_file():
            self._tag = open_clip.pretrained.get_pretrained_cfg(self.name, self.source)
            if not self._tag:
                tags = ", ".join(clip_tags(self.name)) or "none"
                raise TowerError(
                    f"network.weights: {self.source!r} is neither a file nor a tag of {self.name}; its tags are {tags}"
                )

    @cached_property
    def path(self) -> Path:
        """The file, downloaded if the source is a tag."""
        if self._tag is None:
            return Path(self.source)
        try:
            return Path(open_clip.download_pretrained(self._tag))
        except Exception as error:  # whatever hub, network and disk raise
            raise TowerError(
                f"cannot download {self.name} {self.source} ({type(error).__name__}): put the file into clip_pretrain/ "
                "or name it in network.weights, or set network.init to false"
            ) from None

    @cached_property
    def quick_gelu(self) -> bool | None:
        """Whether the weights were trained with QuickGELU (True) or GELU (False); None if nothing says it.

        A tag says it, and so do OpenAI's archives, and open_clip_config.json or transformers' config.json beside a file.
        """
        if self._tag is not None:
            return bool(self._tag.get("quick_gelu", False))
        if self._file.is_torchscript:
            return True
        openclip_config, config = (self.path.with_name(name) for name in ("open_clip_config.json", "config.json"))
        if openclip_config.is_file():
            values = _read_json(openclip_config)
            return bool(values.get("model_cfg", values).get("quick_gelu", False))
        if config.is_file():
            activation = _read_json(config).get("vision_config", {}).get("hidden_act")
            return None if activation is None else activation == "quick_gelu"
        return None

    @property
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and std of the pixels that the weights were trained on; None for a file, which does not say them."""
        tag = self._tag or {}
        return (tuple(tag["mean"]), tuple(tag["std"])) if tag.get("mean") and tag.get("std") else None

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """All weights under open_clip's names, in the file's dtypes."""
        try:
            values = without_wrappers(named_tensors(self.path, self._file.content))
        except WeightsFileError as error:
            raise TowerError(str(error)) from None
        return _from_transformers(values) if "vision_model.embeddings.class_embedding" in values else values

    @cached_property
    def _file(self) -> WeightsFile:
        return read_file(self.path)

    def visual(self) -> dict[str, Tensor]:
        """The vision tower's weights under open_clip's names without `visual.`, in float32."""
        values, prefix = self.state_dict, "visual."
        if not any(key.startswith(prefix) for key in values) and "conv1.weight" in values:
            prefix = ""  # a file of the vision tower alone
        visual = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        if "conv1.weight" not in visual:
            first = {key.split(".")[0] for key in values}
            begin = f"; all keys begin with {first.pop()}." if len(first) == 1 else ""
            raise TowerError(f"{self.path}: holds no CLIP vision transformer (no visual.conv1.weight{begin})")
        return self._floats(visual)

    def text(self) -> TextWeights:
        """Everything but the vision tower.

        A bias of the logits (`logit_bias`) is left out: it is the same for all classes and changes no probability.
        """
        values = self.state_dict
        text = {key.removeprefix("text."): value for key, value in values.items() if key.startswith("text.")}
        if not text:  # beside the vision tower, not in a module of its own
            text = {k: value for k, value in values.items() if not k.startswith("visual.") and k not in _NOT_TEXT}
        for key, found in (("token_embedding.weight", text), ("visual.proj", values), ("logit_scale", values)):
            if key not in found:
                raise TowerError(f"{self.path}: network.head text needs a complete CLIP, and this file has no {key}")
        return TextWeights(
            text=self._floats(text),
            projection=values["visual.proj"].float(),
            logit_scale=values["logit_scale"].float().reshape(()),
        )

    def _floats(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values in float32. Raises TowerError for integers, which are no weights."""
        if odd := next((key for key, value in values.items() if not value.is_floating_point()), None):
            raise TowerError(
                f"{self.path}: its {odd} holds {str(values[odd].dtype).removeprefix('torch.')}, not floats"
            )
        return {key: value.float() for key, value in values.items()}


def read_file(path: Path) -> WeightsFile:
    """As common.weights_file.read, for a tower. Raises TowerError."""
    try:
        return weights_file.read(path)
    except WeightsFileError as error:
        raise TowerError(str(error)) from None
    except OSError as error:
        raise TowerError(f"{path}: cannot be read ({error.strerror})") from None


def check_fit(values: Mapping[str, Tensor], model: Mapping[str, Tensor], path: str | Path, name: str) -> None:
    """Raise TowerError unless `values` of the file `path` can replace all of `model`, a state dict."""
    unfit = [key for key in model if key not in values or values[key].shape != model[key].shape]
    unexpected = [key for key in values if key not in model]
    if unfit or unexpected:
        key = (unfit or unexpected)[0]
        found = tuple(values[key].shape) if key in values else "nothing"
        wanted = tuple(model[key].shape) if key in model else "nothing"
        raise TowerError(
            f"{path}: does not fit {name}: {len(unfit) + len(unexpected)} keys differ, first {key}: "
            f"{found} in the file, {wanted} in the model"
        )
    if reason := unusable(values, model):
        raise TowerError(f"{path}: {reason}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise TowerError(f"{path}: is no JSON file of settings, as it should be beside these weights")
    return values


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [""])[0]


# Parts of transformers' key names, and open_clip's.
_TRANSFORMERS = {
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


def _from_transformers(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's CLIPModel, or its vision tower alone, under open_clip's names."""
    towers = {"vision_model": "visual.", "text_model": ""}
    projections = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
    renamed = {projections[key]: value.T for key, value in values.items() if key in projections}
    renamed |= {key: value for key, value in values.items() if key == "logit_scale"}
    for key, value in values.items():
        tower, _, new = key.partition(".")
        if tower not in towers or key.endswith("position_ids") or re.search(r"\.[kv]_proj\.", key):
            continue  # keys and values are taken together with their queries
        for theirs, ours in _TRANSFORMERS.items():
            new = new.replace(theirs, ours)
        if ".q_proj." in key:
            value = torch.cat([values[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            new = re.sub(r"self_attn\.q_proj\.(weight|bias)", r"attn.in_proj_\1", new)
        renamed[towers[tower] + new] = value
    return renamed
