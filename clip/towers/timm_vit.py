"""timm's vision transformers and Eva models as towers, by name.

Letters: M images (B clips x T frames), N patch tokens, p tokens before them, L = p + N, D width, P patch size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import eva, vision_transformer
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clip.ops import as_is, working_dtype
from clip.towers.base import Block, Tower, TowerError
from clip.towers.weights import check_fit, find_weights, first_line, read_file
from common.weights_file import WeightsFileError, named_tensors, without_wrappers

logger = logging.getLogger("td4v")

FAMILIES = ("vision_transformer", "deit", "eva")  # timm's files whose models can be towers
_UNSUITABLE_FAMILIES = {
    "beit": "its attention has positions of its own, relative ones",
    "naflexvit": "its grid of patches follows each image's aspect",
    "vision_transformer_hybrid": "its patches come from a convolutional network",
    "vision_transformer_relpos": "its attention has positions of its own, relative ones",
}
_UNSUITABLE_BLOCKS = {
    "EvaBlockPostNorm": "the norms stand behind attention and MLP, not before them",
    "ResPostBlock": "the norms stand behind attention and MLP, not before them",
    "ParallelScalingBlock": "attention and MLP run side by side, not one after the other",
    "DiffParallelScalingBlock": "attention and MLP run side by side, not one after the other",
    "ParallelThingsBlock": "several attentions and MLPs run side by side",
}
_UNUSED = ("head", "head_dist", "attn_pool", "pos_drop", "patch_drop", "head_drop")


class TimmBlock(Block):
    """A block of a timm model, which runs as timm wrote it.

    Args:
        module: timm's Block or EvaBlock.
        rope: the model's rotary positions, or None.
        grid: (H, W) patches.
        layer: the block's index where each block has rotations of its own (timm's rope_mixed), else None.
    """

    def __init__(self, module: nn.Module, rope: nn.Module | None, grid: tuple[int, int], layer: int | None):
        super().__init__(module)
        self.rope, self.grid, self.layer = rope, grid, layer

    def norm_attention(self, x: Tensor) -> Tensor:
        dtype = working_dtype(x)
        return self.module.norm1(x.to(dtype)).to(dtype)

    def attention(self, x: Tensor, in_space: bool = True) -> Tensor:
        """See Block.

        Rotary positions count in space alone. Among tokens of one position, as frames see each other, leaving them out
        is exact: the same rotation of query and key cancels in their product.
        """
        dtype = working_dtype(x)
        rotation = {"rope": self.rotation()} if in_space and self.rope is not None else {}
        return _scaled(self.module, 1, self.module.attn(x.to(dtype), **rotation)).to(dtype)

    def norm_mlp(self, x: Tensor) -> Tensor:
        dtype = working_dtype(x)
        return self.module.norm2(x.to(dtype)).to(dtype)

    def mlp(self, x: Tensor) -> Tensor:
        dtype = working_dtype(x)
        return _scaled(self.module, 2, self.module.mlp(x.to(dtype))).to(dtype)

    def attend(self, x: Tensor, queries: int | None = None) -> Tensor:
        return super().attend(x.to(working_dtype(x)), queries)

    def transform(self, x: Tensor) -> Tensor:
        return super().transform(x.to(working_dtype(x)))

    def rotation(self) -> Tensor:
        """Sines and cosines of the grid's positions: (N, ...)."""
        known = getattr(self.rope, "feat_shape", None) is not None
        rotations = self.rope.get_embed() if known else self.rope.get_embed(shape=self.grid)
        return rotations if self.layer is None else rotations[self.layer]


class TimmTower(Tower):
    """A vision transformer or Eva model of timm, whose blocks run as timm wrote them.

    Class token, registers (a distillation token counts as one), absolute and rotary positions, layer scale and extra
    norms are kept. Classifier and attentional pooling are removed. `final_norm` is the norm after the blocks. Some
    models average the tokens first and have weights only in the norm after that (timm's fc_norm): then it is that norm,
    which here normalises each token before the average.

    Args:
        model: built with dynamic_img_size false. It becomes part of the tower.
        name: the architecture's name, for messages.

    Raises:
        TowerError: the model is unsuitable; the message says why.
    """

    def __init__(self, model: VisionTransformer | Eva, name: str):
        super().__init__(name)
        _check_suitable(model, name)
        pooled_norm = _has_weights(model.fc_norm) and not _has_weights(model.norm)
        self._final = "fc_norm" if pooled_norm else "norm"
        self.removed_parts = {*_UNUSED, "norm", "fc_norm"} - {self._final}
        for part in self.removed_parts:
            if isinstance(getattr(model, part, None), nn.Module):
                setattr(model, part, nn.Identity())
        model.blocks = nn.ModuleList(model.blocks)
        self.model = model.requires_grad_(False)
        self.width = model.embed_dim
        self.patch_size = model.patch_embed.patch_size[0]
        self.grid = tuple(model.patch_embed.grid_size)
        self.image_size = tuple(model.patch_embed.img_size)
        rope = getattr(model, "rope", None)
        mixed = rope is not None and model.rope_mixed
        self.blocks = tuple(
            TimmBlock(module, rope, self.grid, layer if mixed else None) for layer, module in enumerate(model.blocks)
        )
        self.prefix = model.num_prefix_tokens
        self.has_class_token = model.cls_token is not None
        known = getattr(model, "pretrained_cfg", None) or {}
        self.mean, self.std = (tuple(known[key]) if known.get(key) else None for key in ("mean", "std"))
        self.train(False)

    @property
    def final_norm(self) -> nn.Module:
        return getattr(self.model, self._final)

    def embedding(self) -> dict[str, nn.Module | nn.Parameter]:
        model = self.model
        parts = {**dict(model.named_parameters(recurse=False)), **dict(model.named_children())}
        return {
            name: part
            for name, part in parts.items()
            if name not in ("blocks", self._final) and (isinstance(part, nn.Parameter) or _has_weights(part))
        }

    def embed(self, patches: Tensor, added: Tensor | None = None) -> Tensor:
        """Adds prefix tokens, positions and `added`, then applies norm_pre: (M, N, 3*P*P) -> (M, L, D), same dtype."""
        model, dtype, projection = self.model, patches.dtype, self.model.patch_embed.proj
        with as_is(patches):
            bias = None if projection.bias is None else projection.bias.to(dtype)
            x = F.linear(patches, projection.weight.flatten(1).to(dtype), bias)  # (M, N, D)
            x = model._pos_embed(model.patch_embed.norm(x.to(projection.weight.dtype)))
            x = x[0] if isinstance(model, Eva) else x  # Eva's gives the rotary embedding too: (M, L, D)
            return model.norm_pre(x if added is None else x + added).to(dtype)


def _scaled(block: nn.Module, half: int, x: Tensor) -> Tensor:
    """Layer scale of a block's first or second half, under either of timm's names, if it has one."""
    if isinstance(block, vision_transformer.Block):
        return getattr(block, f"ls{half}")(x)
    gamma = getattr(block, f"gamma_{half}")
    return x if gamma is None else gamma * x


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _check_suitable(model: nn.Module, name: str) -> None:
    """Raise TowerError for a model that the tower cannot run, saying why."""
    if not isinstance(model, (VisionTransformer, Eva)):
        raise TowerError(
            f"network.arch: {name} is timm's {type(model).__name__}, neither a VisionTransformer nor an Eva"
        )
    kinds = {type(block) for block in model.blocks} - {vision_transformer.Block, EvaBlock}
    if kinds:
        kind = kinds.pop().__name__
        raise TowerError(
            f"network.arch: {name} has blocks of another kind than norm, attention, norm, MLP, which models here "
            f"work with ({kind}: {_UNSUITABLE_BLOCKS.get(kind, 'not known here')})"
        )
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise TowerError(
            f"network.arch: {name} has no plain patches: they come from {type(embed).__name__}, not from one linear map"
        )
    height, width = embed.patch_size
    if height != width or embed.proj.in_channels != 3:
        raise TowerError(
            f"network.arch: {name} takes patches of {height} x {width} pixels in {embed.proj.in_channels} channels, "
            "not square ones in 3"
        )


def is_timm_name(arch: str) -> bool:
    """Whether timm has a model of this name, of whatever kind; the name may have a tag behind a dot."""
    return timm.is_model(arch)


def timm_names() -> list[str]:
    """Names, without tags, of all timm models of FAMILIES."""
    return [name for family in FAMILIES for name in timm.list_models(module=family)]


def find_timm_weights(arch: str, weights: str | None) -> str:
    """Where a timm model's weights are.

    Args:
        arch: timm's name, with or without a tag.
        weights: a file, a tag, or None for the name's own tag, or timm's default.

    Returns:
        A path to a file, or the name with a tag.

    Raises:
        TowerError: the file or the tag does not exist, or timm has no weights of the model.
    """
    name, _, own_tag = arch.partition(".")
    tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{name}.*")]
    if weights is not None and Path(find_weights(arch, weights)).is_file():
        return weights
    if weights is not None and own_tag not in ("", weights):
        raise TowerError(f"network.weights: {weights!r} is no file and not the tag that network.arch: {arch} has")
    default = timm.models.get_pretrained_cfg(name)
    tag = weights or own_tag or (default.tag if default is not None else "")
    if not tags:
        raise TowerError(
            f"network.weights: timm has no weights of {name}: give a file, or set network.init to false for random ones"
        )
    if tag not in tags:
        raise TowerError(
            f"network.weights: {tag!r} is neither a file nor a tag of {name}; its tags are {', '.join(tags)}"
        )
    return f"{name}.{tag}"


def build_timm_tower(
    name: str, image_size: int, source: str | None = None, known_as: str | None = None, **changes: Any
) -> TimmTower:
    """A tower by timm's name.

    Args:
        name: with or without a tag, which selects what else timm knows of the model (mean and std of the pixels).
        image_size: pixels a side. Positions are interpolated if the weights have another size.
        source: as `find_timm_weights` returns it; None for random weights. Files may have any layout that timm reads
            for the model (its own, the authors'), or open_clip's, with the tower under `visual.trunk.`. A classifier
            is left out.
        known_as: the name for messages, if it is not timm's.
        changes: arguments of timm's model that replace its own.

    Raises:
        TowerError: an unknown or unsuitable name, a size that the patches do not divide, weights that cannot be read or
            do not fit.
    """
    known_as = known_as or name
    described = known_as if known_as == name else f"{known_as} (timm's {name})"
    _check_name(name, described)
    arguments = {"img_size": image_size, "num_classes": 0, "dynamic_img_size": False, **changes}
    try:
        model = timm.create_model(name, **arguments)
    except (AssertionError, RuntimeError, ValueError) as error:  # an unknown tag, sizes that timm refuses
        raise TowerError(f"network.arch: {described}: {first_line(error)}") from None
    tower = TimmTower(model, known_as)
    if image_size % tower.patch_size:
        raise TowerError(
            f"data.input_size: {image_size} is not divisible by the patch size {tower.patch_size} of {described}"
        )
    if source is None:
        return tower
    if Path(source).is_file():
        _load(tower, Path(source))
    else:
        tower = TimmTower(_download(source, arguments), known_as)
    tower.weights = source
    logger.info("%s: weights from %s", described, source)
    return tower


def _check_name(name: str, described: str) -> None:
    """Raise TowerError for a name that timm does not know, or whose family cannot be a tower."""
    if not is_timm_name(name):
        raise TowerError(f"network.arch: timm has no model {name!r}")
    renamed = timm.models.get_deprecated_models()
    if name in renamed:
        raise TowerError(f"network.arch: timm has dropped the name {name} for {renamed[name] or 'no other'}")
    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    if family not in FAMILIES:
        reason = "equal blocks of norm, attention, norm, MLP on one grid of patches are missing"
        raise TowerError(
            f"network.arch: {described} is no vision transformer that models here can use: "
            f"{_UNSUITABLE_FAMILIES.get(family, reason)} "
            f"(timm's family {family}; suitable are {', '.join(FAMILIES)})"
        )


def _download(source: str, arguments: dict[str, Any]) -> nn.Module:
    """timm's model with the weights of a tag, downloaded if they are not in the Hugging Face cache."""
    try:
        return timm.create_model(source, pretrained=True, **arguments)
    except Exception as error:  # whatever hub, network and disk raise
        raise TowerError(
            f"cannot get {source} ({type(error).__name__}: {first_line(error)}): name a file in network.weights, "
            "or set network.init to false"
        ) from None


def _load(tower: TimmTower, path: Path) -> None:
    """Read a file, bring it into timm's own layout by timm's own filter, and load all that the tower has."""
    model = tower.model
    try:
        values = without_wrappers(named_tensors(path, read_file(path).content))
    except WeightsFileError as error:
        raise TowerError(str(error)) from None
    try:
        values = _filter(model)(values, model)
    except Exception as error:  # whatever timm raises for another model's weights
        raise TowerError(
            f"{path}: does not fit {tower.name}, for timm cannot bring it into the model's layout "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    wanted, removed = model.state_dict(), tuple(f"{part}." for part in tower.removed_parts)
    values = {key: value for key, value in values.items() if key in wanted or not key.startswith(removed)}
    check_fit(values, wanted, path, tower.name)
    model.load_state_dict(values)


def _filter(model: nn.Module) -> Callable[..., dict[str, Tensor]]:
    """timm's function (values, model) -> values under timm's names, positions and patches resized to the model's."""
    if isinstance(model, Eva):
        return eva.checkpoint_filter_fn
    return partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True)
