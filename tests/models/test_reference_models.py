"""Linear probe and full fine-tuning: exact trainable sets and counts, gradients, what is saved for backward, checkpoints."""

from __future__ import annotations

import pytest
import torch

from clip.towers.openclip_vit import OpenClipTower, build_openclip_tower
from configs.schema import ConfigError, load_config
from engine.optim import check_groups
from models.full_finetune import FullFinetune
from models.linear_probe import LinearProbe
from models.loading import load_weights
from models.parameters import freeze_all_but_trainable, frozen_identity, parameter_groups, parameter_report
from models.registry import MODELS, build_model

WIDTH, LAYERS, CLASSES, SIDE = 64, 3, 5, 32
REFERENCES = ("linear_probe", "full_finetune")
FEATURES = ("class_token", "mean_tokens")


def tiny(model_name: str, **network: object) -> torch.nn.Module:
    vision = {"width": WIDTH, "layers": LAYERS, "heads": 2, "patch_size": 8, "image_size": SIDE}
    network = {"arch": "custom", "vision": vision, "init": False, "model": model_name, **network}
    data = {"dataset": "hmdb51", "num_classes": CLASSES, "num_segments": 4, "input_size": SIDE}
    return build_model(load_config({"data": data, "network": network}))


def clips(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def tower_count(width: int, layers: int, patch: int, side: int) -> int:
    """Patches, class token, positions, two norms, and a block: two norms, four square maps, an MLP four times as wide."""
    embedding = 3 * patch * patch * width + width + (1 + (side // patch) ** 2) * width
    block = 2 * 2 * width + 4 * (width * width + width) + (8 * width * width + 5 * width)
    return embedding + 2 * 2 * width + layers * block


@pytest.mark.parametrize("model_name", REFERENCES)
def test_counts_of_a_small_tower_by_hand(model_name: str) -> None:
    report, tower = parameter_report(tiny(model_name)), tower_count(WIDTH, LAYERS, 8, SIDE)
    head = WIDTH * CLASSES + CLASSES
    assert report.total == tower + head
    assert report.trainable == (head if model_name == "linear_probe" else tower + head)


def test_counts_of_vit_b16_with_51_classes() -> None:
    with torch.device("meta"):
        tower = build_openclip_tower("ViT-B/16", 224)
        full, probe = (
            freeze_all_but_trainable(FullFinetune(tower, num_classes=51)),
            freeze_all_but_trainable(LinearProbe(tower, num_classes=51)),
        )
    tower_parameters = tower_count(768, 12, 16, 224)
    assert (tower_parameters, 768 * 51 + 51) == (85_799_424, 39_219)
    assert parameter_report(full).trainable == parameter_report(full).total == tower_parameters + 39_219
    assert parameter_report(probe).trainable == 39_219 and parameter_report(probe).total == tower_parameters + 39_219


def test_exactly_the_named_parts_are_trainable() -> None:
    probe, full = tiny("linear_probe"), tiny("full_finetune")
    assert {n for n, p in probe.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in full.parameters())
    assert list(full.trainable_modules()) == [
        "conv1", "class_embedding", "positional_embedding", "ln_pre", "blocks", "final_norm", "head",
    ]  # fmt: skip
    for model in (probe, full):
        assert list(model.trainable_modules())[-1] == "head"
        assert not any(module.training for module in model.train().tower.modules())


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_groups_of_full_fine_tuning(layer_decay: float, decay_norms: bool) -> None:
    """Layer 0 is the embedding, then the blocks, ln_post, the head."""
    model = tiny("full_finetune")
    groups = parameter_groups(
        model, lr=0.1, weight_decay=0.05, clip_ratio=0.2, layer_decay=layer_decay, decay_norms=decay_norms
    )
    check_groups(model, groups)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    visual, last = model.tower.visual, LAYERS + 2
    layers = [
        visual.positional_embedding,
        *(block.module.mlp.c_fc.weight for block in model.tower.blocks),
        visual.ln_post.bias,
    ]
    for layer, parameter in enumerate(layers):
        assert rates[parameter] == pytest.approx(0.02 * layer_decay ** (last - layer))
    assert rates[visual.conv1.weight] == rates[visual.ln_pre.bias] == rates[visual.class_embedding] == rates[layers[0]]
    assert rates[model.head.weight] == 0.1
    exempt = {p for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert exempt == (set() if decay_norms else {p for p in model.parameters() if p.ndim == 1})


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("model_name", REFERENCES)
def test_gradients_reach_everything_trainable_and_nothing_else(model_name: str, feature: str) -> None:
    model = tiny(model_name, options={"feature": feature}).train()
    model(clips()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == parameter.requires_grad, name


def test_recomputing_blocks_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        model = tiny("full_finetune", recompute=recompute).train()
        model(clips()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("feature", FEATURES)
def test_both_see_the_same_and_it_is_the_towers_output(feature: str) -> None:
    probe, full = (tiny(model_name, options={"feature": feature}).eval() for model_name in REFERENCES)
    tokens = probe.tower.visual.ln_post(probe.tower(clips().flatten(0, 1)))  # (B*T, 1 + N, D)
    tokens = tokens[:, 0] if feature == "class_token" else tokens.mean(1)
    for model in (probe, full):
        torch.testing.assert_close(model.features(clips()), tokens.unflatten(0, (2, 4)).mean(1))
        torch.testing.assert_close(model(clips()), model.head(model.features(clips())))


def test_the_probe_saves_nothing_of_the_tower_for_backward() -> None:
    model, saved = tiny("linear_probe").train(), []
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(clips()).sum()
    assert [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in weights] == [(2, WIDTH)]


@pytest.mark.parametrize("model_name", REFERENCES)
def test_weights_in_and_out(model_name: str) -> None:
    source, target = tiny(model_name), tiny(model_name)
    identity = frozen_identity(source)
    assert (identity is None) == (model_name == "full_finetune")
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    trainable = {n: v for n, v in source.state_dict().items() if source.get_parameter(n).requires_grad}
    assert (trainable.keys() == source.state_dict().keys()) == (model_name == "full_finetune")
    load_weights(target, trainable, "a.pt", backbone=identity)
    assert all(map(torch.equal, source.state_dict().values(), target.state_dict().values()))


def test_options_and_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="network.options.feature: must be one of class_token, mean_tokens"):
        tiny("linear_probe", options={"feature": "class"})
    with pytest.raises(ConfigError, match="did you mean linear_probe"):
        tiny("linear_prob")
    assert set(REFERENCES) < MODELS.keys() and isinstance(tiny("full_finetune").tower, OpenClipTower)
