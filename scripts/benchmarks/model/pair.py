"""A model of the product and its plain twin, with the same weights and clips, and how far they differ.

Letters: B clips, T frames, D width of the features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from configs.schema import Config, ConfigError, VisionConfig, fill_options
from engine.optim import Precision
from models import tadaconvnextv2, tdn
from models.registry import MODELS, build_model
from scripts.benchmarks.model.command import MODEL_NAMES, SIDES
from scripts.benchmarks.model.family import PlainTAda2D, PlainTAdaConvNeXt, PlainTAdaFormer, PlainTDN
from scripts.benchmarks.model.reference import PlainFineTuning, PlainSideTuning, TowerSizes, fill, to_product

EXACT = Precision("fp32", None, scaled=False)  # the models' own format
SMALL = {  # options of small models
    "tdn": {"depths": (1, 1, 1, 1), "width": 16},
    "tada2d": {"depths": (1, 1, 1, 1), "width": 16},
    "tadaformer": {"head_width": 16},
    "tadaconvnextv2": {"depths": (1, 1, 1, 1), "widths": (16, 16, 32, 32), "head_width": 8},
}
LOSS_SCALE = {torch.float16: 2.0**12}


@dataclass(frozen=True)
class Pair:
    """The two models with the same weights, and a batch: video (B, T*f, 3, height, width), label (B,).

    `to_product` gives the plain one's weights or gradients under the product's names.
    """

    models: dict[str, nn.Module]
    to_product: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    video: Tensor
    label: Tensor

    def step(self, side: str, precision: Precision) -> Tensor:
        """Forward and backward of the batch; the loss, a scalar."""
        model, scale = self.models[side], LOSS_SCALE.get(precision.dtype, 1.0)
        model.zero_grad()
        with precision.autocast(self.video.device):
            loss = cross_entropy(model(self.video), self.label, label_smoothing=0.1)
        (loss * scale).backward()
        return loss.detach()

    def infer(self, side: str, precision: Precision) -> Tensor:
        """Forward without gradients; the logits (B, K)."""
        with torch.inference_mode(), precision.autocast(self.video.device):
            return self.models[side](self.video)

    def values(self, side: str, precision: Precision) -> dict[str, Tensor]:
        """Features, logits, and the gradient of each trainable parameter under the product's name, of one training step."""
        model = self.train().models[side]
        found: dict[str, Tensor] = {}
        head = model.get_submodule("head" if side == "product" else model.classifier)
        hook = head.register_forward_hook(
            lambda _, inputs, logits: found.update(features=inputs[0].detach(), logits=logits.detach())
        )
        try:
            self.step(side, precision)
        finally:
            hook.remove()
        scale = LOSS_SCALE.get(precision.dtype, 1.0)
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad / scale for name, p in model.named_parameters()
        }
        model.zero_grad()
        grads = grads if side == "product" else self.to_product(grads)
        trainable = [name for name, p in self.models["product"].named_parameters() if p.requires_grad]
        return found | {name: grads[name] for name in trainable}

    def train(self, mode: bool = True) -> Pair:
        for model in self.models.values():
            model.train(mode)
        return self


def make_pair(config: Config, batch: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Pair:
    """Both models of a configuration with random weights, and random clips."""
    product = build_model(config, pretrained=False)
    plain = plain_model(config, product)
    fill(plain, seed)
    is_td4v = config.network.model_name.startswith("td4v")
    carry = to_product if is_td4v else MODELS[config.network.model_name].from_published
    product.load_state_dict({**product.state_dict(), **carry(plain.state_dict())})
    generator = torch.Generator().manual_seed(seed)
    size, classes = config.data.input_size, config.data.num_classes
    frames = config.data.num_segments * product.frames_per_segment
    video = torch.randn(batch, frames, 3, size, size, generator=generator)
    label = torch.randint(classes, (batch,), generator=generator)
    models = {"plain": plain.to(device, dtype), "product": product.to(device, dtype)}
    return Pair(models, carry, video.to(device, dtype), label.to(device))


def plain_model(config: Config, product: nn.Module) -> nn.Module:
    """The plain twin of a product model. Raises ConfigError for what is not transcribed."""
    network, classes, frames = config.network, config.data.num_classes, config.data.num_segments
    if network.model_name not in MODEL_NAMES.values():
        raise ConfigError(f"network.model: {network.model_name} has no plain transcription in this benchmark")
    options = fill_options(MODELS[network.model_name].Options, network.options, "network.options")
    if network.model_name == "tdn":
        return PlainTDN(classes, frames, options.depths or tdn.DEPTHS[options.depth], options.width)
    if network.model_name == "tada2d":
        return PlainTAda2D(classes, options.depths, options.width)
    if network.model_name == "tadaconvnextv2":
        return PlainTAdaConvNeXt(classes, **tadaconvnextv2.chosen_size(options)._asdict())
    tower = product.tower
    block = tower.blocks[0].module
    sizes = TowerSizes(
        width=tower.width,
        layers=len(tower.blocks),
        heads=block.attn.num_heads,
        patch_size=tower.patch_size,
        grid=tuple(tower.grid),
        hidden=block.mlp.c_fc.out_features,
        quick_gelu=tower.quick_gelu,
    )
    if network.model_name == "tadaformer":
        temporal, double = options.temporal_projection, options.two_convolutions
        return PlainTAdaFormer(sizes, classes, frames, options.head_width, temporal, double)
    if network.model_name == "td4v_finetune":
        return PlainFineTuning(
            sizes,
            classes,
            frames,
            halves=tuple(product.td4v),
            ratio=options.ratio,
            mode=options.mode,
            feature=options.feature,
            embedding=options.temporal_embedding,
        )
    if network.options and options != type(options)():
        raise ConfigError("network.options: the plain transcription of side-tuning has all of its temporal parts")
    return PlainSideTuning(
        sizes,
        classes,
        frames,
        widths=network.pyramid.n_embs,
        mlp_ratio=network.pyramid.mlp_ratio,
        ratio=network.DA_ratio,
        mode=network.sample_mode,
    )


def small(config: Config) -> Config:
    """The same model with few blocks, on a tower of 3 x 3 patches, for what would take too long at full size."""
    frames = config.data.num_segments
    network = replace(
        config.network,
        arch="custom",
        vision=VisionConfig(width=64, layers=2, heads=2, patch_size=16, image_size=48),
        pyramid=replace(config.network.pyramid, n_embs=(max(24, frames), max(72, frames))),
        options={**config.network.options, **SMALL.get(config.network.model_name, {})},
    )
    return replace(config, data=replace(config.data, num_classes=4, input_size=48), network=network)


def differences(pair: Pair) -> dict[str, tuple[float, str]]:
    """The largest |difference| over the plain one's rms, and where it is, of logits and of all gradients.

    The gradient of a bias is compared with that of its layer's weights if this is larger: before a BatchNorm it is 0 in
    theory, and nothing but rounding errors.
    """
    plain, product = (
        pair.train().values(side, EXACT) | {"inference": pair.train(False).infer(side, EXACT)} for side in SIDES
    )
    rms = {name: value.pow(2).mean().sqrt().item() for name, value in plain.items()}
    errors = {}
    for name, value in plain.items():
        scale = max(rms[name], rms.get(f"{name.removesuffix('bias')}weight", 0.0), 1e-300)
        errors[name] = (product[name] - value).abs().max().item() / scale
    worst = max(_gradients(plain), key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    return {
        "logits": (errors["logits"], "training"),
        "inference": (errors["inference"], "logits"),
        "gradients": (errors[worst], worst),
        "gradients as one vector": (relative_error(product, plain)["gradients"], "all"),
    }


def losses(pair: Pair, side: str, steps: int) -> list[float]:
    """The losses of AdamW steps on the batch, as the paper trains."""
    found: list[float] = []
    model = pair.train().models[side]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.15)
    for _ in range(steps):
        found.append(pair.step(side, EXACT).item())
        optimizer.step()
    return found


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """rms of the difference over rms, of the features and of all gradients as one vector."""

    def norm(names: Sequence[str], value: Callable[[str], Tensor]) -> float:
        return math.sqrt(sum(value(name).double().pow(2).sum().item() for name in names))

    return {
        what: norm(names, lambda name: found[name].double() - exact[name].double()) / norm(names, exact.__getitem__)
        for what, names in (("features", ["features"]), ("gradients", _gradients(exact)))
    }


def _gradients(values: Iterable[str]) -> list[str]:
    return [name for name in values if name not in ("features", "logits", "inference")]
