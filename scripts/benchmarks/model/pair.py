"""A model of the product and its plain twin with the same weights and clips, and how equal they are.

Lives here: building both from a configuration, running either, comparing what they give. Does not live here: the plain
models (bench_plain.py), time, memory and the report (bench_model.py).

Letters: B clips, T frames, D width of the features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from configs.schema import Config, ConfigError, PyramidConfig, VisionConfig, fill_options
from engine.optim import Precision
from models.registry import MODELS, build_model
from scripts.benchmarks.model.reference import PlainFineTuning, PlainSideTuning, TrunkSizes, fill, to_product

WHO = ("plain", "product")
METHOD_NAMES = {"side": "td4v_side", "fine": "td4v_finetune"}
STEPS = 20  # of a training curve
EXACT = Precision("fp32", None, scaled=False)  # the models' own format
LOSS_SCALE = {torch.float16: 2.0**12}


@dataclass(frozen=True)
class Pair:
    """The two models with the same weights, and a batch: video (B, T, 3, height, width), label (B,)."""

    models: dict[str, nn.Module]
    video: Tensor
    label: Tensor

    def step(self, who: str, precision: Precision) -> Tensor:
        """Forward and backward of the batch; the loss, a scalar."""
        model, scale = self.models[who], LOSS_SCALE.get(precision.dtype, 1.0)
        model.zero_grad()
        with precision.autocast(self.video.device):
            loss = cross_entropy(model(self.video), self.label, label_smoothing=0.1)
        (loss * scale).backward()
        return loss.detach()

    def infer(self, who: str, precision: Precision) -> Tensor:
        """Forward, nothing kept; the logits (B, K)."""
        with torch.inference_mode(), precision.autocast(self.video.device):
            return self.models[who](self.video)

    def values(self, who: str, precision: Precision) -> dict[str, Tensor]:
        """Features, logits, and the gradient of each tuned parameter under the product's name, of one training step."""
        model = self.train().models[who]
        found: dict[str, Tensor] = {}
        head = model.get_submodule("head" if who == "product" else "fc_proj")
        hook = head.register_forward_hook(
            lambda _, inputs, logits: found.update(features=inputs[0].detach(), logits=logits.detach())
        )
        try:
            self.step(who, precision)
        finally:
            hook.remove()
        scale = LOSS_SCALE.get(precision.dtype, 1.0)
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad / scale for name, p in model.named_parameters()
        }
        model.zero_grad()
        grads = grads if who == "product" else to_product(grads)
        tuned = [name for name, p in self.models["product"].named_parameters() if p.requires_grad]
        return found | {name: grads[name] for name in tuned}

    def train(self, mode: bool = True) -> Pair:
        for model in self.models.values():
            model.train(mode)
        return self


def make_pair(config: Config, batch: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Pair:
    """Both models of a configuration with random weights, and random clips."""
    product = build_model(config, pretrained=False)
    plain = plain_model(config, product)
    fill(plain, seed)
    product.load_state_dict({**product.state_dict(), **to_product(plain.state_dict())})
    generator = torch.Generator().manual_seed(seed)
    size, classes = config.data.input_size, config.data.num_classes
    video = torch.randn(batch, config.data.num_segments, 3, size, size, generator=generator)
    label = torch.randint(classes, (batch,), generator=generator)
    models = {"plain": plain.to(device, dtype), "product": product.to(device, dtype)}
    return Pair(models, video.to(device, dtype), label.to(device))


def plain_model(config: Config, product: nn.Module) -> nn.Module:
    """The plain twin of a product model. Raises ConfigError for what is not transcribed."""
    network, classes, frames = config.network, config.data.num_classes, config.data.num_segments
    if network.model_name not in METHOD_NAMES.values():
        raise ConfigError(f"network.model: {network.model_name} has no plain transcription in this benchmark")
    options = fill_options(MODELS[network.model_name].Options, network.options, "network.options")
    tower = product.tower
    block = tower.blocks[0].module
    sizes = TrunkSizes(tower.width, len(tower.blocks), block.attn.num_heads, tower.patch_size, tuple(tower.grid),
                       block.mlp.c_fc.out_features, tower.quick_gelu)  # fmt: skip
    if network.model_name == "td4v_finetune":
        return PlainFineTuning(sizes, classes, frames, tuple(product.td4v), options.ratio, options.mode,
                               options.feature, options.temporal_embedding)  # fmt: skip
    if network.options and options != type(options)():
        raise ConfigError("network.options: the plain transcription of side-tuning has all of its temporal parts")
    pyramid = network.pyramid
    return PlainSideTuning(sizes, classes, frames, pyramid.n_embs, pyramid.mlp_ratio, network.DA_ratio,
                           network.sample_mode)  # fmt: skip


def small(config: Config) -> Config:
    """The same method on a tower of two blocks and 3 x 3 patches, for what would take too long at full size."""
    frames = config.data.num_segments
    return replace(
        config,
        data=replace(config.data, num_classes=4, input_size=48),
        network=replace(
            config.network, arch="custom", vision=VisionConfig(64, 2, 2, 16, 48),
            pyramid=PyramidConfig((max(24, frames), max(72, frames)), config.network.pyramid.mlp_ratio),
        ),
    )  # fmt: skip


def differences(pair: Pair) -> dict[str, tuple[float, str]]:
    """Largest |difference| over the plain one's rms, and where it is: of logits, in training and in inference, and of
    the gradient of each tuned parameter; and the rms of all gradients' difference over their rms.

    The gradient of a bias counts against that of its layer's weights where this is larger: some are 0 in theory (in
    front of a BatchNorm), and nothing but rounding errors.
    """
    plain, product = (
        pair.train().values(who, EXACT) | {"inference": pair.train(False).infer(who, EXACT)} for who in WHO
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


def losses(pair: Pair, who: str) -> list[float]:
    """The losses of STEPS AdamW steps on the batch, as the paper trains."""
    found = []
    model = pair.train().models[who]
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=1e-3, weight_decay=0.15)
    for _ in range(STEPS):
        found.append(pair.step(who, EXACT).item())
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
