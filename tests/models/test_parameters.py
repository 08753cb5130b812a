"""Parameter groups: every trainable parameter once, learning rates and exemptions by hand, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from configs.schema import ConfigError, load_config
from engine.optim import build_optimizer, check_groups
from models import parameters
from models.loading import load_weights
from models.parameters import freeze_all_but_trainable, frozen_identity, parameter_groups
from models.registry import MODELS, build_model
from tests.helpers.tiny_models import adapted

SCALED = ("tadaformer", "tadaconvnextv2")  # their authors' multipliers make more groups
BATCH, LAYER = nn.BatchNorm1d, nn.LayerNorm


def tiny(model_name: str, **options) -> nn.Module:
    """Three blocks, T = 4, five classes; side widths 16, 16, 64."""
    vision = {"width": 64, "layers": 3, "heads": 2, "patch_size": 8, "image_size": 32}
    network = {"arch": "custom", "vision": vision, "pyramid": {"n_embs": [16, 16, 64]}, "init": False}
    data = {"dataset": "hmdb51", "num_classes": 5, "num_segments": 4, "input_size": 32}
    return build_model(load_config(adapted(model_name, data, network | {"options": options})))


def names_of(model: nn.Module, groups: list[dict]) -> dict[str, list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups}


@pytest.mark.parametrize("model_name", [name for name in MODELS if name not in SCALED])
def test_by_default_one_group_a_trainable_module_in_its_own_order(model_name: str) -> None:
    """Optimizer states in checkpoints refer to parameters by their index, so the order must not change."""
    model = tiny(model_name)
    groups = parameter_groups(model, lr=0.1, weight_decay=0.05, clip_ratio=0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [
        (name, 0.1 if name == "head" else 0.05) for name in model.trainable_modules()
    ]
    assert all(group.keys() == {"name", "params", "lr", "weight_decay"} for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.05}
    for group, part in zip(groups, model.trainable_modules().values(), strict=True):
        expected = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        assert [id(p) for p in group["params"]] == [id(p) for p in expected]


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_every_trainable_parameter_is_in_exactly_one_group(
    model_name: str, layer_decay: float, decay_norms: bool
) -> None:
    model = tiny(model_name)
    groups = parameter_groups(
        model, lr=0.1, weight_decay=0.05, clip_ratio=0.5, layer_decay=layer_decay, decay_norms=decay_norms
    )
    check_groups(model, groups)
    assert len({group["name"] for group in groups}) == len(groups) and all(group["params"] for group in groups)


@pytest.mark.parametrize("model_name", ("td4v_side", "td4v_finetune"))
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_norms_biases_and_scalars_are_exempt_from_decay_and_nothing_else(model_name: str, layer_decay: float) -> None:
    model = tiny(model_name)
    groups = parameter_groups(model, lr=0.1, weight_decay=0.05, layer_decay=layer_decay, decay_norms=False)
    exempt = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]
    assert {group["name"].endswith("_no_decay") for group in groups if group["weight_decay"] == 0} == {True}
    trainable = [module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]
    norms = sum(len(list(module.parameters())) for module in trainable if isinstance(module, (BATCH, LAYER)))
    biases = sum(isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) for module in trainable)
    scales = sum(hasattr(module, "scale") for module in trainable)
    assert len(exempt) == norms + biases + scales
    weights = {parameter for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert {id(module.weight) for module in trainable if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))} <= {
        id(parameter) for parameter in weights
    }
    left = {name.split(".")[-1] for name, parameter in model.named_parameters() if parameter in weights}
    assert left == {"weight", "temporal_embedding"}


def test_counts_of_side_tunings_exemptions() -> None:
    """By hand: a TD4V has 2 of its norm, 4 biases, a scale; a side layer besides 3 norms, project, qkv, proj, fc1, fc2."""
    groups = parameter_groups(tiny("td4v_side"), lr=0.1, weight_decay=0.05, decay_norms=False)
    sizes = {group["name"]: len(group["params"]) for group in groups}
    per_layer, upsample, stem, norm = 7 + 3 * 2 + 5, 2 + 1, 2 + 1, 2
    assert sizes["side_no_decay"] == 3 * per_layer + upsample + stem + norm
    assert sizes["head_no_decay"] == sizes["head"] == 1
    weights = 3 * (4 + 5) + 1 + 1 + 2  # TD4V 4, project and block 5; upsampling, stem; embeddings at levels 0 and 2
    assert sizes["side"] == weights


def test_layers_of_side_tuning_by_hand() -> None:
    model = tiny("td4v_side")
    groups = parameter_groups(model, lr=0.1, weight_decay=0.05, clip_ratio=0.5, layer_decay=0.5)
    body = {f"side_{k:02d}": 0.05 * 0.5 ** (5 - k) for k in range(5)}  # stem, three levels, norm; the head is layer 5
    assert {group["name"]: group["lr"] for group in groups} == {**body, "head_05": 0.1}
    held = names_of(model, groups)
    side = [name for name, parameter in model.named_parameters() if name.startswith("side.")]
    assert held["side_00"] == [name for name in side if name.startswith("side.stem.")]
    for level in range(3):
        assert held[f"side_{level + 1:02d}"] == [name for name in side if name.startswith(f"side.layers.{level}.")]
    assert held["side_04"] == ["side.norm.weight", "side.norm.bias"]
    assert held["head_05"] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("placement", ["before_attention", "both"])
def test_layers_of_fine_tuning_by_hand(placement: str) -> None:
    model = tiny("td4v_finetune", placement=placement)
    groups = parameter_groups(model, lr=0.1, weight_decay=0.05, layer_decay=0.8)
    factors = {"td4v_00": 0.8**3, "td4v_01": 0.8**2, "td4v_02": 0.8, "temporal_embedding_00": 0.8**3, "head_03": 1.0}
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == pytest.approx({name: 0.1 * factor for name, factor in factors.items()})
    held = names_of(model, groups)
    for index in range(3):
        expected = [n for n, _ in model.td4v.named_parameters(prefix="td4v") if n.split(".")[2] == str(index)]
        assert held[f"td4v_{index:02d}"] == expected and len(expected) == 11 * len(model.td4v)


def test_fine_tuning_without_temporal_embedding_has_layers_too() -> None:
    model = tiny("td4v_finetune", temporal_embedding=False)
    assert [len(layer) for layer in model.trainable_layers()] == [1, 1, 1, 1]
    check_groups(model, parameter_groups(model, lr=0.1, weight_decay=0.05, layer_decay=0.8))


def test_a_step_without_gradients_shrinks_what_decays_and_leaves_the_rest() -> None:
    """AdamW's step with zero gradients is p (1 - lr wd): the groups' own settings seen through the optimizer."""
    torch.manual_seed(0)
    model = tiny("td4v_finetune", zero_init=False).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    groups = parameter_groups(model, lr=0.1, weight_decay=0.2, layer_decay=0.5, decay_norms=False)
    optimizer = build_optimizer(groups, "adamw", weight_decay=0.2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    factor = {"head": 1.0, "temporal_embedding": 0.5**3}
    for name, parameter in model.named_parameters():
        rate = factor.get(name.split(".")[0]) or 0.5 ** (3 - int(name.split(".")[2])) if parameter.requires_grad else 0
        decays = parameter.requires_grad and parameter.ndim > 1
        expected = before[name] * (1 - 0.1 * rate * 0.2) if decays else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=0, msg=name)


class Layered(nn.Module):
    """A model whose layers are given from outside."""

    def __init__(self, pick=None) -> None:
        super().__init__()
        self.body, self.more, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        if pick is not None:
            self.trainable_layers = lambda: pick(self)

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"body": nn.ModuleList([self.body, self.more]), "head": self.head}


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (None, "Layered does not name its layers"),
        (lambda m: [[m.body], [m.head]], "differ in more.bias"),
        (lambda m: [[m.body], [m.more, m.body], [m.head]], "in its layers 0 and 1"),
        (lambda m: [[m.body, m.more], [nn.Linear(2, 2)], [m.head]], "differ in a foreign parameter"),
    ],
)
def test_layers_that_are_not_the_trainable_ones_are_refused(pick, message: str) -> None:
    model = freeze_all_but_trainable(Layered(pick))
    assert len(parameter_groups(model, lr=0.1, weight_decay=0.05)) == 2
    with pytest.raises(ConfigError, match=rf"solver\.layer_decay: .*{message}"):
        parameter_groups(model, lr=0.1, weight_decay=0.05, layer_decay=0.9)


def test_frozen_weights_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, hashed = tiny("td4v_side"), tiny("td4v_finetune"), []
    original = parameters._sha256
    monkeypatch.setattr(parameters, "_sha256", lambda frozen: hashed.append(len(frozen)) or original(frozen))
    first = frozen_identity(model)
    assert first == frozen_identity(model) and len(hashed) == 1
    assert first["sha256"] == frozen_identity(other)["sha256"]  # the same tower in another model
    trainable = {name: value + 1 for name, value in model.state_dict().items() if not name.startswith("tower.")}
    load_weights(model, trainable, "a.pt", backbone=first)
    assert frozen_identity(model) == first and len(hashed) == 2
    other_tower = {name: value + 1 for name, value in model.state_dict().items()}
    load_weights(model, other_tower, "b.pt")
    changed = frozen_identity(model)
    assert changed["sha256"] != first["sha256"] and changed["weights"] == "those in b.pt" and len(hashed) == 3
