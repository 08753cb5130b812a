"""Every golden vector of the folder GOLDEN_DIR (default ../shared/golden and ../shared/golden_aim) holds for our modules.

The vectors are numbers from the authors' own modules; the folder's README and fill.py say how they are made. A family
of cases that is not known here fails, and so do a GOLDEN_DIR without vectors and vectors without a fill.py; only where
no folder is named and the default ones are not there, nothing is tested.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from clip.adapter import TD4V
from clip.published import from_authors
from clip.side_network import SideBlock
from clip.towers.openclip_vit import build_custom_tower
from configs.schema import parse_ratio
from datasets.sampling import test_indices as clip_indices
from datasets.sampling import val_indices
from models import aim
from models.aim import AIM, Adapter
from models.registry import freeze_all_but_trainable
from models.td4v_side import TD4VSide

SHARED = Path(__file__).parents[3] / "shared"
NAMED = os.environ.get("GOLDEN_DIR")
FOLDERS = [SHARED / "golden", SHARED / "golden_aim"] if NAMED is None else [Path(NAMED)]
CASES = [path for folder in FOLDERS for path in sorted(folder.glob("*.json"))]
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def fill_file(folders: list[Path], shared: Path) -> Path:
    """The fill rule: beside the vectors, in the folder `golden` beside theirs, or in the shared one."""
    places = [*folders, *(folder.resolve().parent / "golden" for folder in folders), shared / "golden"]
    found = [place / "fill.py" for place in places if (place / "fill.py").is_file()]
    assert found, f"there is no fill.py in {', '.join(map(str, places))}"
    return found[0]


def test_a_folder_that_is_named_has_vectors():
    assert CASES or NAMED is None, f"GOLDEN_DIR: there are no golden vectors (*.json) in {NAMED}"


def test_where_the_fill_rule_is_looked_for(tmp_path):
    vectors, shared = tmp_path / "one" / "golden_new", tmp_path / "shared"
    vectors.mkdir(parents=True)
    with pytest.raises(AssertionError, match="there is no fill.py in "):
        fill_file([vectors], shared)
    for place in (shared / "golden", tmp_path / "one" / "golden", vectors):  # the last comes first
        place.mkdir(parents=True, exist_ok=True)
        (place / "fill.py").touch()
        assert fill_file([vectors], shared) == place / "fill.py"


@pytest.fixture(scope="module")
def fill():
    """The fill rule, loaded."""
    path = fill_file(FOLDERS, SHARED)
    spec = importlib.util.spec_from_file_location("golden_fill", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    normal = functools.cache(module._normal)  # the large cases have the same names and shapes
    module._normal = lambda key, shape: normal(key, tuple(shape))
    return module


@pytest.mark.skipif(not CASES, reason=f"no golden vectors in {FOLDERS[0]}")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path, fill):
    case = json.loads(path.read_text())
    if isinstance(case, list):
        check_sampling(case)
        return
    families = {"adapter.py:TD4V": run_td4v, "AttnCBlock": run_side_block, "frozen CLIP part": run_trunk,
                "VisualTransformer": run_side_network, "vit_clip.py:ViT_CLIP": run_aim,
                "vit_clip.py:Adapter": run_aim_adapter}  # fmt: skip
    run = next((run for name, run in families.items() if name in case["official_source"]), None)
    assert run is not None, f"{path.name}: no test for {case['official_source']}"
    run(case, fill)


def check_sampling(cases):
    assert cases
    for case in cases:
        style = case["style"].split("-")[0]
        length, frames = case["num_frames"], case["T"]
        if case["split"] == "val":
            indices = val_indices(length, frames, style, case["dense"])
        else:
            indices = clip_indices(length, frames, case["clips"], style, case["dense"]).reshape(-1)
        assert (np.asarray(indices) + 1).tolist() == case["indices"], case


def run_td4v(case, fill):
    arguments = case["constructor_args"]
    module = TD4V(arguments["dim"], parse_ratio(arguments["scale"]), arguments["sample_mode"])
    load(module, case, fill)
    x = tensor(fill.inputs_of(case)["input"], case).requires_grad_()
    y = to_tokens(module(to_volume(x, arguments["T"])))
    check(case, fill, module, y, x)


def run_side_block(case, fill):
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
    for key, reference in case["extra_grads"].items():
        expected = np.array(reference["samples"])
        found = fill.samples(inputs[key].grad, len(expected))
        assert np.abs(found - expected).max() / rms(expected) < TOLERANCE[case["dtype"]], key


def run_trunk(case, fill):
    tower = golden_tower(case["constructor_args"])
    values = {key.removeprefix("tower."): value for key, value in weights(case, fill).items()}
    keep = {f"visual.{key}": value for key, value in tower.visual.state_dict().items() if key.startswith("ln_post.")}
    tower.load_state_dict({**keep, **values})
    tower.to(getattr(torch, case["dtype"]))
    x = tensor(fill.inputs_of(case)["input"], case).requires_grad_()
    y = tower(x)[:, 1:].transpose(0, 1)  # (B*T, N, D) -> (N, B*T, D)
    check(case, fill, tower, y, x)


def run_side_network(case, fill):
    arguments = case["constructor_args"]
    model = TD4VSide(golden_tower(arguments), 5, arguments["T"], arguments["n_embs"], arguments["mlp_ratio"],
                     parse_ratio(arguments["DA_ratio"]), arguments["sample_mode"])  # fmt: skip
    own = model.state_dict()
    extra = {key: own[key] for key in own if key.startswith(("head.", "tower.visual.ln_post."))}
    model.load_state_dict({**extra, **weights(case, fill)})
    freeze_all_but_trainable(model).to(getattr(torch, case["dtype"])).train(case["mode"] == "train")
    x = tensor(fill.inputs_of(case)["input"], case).unflatten(0, (-1, arguments["T"]))  # (B, T, 3, H, W)
    if len(x) == 1 and model.training:  # degenerate: the authors' module gives a constant there, ours refuses
        with pytest.raises(ValueError, match="at least two clips"):
            model.features(x)
        return
    y = model.features(x)
    check(case, fill, model, y, None)


def run_aim_adapter(case, fill):
    arguments = case["constructor_args"]
    adapter = Adapter(arguments["D_features"], arguments.get("mlp_ratio", 0.25), arguments.get("skip_connect", True))
    load(adapter, case, fill)
    x = tensor(fill.inputs_of(case)["input"], case).requires_grad_()
    check(case, fill, adapter, adapter(x), x)


def run_aim(case, fill):
    """As it is trained, and with gradients of all weights, for which the tower runs as open_clip wrote it."""
    arguments = case["constructor_args"]
    drop_path = arguments.get("drop_path_rate", 0.2)
    assert case["mode"] == "eval" or drop_path == 0, "dropped paths are random"
    model = AIM(golden_tower(arguments), 5, arguments["num_frames"], arguments.get("num_tadapter", 1),
                arguments.get("adapter_scale", 0.5), drop_path, arguments.get("mlp_ratio", 0.25))  # fmt: skip
    own = model.state_dict()
    model.load_state_dict({**{key: own[key] for key in ("head.weight", "head.bias")}, **weights(case, fill)})
    freeze_all_but_trainable(model).to(getattr(torch, case["dtype"])).train(case["mode"] == "train")
    for everything in (False, True):
        x = tensor(fill.inputs_of(case)["input"], case).requires_grad_()  # (B, 3, T, H, W)
        model.zero_grad()
        y = model.requires_grad_(True) if everything else model
        y = y.frame_features(x.transpose(1, 2)).transpose(1, 2)[..., None, None]  # (B, T, D) -> (B, D, T, 1, 1)
        check(case, fill, model, y, x)


def golden_tower(arguments):
    return build_custom_tower(arguments["width"], arguments["layers"], arguments["heads"], arguments["patch_size"],
                              arguments["input_resolution"])  # fmt: skip


def weights(case, fill):
    """The authors' state_dict of the case, through the project's public loader."""
    return ours({key: torch.from_numpy(np.asarray(value)) for key, value in fill.state_dict(case).items()}, case)


def ours(values, case):
    if "vit_clip.py:Adapter" in case["official_source"]:
        place, renamed = "transformer.resblocks.0.S_Adapter.", "adapters.0.spatial."
        whole = aim.from_published({place + key: value for key, value in values.items()})
        return {key.removeprefix(renamed): value for key, value in whole.items()}
    return aim.from_published(values) if "vit_clip.py" in case["official_source"] else from_authors(values)


def load(module, case, fill):
    module.load_state_dict(weights(case, fill))
    module.to(getattr(torch, case["dtype"])).train(case["mode"] == "train")


def check(case, fill, module, output, inputs):
    """Output, input gradient, parameter gradients and buffers against the case."""
    tolerance = TOLERANCE[case["dtype"]]
    output.pow(2).mean().backward()
    gradient = None if inputs is None else inputs.grad
    errors = fill.compare(case, output.detach(), gradient)
    assert set(errors) == ({"output"} if gradient is None else {"output", "grad"})
    assert max(errors.values()) < tolerance, errors
    parameters = dict(module.named_parameters())
    names = official_names(case)
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


def official_names(case):
    """Their key -> ours; the loader keeps the order."""
    keys = [key for key in case["state_dict"] if key != "proj"]
    shapes = {key: torch.empty(case["state_dict"][key]) for key in keys}
    return dict(zip(keys, ours(shapes, case), strict=True))


def tensor(values, case):
    return torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, case["dtype"]))


def rms(values):
    return max(float(np.sqrt((values**2).mean())), 1e-300)


def to_volume(x, frames):
    """(N, B*T, D) -> (B, T, H, W, D), square grid."""
    side = round(len(x) ** 0.5)
    return x.unflatten(1, (-1, frames)).unflatten(0, (side, side)).permute(2, 3, 0, 1, 4)


def to_tokens(x):
    """(B, T, H, W, D) -> (N, B*T, D)."""
    return x.permute(2, 3, 0, 1, 4).flatten(2, 3).flatten(0, 1)
