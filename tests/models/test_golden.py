"""The golden vectors hold for our modules: the numbers of tests/golden, and those of the folder GOLDEN_DIR if it is set.

A case from a module that is not known here fails, and so does a GOLDEN_DIR without vectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clip.adapter import TD4V
from clip.published import from_authors
from clip.side_network import SideBlock
from clip.towers.base import Tower
from clip.towers.openclip_vit import build_custom_tower
from configs.schema import parse_ratio
from models import aim
from models.aim import AIM, Adapter
from models.parameters import freeze_all_but_trainable
from models.td4v_side import TD4VSide
from tests.helpers.golden import ADDED, CASES, FOLDERS, TOLERANCE, check_sampling, fill_file, load_fill, tensor
from tests.helpers.golden_family import FamilyCase, family_case


def test_every_folder_has_vectors() -> None:
    for folder in FOLDERS:
        name = "GOLDEN_DIR" if str(folder) == ADDED else "tests/golden"
        assert any(folder.glob("*.json")), f"{name}: there are no golden vectors (*.json) in {folder}"


def test_where_the_fill_rule_is_looked_for(tmp_path: Path) -> None:
    vectors, default = tmp_path / "one" / "golden_new", tmp_path / "default"
    vectors.mkdir(parents=True)
    with pytest.raises(AssertionError, match="there is no fill.py in "):
        fill_file(vectors, default)
    for folder in (default, tmp_path / "one" / "golden", vectors):  # the last comes first
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fill.py").touch()
        assert fill_file(vectors, default) == folder / "fill.py"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    case = json.loads(path.read_text())
    if isinstance(case, list):
        check_sampling(case)
        return
    if (family := family_case(case)) is not None:
        check_family(case, load_fill(fill_file(path.parent)), family)
        return
    checks = {
        "adapter.py:TD4V": check_td4v,
        "AttnCBlock": check_side_block,
        "frozen CLIP part": check_tower,
        "VisualTransformer": check_side_network,
        "vit_clip.py:ViT_CLIP": check_aim,
        "vit_clip.py:Adapter": check_aim_adapter,
    }
    run = next((run for name, run in checks.items() if name in case["official_source"]), None)
    assert run is not None, f"{path.name}: no test for {case['official_source']}"
    run(case, load_fill(fill_file(path.parent)))


def check_family(case: dict, fill: ModuleType, family: FamilyCase) -> None:
    values = family.rename({key: torch.from_numpy(np.asarray(value)) for key, value in fill.state_dict(case).items()})
    missing, unexpected = family.module.load_state_dict(values, strict=False)
    partial = ("TDN_Net (up to", ":TAdaFormerBlock")  # a part of a network is run, the rest keeps its weights
    assert not unexpected and (not missing or any(name in case["official_source"] for name in partial)), missing
    family.module.to(getattr(torch, case["dtype"])).train(case["mode"] == "train").requires_grad_(True)
    inputs = {key: tensor(value, case).requires_grad_() for key, value in fill.inputs_of(case).items()}
    output = family.run(*inputs.values())
    used = [key for key in case["state_dict"] if key not in case["params_without_grad"]]
    check(case, fill, family.module, output, inputs["input"], names=dict(zip(used, values, strict=True)))
    for name, value in (("output", output.detach()), ("grad", inputs["input"].grad)):
        expected = np.array(case[f"{name}_samples_b"])
        flat = value.contiguous().view(-1).numpy()
        found = flat[(np.arange(len(expected)) * 1000003 + 12345) % flat.size]
        assert np.abs(found - expected).max() / rms(expected) < TOLERANCE[case["dtype"]], name
    check_extra_gradients(case, fill, inputs)


def check_td4v(case: dict, fill: ModuleType) -> None:
    arguments = case["constructor_args"]
    module = TD4V(arguments["dim"], parse_ratio(arguments["scale"]), arguments["sample_mode"])
    load(module, case, fill)
    x = tensor(fill.inputs_of(case)["input"], case).requires_grad_()
    y = to_tokens(module(to_volume(x, arguments["T"])))
    check(case, fill, module, y, x)


def check_side_block(case: dict, fill: ModuleType) -> None:
    arguments = case["constructor_args"]
    heads = arguments.get("heads") or max(1, arguments["dim"] // 64)
    block = SideBlock(
        arguments["dim"], heads, arguments["mlp_ratio"], parse_ratio(arguments["DA_ratio"]), arguments["sample_mode"]
    )
    load(block, case, fill)
    inputs = {key: tensor(value, case).requires_grad_() for key, value in fill.inputs_of(case).items()}
    token = inputs.get("x_token")
    seen = token if token is None else token[0].unflatten(0, (-1, arguments["T"]))  # (1, B*T, D) -> (B, T, D)
    y = to_tokens(block(to_volume(inputs["input"], arguments["T"]), seen))
    check(case, fill, block, y, inputs["input"])
    check_extra_gradients(case, fill, inputs)


def check_tower(case: dict, fill: ModuleType) -> None:
    tower = golden_tower(case["constructor_args"])
    values = {key.removeprefix("tower."): value for key, value in weights(case, fill).items()}
    keep = {f"visual.{key}": value for key, value in tower.visual.state_dict().items() if key.startswith("ln_post.")}
    tower.load_state_dict({**keep, **values})
    tower.to(getattr(torch, case["dtype"]))
    x = tensor(fill.inputs_of(case)["input"], case).requires_grad_()
    y = tower(x)[:, 1:].transpose(0, 1)  # (B*T, N, D) -> (N, B*T, D)
    check(case, fill, tower, y, x)


def check_side_network(case: dict, fill: ModuleType) -> None:
    arguments = case["constructor_args"]
    model = TD4VSide(
        golden_tower(arguments),
        num_classes=5,
        frames=arguments["T"],
        widths=arguments["n_embs"],
        mlp_ratio=arguments["mlp_ratio"],
        ratio=parse_ratio(arguments["DA_ratio"]),
        mode=arguments["sample_mode"],
    )
    initial = model.state_dict()
    extra = {key: initial[key] for key in initial if key.startswith(("head.", "tower.visual.ln_post."))}
    model.load_state_dict({**extra, **weights(case, fill)})
    freeze_all_but_trainable(model).to(getattr(torch, case["dtype"])).train(case["mode"] == "train")
    x = tensor(fill.inputs_of(case)["input"], case).unflatten(0, (-1, arguments["T"]))  # (B, T, 3, H, W)
    if len(x) == 1 and model.training:  # degenerate: the authors' module gives a constant there, ours refuses
        with pytest.raises(ValueError, match="at least two clips"):
            model.features(x)
        return
    y = model.features(x)
    check(case, fill, model, y, None)


def check_aim_adapter(case: dict, fill: ModuleType) -> None:
    arguments = case["constructor_args"]
    adapter = Adapter(arguments["D_features"], arguments.get("mlp_ratio", 0.25), arguments.get("skip_connect", True))
    load(adapter, case, fill)
    x = tensor(fill.inputs_of(case)["input"], case).requires_grad_()
    check(case, fill, adapter, adapter(x), x)


def check_aim(case: dict, fill: ModuleType) -> None:
    """As it is trained, and with gradients of all weights, for which the tower runs as open_clip wrote it."""
    arguments = case["constructor_args"]
    drop_path = arguments.get("drop_path_rate", 0.2)
    assert case["mode"] == "eval" or drop_path == 0, "dropped paths are random"
    model = AIM(
        golden_tower(arguments),
        num_classes=5,
        frames=arguments["num_frames"],
        temporal_adapters=arguments.get("num_tadapter", 1),
        scale=arguments.get("adapter_scale", 0.5),
        drop_path=drop_path,
        ratio=arguments.get("mlp_ratio", 0.25),
    )
    initial = model.state_dict()
    model.load_state_dict({**{key: initial[key] for key in ("head.weight", "head.bias")}, **weights(case, fill)})
    freeze_all_but_trainable(model).to(getattr(torch, case["dtype"])).train(case["mode"] == "train")
    for everything in (False, True):
        x = tensor(fill.inputs_of(case)["input"], case).requires_grad_()  # (B, 3, T, H, W)
        model.zero_grad()
        y = model.requires_grad_(True) if everything else model
        y = y.frame_features(x.transpose(1, 2)).transpose(1, 2)[..., None, None]  # (B, T, D) -> (B, D, T, 1, 1)
        check(case, fill, model, y, x)


def golden_tower(arguments: dict) -> Tower:
    return build_custom_tower(arguments["width"], arguments["layers"], arguments["heads"], arguments["patch_size"],
                              arguments["input_resolution"])  # fmt: skip


def weights(case: dict, fill: ModuleType) -> dict[str, Tensor]:
    """The authors' state_dict of the case, through the project's public loader."""
    return renamed({key: torch.from_numpy(np.asarray(value)) for key, value in fill.state_dict(case).items()}, case)


def renamed(values: Mapping[str, Tensor], case: dict) -> dict[str, Tensor]:
    if "vit_clip.py:Adapter" in case["official_source"]:
        theirs, ours = "transformer.resblocks.0.S_Adapter.", "adapters.0.spatial."
        values = aim.from_published({theirs + key: value for key, value in values.items()})
        return {key.removeprefix(ours): value for key, value in values.items()}
    return aim.from_published(values) if "vit_clip.py" in case["official_source"] else from_authors(values)


def load(module: nn.Module, case: dict, fill: ModuleType) -> None:
    module.load_state_dict(weights(case, fill))
    module.to(getattr(torch, case["dtype"])).train(case["mode"] == "train")


def check(
    case: dict,
    fill: ModuleType,
    module: nn.Module,
    output: Tensor,
    inputs: Tensor | None,
    names: dict[str, str] | None = None,
) -> None:
    """Output, input gradient, parameter gradients and buffers against the case.

    Args:
        names: their key -> ours; by default what the loader makes of them.
    """
    tolerance = TOLERANCE[case["dtype"]]
    output.pow(2).mean().backward()
    gradient = None if inputs is None else inputs.grad
    errors = fill.compare(case, output.detach(), gradient)
    assert set(errors) == ({"output"} if gradient is None else {"output", "grad"})
    assert max(errors.values()) < tolerance, errors
    parameters = dict(module.named_parameters())
    names = names or official_names(case)
    largest = max(case["param_grad_l2"].values(), default=0.0)
    compared = 0
    for key, norm in case["param_grad_l2"].items():
        name = names[key].removeprefix("tower.") if names[key] not in parameters else names[key]
        if parameters[name].requires_grad:
            found = parameters[name].grad.double().norm().item()
            assert abs(found - norm) <= 10 * tolerance * max(norm, 1e-2 * largest), (key, found, norm)
            compared += 1
    assert compared or not any(parameter.requires_grad for parameter in parameters.values())
    buffers = dict(module.named_buffers())
    for key, norm in case["buffers_after_l2"].items():
        found = buffers[names[key]].double().norm().item()
        assert abs(found - norm) <= tolerance * max(norm, 1e-3), (key, found, norm)


def check_extra_gradients(case: dict, fill: ModuleType, inputs: dict[str, Tensor]) -> None:
    """The gradients of inputs besides the first."""
    for key, reference in case["extra_grads"].items():
        expected = np.array(reference["samples"])
        found = fill.samples(inputs[key].grad, len(expected))
        assert np.abs(found - expected).max() / rms(expected) < TOLERANCE[case["dtype"]], key


def official_names(case: dict) -> dict[str, str]:
    """Their key -> ours; the loader keeps the order."""
    keys = [key for key in case["state_dict"] if key != "proj"]
    shapes = {key: torch.empty(case["state_dict"][key]) for key in keys}
    return dict(zip(keys, renamed(shapes, case), strict=True))


def rms(values: np.ndarray) -> float:
    return max(float(np.sqrt((values**2).mean())), 1e-300)


def to_volume(x: Tensor, frames: int) -> Tensor:
    """(N, B*T, D) -> (B, T, H, W, D), square grid."""
    side = round(len(x) ** 0.5)
    return x.unflatten(1, (-1, frames)).unflatten(0, (side, side)).permute(2, 3, 0, 1, 4)


def to_tokens(x: Tensor) -> Tensor:
    """(B, T, H, W, D) -> (N, B*T, D)."""
    return x.permute(2, 3, 0, 1, 4).flatten(2, 3).flatten(0, 1)
