"""TDN and the TAdaConv family: counts, optimizer groups, weights of others, what is refused. Numbers: test_golden.py."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from clip.towers.openclip_vit import build_openclip_tower
from models import tada2d, tadaconvnextv2, tadaformer, tdn
from models.parameters import freeze_all_but_trainable, parameter_groups
from tests.helpers.golden import GOLDEN

FAMILY = GOLDEN / "tadn"
CONV1_TEMP = 9_472  # of the authors' TDN: parameters that nothing uses


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def former(arch: str, classes: int, something: bool) -> tadaformer.TAdaFormer:
    tower = build_openclip_tower(arch, image_size=224, weights=None)
    options = {"temporal_projection": something, "two_convolutions": something}
    return tadaformer.TAdaFormer(tower, num_classes=classes, **options)


@pytest.mark.parametrize(
    ("depth", "classes", "expected"),
    [
        (50, 174, 24_420_046),
        (50, 400, 24_883_120),
        (50, 51, 24_168_019),
        (101, 174, 43_681_726),
        (101, 400, 44_144_800),
        (101, 51, 43_429_699),
    ],
)
def test_parameters_of_tdn(depth: int, classes: int, expected: int) -> None:
    with torch.device("meta"):
        model = tdn.TDN(num_classes=classes, segments=8, depths=tdn.DEPTHS[depth])
    assert count(model) == expected - CONV1_TEMP
    assert model.origin.name == f"ResNet-{depth}"


@pytest.mark.parametrize(("classes", "expected"), [(400, 27_485_472), (174, 27_022_398)])
def test_parameters_of_tada2d(classes: int, expected: int) -> None:
    with torch.device("meta"):
        model = tada2d.TAda2D(num_classes=classes)
    assert count(model) == expected
    assert sum(count(block.route) for block in model.blocks()) == 3_150_288
    assert sum(count(block.norm_average) for block in model.blocks()) == 7_552


@pytest.mark.parametrize(
    ("size", "classes", "expected"),
    [
        ("tiny", 400, 45_971_488),
        ("tiny", 174, 45_797_694),
        ("small", 400, 82_249_120),
        ("small", 174, 82_075_326),
        ("base", 400, 145_687_632),
        ("base", 174, 145_455_982),
    ],
)
def test_parameters_of_tadaconvnextv2(size: str, classes: int, expected: int) -> None:
    with torch.device("meta"):
        model = tadaconvnextv2.TAdaConvNeXtV2(num_classes=classes, **tadaconvnextv2.SIZES[size]._asdict())
    assert count(model) == expected
    routes = {"tiny": 17_821_296, "small": 32_450_544}
    if size in routes:
        assert sum(count(block.route) for block in model.blocks()) == routes[size]


@pytest.mark.parametrize(
    ("arch", "classes", "something", "expected", "temporal"),
    [
        ("ViT-B-16-quickgelu", 400, False, 104_195_728, 16_909_056),
        ("ViT-B-16-quickgelu", 174, True, 135_086_766, 47_973_888),
        ("ViT-L-14-quickgelu", 400, False, 364_827_024, 60_033_024),
        ("ViT-L-14-quickgelu", 174, True, 474_960_046, 170_397_696),
    ],
)
def test_parameters_of_tadaformer(arch: str, classes: int, something: bool, expected: int, temporal: int) -> None:
    with torch.device("meta"):
        model = former(arch, classes, something)
    assert count(model) == expected and count(model.tada) == temporal


GROUPS: dict[str, tuple[Callable[[], nn.Module], Callable, dict]] = {
    "tada2d_8f": (
        lambda: tada2d.TAda2D(num_classes=174),
        tada2d.from_published,
        {"weight_decay": 1e-4, "decay_norms": False},
    ),
    "tadaformer_b16_ssv2_16f": (
        lambda: former("ViT-B-16-quickgelu", 174, something=True),
        tadaformer.from_published,
        {"weight_decay": 0.05, "decay_norms": False, "layer_decay": 0.7},
    ),
    "tadaconvnextv2_tiny_k400_16f": (
        lambda: tadaconvnextv2.TAdaConvNeXtV2(num_classes=400, **tadaconvnextv2.SIZES["tiny"]._asdict()),
        tadaconvnextv2.from_published,
        {"weight_decay": 0.02},
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_optimizer_groups_are_the_authors(name: str) -> None:
    make, from_published, settings = GROUPS[name]
    with torch.device("meta"):
        model = freeze_all_but_trainable(make())
    expected = json.loads((FAMILY / f"tables/groups_{name}.json").read_text())["parameters"]
    ours = dict(zip(expected, from_published({key: torch.empty(1) for key in expected}), strict=True))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, lr=1.0, **settings)
        for parameter in group["params"]
    }
    assert found.keys() == set(ours.values())
    for key, values in expected.items():
        assert found[ours[key]] == pytest.approx(tuple(values), rel=1e-9), key


PUBLISHED: dict[str, tuple[Callable[[], nn.Module], Callable, str]] = {
    "tdn_r50_8f": (lambda: tdn.TDN(num_classes=174, segments=8), tdn.from_published, "state_dict"),
    "tada2d_r50_ssv2": (lambda: tada2d.TAda2D(num_classes=174), tada2d.from_published, "model_state"),
    "tadaconvnextv2_t_k400": (
        lambda: tadaconvnextv2.TAdaConvNeXtV2(num_classes=400, **tadaconvnextv2.SIZES["tiny"]._asdict()),
        tadaconvnextv2.from_published,
        "model_state",
    ),
    "tadaformer_b16_k400": (
        lambda: former("ViT-B-16-quickgelu", 400, something=False),
        tadaformer.from_published,
        "model_state",
    ),
    "tadaformer_b16_ssv2": (
        lambda: former("ViT-B-16-quickgelu", 174, something=True),
        tadaformer.from_published,
        "model_state",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes_are_all_ours(name: str) -> None:
    make, from_published, part = PUBLISHED[name]
    shapes = json.loads((FAMILY / f"keys/{name}_published.json").read_text())[part]
    with torch.device("meta"):
        model = make()
        values = {key.removeprefix("module."): torch.empty(shape) for key, shape in shapes.items()}
    ours = {key: value.shape for key, value in from_published(values).items()}
    assert ours == {key: value.shape for key, value in model.state_dict().items()}
