"""The tower that a configuration names, from open_clip or timm, with its weights."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np

from clip.towers.base import Tower, TowerError
from clip.towers.openclip_vit import OpenClipTower, build_custom_tower, build_openclip_tower, clip_names, timm_arguments
from clip.towers.timm_vit import build_timm_tower, find_timm_weights, is_timm_name, timm_names
from clip.towers.weights import ClipWeights, clip_tags, find_weights
from configs.schema import Config, DataConfig, NetworkConfig, nearest

logger = logging.getLogger("td4v")


def build_tower(config: Config) -> Tower:
    """The frozen tower of `network.arch` for images of `data.input_size` pixels.

    Its weights are those of `network.weights`, or random if `network.init` is false. A warning is logged if data.mean
    or data.std are not those that the weights were trained with.

    Args:
        config: network.arch is a name of open_clip or OpenAI, or one of timm; a name that both know is timm's if
            open_clip has no weights of it. network.vision gives the sizes of a custom CLIP.

    Returns:
        A Tower on the CPU, in float32. `tower.weights` says where its weights come from.

    Raises:
        TowerError: an unknown or unsuitable name, sizes that do not fit, weights that cannot be read or do not fit.
    """
    network, size = config.network, config.data.input_size
    arch = network.arch
    if is_timm_name(arch) and (arch not in clip_names() or not clip_tags(arch)):
        source = find_timm_weights(arch, network.weights) if network.init else None
        tower = build_timm_tower(arch, image_size=size, source=source)
    else:
        tower = _build_clip_tower(network, size)
    if network.init:
        _check_pixels(tower, config.data)
    else:
        tower.weights = f"random weights of seed {config.seed}"
    return tower


def _build_clip_tower(network: NetworkConfig, size: int) -> Tower:
    arch, known = network.arch, clip_names()
    if network.vision is None and arch not in known:
        close = " or ".join(name for name in (nearest(arch, known), nearest(arch, timm_names())) if name)
        hint = f"; did you mean {close}?" if close else ""
        raise TowerError(f"network.arch: {arch!r} is neither a model of open_clip nor one of timm{hint}")
    weights = ClipWeights(arch, find_weights(arch, network.weights)) if network.init else None
    timm_model = timm_arguments(arch)
    if network.vision is not None:
        sizes = {**dataclasses.asdict(network.vision), "image_size": size}
        tower = build_custom_tower(**sizes, weights=weights)
    elif timm_model is None:
        tower = build_openclip_tower(arch, image_size=size, weights=weights)
    else:
        source = None if weights is None else str(weights.path)
        tower = build_timm_tower(timm_model.pop("model_name"), size, source, known_as=arch, **timm_model)
        if weights is not None:
            tower.weights = weights.source
            tower.mean, tower.std = weights.pixel_statistics or (tower.mean, tower.std)
    if network.head == "text":
        tower.clip_weights = weights  # the text head reads the rest of the file
    return tower


def _check_pixels(tower: Tower, data: DataConfig) -> None:
    """Log a warning if the configuration names other pixel statistics than the tower's."""
    pairs = ((tower.mean, data.mean), (tower.std, data.std))
    if all(None in pair or np.allclose(*pair, atol=1e-3) for pair in pairs):
        return
    statistics, check = f"mean {tower.mean}, std {tower.std}", "check what your file was trained with"
    if not Path(tower.weights).is_file():
        advice = f"{tower.name} was trained on pixels with {statistics}; set them to that, or to null"
    elif isinstance(tower, OpenClipTower):
        advice = f"OpenAI's for CLIP are {statistics}; {check}"
    elif "." in tower.name:
        advice = f"those of timm's {tower.name} are {statistics}; {check}"
    else:
        tag = ", or put its tag into network.arch" if is_timm_name(tower.name) else ""
        advice = f"timm's default for this name is {statistics}; {check}{tag}"
    mean, std = tuple(data.mean or tower.mean or ()), tuple(data.std or tower.std or ())
    logger.warning("data.mean is %s and data.std %s, but %s", mean, std, advice)
