"""The frozen CLIP vision tower. The only file that imports open_clip.

Lives here: building a tower by name or from plain sizes, finding and reading CLIP's weights in the formats people
have them in, running it block by block. Does not live here: anything tuned.

Letters: M images (B clips x T frames), N patch tokens, D width.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIPVisionCfg, resize_pos_embed
from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from clip.frozen import FrozenBlock
from clip.lean import as_is, working_dtype

logger = logging.getLogger("td4v")

CHUNK = 64  # images that a frozen block takes at a time where no gradient goes through it

# OpenAI's names, the open_clip models that have their activation, and the archives users put into clip_pretrain/.
OPENAI = {
    "ViT-B/32": ("ViT-B-32-quickgelu", "ViT-B-32.pt"),
    "ViT-B/16": ("ViT-B-16-quickgelu", "ViT-B-16.pt"),
    "ViT-L/14": ("ViT-L-14-quickgelu", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("ViT-L-14-336-quickgelu", "ViT-L-14-336px.pt"),
}


class BackboneError(ValueError):
    """A tower or its weights cannot be had as asked; the message is one sentence."""


class VisionTower(nn.Module):
    """A frozen CLIP vision transformer: never in training mode, no parameter requires a gradient.

    Gradients flow through it to its input; a method that wants none runs it under torch.no_grad().

    Args:
        visual: an open_clip VisionTransformer with a class token; its projection to the text space is dropped.
        quick_gelu: which activation it was built with.
        name: of the architecture.

    Attributes:
        weights: where they are from, in words. width (D), patch_size (pixels), grid ((H, W) patches), image_size ((height, width) pixels), blocks.
    """

    def __init__(self, visual: VisionTransformer, quick_gelu: bool, name: str = "custom"):
        super().__init__()
        self.name, self.weights = name, "random weights"
        if visual.attn_pool is not None:
            raise BackboneError("a tower with attentional pooling has no class token for TD4V to use")
        visual.proj = None
        self.visual = visual.requires_grad_(False)
        self.quick_gelu = quick_gelu
        self.width = visual.conv1.out_channels
        self.patch_size = visual.patch_size[0]
        self.grid = visual.grid_size
        self.image_size = visual.image_size
        self._low: dict[int, tuple[torch.dtype, Any, FrozenBlock]] = {}  # blocks in autocast's dtype, and made of what
        self.train(False)

    def train(self, mode: bool = True) -> VisionTower:
        """Stays in eval mode, whatever the model around it does."""
        return super().train(False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.visual.transformer.resblocks

    def patchify(self, images: Tensor) -> Tensor:
        """Pixels by patch: (M, 3, height, width) -> (M, N, 3*P*P), in autocast's dtype where that is on."""
        if tuple(images.shape[-2:]) != tuple(self.image_size):
            raise ValueError(f"the tower was built for {self.image_size} pixels and got {tuple(images.shape[-2:])}")
        (H, W), P, dtype = self.grid, self.patch_size, working_dtype(images)
        self.prepare(dtype)
        patches = images.to(dtype).unflatten(3, (W, P)).unflatten(2, (H, P))  # (M, 3, H, P, W, P)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(len(images), H * W, -1)

    def embed(self, patches: Tensor) -> Tensor:
        """Class token, positions, ln_pre: what `patchify` gave (M, N, 3*P*P) -> (M, 1 + N, D), same dtype."""
        visual, dtype = self.visual, patches.dtype
        with as_is(patches):
            x = F.linear(patches, visual.conv1.weight.flatten(1).to(dtype))  # (M, N, D)
            token = visual.class_embedding.expand(len(x), 1, -1)
            x = torch.cat([token, x.to(token.dtype)], 1) + visual.positional_embedding
            return visual.ln_pre(x).to(dtype)

    def attend(self, index: int, x: Tensor, queries: int | None = None) -> Tensor:
        """The attention half of block `index`, with its residual: (M, 1 + N, D) -> the same.

        With `queries`, only for the first tokens: (M, 1 + N, D) -> (M, queries, D).
        """
        x = x.to(working_dtype(x))
        if (frozen := self._block(index, x.dtype)) is not None:
            with as_is(x):
                return frozen.attend(x, queries)
        block = self.blocks[index]
        y = block.ln_1(x)
        if hasattr(block, "attention"):
            y = block.attention(q_x=y)
        else:  # open_clip's CustomResidualAttentionBlock
            y = block.ln_attn(block.attn(y))
        return (x + block.ls_1(y))[:, :queries]

    def transform(self, index: int, x: Tensor) -> Tensor:
        """The MLP half of block `index`, with its residual: (M, L, D) -> the same."""
        x = x.to(working_dtype(x))
        if (frozen := self._block(index, x.dtype)) is not None:
            with as_is(x):
                return frozen.transform(x)
        block = self.blocks[index]
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    def run_block(self, index: int, x: Tensor) -> Tensor:
        """Block `index` without gradients, a few images at a time, so that its inner width never stands for all.

        (M, 1 + N, D) -> the same.
        """
        with torch.no_grad():
            parts = [self.transform(index, self.attend(index, part)) for part in x.split(CHUNK)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward(self, images: Tensor) -> Tensor:
        """All blocks, before ln_post: (M, 3, height, width) -> (M, 1 + N, D)."""
        x = self.embed(self.patchify(images))
        for index in range(len(self.blocks)):
            x = self.transform(index, self.attend(index, x))
        return x

    @torch.compiler.disable
    def prepare(self, dtype: torch.dtype) -> None:
        """Have the plain blocks' weights in `dtype`, anew where they have changed; `patchify` begins a pass with it.

        Changes through `.data`, which leave no mark, are not seen.
        """
        for index, block in enumerate(self.blocks):
            if _is_plain(block) and block.ln_1.weight.dtype != dtype:
                self._refresh(index, dtype)

    def _refresh(self, index: int, dtype: torch.dtype) -> None:
        block = self.blocks[index]
        marks = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in block.parameters()]
        if index not in self._low or self._low[index][:2] != (dtype, marks):
            with torch.inference_mode(False), torch.no_grad():  # an evaluation's copies must serve training too
                self._low[index] = dtype, marks, FrozenBlock.of(block, dtype, type(block.mlp.gelu) is QuickGELU)

    def _block(self, index: int, dtype: torch.dtype) -> FrozenBlock | None:
        """The block's weights in `dtype`; None if it must run as open_clip wrote it."""
        block = self.blocks[index]
        if not _is_plain(block):
            return None
        if block.ln_1.weight.dtype == dtype:
            return FrozenBlock.of(block, dtype, type(block.mlp.gelu) is QuickGELU)
        if not torch.compiler.is_compiling():
            self._refresh(index, dtype)
        return self._low[index][2]

    def _apply(self, *arguments: Any, **options: Any) -> VisionTower:
        self._low.clear()  # weights that moved must not hold on to copies where they were
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_low": {}}


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is open_clip's usual one, without layer scale, with nothing in it tuned or replaced."""
    return (
        type(block) is ResidualAttentionBlock
        and type(block.ls_1) is nn.Identity
        and type(block.attn) is nn.MultiheadAttention
        and {type(block.ln_1), type(block.ln_2)} <= {nn.LayerNorm, LayerNorm, LayerNormFp32}
        and type(block.mlp.c_fc) is type(block.mlp.c_proj) is nn.Linear
        and (type(block.mlp.gelu) is QuickGELU or getattr(block.mlp.gelu, "approximate", None) == "none")
        and not any(parameter.requires_grad for parameter in block.parameters())
    )


def build_tower(arch: str, image_size: int, source: str | None = None) -> VisionTower:
    """A tower by name.

    Args:
        arch: OpenAI's name (`ViT-B/16`, `ViT-L/14`: built with QuickGELU) or any open_clip ViT (`ViT-B-16`, ...).
        image_size: pixels a side; positional embeddings are interpolated if the weights have another.
        source: where the weights are (see `find_weights`), or None for random weights.

    Raises:
        BackboneError: unknown or unsuitable name, weights that cannot be had or do not fit, activation mismatch.
    """
    name = OPENAI[arch][0] if arch in OPENAI else arch
    model = open_clip.get_model_config(name) if "/" not in name else None
    if model is None:
        known = [*OPENAI, *(n for n in open_clip.list_models() if n.startswith("ViT"))]
        raise BackboneError(f"network.arch: {arch!r} is not a known CLIP; known are e.g. {', '.join(known[:12])}")
    vision = model["vision_cfg"]
    if "timm_model_name" in vision or isinstance(vision.get("layers"), list):
        raise BackboneError(f"network.arch: {arch} is not a plain vision transformer of open_clip")
    options = CLIPVisionCfg(**{**vision, "image_size": image_size})
    unused = ("attentional_pool", "patch_dropout", "no_ln_pre", "final_ln_after_pool", "ls_init_value", "pool_type", "pos_embed_type", "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")  # fmt: skip
    extra = {key: getattr(options, key) for key in unused}
    extra["patch_dropout"] = 0.0
    return _build(
        options.width, options.layers, options.width // options.head_width, options.mlp_ratio, options.patch_size,
        image_size, model.get("quick_gelu", False), source, name, extra,
    )  # fmt: skip


def build_custom_tower(width: int, layers: int, heads: int, patch_size: int, image_size: int, mlp_ratio: float = 4.0,
                       quick_gelu: bool = True, source: str | None = None) -> VisionTower:  # fmt: skip
    """A tower from plain sizes, for tests and small experiments. Arguments, result and errors as `build_tower`."""
    return _build(width, layers, heads, mlp_ratio, patch_size, image_size, quick_gelu, source, "custom", {})


def find_weights(arch: str, weights: str | None, folder: str | Path = "clip_pretrain") -> str:
    """Where the weights of a tower come from: what is asked for, else OpenAI's archive in `folder`, else its tag.

    Returns:
        a path to a file, or an open_clip tag.

    Raises:
        BackboneError: a missing file, or an arch without a default.
    """
    if weights is not None:
        looks_like_file = "/" in weights or Path(weights).suffix in (".pt", ".pth", ".bin", ".safetensors")
        if looks_like_file and not Path(weights).is_file():
            raise BackboneError(f"network.weights: no file {weights}")
        return weights
    if arch not in OPENAI:
        raise BackboneError(
            f"network.weights: {arch} needs an open_clip tag or a file, or set network.init to false for random weights"
        )
    archive = Path(folder) / OPENAI[arch][1]
    return str(archive) if archive.is_file() else "openai"


def read_visual_weights(path: str | Path) -> dict[str, Tensor]:
    """The vision tower's weights in a file, under open_clip's names without `visual.`, in float32.

    Reads safetensors and torch files (`.bin`, `.pt`; bare or under `state_dict`, with or without `module.`) in the
    layouts of open_clip and of Hugging Face's transformers, and OpenAI's own TorchScript archives in half precision.

    Raises:
        BackboneError: unreadable file, a pickle with code, or a file without a vision tower.
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
        raise BackboneError(
            f"{path}: cannot be read as CLIP weights ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from None
    values = values.get("state_dict", values) if isinstance(values, Mapping) else values
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise BackboneError(f"{path}: holds no state_dict")
    values = {key.removeprefix("module."): value for key, value in values.items()}
    if "vision_model.embeddings.class_embedding" in values:
        values = _from_transformers(values)
    visual = {key.removeprefix("visual."): value.float() for key, value in values.items() if key.startswith("visual.")}
    if not visual and "conv1.weight" in values:
        visual = {key: value.float() for key, value in values.items()}
    if "conv1.weight" not in visual:
        raise BackboneError(f"{path}: holds no CLIP vision transformer (no visual.conv1.weight)")
    return visual


def _build(width: int, layers: int, heads: int, mlp_ratio: float, patch_size: int, image_size: int, quick_gelu: bool,
           source: str | None, name: str, extra: dict) -> VisionTower:  # fmt: skip
    if image_size % patch_size:
        raise BackboneError(f"data.input_size: {image_size} is not divisible by the patch size {patch_size} of {name}")
    visual = VisionTransformer(
        image_size=image_size, patch_size=patch_size, width=width, layers=layers, heads=heads, mlp_ratio=mlp_ratio,
        act_layer=QuickGELU if quick_gelu else nn.GELU, **extra,
    )  # fmt: skip
    tower = VisionTower(visual, quick_gelu, name)
    if source is not None:
        _load(tower, source, name)
        logger.info("%s: weights from %s", name, source)
    return tower


def _load(tower: VisionTower, source: str, name: str) -> None:
    """Fetch, check and load weights; the projection to the text space, which nothing here uses, is left out."""
    path, gelu = Path(source), None
    if path.is_file():
        gelu = _stated_activation(path)
    else:
        tag = open_clip.pretrained.get_pretrained_cfg(name, source)
        if not tag:
            tags = open_clip.list_pretrained_tags_by_model(name)
            raise BackboneError(
                f"network.weights: {source!r} is neither a file nor a tag of {name}; its tags are {', '.join(tags) or 'none'}"
            )
        gelu = bool(tag.get("quick_gelu", False))
    names = {True: "QuickGELU", False: "GELU"}
    if gelu is None:
        logger.warning("%s does not say its activation: make sure that it is %s", source, names[tower.quick_gelu])
    elif gelu != tower.quick_gelu:
        raise BackboneError(
            f"network.arch: {name} is built with {names[tower.quick_gelu]}, but the weights {source} were trained with {names[gelu]}; choose the {'-quickgelu' if gelu else 'plain'} variant"
        )
    if not path.is_file():
        try:
            path = Path(open_clip.download_pretrained(tag))
        except Exception as error:
            raise BackboneError(
                f"cannot download {name} {source} ({type(error).__name__}): put the file into clip_pretrain/ or name it in network.weights, or set network.init to false"
            ) from None
    values = read_visual_weights(path)
    values.pop("proj", None)
    if "positional_embedding" in values:
        named = {"visual.positional_embedding": values["positional_embedding"]}
        resize_pos_embed(named, SimpleNamespace(visual=tower.visual))
        values["positional_embedding"] = named["visual.positional_embedding"]
    own = tower.visual.state_dict()
    unfit = [key for key in own if key not in values or values[key].shape != own[key].shape]
    unknown = [key for key in values if key not in own]
    if unfit or unknown:
        key = (unfit or unknown)[0]
        found = tuple(values[key].shape) if key in values else "nothing"
        wanted = tuple(own[key].shape) if key in own else "nothing"
        raise BackboneError(
            f"{path}: does not fit {name}: {len(unfit) + len(unknown)} keys differ, first {key}: {found} in the file, {wanted} in the model"
        )
    tower.visual.load_state_dict(values)


def _from_transformers(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower of Hugging Face's CLIPModel under open_clip's names."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",  # their spelling
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    renamed = {}
    for key, value in values.items():
        if not key.startswith("vision_model.") or key.endswith("position_ids") or re.search(r"\.[kv]_proj\.", key):
            continue  # keys and values are taken together with their queries
        new = key.removeprefix("vision_model.")
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        if ".q_proj." in key:
            value = torch.cat([values[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            new = re.sub(r"self_attn\.q_proj\.(weight|bias)", r"attn.in_proj_\1", new)
        renamed[f"visual.{new}"] = value
    return renamed


def _is_torchscript(path: Path) -> bool:
    """Whether a torch file is a TorchScript archive: those hold code and constants beside the tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())


def _stated_activation(path: Path) -> bool | None:
    """QuickGELU or not, where it is said: OpenAI's archives, open_clip_config.json or transformers' config.json beside."""
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
