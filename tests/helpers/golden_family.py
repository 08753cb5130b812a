"""How the golden cases of TDN and of the TAdaConv family are built and run with our modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clip.towers.openclip_vit import OpenClipTower, build_custom_tower
from models import tada2d, tadaconvnextv2, tadaformer, tdn
from models.renaming import Rule, renamed
from models.tadaconv import (
    ROUTE_NAMES,
    ROUTE_V2_NAMES,
    RouteFunction,
    RouteFunctionV2,
    TAdaConv2d,
    TAdaConv2dV2,
    as_clips,
    as_images,
    average_over_time,
    reshaped,
)

State = dict[str, Tensor]
SIDE = {"cin": "input", "cout": "output"}


class FamilyCase(NamedTuple):
    """Our module for a case, the function that renames the authors' weights, and how the module is called."""

    module: nn.Module
    rename: Callable[[Mapping[str, Tensor]], State]
    run: Callable[..., Tensor]  # of the case's inputs, in their order


class RoutedConv(nn.Module):
    """The first version with its route function, as the docstring of models/tadaconv.py shows it."""

    def __init__(self, arguments: dict):
        super().__init__()
        self.route = RouteFunction(arguments["in_channels"], ratio=arguments["ratio"], kernels=arguments["kernels"])
        self.conv = first_version(arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.route(x))


class RoutedConvV2(nn.Module):
    """The second version with route function and norms, as it stands in TAdaFormer."""

    def __init__(self, channels: int, head_width: int):
        super().__init__()
        self.conv, self.route = TAdaConv2dV2(channels, 3), RouteFunctionV2(channels, head_width=head_width)
        self.norm, self.norm_average = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x, self.route(x))
        return self.norm(as_images(z)) + self.norm_average(as_images(average_over_time(z)))


def family_case(case: dict) -> FamilyCase | None:
    """What a case needs, or None if it is of another family."""
    source = case["official_source"]
    cases = {
        "models.py:TSN": complete_tdn,
        "tdn_net.py:TDN_Net (up to": short_term_tdn,
        ":BottleneckShift": tdn_block,
        ":mSEModule": excitation,
        ":ShiftModule": shift,
        ":TAdaConv2d+RouteFuncMLP": routed_conv,
        "tadaconv.py:TAdaConv2d": conv_alone,
        ":RouteFuncMLP": route,
        ":RouteFuncwTransformer": route_v2,
        ":TAdaConv2dV2": routed_conv_v2,
        "(TAda2D:": complete_tada2d,
        "Base3DBlock (TAda2DBlock)": tada2d_block,
        "(TAdaFormer:": complete_tadaformer,
        ":TAdaFormerBlock": tadaformer_block,
        "(TAdaConvNeXtV2:": complete_tadaconvnextv2,
        ":TAdaConvNeXtV2Block": tadaconvnextv2_block,
    }
    make = next((make for name, make in cases.items() if name in source), None)
    return make(case, case["constructor_args"]) if make else None


def within(prefix: str, ours: str, rules: tuple[Rule, ...]) -> Callable[[Mapping[str, Tensor]], State]:
    """Rename the weights of a part: they are those of `prefix` in the authors' network, and of `ours` in ours."""

    def rename(values: Mapping[str, Tensor]) -> State:
        names = {key: renamed(prefix + key, rules) for key in values}
        assert all(name.startswith(ours) for name in names.values())
        return {names[key].removeprefix(ours): reshaped(names[key], value) for key, value in values.items()}

    return rename


def complete_tdn(case: dict, arguments: dict) -> FamilyCase:
    depth = int(arguments["base_model"].removeprefix("resnet"))
    model = tdn.TDN(num_classes=arguments["num_class"], segments=arguments["num_segments"], depths=tdn.DEPTHS[depth])
    return FamilyCase(model, tdn.from_published, lambda x: model(x.unflatten(1, (-1, 3))))


def short_term_tdn(case: dict, arguments: dict) -> FamilyCase:
    """The rest of the network keeps its initial weights."""
    model = tdn.TDN(num_classes=5, segments=arguments["num_segments"])

    def rename(values: Mapping[str, Tensor]) -> State:
        return tdn.from_published({f"base_model.{key}": value for key, value in values.items()})

    return FamilyCase(model, rename, lambda x: model.short_term(x.unflatten(1, (tdn.FRAMES, 3))))


def tdn_block(case: dict, arguments: dict) -> FamilyCase:
    in_width, width, segments = arguments["inplanes"], arguments["planes"], arguments["num_segments"]
    block = tdn.Bottleneck(
        in_width,
        width,
        stride=arguments["stride"],
        temporal=True,
        has_shortcut=any(key.startswith("downsample") for key in case["state_dict"]),
    )
    rename = within("base_model.layer2_bak.0.", "stages.1.0.", tdn.FROM_PUBLISHED)
    return FamilyCase(block, rename, lambda x: block(x, segments))


def excitation(case: dict, arguments: dict) -> FamilyCase:
    module = tdn.SegmentExcitation(arguments["channel"])
    rename = within("mse.", "excitation.", tdn.FROM_PUBLISHED)
    return FamilyCase(module, rename, lambda x: module(x, arguments["n_segment"]))


def shift(case: dict, arguments: dict) -> FamilyCase:
    module = tdn.SegmentShift(arguments["input_channels"])
    rename = within("shift.", "shift.", tdn.FROM_PUBLISHED)
    return FamilyCase(module, rename, lambda x: module(x, arguments["n_segment"]))


def first_version(arguments: dict) -> TAdaConv2d:
    return TAdaConv2d(
        arguments["in_channels"],
        arguments["out_channels"],
        arguments["kernel_size"][1],
        stride=arguments["stride"][1],
        padding=arguments["padding"][1],
        bias=arguments["bias"],
        factors_on=SIDE[arguments["cal_dim"]],
    )


def routed_conv(case: dict, arguments: dict) -> FamilyCase:
    rules = ((r"^conv_rf\.", "route."), *ROUTE_NAMES)
    module = RoutedConv(arguments)
    return FamilyCase(module, within("", "", rules), module)


def conv_alone(case: dict, arguments: dict) -> FamilyCase:
    module = first_version(arguments)
    return FamilyCase(module, within("", "", ()), module)


def route(case: dict, arguments: dict) -> FamilyCase:
    module = RouteFunction(arguments["c_in"], ratio=arguments["ratio"], kernels=arguments["kernels"])
    return FamilyCase(module, within("route.", "route.", ROUTE_NAMES), module)


def route_v2(case: dict, arguments: dict) -> FamilyCase:
    module = RouteFunctionV2(
        arguments["c_in"],
        ratio=arguments["ratio"],
        kernels=arguments["kernels"],
        head_width=arguments["head_dim"],
        starts_at_one=arguments["zero_init_cal"],
    )
    return FamilyCase(module, within("route.", "route.", ROUTE_V2_NAMES), lambda x: torch.cat(module(x), 1))


def routed_conv_v2(case: dict, arguments: dict) -> FamilyCase:
    module = RoutedConvV2(arguments["channels"], arguments["head_dim"])

    def run(x: Tensor) -> Tensor:
        side = round(len(x) ** 0.5)
        x = x.unflatten(1, (-1, arguments["num_frames"])).unflatten(0, (side, side))  # (H, W, N, T, C)
        return module(x.permute(2, 4, 3, 0, 1)).flatten(2).permute(2, 0, 1)  # (N*T, C, H*W) -> (H*W, N*T, C)

    return FamilyCase(module, within("tadaconv.", "", tadaformer.FROM_PUBLISHED), run)


def complete_tada2d(case: dict, arguments: dict) -> FamilyCase:
    model = tada2d.TAda2D(num_classes=arguments["num_classes"])
    return FamilyCase(model, tada2d.from_published, lambda x: model(x.transpose(1, 2)))


def tada2d_block(case: dict, arguments: dict) -> FamilyCase:
    block = tada2d.TAdaBlock(
        arguments["dim_in"], arguments["num_filters"] // arguments["expansion_ratio"], arguments["stride"][1]
    )

    def run(x: Tensor) -> Tensor:
        return as_clips(block(as_images(x), x.shape[2]), x.shape[2])

    return FamilyCase(block, tada2d.from_published, run)


def tadaformer_model(arguments: dict, size: int, layers: int) -> tadaformer.TAdaFormer:
    tower: OpenClipTower = build_custom_tower(
        width=arguments["width"],
        layers=layers,
        heads=arguments["heads"],
        patch_size=arguments["patch_size"],
        image_size=size,
    )
    return tadaformer.TAdaFormer(
        tower,
        num_classes=arguments["num_classes"],
        temporal_projection=arguments["temp_enhance"],
        two_convolutions=arguments["double_tada"],
    )


def complete_tadaformer(case: dict, arguments: dict) -> FamilyCase:
    model = tadaformer_model(arguments, arguments["input_resolution"], arguments["layers"])
    return FamilyCase(model, tadaformer.from_published, lambda x: model(x.transpose(1, 2)))


def tadaformer_block(case: dict, arguments: dict) -> FamilyCase:
    """The first block of a network, whose other weights stay as they are."""
    side = round((case["inputs"]["input"][0] - 1) ** 0.5)
    model = tadaformer_model(arguments, arguments["patch_size"] * side, layers=1)
    frames = (arguments["num_frames"] + 1) // tadaformer.STRIDE

    def rename(values: Mapping[str, Tensor]) -> State:
        return tadaformer.from_published({f"backbone.layers.0.{key}": value for key, value in values.items()})

    def run(x: Tensor) -> Tensor:
        block, tada = model.tower.blocks[0], model.tada[0]
        return model.run_block(block, tada, x.transpose(0, 1), frames=frames, drop_path=0).transpose(0, 1)

    return FamilyCase(model, rename, run)


def complete_tadaconvnextv2(case: dict, arguments: dict) -> FamilyCase:
    model = tadaconvnextv2.TAdaConvNeXtV2(
        num_classes=arguments["num_classes"],
        depths=tuple(arguments["depths"]),
        widths=tuple(arguments["dims"]),
        head_width=arguments["head_dim"],
    )
    return FamilyCase(model, tadaconvnextv2.from_published, lambda x: model(x.transpose(1, 2)))


def tadaconvnextv2_block(case: dict, arguments: dict) -> FamilyCase:
    block = tadaconvnextv2.TAdaConvNeXtBlock(arguments["dim"], head_width=arguments["head_dim"])

    def run(x: Tensor) -> Tensor:
        y = block(as_images(x).permute(0, 2, 3, 1), x.shape[2])  # (N*T, H, W, C)
        return as_clips(y.permute(0, 3, 1, 2), x.shape[2])

    return FamilyCase(block, tadaconvnextv2.from_published, run)
