"""Reads state_dicts saved by the authors' code: their key names and shapes onto ours. Nothing else lives here.

Source of the names: owlholy/TD4V clip/VisualTransformer.py, clip/Transformer.py, clip/AttnCBlock.py, clip/adapter.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# Within a TD4V module and a side block.
_LEAVES = (
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
# From the whole network; levels that are numbered by use, not by layer, are resolved in `from_authors`.
_WHOLE = (
    (r"^fc_proj\.", "head."),
    (r"^side_conv1\.", "side.stem.conv."),
    (r"^side_pre_bn3d\.", "side.stem.norm."),
    (r"^side_post_bn\.", "side.norm."),
    (r"^transformer\.side_lns\.(\d+)\.", r"side.layers.\1.norm."),
    (r"^transformer\.side_linears\.(\d+)\.", r"side.layers.\1.project."),
    (r"^transformer\.side_transformer\.(\d+)\.", r"side.layers.\1.block."),
)
_TOWER = re.compile(r"^(conv1|class_embedding|positional_embedding|ln_pre|ln_post|proj|transformer\.resblocks)\b")
_NUMBERED = re.compile(r"^transformer\.side_(temporal_embeddings|upsample|upsample_ln)\.(\d+)")


def is_authors_layout(keys: Iterable[str]) -> bool:
    """Whether these are the authors' key names for the whole side network (with or without `module.`, `visual.`)."""
    return any(re.search(r"(^|\.)side_conv1\.weight$", key) for key in keys)


def from_authors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the authors' weights for ours.

    Takes the whole model (`visual.` and `fc_proj.`, or the vision transformer alone), a side block, a TD4V module or
    the CLIP trunk. The tower's text projection, which nothing uses, is dropped.

    Args:
        state_dict: their names, with or without `module.`; any dtype.

    Returns:
        our names; tensors are views of theirs. The whole model's keys start with `tower.`, `side.` and `head.`.

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
        if new.endswith("stem.conv.weight") or value.ndim != 5:
            renamed[new] = value
        else:  # Conv3d kernels (k, 1, 1) and (1, k, k) are Conv2d here
            renamed[new] = value.squeeze(2) if value.shape[2] == 1 and value.shape[3:] != (1, 1) else value.squeeze(4)
    return renamed


def _rename(key: str, levels: dict[str, list[int]]) -> str:
    if _TOWER.match(key):
        return f"tower.visual.{key}"
    numbered = _NUMBERED.match(key)
    if numbered:
        kind, number = numbered[1], int(numbered[2])
        part = {"temporal_embeddings": "temporal_embedding", "upsample": "upsample.1", "upsample_ln": "upsample.0"}[
            kind
        ]
        return f"side.layers.{levels[kind][number]}.{part}{key[numbered.end() :]}"
    new = key
    for pattern, replacement in _WHOLE + _LEAVES:
        new = re.sub(pattern, replacement, new)
    known = r"^(head|side|td4v|norm|down|up|conv_backward|conv_forward|norm_mlp|norm_attn|attn|mlp)\.|^scale$"
    if not re.match(known, new):
        raise ValueError(f"the key {key} is not of the authors' TD4V")
    return new


def _levels(state_dict: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The layers that the authors' consecutively numbered embeddings and upsamplings belong to, from the widths."""
    widths, pattern = {}, re.compile(r"^transformer\.side_linears\.(\d+)\.weight$")
    for key, value in state_dict.items():
        if match := pattern.match(key):
            widths[int(match[1])] = value.shape[0]
    changed = [i for i in sorted(widths) if widths[i] != widths[i - 1 if i else max(widths)]]
    widened = [i for i in changed if i > 0]
    return {"temporal_embeddings": changed, "upsample": widened, "upsample_ln": widened}
