"""Reads state dicts saved by the authors' TD4V code: their key names and shapes become ours.

Source of the names: owlholy/TD4V clip/VisualTransformer.py, clip/Transformer.py, clip/AttnCBlock.py, clip/adapter.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# Within a TD4V module and a side block.
_MODULE_NAMES = (
    (r"(^|\.)bn_down\.", r"\1norm."),
    (r"(^|\.)conv_down\.", r"\1down."),
    (r"(^|\.)conv_up\.", r"\1up."),
    (r"(^|\.)conv_1\.", r"\1conv_backward."),
    (r"(^|\.)conv_2\.", r"\1conv_forward."),
    (r"(^|\.)bn_2\.", r"\1norm_mlp."),
    (r"(^|\.)ln_1\.", r"\1norm_attn."),
    (r"(^|\.)attn\.in_proj_(weight|bias)$", r"\1attn.qkv.\2"),
    (r"(^|\.)attn\.out_proj\.", r"\1attn.proj."),
)
# Of the complete network, except the parts of _NUMBERED.
_NETWORK_NAMES = (
    (r"^fc_proj\.", "head."),
    (r"^side_conv1\.", "side.stem.conv."),
    (r"^side_pre_bn3d\.", "side.stem.norm."),
    (r"^side_post_bn\.", "side.norm."),
    (r"^transformer\.side_lns\.(\d+)\.", r"side.layers.\1.norm."),
    (r"^transformer\.side_linears\.(\d+)\.", r"side.layers.\1.project."),
    (r"^transformer\.side_transformer\.(\d+)\.", r"side.layers.\1.block."),
)
_TOWER = re.compile(r"^(conv1|class_embedding|positional_embedding|ln_pre|ln_post|proj|transformer\.resblocks)\b")
# Parts that only some levels have. The authors number them in the order of use, we by their level.
_NUMBERED = re.compile(r"^transformer\.side_(temporal_embeddings|upsample|upsample_ln)\.(\d+)")
_NUMBERED_NAMES = {
    "temporal_embeddings": "temporal_embedding",
    "upsample": "upsample.1",
    "upsample_ln": "upsample.0",
}
_OUR_NAMES = re.compile(
    r"^(head|side|td4v|norm|down|up|conv_backward|conv_forward|norm_mlp|norm_attn|attn|mlp)\.|^scale$"
)


def is_authors_layout(keys: Iterable[str]) -> bool:
    """Whether these are the authors' key names of the complete side network, with or without `module.`, `visual.`."""
    return any(re.search(r"(^|\.)side_conv1\.weight$", key) for key in keys)


def from_authors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the authors' weights.

    Takes the complete model (`visual.` and `fc_proj.`, or the vision transformer alone), a side block, a TD4V module or
    CLIP's tower. The tower's text projection, which nothing uses, is dropped.

    Args:
        state_dict: their names, with or without `module.`; any dtype.

    Returns:
        Our names; the tensors are views of theirs. The complete model's keys start with `tower.`, `side.` and `head.`.

    Raises:
        ValueError: a key that belongs to none of these.
    """
    plain = {key.removeprefix("module.").removeprefix("visual."): value for key, value in state_dict.items()}
    levels = _levels(plain)
    renamed = {}
    for key, value in plain.items():
        if key == "proj":
            continue
        new = _rename(key, levels)
        if value.ndim == 5 and not new.endswith("stem.conv.weight"):  # Conv3d kernels (k, 1, 1), (1, k, k) are Conv2d's
            value = value.squeeze(2) if value.shape[2] == 1 and value.shape[3:] != (1, 1) else value.squeeze(4)
        renamed[new] = value
    return renamed


def _rename(key: str, levels: dict[str, list[int]]) -> str:
    if _TOWER.match(key):
        return f"tower.visual.{key}"
    if numbered := _NUMBERED.match(key):
        part, number = numbered[1], int(numbered[2])
        return f"side.layers.{levels[part][number]}.{_NUMBERED_NAMES[part]}{key[numbered.end() :]}"
    new = key
    for pattern, replacement in _NETWORK_NAMES + _MODULE_NAMES:
        new = re.sub(pattern, replacement, new)
    if not _OUR_NAMES.match(new):
        raise ValueError(f"the key {key} is not of the authors' TD4V")
    return new


def _levels(state_dict: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The levels that have the parts of _NUMBERED, in order, from the widths of the levels."""
    widths, pattern = {}, re.compile(r"^transformer\.side_linears\.(\d+)\.weight$")
    for key, value in state_dict.items():
        if match := pattern.match(key):
            widths[int(match[1])] = value.shape[0]
    changed = [level for level in sorted(widths) if widths[level] != widths[level - 1 if level else max(widths)]]
    widened = [level for level in changed if level > 0]
    return {"temporal_embeddings": changed, "upsample": widened, "upsample_ln": widened}
