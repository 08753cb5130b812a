"""CLIP's own vision tower: open_clip's vision transformer, built by name or from plain sizes, run block by block.

Does not live here: what methods may ask of any tower (tower.py), finding and reading weights (weights.py), trunks that
timm wrote (timm_tower.py), the arithmetic of a frozen block (frozen.py), anything tuned.

Letters: M images (B clips x T frames), N patch tokens, D width.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIPVisionCfg, resize_pos_embed
from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from clip.ops import as_is, working_dtype
from clip.towers.base import Block, Tower, TowerError
from clip.towers.frozen_block import FrozenBlock
from clip.towers.weights import OPENAI, check_fit, fetch_weights, read_visual_weights, stated_activation, stated_pixels

logger = logging.getLogger("td4v")


class OpenClipBlock(Block):
    """A block of open_clip's vision transformer. A plain frozen one runs as a FrozenBlock, others as open_clip wrote them.

    In autocast's dtype a FrozenBlock has a low-precision copy of the weights. The block keeps the copy and makes it
    again after the weights have changed; changes through `.data` leave no mark and are not seen.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._fold = True  # whether the copy may have the norms' affine parts in its weights
        self._copy: tuple[torch.dtype, list[tuple[int, int]], FrozenBlock] | None = (
            None  # dtype, version of the weights
        )

    def norm_attention(self, x: Tensor) -> Tensor:
        x = x.to(working_dtype(x))
        if (frozen := self._frozen(x.dtype)) is None:
            return self.module.ln_1(x)
        with as_is(x):
            return frozen.norm(0, x)

    def attention(self, x: Tensor, in_space: bool = True) -> Tensor:
        """See Block. CLIP has no positions inside its blocks, so `in_space` changes nothing."""
        x, block = x.to(working_dtype(x)), self.module
        if (frozen := self._frozen(x.dtype)) is not None:
            with as_is(x):
                return frozen.attention(x)
        if hasattr(block, "attention"):
            return block.ls_1(block.attention(q_x=x))
        return block.ls_1(block.ln_attn(block.attn(x)))  # open_clip's CustomResidualAttentionBlock

    def norm_mlp(self, x: Tensor) -> Tensor:
        x = x.to(working_dtype(x))
        if (frozen := self._frozen(x.dtype)) is None:
            return self.module.ln_2(x)
        with as_is(x):
            return frozen.norm(1, x)

    def mlp(self, x: Tensor) -> Tensor:
        x = x.to(working_dtype(x))
        if (frozen := self._frozen(x.dtype)) is None:
            return self.module.ls_2(self.module.mlp(x))
        with as_is(x):
            return frozen.mlp(x)

    def attend(self, x: Tensor, queries: int | None = None) -> Tensor:
        x = x.to(working_dtype(x))
        if (frozen := self._frozen(x.dtype)) is None:
            return super().attend(x, queries)
        with as_is(x):
            return frozen.attend(x, queries)

    def transform(self, x: Tensor) -> Tensor:
        x = x.to(working_dtype(x))
        if (frozen := self._frozen(x.dtype)) is None:
            return super().transform(x)
        with as_is(x):
            return frozen.transform(x)

    def keep_norms(self) -> None:
        self._fold = False
        self.drop_copy()

    def drop_copy(self) -> None:
        self._copy = None

    def prepare(self, dtype: torch.dtype) -> None:
        """Make or renew the copy of a plain block's weights in `dtype`."""
        block = self.module
        if not _is_plain(block) or block.ln_1.weight.dtype == dtype:
            return
        version = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in block.parameters()]
        if self._copy is None or self._copy[:2] != (dtype, version):
            with torch.inference_mode(False), torch.no_grad():  # a copy made in evaluation must serve training too
                self._copy = dtype, version, self._freeze(dtype)

    def _frozen(self, dtype: torch.dtype) -> FrozenBlock | None:
        """The block's weights in `dtype`; None if it must run as open_clip wrote it."""
        if not _is_plain(self.module):
            return None
        if self.module.ln_1.weight.dtype == dtype:
            return self._freeze(dtype)
        if not torch.compiler.is_compiling():
            self.prepare(dtype)
        return self._copy[2]

    def _freeze(self, dtype: torch.dtype) -> FrozenBlock:
        return FrozenBlock.of(self.module, dtype, type(self.module.mlp.gelu) is QuickGELU, self._fold)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copy": None}


class OpenClipTower(Tower):
    """CLIP's vision transformer; its plain blocks run lean (see FrozenBlock), the others as open_clip wrote them.

    Args:
        visual: an open_clip VisionTransformer with a class token; its projection to the text space is dropped.
        quick_gelu: which activation it was built with.
        name: of the architecture.
    """

    mean = open_clip.OPENAI_DATASET_MEAN
    std = open_clip.OPENAI_DATASET_STD

    def __init__(self, visual: VisionTransformer, quick_gelu: bool, name: str = "custom"):
        super().__init__(name)
        if visual.attn_pool is not None:
            raise TowerError(f"network.arch: {name} pools by attention and has no class token to use")
        visual.proj = None
        self.visual = visual.requires_grad_(False)
        self.quick_gelu = quick_gelu
        self.width = visual.conv1.out_channels
        self.patch_size = visual.patch_size[0]
        self.grid = visual.grid_size
        self.image_size = visual.image_size
        self.blocks = tuple(OpenClipBlock(module) for module in visual.transformer.resblocks)
        self.train(False)

    @property
    def final_norm(self) -> nn.Module:
        return self.visual.ln_post

    def embedding(self) -> dict[str, nn.Module | nn.Parameter]:
        names = ("conv1", "class_embedding", "positional_embedding", "ln_pre")
        return {name: getattr(self.visual, name) for name in names}

    def embed(self, patches: Tensor, added: Tensor | None = None) -> Tensor:
        """Class token, positions, `added`, ln_pre: what `patchify` gave (M, N, 3*P*P) -> (M, 1 + N, D), same dtype."""
        visual, dtype = self.visual, patches.dtype
        with as_is(patches):
            x = F.linear(patches, visual.conv1.weight.flatten(1).to(dtype))  # (M, N, D)
            token = visual.class_embedding.expand(len(x), 1, -1)
            x = torch.cat([token, x.to(token.dtype)], 1) + visual.positional_embedding
            return visual.ln_pre(x if added is None else x + added).to(dtype)

    def keep_norms(self) -> None:
        for block in self.blocks:
            block.keep_norms()

    @torch.compiler.disable
    def prepare(self, dtype: torch.dtype) -> None:
        for block in self.blocks:
            block.prepare(dtype)

    def _apply(self, *arguments: Any, **options: Any) -> OpenClipTower:
        for block in self.blocks:
            block.drop_copy()  # weights that moved must not hold on to copies where they were
        return super()._apply(*arguments, **options)


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


def _model_config(arch: str) -> dict[str, Any] | None:
    """open_clip's account of a model by OpenAI's name or its own, or None."""
    name = OPENAI[arch][0] if arch in OPENAI else arch
    return open_clip.get_model_config(name) if "/" not in name else None


def clip_names() -> list[str]:
    """Every name that open_clip or OpenAI has for a model, of whatever kind."""
    return [*OPENAI, *open_clip.list_models()]


def timm_trunk(arch: str) -> dict[str, Any] | None:
    """How open_clip builds the vision tower of `arch` if timm wrote it: arguments of timm.create_model; else None.

    `model_name`, and `global_pool` where open_clip changes it before the trunk is built, as norms depend on it.
    """
    vision = (_model_config(arch) or {}).get("vision_cfg", {})
    if "timm_model_name" not in vision:
        return None
    changes = {} if vision.get("timm_proj") in ("linear", "mlp") else {"global_pool": vision["timm_pool"]}
    return {"model_name": vision["timm_model_name"], **changes}


def build_tower(arch: str, image_size: int, source: str | None = None) -> OpenClipTower:
    """A tower by name.

    Args:
        arch: OpenAI's name (`ViT-B/16`, `ViT-L/14`: built with QuickGELU) or any open_clip ViT (`ViT-B-16`, ...).
        image_size: pixels a side; positional embeddings are interpolated if the weights have another.
        source: where the weights are (see `find_weights`), or None for random weights.

    Raises:
        TowerError: unknown or unsuitable name, weights that cannot be had or do not fit, activation mismatch.
    """
    name, model = OPENAI[arch][0] if arch in OPENAI else arch, _model_config(arch)
    if model is None:
        known = [*OPENAI, *(n for n in open_clip.list_models() if n.startswith("ViT"))]
        raise TowerError(f"network.arch: {arch!r} is not a known CLIP; known are e.g. {', '.join(known[:12])}")
    vision = model["vision_cfg"]
    if "timm_model_name" in vision or isinstance(vision.get("layers"), list):
        kind = "timm's" if "timm_model_name" in vision else "a ResNet"
        raise TowerError(f"network.arch: {arch} is not a plain vision transformer of open_clip ({kind})")
    options = CLIPVisionCfg(**{**vision, "image_size": image_size})
    unused = ("attentional_pool", "patch_dropout", "no_ln_pre", "final_ln_after_pool", "ls_init_value", "pool_type", "pos_embed_type", "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")  # fmt: skip
    extra = {key: getattr(options, key) for key in unused}
    extra["patch_dropout"] = 0.0
    return _build(
        options.width, options.layers, options.width // options.head_width, options.mlp_ratio, options.patch_size,
        image_size, model.get("quick_gelu", False), source, name, extra,
    )  # fmt: skip


def build_custom_tower(width: int, layers: int, heads: int, patch_size: int, image_size: int, mlp_ratio: float = 4.0,
                       quick_gelu: bool = True, source: str | None = None) -> OpenClipTower:  # fmt: skip
    """A tower from plain sizes, for tests and small experiments. Arguments, result and errors as `build_tower`."""
    return _build(width, layers, heads, mlp_ratio, patch_size, image_size, quick_gelu, source, "custom", {})


def _build(width: int, layers: int, heads: int, mlp_ratio: float, patch_size: int, image_size: int, quick_gelu: bool,
           source: str | None, name: str, extra: dict) -> OpenClipTower:  # fmt: skip
    if image_size % patch_size:
        raise TowerError(f"data.input_size: {image_size} is not divisible by the patch size {patch_size} of {name}")
    visual = VisionTransformer(
        image_size=image_size, patch_size=patch_size, width=width, layers=layers, heads=heads, mlp_ratio=mlp_ratio,
        act_layer=QuickGELU if quick_gelu else nn.GELU, **extra,
    )  # fmt: skip
    tower = OpenClipTower(visual, quick_gelu, name)
    if source is not None:
        _load(tower, source, name)
        logger.info("%s: weights from %s", name, source)
    return tower


def _load(tower: OpenClipTower, source: str, name: str) -> None:
    """Fetch, check and load weights; the projection to the text space, which nothing here uses, is left out."""
    gelu = stated_activation(name, source)
    names = {True: "QuickGELU", False: "GELU"}
    if gelu is None:
        logger.warning("%s does not say its activation: make sure that it is %s", source, names[tower.quick_gelu])
    elif gelu != tower.quick_gelu:
        raise TowerError(
            f"network.arch: {name} is built with {names[tower.quick_gelu]}, but the weights {source} were trained with {names[gelu]}; choose the {'-quickgelu' if gelu else 'plain'} variant"
        )
    tower.mean, tower.std = stated_pixels(name, source) or (tower.mean, tower.std)
    path = fetch_weights(name, source)
    values = read_visual_weights(path)
    values.pop("proj", None)
    if "positional_embedding" in values:
        named = {"visual.positional_embedding": values["positional_embedding"]}
        resize_pos_embed(named, SimpleNamespace(visual=tower.visual))
        values["positional_embedding"] = named["visual.positional_embedding"]
    check_fit(values, tower.visual.state_dict(), path, name)
    tower.visual.load_state_dict(values)
