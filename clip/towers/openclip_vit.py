"""CLIP's own vision tower: open_clip's vision transformer, built by name or from sizes.

Letters: M images (B clips x T frames), N patch tokens, D width, P patch size.
"""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIPVisionCfg, resize_pos_embed
from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from clip.ops import as_is, gelu_linear, layer_normed_linear, quick_gelu_linear, tensor_versions, working_dtype
from clip.towers.base import Block, Tower, TowerError
from clip.towers.frozen_block import FrozenBlock
from clip.towers.weights import OPENAI, ClipWeights, check_fit

logger = logging.getLogger("td4v")


class _Copy(NamedTuple):
    dtype: torch.dtype
    versions: list[tuple[int, int]]  # of the weights it was made from
    block: FrozenBlock


class OpenClipBlock(Block):
    """A block of open_clip's vision transformer. A plain frozen one runs as a FrozenBlock, a plain trained one with the
    functions of `clip.ops`, others as open_clip wrote them.

    In autocast's dtype a FrozenBlock has a low-precision copy of the weights. The block keeps the copy and makes it
    again after the weights have changed; changes through `.data` leave no mark and are not seen.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._fold = True  # whether the copy may have the norms' affine parts in its weights
        self._copy: _Copy | None = None

    def norm_attention(self, x: Tensor) -> Tensor:
        x = x.to(working_dtype(x))
        if (frozen := self._frozen(x.dtype)) is None:
            return self.module.ln_1(x)
        with as_is(x):
            return frozen.norm_attention(x)

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
            return frozen.norm_mlp(x)

    def mlp(self, x: Tensor) -> Tensor:
        x = x.to(working_dtype(x))
        if (frozen := self._frozen(x.dtype)) is None:
            return self.module.ls_2(self.module.mlp(x))
        with as_is(x):
            return frozen.mlp(x)

    def attention_of(self, x: Tensor) -> Tensor:
        """See Block. A plain block that is trained saves only what `clip.ops` says."""
        if not self._is_trained():
            return super().attention_of(x)
        attn, proj = self.module.attn, self.module.attn.out_proj
        qkv = layer_normed_linear(x, self.module.ln_1, attn.in_proj_weight, attn.in_proj_bias)  # (M, L, 3*D)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # each (M, L, heads, head width)
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        return F.linear(y.transpose(1, 2).flatten(2), proj.weight, proj.bias)

    def mlp_of(self, x: Tensor) -> Tensor:
        """See Block. A plain block that is trained saves only what `clip.ops` says."""
        if not self._is_trained():
            return super().mlp_of(x)
        mlp = self.module.mlp
        inner = layer_normed_linear(x, self.module.ln_2, mlp.c_fc.weight, mlp.c_fc.bias)  # (M, L, 4*D)
        activated_linear = quick_gelu_linear if type(mlp.gelu) is QuickGELU else gelu_linear
        return activated_linear(inner, mlp.c_proj.weight, mlp.c_proj.bias)

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

    def _is_trained(self) -> bool:
        return _is_usual(self.module) and not _is_plain(self.module)

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
        versions = tensor_versions(block.parameters())
        if self._copy is None or self._copy[:2] != (dtype, versions):
            with torch.inference_mode(False), torch.no_grad():  # a copy made in evaluation must serve training too
                self._copy = _Copy(dtype, versions, self._freeze(dtype))

    def _frozen(self, dtype: torch.dtype) -> FrozenBlock | None:
        """The block's weights in `dtype`; None if it must run as open_clip wrote it."""
        if not _is_plain(self.module):
            return None
        if self.module.ln_1.weight.dtype == dtype:
            return self._freeze(dtype)
        if not torch.compiler.is_compiling():
            self.prepare(dtype)
        return self._copy.block

    def _freeze(self, dtype: torch.dtype) -> FrozenBlock:
        quick_gelu = type(self.module.mlp.gelu) is QuickGELU
        return FrozenBlock.of(self.module, dtype, quick_gelu=quick_gelu, fold=self._fold)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copy": None}


class OpenClipTower(Tower):
    """CLIP's vision transformer, without its projection to the text space.

    Args:
        visual: an open_clip VisionTransformer with a class token. It becomes part of the tower.
        quick_gelu: whether its activation is QuickGELU, not GELU.
        name: the architecture's name.
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
        """Adds class token, positions and `added`, then applies ln_pre: (M, N, 3*P*P) -> (M, 1 + N, D), same dtype."""
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
    """Whether a block is open_clip's usual one with nothing in it trainable."""
    return _is_usual(block) and not any(parameter.requires_grad for parameter in block.parameters())


def _is_usual(block: nn.Module) -> bool:
    """Whether a block is open_clip's usual one, without layer scale, with nothing in it replaced."""
    return (
        type(block) is ResidualAttentionBlock
        and type(block.ls_1) is nn.Identity
        and type(block.attn) is nn.MultiheadAttention
        and {type(block.ln_1), type(block.ln_2)} <= {nn.LayerNorm, LayerNorm, LayerNormFp32}
        and type(block.mlp.c_fc) is type(block.mlp.c_proj) is nn.Linear
        and (type(block.mlp.gelu) is QuickGELU or getattr(block.mlp.gelu, "approximate", None) == "none")
    )


def _model_config(arch: str) -> dict[str, Any] | None:
    """open_clip's configuration of a model by OpenAI's name or open_clip's, or None."""
    name = OPENAI[arch][0] if arch in OPENAI else arch
    return open_clip.get_model_config(name) if "/" not in name else None


def clip_names() -> list[str]:
    """Every name that OpenAI or open_clip has for a model, of whatever kind."""
    return [*OPENAI, *open_clip.list_models()]


def timm_arguments(arch: str) -> dict[str, Any] | None:
    """Arguments of timm.create_model for the vision tower of `arch` if timm wrote it, else None.

    They are `model_name`, and `global_pool` where open_clip changes it before the model is built, as norms depend on it.
    """
    vision = (_model_config(arch) or {}).get("vision_cfg", {})
    if "timm_model_name" not in vision:
        return None
    changes = {} if vision.get("timm_proj") in ("linear", "mlp") else {"global_pool": vision["timm_pool"]}
    return {"model_name": vision["timm_model_name"], **changes}


# Arguments of open_clip's VisionTransformer that its model configurations set, besides the sizes.
_VISION_OPTIONS = [
    "attentional_pool",
    "block_type",
    "final_ln_after_pool",
    "ls_init_value",
    "no_ln_pre",
    "pool_type",
    "pos_embed_type",
    "qk_norm",
    "scale_attn",
    "scale_attn_inner",
    "scale_fc",
    "scale_heads",
    "scaled_cosine_attn",
]


def build_openclip_tower(arch: str, image_size: int, weights: ClipWeights | None = None) -> OpenClipTower:
    """A tower by name.

    Args:
        arch: OpenAI's name (`ViT-B/16`, `ViT-L/14`: built with QuickGELU) or any open_clip ViT (`ViT-B-16`, ...).
        image_size: pixels a side. Positional embeddings are interpolated if the weights have another size.
        weights: None for random weights.

    Raises:
        TowerError: an unknown or unsuitable name, weights that cannot be read or do not fit, another activation.
    """
    model = _model_config(arch)
    if model is None:
        known = [*OPENAI, *(name for name in open_clip.list_models() if name.startswith("ViT"))]
        raise TowerError(f"network.arch: {arch!r} is not a known CLIP; known are e.g. {', '.join(known[:12])}")
    vision = model["vision_cfg"]
    if "timm_model_name" in vision or isinstance(vision.get("layers"), list):
        kind = "timm's" if "timm_model_name" in vision else "a ResNet"
        raise TowerError(f"network.arch: {arch} is not a plain vision transformer of open_clip ({kind})")
    vision = CLIPVisionCfg(**vision)
    return build_custom_tower(
        width=vision.width,
        layers=vision.layers,
        heads=vision.width // vision.head_width,
        patch_size=vision.patch_size,
        image_size=image_size,
        mlp_ratio=vision.mlp_ratio,
        quick_gelu=model.get("quick_gelu", False),
        weights=weights,
        name=OPENAI[arch][0] if arch in OPENAI else arch,
        **{option: getattr(vision, option) for option in _VISION_OPTIONS},
    )


def build_custom_tower(
    width: int,
    layers: int,
    heads: int,
    patch_size: int,
    image_size: int,
    mlp_ratio: float = 4.0,
    quick_gelu: bool = True,
    weights: ClipWeights | None = None,
    name: str = "custom",
    **options: Any,
) -> OpenClipTower:
    """A tower from plain sizes, for tests and small experiments. The rest and errors: see `build_openclip_tower`.

    Args:
        width: D.
        layers: number of blocks.
        heads: must divide D.
        patch_size: P, in pixels. image_size: pixels a side, a multiple of P.
        mlp_ratio: hidden width of the MLP / D.
        quick_gelu: whether the activation is QuickGELU, not GELU.
        options: further arguments of open_clip's VisionTransformer.
    """
    if image_size % patch_size:
        raise TowerError(f"data.input_size: {image_size} is not divisible by the patch size {patch_size} of {name}")
    visual = VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=layers,
        heads=heads,
        mlp_ratio=mlp_ratio,
        act_layer=QuickGELU if quick_gelu else nn.GELU,
        **options,
    )
    tower = OpenClipTower(visual, quick_gelu=quick_gelu, name=name)
    if weights is not None:
        _load(tower, weights)
        logger.info("%s: weights from %s", name, weights.source)
    return tower


def _load(tower: OpenClipTower, weights: ClipWeights) -> None:
    """Check and load all weights but the projection to the text space."""
    name, activations = tower.name, {True: "QuickGELU", False: "GELU"}
    built, trained = activations[tower.quick_gelu], activations.get(weights.quick_gelu)
    if trained is None:
        logger.warning("%s does not say its activation: make sure that it is %s", weights.source, built)
    elif trained != built:
        raise TowerError(
            f"network.arch: {name} is built with {built}, but the weights {weights.source} were trained with {trained}; "
            f"choose the {'-quickgelu' if weights.quick_gelu else 'plain'} variant"
        )
    values = weights.visual()
    values.pop("proj", None)
    positions = values.get("positional_embedding", torch.empty(0))
    if positions.ndim == 2:
        count = max(len(positions) - 1, 0)  # without the class token's
        if math.isqrt(count) ** 2 != count:
            raise TowerError(
                f"{weights.path}: its visual.positional_embedding holds {count} positions, which are no "
                "square grid; only square images are supported"
            )
        resized = {"visual.positional_embedding": values["positional_embedding"]}
        resize_pos_embed(resized, SimpleNamespace(visual=tower.visual))
        values["positional_embedding"] = resized["visual.positional_embedding"]
    check_fit(values, tower.visual.state_dict(), weights.path, name)
    tower.visual.load_state_dict(values)
    tower.weights = weights.source
    tower.mean, tower.std = weights.pixel_statistics or (tower.mean, tower.std)
