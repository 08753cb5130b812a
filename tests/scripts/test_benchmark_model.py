"""The plain transcription equals the product in float64, holds for the golden vectors, and the benchmark runs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml

from clip.adapter import TD4V
from clip.side_network import SideBlock
from clip.towers.openclip_vit import build_custom_tower
from configs.schema import ConfigError, load_config, parse_ratio
from engine import profiling
from models.parameters import freeze_all_but_trainable
from models.td4v_finetune import PLACEMENTS, TD4VFinetune
from models.td4v_side import TD4VSide
from scripts.benchmarks.model import command, pair, reference
from scripts.benchmarks.model.reference import (
    PlainFineTuning,
    PlainSideBlock,
    PlainSideTuning,
    PlainTD4V,
    PlainTower,
    TowerSizes,
)
from tests.helpers.golden import CASES, TOLERANCE, fill_file, load_fill, tensor

pytestmark = pytest.mark.usefixtures("quick_collection")
SIZES = TowerSizes(width=64, layers=3, heads=2, patch_size=4, grid=(3, 3), hidden=256)
TRAIN = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])


def twins(plain, product, train):
    """Both in float64 with the same weights, everything required to have gradients but the frozen tower."""
    reference.fill(plain, seed=3)
    own = product.state_dict()
    product.load_state_dict({**own, **reference.to_product(plain.state_dict())})
    return plain.double().train(train), product.double().train(train)


def assert_same(plain, product, expected, found):
    """Outputs, then the gradients of all parameters and the buffers that a backward pass leaves."""
    torch.manual_seed(0)
    close(found, expected, "output")
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    gradients = reference.to_product(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in plain.named_parameters()}
    )
    trainable = {name: p for name, p in product.named_parameters() if p.requires_grad}
    assert trainable and any(p.grad is not None for p in trainable.values())
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in trainable.items():
        gradient = gradients[name]
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # a bias in front of a BatchNorm has the gradient 0 and both have rounding errors there
        close(grad, gradient, name, floor=1e-3 * largest)
    buffers = reference.to_product({**dict(plain.named_parameters()), **dict(plain.named_buffers())})
    for name, buffer in product.named_buffers():
        close(buffer.double(), buffers[name].double(), name)


def close(found, expected, name, floor=1e-12):
    rms = max(expected.detach().pow(2).mean().sqrt(), torch.as_tensor(floor))
    error = (found.detach() - expected.detach()).abs().max() / rms
    assert error < 1e-9, f"{name}: {error:.1e}"


@TRAIN
@pytest.mark.parametrize("mode", ["FC", "CNN"])
@pytest.mark.parametrize(("frames", "grid"), [(2, (2, 2)), (4, (3, 5)), (8, (5, 3))])
def test_td4v(mode, frames, grid, train):
    plain, product = twins(PlainTD4V(18, 1 / 3, mode, frames, grid), TD4V(18, 1 / 3, mode), train)
    x = torch.randn(grid[0] * grid[1], 2 * frames, 18, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    volume = inputs[1].reshape(*grid, 2, frames, 18).permute(2, 3, 0, 1, 4)  # (B, T, H, W, D)
    found = product(volume).permute(2, 3, 0, 1, 4).flatten(2, 3).flatten(0, 1)
    assert_same(plain, product, plain(inputs[0]), found)
    close(inputs[1].grad, inputs[0].grad, "input")


@TRAIN
@pytest.mark.parametrize("mode", ["FC", "CNN"])
@pytest.mark.parametrize("frames", [4, 8])
@pytest.mark.parametrize("with_token", [True, False])
def test_side_block(mode, frames, train, with_token):
    width, grid = 130, (3, 5)  # T does not divide the width: the shift leaves channels
    plain = PlainSideBlock(width, 2, 1.5, 1 / 6, mode, frames, grid)
    plain, product = twins(plain, SideBlock(width, 2, 1.5, 1 / 6, mode), train)
    x = torch.randn(15, 2 * frames, width, dtype=torch.float64)
    token = torch.randn(1, 2 * frames, width, dtype=torch.float64)
    inputs = [(x.clone().requires_grad_(), token.clone().requires_grad_()) for _ in range(2)]
    expected = plain(inputs[0][0], inputs[0][1] if with_token else None)
    volume = inputs[1][0].reshape(*grid, 2, frames, width).permute(2, 3, 0, 1, 4)
    found = product(volume, inputs[1][1][0].unflatten(0, (2, frames)) if with_token else None)
    assert_same(plain, product, expected, found.permute(2, 3, 0, 1, 4).flatten(2, 3).flatten(0, 1))
    for ours, theirs in zip(inputs[1], inputs[0], strict=True) if with_token else ():
        close(ours.grad, theirs.grad, "input")


@TRAIN
@pytest.mark.parametrize(
    ("widths", "mode", "frames"), [([24, 24, 70], "CNN", 4), ([70, 24, 24], "FC", 8), ([24, 24, 24], "CNN", 8)]
)
def test_side_network(widths, mode, frames, train):
    plain = PlainSideTuning(SIZES, 5, frames, widths, 2.0, 1 / 6, mode)
    product = freeze_all_but_trainable(
        TD4VSide(tower(), num_classes=5, frames=frames, widths=widths, mlp_ratio=2.0, ratio=1 / 6, mode=mode)
    )
    plain, product = twins(plain, product, train)
    video = torch.randn(2, frames, 3, 12, 12, dtype=torch.float64)
    close(
        product.tower.double()(video.flatten(0, 1)).permute(1, 0, 2), PlainTower.forward(plain, video.flatten(0, 1)), ""
    )
    assert_same(plain, product, plain(video), product(video))


@TRAIN
@pytest.mark.parametrize(
    ("placement", "mode", "frames", "feature", "embedding"),
    [
        ("before_attention", "FC", 8, "class_token", True),
        ("before_mlp", "CNN", 4, "mean_tokens", True),
        ("both", "CNN", 4, "class_token", False),
    ],
)
def test_fine_tuning(placement, mode, frames, feature, embedding, train):
    places = list(PLACEMENTS[placement])
    plain = PlainFineTuning(SIZES, 5, frames, places, 1 / 6, mode, feature, embedding)
    product = TD4VFinetune(
        tower(),
        num_classes=5,
        frames=frames,
        placement=placement,
        mode=mode,
        ratio=1 / 6,
        feature=feature,
        zero_init=False,
        temporal_embedding=embedding,
    )
    plain, product = twins(plain, freeze_all_but_trainable(product), train)
    video = torch.randn(2, frames, 3, 12, 12, dtype=torch.float64)
    assert_same(plain, product, plain(video), product(video))


def tower():
    return build_custom_tower(SIZES.width, SIZES.layers, SIZES.heads, SIZES.patch_size, 12)


@pytest.mark.parametrize("name", ["tdn", "tada2d", "tadaformer", "tadaconvnextv2"])
def test_family(name):
    options = SimpleNamespace(configs=[f"configs/ssv2/{name}.yaml"], models=None, recompute=False, frames=None, batch=2)
    ((_, config),) = command.configurations(options)
    both = pair.make_pair(pair.small(config), 2, 0, torch.device("cpu"), torch.float64)
    found = pair.differences(both)
    assert found.keys() == {"logits", "inference", "gradients", "gradients as one vector"}
    for what, (error, where) in found.items():
        assert error < 1e-9, f"{what}, {where}"


@pytest.mark.parametrize("path", [p for p in CASES if p.stem.startswith(("td4v", "side_block", "side_network_small"))],
                         ids=lambda path: path.stem)  # fmt: skip
def test_golden(path):
    """The authors' numbers for the plain modules; the names are the authors' own, so nothing is renamed."""
    case, fill = json.loads(path.read_text()), load_fill(fill_file(path.parent))
    arguments, dtype = case["constructor_args"], getattr(torch, case["dtype"])
    frames, ratio, mode = (
        arguments["T"],
        parse_ratio(arguments["DA_ratio" if "DA_ratio" in arguments else "scale"]),
        arguments["sample_mode"],
    )
    inputs = {key: tensor(value, case).requires_grad_() for key, value in fill.inputs_of(case).items()}
    grid = (round(len(inputs["input"]) ** 0.5),) * 2
    if "n_embs" in arguments:
        side = arguments["input_resolution"] // arguments["patch_size"]
        sizes = TowerSizes(arguments["width"], arguments["layers"], arguments["heads"], arguments["patch_size"],
                           (side, side), 4 * arguments["width"])  # fmt: skip
        plain = PlainSideTuning(sizes, 5, frames, arguments["n_embs"], arguments["mlp_ratio"], ratio, mode)
    elif "heads" in arguments:
        plain = PlainSideBlock(arguments["dim"], arguments["heads"], arguments["mlp_ratio"], ratio, mode, frames, grid)
    else:
        plain = PlainTD4V(arguments["dim"], ratio, mode, frames, grid)
    values = {
        key: torch.from_numpy(value) if value.shape else torch.tensor(value)
        for key, value in fill.state_dict(case).items()
    }
    own = plain.state_dict()
    assert all(key in own for key in values)
    plain.load_state_dict({**own, **values})
    plain.to(dtype).train(case["mode"] == "train")
    if "n_embs" in arguments:
        output = plain.features(inputs["input"].unflatten(0, (-1, frames)))
    else:
        output = plain(*inputs.values())
    output.pow(2).mean().backward()
    gradient = None if "n_embs" in arguments else inputs["input"].grad
    errors = fill.compare(case, output.detach(), gradient)
    assert errors and max(errors.values()) < TOLERANCE[case["dtype"]], errors
    parameters = dict(plain.named_parameters())
    largest = max(case["param_grad_l2"].values())
    for key, norm in case["param_grad_l2"].items():
        if parameters[key].requires_grad:
            found = parameters[key].grad.norm().item()
            assert abs(found - norm) <= 10 * TOLERANCE[case["dtype"]] * max(norm, 1e-2 * largest), key


@pytest.fixture
def tiny(tmp_path):
    """A configuration of a custom tower, whose data nobody reads."""
    path = tmp_path / "tiny.yaml"
    network = {
        "arch": "custom", "init": False, "pyramid": {"n_embs": [24, 72]},
        "vision": {"width": 64, "layers": 2, "heads": 2, "patch_size": 16, "image_size": 48},
    }  # fmt: skip
    data = {"dataset": "tiny", "style": "kinetics", "num_classes": 5, "num_segments": 8, "input_size": 48}
    path.write_text(yaml.safe_dump({"data": data, "network": network}))
    return str(path)


def test_the_command(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profiling, "matrix_rate", partial(profiling.matrix_rate, size=256))
    arguments = [tiny, "--device", "cpu", "--frames", "4", "--repeats", "1", "--output", str(tmp_path)]
    assert command.main([*arguments, "--models", "side", "fine"]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "bench_model.md").read_text() and "NOT EQUAL" not in text
    record = json.loads((tmp_path / "bench_model.json").read_text())
    assert [result["model"] for result in record["results"]] == ["td4v_side", "td4v_finetune"]
    for result in record["results"]:
        assert set(result["equality"]) == set(command.ALLOWED) and not record["failures"]
        curve = result["curve"]["plain"]
        assert len(curve) == command.STEPS and curve[-1] < 0.7 * curve[0]  # it learns, so that equal means something
        assert set(result["speed"]) == {"fp32", "bf16"} and result["step_flops"] > result["forward_flops"] > 0
        for speed in result["speed"].values():
            assert speed["inference"]["plain"][0] > 0 and speed["rate"]["training"][0] > 0
            assert speed["saved"]["plain"] > 0 and speed["peak"]["product"] > 0
        errors = result["speed"]["bf16"]["error"]
        assert all(1e-4 < value < 0.1 for who in errors.values() for value in who.values())
        times = result["speed"]["fp32"]["training"]
        assert f"{times['plain'][0] / times['product'][0]:.2f}" in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(1.7, "differ by"), pytest.param(float("nan"), "differ by nan", marks=pytest.mark.slow)],
)
def test_unequal_models_are_said_first(tiny, tmp_path, capsys, caplog, monkeypatch, wrong, message):
    monkeypatch.setattr(reference.QuickGELU, "forward", lambda self, x: x * torch.sigmoid(wrong * x))
    monkeypatch.setattr(profiling, "matrix_rate", lambda *_, **__: 1e9)
    arguments = [tiny, "--device", "cpu", "--repeats", "1", "--precision", "fp32", "--output", str(tmp_path)]
    assert command.main(arguments) == 1
    assert capsys.readouterr().out.startswith("**NOT EQUAL** tiny td4v_side")
    assert message in caplog.text


def test_bad_arguments(tiny, tmp_path, caplog, capsys):
    with pytest.raises(SystemExit):
        command.main([tiny, "--batch", "1"])
    assert "--batch and --frames must be at least 2" in capsys.readouterr().err
    for arguments, message in (
        ([str(tmp_path / "none.yaml")], "none.yaml"),
        ([tiny, "--precision", "fp16", "--device", "cpu"], "needs a GPU"),
    ):
        caplog.clear()
        assert command.main(arguments) == 1
        assert message in caplog.text
    config = replace(load_config(tiny), network=replace(load_config(tiny).network, options={"td4v": False}))
    with pytest.raises(ConfigError, match="all of its temporal parts"):
        pair.make_pair(config, 2, 0, torch.device("cpu"))
