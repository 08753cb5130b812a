"""TDN and the TAdaConv family: counts, optimizer groups, weights of others, what is refused. Numbers: test_golden.py."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from clip.towers.openclip_vit import build_custom_tower, build_openclip_tower
from configs.schema import ConfigError, load_config
from engine.profiling import count_flops
from models import tada2d, tadaconvnextv2, tadaformer, tdn
from models.imagenet import imagenet_weights, load_backbone
from models.parameters import freeze_all_but_trainable, parameter_groups
from models.registry import build_model
from models.tadaconv import ROUTE_NAMES, RouteFunction, TAdaConv2d, average_over_time, drop_clips, renamed_weights
from tests.helpers.golden import GOLDEN, load_fill
from tests.helpers.tiny_models import adapted, random_clips

FAMILY = GOLDEN / "tadn"
ROOT = Path(__file__).parents[2]
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


SHIFT_MACS = 3  # of each number that TDN's shift makes; here they are sums and no convolution, so nothing counts them


@pytest.mark.parametrize(
    ("name", "frames", "side", "expected"),
    [
        ("tdn_50", 8, 224, 35.64),
        ("tdn_101", 8, 224, 65.84),
        ("tada2d", 8, 224, 33.02),
        ("former_k400", 16, 224, 153.60),
        ("former_ssv2", 16, 224, 187.03),
        ("tiny", 16, 224, 36.01),
        ("tiny", 16, 256, 46.99),
        ("small", 16, 224, 69.96),
        ("base", 16, 224, 123.60),
    ],
)
def test_multiply_adds_of_a_clip(name: str, frames: int, side: int, expected: float) -> None:
    """The authors' GFLOPs, which are multiply-adds."""
    classes, shifted = 174 if name == "former_ssv2" else 400, []
    with torch.device("meta"):
        if name.startswith("tdn"):
            depths = tdn.DEPTHS[int(name.removeprefix("tdn_"))]
            model = tdn.TDN(num_classes=classes, segments=frames, depths=depths)
        elif name == "tada2d":
            model = tada2d.TAda2D(num_classes=classes)
        elif name.startswith("former"):
            model = former("ViT-B-16-quickgelu", classes, something=name == "former_ssv2")
        else:
            model = tadaconvnextv2.TAdaConvNeXtV2(num_classes=classes, **tadaconvnextv2.SIZES[name]._asdict())
        video = torch.empty(1, frames * model.frames_per_segment, 3, side, side)
    for module in model.modules():
        if isinstance(module, tdn.SegmentShift):
            module.register_forward_hook(lambda _, inputs, y: shifted.append(SHIFT_MACS * y.numel()))
    with torch.no_grad():
        found = count_flops(lambda: model.eval()(video)) / 2 + sum(shifted)
    assert found / 1e9 == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("name", ["tdn", "tada2d", "tadaformer", "tadaconvnextv2"])
def test_recomputation_changes_nothing(name: str) -> None:
    """Logits, gradients and running statistics bit for bit, with the same clips dropped."""
    results = []
    for recompute in (False, True):
        network = {
            "arch": "custom", "init": False, "drop_fc": 0.5, "recompute": recompute,
            "vision": {"width": 64, "layers": 2, "heads": 2, "patch_size": 16, "image_size": 48},
            "options": {"drop_path": 0.5} if name in ("tadaformer", "tadaconvnextv2") else {},
        }  # fmt: skip
        data = {"dataset": "hmdb51", "num_classes": 5, "num_segments": 4, "input_size": 48}
        config = load_config(adapted(name, data, network))
        model = build_model(config).train()
        torch.manual_seed(0)
        logits = model(random_clips(model, config, 2))
        logits.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"logits": logits, **gradients, **dict(model.named_buffers())})
    plain, again = results
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        assert value is again[key] is None or torch.equal(value, again[key]), key


GROUPS: dict[str, tuple[Callable[[], nn.Module], Callable, str]] = {
    "tada2d_8f": (
        lambda: tada2d.TAda2D(num_classes=174),
        tada2d.from_published,
        "ssv2/tada2d",
    ),
    "tadaformer_b16_ssv2_16f": (
        lambda: former("ViT-B-16-quickgelu", 174, something=True),
        tadaformer.from_published,
        "ssv2/tadaformer",
    ),
    "tadaconvnextv2_tiny_k400_16f": (
        lambda: tadaconvnextv2.TAdaConvNeXtV2(num_classes=400, **tadaconvnextv2.SIZES["tiny"]._asdict()),
        tadaconvnextv2.from_published,
        "k400/tadaconvnextv2",
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_optimizer_groups_are_the_authors(name: str) -> None:
    make, from_published, recipe = GROUPS[name]
    solver = load_config(ROOT / f"configs/{recipe}.yaml").solver
    settings = {key: getattr(solver, key) for key in ("weight_decay", "clip_ratio", "layer_decay", "decay_norms")}
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
    module = importlib.import_module(type(model).__module__)
    assert {module.published_name(key) for key in ours} == {key for key in values if ".conv1_temp." not in key}


def digest(value: Tensor) -> list:
    """As the tables have it: norm, first values, and a sum in which each position has another weight."""
    flat = value.double().flatten()
    return [flat.norm().item(), *flat[:3].tolist(), (flat * torch.arange(1, len(flat) + 1)).sum().item()]


IMAGENET: dict[str, tuple[Callable[[], nn.Module], Callable, Callable, str]] = {
    "tdn_r50": (lambda: tdn.TDN(num_classes=5, segments=8), tdn.from_resnet, tdn.from_published, "base_model."),
    "tada2d_r50": (lambda: tada2d.TAda2D(num_classes=5), tada2d.from_resnet, tada2d.from_published, ""),
    "tadaconvnextv2_tiny": (
        lambda: tadaconvnextv2.TAdaConvNeXtV2(num_classes=5, **tadaconvnextv2.SIZES["tiny"]._asdict()),
        tadaconvnextv2.from_convnext,
        tadaconvnextv2.from_published,
        "",
    ),
}


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_weights_become_what_the_authors_code_makes_of_them(name: str, tmp_path: Path) -> None:
    make, from_image_network, from_published, prefix = IMAGENET[name]
    table = json.loads((FAMILY / f"keys/convert_imagenet_to_{name}.json").read_text())
    fill = load_fill(GOLDEN / "fill.py")
    path = tmp_path / "imagenet.pth"
    torch.save(
        {"model": {key: torch.from_numpy(fill._normal(key, shape)) for key, shape in table["source"].items()}}, path
    )
    arch = "convnext_tiny" if "convnext" in name else "resnet50"
    values, source = imagenet_weights(str(path), arch)
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_backbone(model, from_image_network(values), source)
    assert model.origin.weights == str(path)
    keys = [key for key in (*table["target"], *table["target_not_from_source"]) if not key.startswith("conv1_temp.")]
    ours = dict(zip(keys, from_published({f"{prefix}{key}": torch.empty(1) for key in keys}), strict=True))
    loaded = model.state_dict()
    for key, target in table["target"].items():
        if key in ours:
            norm, first, total = target["digest"]
            assert digest(loaded[ours[key]]) == pytest.approx([norm, *first, total], rel=1e-6, abs=1e-4), key
    for key in table["target_not_from_source"]:
        if key in ours:
            assert torch.equal(loaded[ours[key]], before[ours[key]]), key


def test_clip_becomes_what_the_authors_code_makes_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A complete CLIP: the text half and the projection are not used, and what starts fresh is named."""
    table = json.loads((FAMILY / "keys/convert_clip_to_tadaformer_b16_k400.json").read_text())
    fill, path = load_fill(GOLDEN / "fill.py"), tmp_path / "clip.pt"
    values = {key: torch.from_numpy(fill._normal(key, shape)) for key, shape in table["source"].items()}
    torch.save({**values, "token_embedding.weight": torch.ones(2, 512), "logit_scale": torch.ones(())}, path)
    network = {"arch": "ViT-B/16", "model": "tadaformer", "weights": str(path)}
    data = {"dataset": "kinetics400", "num_classes": 5, "num_segments": 16}
    with caplog.at_level("INFO", "td4v"):
        model = build_model(load_config({"data": data, "network": network}))
    fresh = [name for name in model.state_dict() if name.startswith(("tada.", "head."))]
    assert (
        "16,912,901 of 103,891,973" in caplog.text
        and "start fresh: head.bias, head.weight, tada.first\n" in caplog.text
    )
    loaded = {tadaformer.published_name(key): value for key, value in model.state_dict().items()}
    assert loaded.keys() - table["target"].keys() == {tadaformer.published_name(name) for name in fresh}
    for key, target in table["target"].items():
        norm, first, total = target["digest"]
        assert digest(loaded[key]) == pytest.approx([norm, *first, total], rel=1e-6, abs=1e-4), key


@pytest.mark.parametrize("kind", ["timm", "safetensors", "state_dict", "22k"])
def test_files_of_image_networks_in_other_forms(kind: str, tmp_path: Path) -> None:
    """timm's names of a ResNet are torchvision's; wrappers are taken off, and classifiers of any size left out."""
    is_convnext = kind == "22k"
    make = torchvision.models.convnext_tiny if is_convnext else torchvision.models.resnet50
    with torch.device("meta"):
        network = timm.create_model("resnet50") if kind == "timm" else make(num_classes=21_841 if is_convnext else 10)
    values = {key: torch.zeros(value.shape) for key, value in network.state_dict().items()}
    path = tmp_path / ("r.safetensors" if kind == "safetensors" else "r.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(values, path)
    elif kind == "state_dict":
        torch.save({"state_dict": {f"module.{key}": value for key, value in values.items()}, "epoch": 90}, path)
    else:
        torch.save({"model": values} if is_convnext else values, path)
    found, source = imagenet_weights(str(path), "convnext_tiny" if is_convnext else "resnet50")
    assert source == str(path) and len(found) == (180 if is_convnext else 318)
    assert not [key for key in found if key.startswith(("fc.", "head."))]


def test_files_of_another_network_are_refused(tmp_path: Path) -> None:
    network = torchvision.models.resnet101()
    path = tmp_path / "resnet101.pth"
    torch.save(network.state_dict(), path)
    with pytest.raises(
        ConfigError, match=r"^network.weights: .*101.pth does not hold the weights of resnet50: has layer3.6."
    ):
        imagenet_weights(str(path), "resnet50")
    with pytest.raises(ConfigError, match="has no layer3.6.conv1.weight"):
        imagenet_weights(str(save(tmp_path / "r50.pth", torchvision.models.resnet50())), "resnet101")
    with pytest.raises(
        ConfigError, match="'nothing' is neither a file nor a tag of resnet50; its tags are IMAGENET1K_V1"
    ):
        imagenet_weights("nothing", "resnet50")
    with pytest.raises(ConfigError, match="network.weights: no file there/is/none.pth"):
        imagenet_weights("there/is/none.pth", "resnet50")


def save(path: Path, network: nn.Module) -> Path:
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_convnext_files_of_both_libraries_are_the_same_network(library: str, tmp_path: Path) -> None:
    make = torchvision.models.convnext_tiny if library == "torchvision" else lambda: timm.create_model("convnext_tiny")
    network = make()
    values, _ = imagenet_weights(str(save(tmp_path / "c.pth", network)), "convnext_tiny")
    model = tadaconvnextv2.TAdaConvNeXtV2(num_classes=5, **tadaconvnextv2.SIZES["tiny"]._asdict())
    load_backbone(model, tadaconvnextv2.from_convnext(values), "c.pth")
    own = dict(network.named_parameters())
    first = "features.1.0.block.0.weight" if library == "torchvision" else "stages.0.blocks.0.conv_dw.weight"
    assert torch.equal(model.stages[0][0].conv.weight, own[first])


def test_tada2d_starts_as_the_image_network() -> None:
    """Factors are 1 and averages over time count nothing, so the order of the frames does not matter."""
    model = tada2d.TAda2D(num_classes=5, depths=(1, 1, 1, 1)).eval().double()
    video = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(model(video), model(video.flip(1)), rtol=1e-9, atol=1e-12)
        for block in model.blocks():
            nn.init.ones_(block.norm_average.weight)
        assert (model(video) - model(video[:, [0, 2, 1, 3]])).abs().max() > 1e-7


def test_a_clip_drops_a_branch_in_all_of_its_frames() -> None:
    torch.manual_seed(0)
    dropped = drop_clips(torch.ones(8 * 4, 2, 3), 0.5, frames=4, training=True).unflatten(0, (8, 4))
    assert {value.item() for value in dropped.flatten(1).unique()} == {0.0, 2.0}
    assert all(len(clip.unique()) == 1 for clip in dropped)
    assert drop_clips(torch.ones(4, 2), 0.5, frames=4, training=False).eq(1).all()


def test_fresh_weights_are_as_the_authors_start_them() -> None:
    module = tadaformer.TAdaModule(256, (2, 2), head_width=8, temporal=True)
    widths = (64, 64, 64, 64)
    network = tadaconvnextv2.TAdaConvNeXtV2(num_classes=9, depths=(1, 1, 1, 1), widths=widths, head_width=8)
    for name, values in (*module.named_parameters(), *network.stages.named_parameters()):
        if values.ndim > 1 and not values.eq(0).all():
            assert values.std().item() == pytest.approx(0.02, rel=0.15), name
        elif "bias" in name:
            assert values.eq(0).all(), name
    zeros = {name for name, values in module.named_parameters() if values.ndim > 1 and values.eq(0).all()}
    assert zeros == {"expand.weight"}  # with it the branch, not the factors
    zeros = {name for name, values in network.named_parameters() if values.ndim > 1 and values.eq(0).all()}
    assert len(zeros) == 8 and all(name.endswith("_factors.weight") for name in zeros)
    bound = 1 / (12 * 8 * 9) ** 0.5
    for values in TAdaConv2d(8, 12, 3, bias=True).parameters():
        assert bound / 2 < values.abs().max() <= bound


def test_a_published_route_of_single_frames() -> None:
    """Its convolutions over time have kernel 1, as its linear layer has."""
    route = RouteFunction(8, kernels=(1, 1))
    values = {f"route.{key}": value[..., None, None] for key, value in route.state_dict().items() if "weight" in key}
    published = {
        "route.g.weight": values["route.clip.weight"].unsqueeze(2),
        "route.a.weight": values["route.reduce.weight"],
        "route.b.weight": values["route.expand.weight"],
    }
    ours = renamed_weights(published, ROUTE_NAMES)
    missing = nn.ModuleDict({"route": route}).load_state_dict(ours, strict=False)
    assert not missing.unexpected_keys and len(ours) == 3


def test_tadaformer_refuses_another_size() -> None:
    """One that the stem would cut down to the tower's size too."""
    tower = build_custom_tower(width=32, layers=1, heads=1, patch_size=8, image_size=16)
    model = tadaformer.TAdaFormer(tower, num_classes=3, head_width=8)
    with pytest.raises(ValueError, match=r"built for \(16, 16\) pixels and got \(17, 16\)"):
        model(torch.zeros(1, 5, 3, 17, 16))


def test_an_average_needs_three_frames() -> None:
    x = torch.arange(3.0).view(1, 1, 3, 1, 1)
    assert average_over_time(x).flatten().tolist() == pytest.approx([1 / 3, 1, 1])
    with pytest.raises(ValueError, match="at least 3 frames, not 2"):
        average_over_time(x[:, :, :2])
