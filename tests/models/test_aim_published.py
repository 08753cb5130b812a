"""AIM's published files: checkpoints of the authors' names and shapes, loaded and refused, and their recipes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from torch import Tensor

from configs.schema import load_config
from datasets.build import class_names
from datasets.prepare.synthetic import make
from engine import checkpoint_file
from models import aim
from models.loading import WeightsError, load_weights
from models.registry import build_model
from tests.clip.test_text_head import random_clip
from tests.helpers.cli_harness import command, evaluated, train, training_refusal
from tests.models.test_aim import CLASSES, FRAMES, HEADS, LAYERS, SIDE, TOKENS, WIDTH, config, tiny

ROOT = Path(__file__).parents[2]


def published(adapters: int = 1, frames: int = FRAMES, classes: int = CLASSES) -> dict[str, Tensor]:
    """Names and shapes as their code saves them, from the published modules' structure."""
    D, shapes = WIDTH, {"temporal_embedding": (1, frames, WIDTH), "class_embedding": (WIDTH,)}
    shapes |= {"positional_embedding": (TOKENS, D), "conv1.weight": (D, 3, 8, 8)}

    def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    shapes |= pair("ln_pre", D) | pair("ln_post", D)
    for block in (f"transformer.resblocks.{index}" for index in range(LAYERS)):
        shapes |= {f"{block}.attn.in_proj_weight": (3 * D, D), f"{block}.attn.in_proj_bias": (3 * D,)}
        shapes |= pair(f"{block}.attn.out_proj", D, D) | pair(f"{block}.ln_1", D) | pair(f"{block}.ln_2", D)
        shapes |= pair(f"{block}.mlp.c_fc", 4 * D, D) | pair(f"{block}.mlp.c_proj", D, 4 * D)
        for name in ("MLP_Adapter", "S_Adapter", "T_Adapter", "T_Adapter_in")[: 2 + adapters]:
            shapes |= pair(f"{block}.{name}.D_fc1", D // 4, D) | pair(f"{block}.{name}.D_fc2", D, D // 4)
    shapes = {f"backbone.{name}": shape for name, shape in shapes.items()} | pair("cls_head.fc_cls", classes, D)
    generator = torch.Generator().manual_seed(7)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def file(path: Path, values: dict[str, Tensor]) -> Path:
    """As mmcv's runner writes it, the best one with NumPy's number of how good it is."""
    meta = {"epoch": 30, "iter": 900, "mmcv_version": "1.4.0", "config": "model = dict(type='Recognizer3D')\n",
            "hook_msgs": {"best_score": numpy.float64(0.839), "last_ckpt": "epoch_29.pth"}}  # fmt: skip
    optimizer = {"state": {0: {"step": 900, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 3e-4, "params": [0]}]}
    torch.save({"meta": meta, "state_dict": OrderedDict(values), "optimizer": optimizer}, path)
    return path


@pytest.mark.parametrize("adapters", [1, 2])
def test_a_published_file_loads(tmp_path: Path, adapters: int) -> None:
    theirs = published(adapters)
    path = file(tmp_path / "best.pth", theirs)
    model = tiny(temporal_adapters=adapters)
    load_weights(model, checkpoint_file.load(path).weights, str(path))
    loaded, block = model.state_dict(), "backbone.transformer.resblocks.2"
    pairs = {
        "adapters.2.joint.down.weight": f"{block}.MLP_Adapter.D_fc1.weight",
        "adapters.2.temporal.up.weight": f"{block}.T_Adapter.D_fc2.weight",
        "adapters.2.spatial.up.bias": f"{block}.S_Adapter.D_fc2.bias",
        "tower.visual.transformer.resblocks.2.attn.in_proj_weight": f"{block}.attn.in_proj_weight",
        "tower.visual.ln_post.bias": "backbone.ln_post.bias",
        "head.weight": "cls_head.fc_cls.weight",
    }
    assert all(torch.equal(loaded[ours], theirs[name]) for ours, name in pairs.items())
    assert torch.equal(loaded["temporal_embedding"], theirs["backbone.temporal_embedding"][0])
    assert ("adapters.2.temporal_in.up.bias" in loaded) == (adapters == 2)
    assert model.origin.weights == f"those in {path}"
    other = tiny(temporal_adapters=adapters, classes=7)
    load_weights(other, theirs, "best.pth", drop_head=True)
    assert torch.equal(other.temporal_embedding, model.temporal_embedding)


BLOCK = "backbone.transformer.resblocks.1."
MISSING = [
    "backbone.temporal_embedding",
    "backbone.conv1.weight",
    f"{BLOCK}mlp.c_fc.bias",
    f"{BLOCK}S_Adapter.D_fc2.bias",
]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"temporal_adapters": 2}, {}, "has one temporal adapter a block, network.options.temporal_adapters is 2"),
        ({"frames": 8}, {}, "was made for T = 4 frames, data.num_segments is 8; set data.num_segments to 4"),
        ({"classes": 9}, {}, "its classifier has 5 classes, data.num_classes is 9"),
        ({}, {"backbone.ln_post.bias": None}, r"does not fit .* 1 keys missing \(first backbone.ln_post.bias\), 0 unexpected"),
        ({}, {"backbone.ln_pre.bias": None}, r"does not fit .* 1 keys missing \(first backbone.ln_pre.bias\), 0 unexpected"),
        ({}, dict.fromkeys(MISSING), rf"4 keys missing \(first {MISSING[0]}, {MISSING[1]}, {MISSING[2]}\)"),
        ({}, {"cls_head.fc_cls.bias": None}, r"its classifier is incomplete: 1 keys missing \(first cls_head.fc_cls.bias\)"),
        ({}, {"cls_head.fc_cls.bias": None, "cls_head.fc_cls.weight": None},
         "holds no classifier: name it in pretrain and set pretrain_head: drop"),
        ({}, {"backbone.ln_mid.bias": 1, "neck.a": 1, "a": 1, "b": 1},
         r"4 keys are not of the authors' AIM \(first backbone.ln_mid.bias, neck.a, a\)"),
        ({}, {f"{BLOCK}X_Adapter.D_fc1.bias": 1}, rf"not of the authors' AIM \(first {BLOCK}X_Adapter.D_fc1.bias\)"),
        ({}, {f"{BLOCK}S_Adapter.D_fc3.bias": 1}, rf"not of the authors' AIM \(first {BLOCK}S_Adapter.D_fc3.bias\)"),
        ({}, {f"{BLOCK}mlp.D_fc1.bias": 1}, rf"0 keys missing, 1 unexpected \(first {BLOCK}mlp.D_fc1.bias\)"),
        ({}, {f"{BLOCK}ln_1.bias".replace("1", "7", 1): 1}, r"1 unexpected \(first backbone.transformer.resblocks.7.ln_1.bias\)"),
        ({}, {"backbone.conv1.weight": 1}, r"1 shapes differ \(first backbone.conv1.weight\): \(32,\) in the file"),
        ({"network": {"model": "td4v_side", "pyramid": {"n_embs": [8, 8, 32]}}}, {}, "of aim by its authors, .* is td4v_side$"),
    ],
)  # fmt: skip
def test_published_files_that_do_not_fit(options: dict, changes: dict, message: str) -> None:
    theirs = {**published(), **{name: torch.ones(WIDTH) if value else None for name, value in changes.items()}}
    model = build_model(config(**options))
    with pytest.raises(WeightsError, match=rf"^best\.pth: .*{message}") as caught:
        load_weights(model, {name: value for name, value in theirs.items() if value is not None}, "best.pth")
    assert "\n" not in str(caught.value)


def test_names_lead_back_to_where_they_are_from() -> None:
    theirs = published(adapters=2)
    ours = aim.from_published(theirs)
    assert [aim.published_name(key) for key in ours] == list(theirs)
    assert aim.published_name("head.classes") == "head.classes"  # which they have not


def test_the_backbone_alone_serves_with_a_new_classifier() -> None:
    theirs = {name: value for name, value in published().items() if name.startswith("backbone.")}
    for plain in (theirs, {name.removeprefix("backbone."): value for name, value in theirs.items()}):
        model = tiny(classes=7)
        head = model.head.weight.clone()
        load_weights(model, plain, "best.pth", drop_head=True)
        assert torch.equal(model.tower.visual.conv1.weight, theirs["backbone.conv1.weight"])
        assert torch.equal(model.head.weight, head)


def test_ours_with_another_number_of_adapters() -> None:
    with pytest.raises(WeightsError, match="has two temporal adapters a block, network.options.temporal_adapters is 1"):
        load_weights(tiny(), tiny(temporal_adapters=2).state_dict(), "a.pt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of 4 classes and aim.yaml, the tiny configuration for it."""
    folder = tmp_path_factory.mktemp("aim")
    make(folder / "data", train=8, val=4, seed=3, size=32)
    lists = {f"{part}_list": str(folder / "data" / f"{part}.txt") for part in ("train", "val")}
    data = {"dataset": "frame_order", "style": "kinetics", "num_classes": 4, "num_segments": FRAMES, "batch_size": 4,
            "workers": 0, "input_size": SIDE, "train_root": str(folder / "data" / "frames"),
            "val_root": str(folder / "data" / "frames"), **lists}  # fmt: skip
    values = {"data": data, "network": config().to_dict()["network"], "solver": {"epochs": 1, "lr_warmup_step": 0},
              "logging": {"output_dir": str(folder / "exp")}}  # fmt: skip
    (folder / "aim.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_both_scripts_take_a_published_file(made: Path, tmp_path: Path) -> None:
    """test_vision.py --weights, and pretrain of train_vision.py, which then keeps the file's frozen weights."""
    theirs, path = published(classes=4), made / "aim.yaml"
    weights = file(tmp_path / "epoch_30.pth", theirs)
    status, text = command("test_vision.py", "--config", path, "--weights", weights)
    assert status == 0, text
    trained = weights_of_run(train(path, tmp_path / "run", f"pretrain={weights}"))
    assert torch.equal(trained["tower.visual.conv1.weight"], theirs["backbone.conv1.weight"])
    assert not torch.equal(trained["head.weight"], theirs["cls_head.fc_cls.weight"])
    difference = (trained["temporal_embedding"] - theirs["backbone.temporal_embedding"][0]).abs().max()
    assert 0 < difference < 0.05  # two steps from where it was
    status, text = command("test_vision.py", "--config", path, "--weights", weights, "--set", "data.num_segments=8")
    assert status != 0 and "epoch_30.pth: was made for T = 4 frames, data.num_segments is 8" in text


@pytest.mark.parametrize("tuned", ["none", "classifier", "tower"])
def test_the_text_head_in_place_of_a_published_classifier(made: Path, tmp_path: Path, tuned: str) -> None:
    """It is or starts as CLIP's, whoever brings the frozen weights, and stays with the run."""
    theirs, path = published(classes=9), tmp_path / "text.yaml"
    weights = file(tmp_path / "epoch_30.pth", theirs)
    vision = {"image_size": SIDE, "patch_size": 8, "width": WIDTH, "layers": LAYERS, "head_width": WIDTH // HEADS}
    clip = random_clip(24, vision, {"width": 64, "heads": 1, "layers": 2})
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    values = yaml.safe_load((made / "aim.yaml").read_text())
    values["network"] |= {"init": True, "weights": str(tmp_path / "clip.pt"), "head": "text", "text": {"tuned": tuned}}
    values["data"]["label_list"] = str(made / "data" / "labels.csv")
    path.write_text(yaml.safe_dump(values))
    chosen = (f"pretrain={weights}", "pretrain_head=drop")
    run = train(path, tmp_path / "run", *chosen)
    trained, chosen_config = weights_of_run(run), load_config(path)
    head = build_model(chosen_config, class_names=class_names(chosen_config.data)).head
    for name, value in head.state_dict().items():
        moved = 0.01 if tuned != "none" else 0  # in two steps
        torch.testing.assert_close(trained[f"head.{name}"], value, rtol=0, atol=moved)
    assert torch.equal(trained["tower.visual.conv1.weight"], theirs["backbone.conv1.weight"])
    train(path, run, *chosen, "solver.epochs=2")
    evaluated(path, run / "model_best.pt", tmp_path / "best.json", "data.label_list=null")
    sentence = training_refusal(path, tmp_path / "other", *chosen, "data.label_list=null")
    assert sentence.startswith("network.head: text has no classes")


def test_resuming_from_a_published_file_says_that_it_is_no_run(made: Path, tmp_path: Path) -> None:
    weights = file(tmp_path / "epoch_30.pth", published(classes=4))
    chosen = ("--output", tmp_path / "run", "--set", f"resume={weights}")
    status, text = command("train_vision.py", "--config", made / "aim.yaml", *chosen)
    warning = f"{weights}: holds weights but no run to resume (epoch, step_in_epoch, "
    found = [line for line in text.splitlines() if f" WARNING {warning}" in line]
    assert status == 0 and len(found) == 1 and found[0].endswith(" missing): training starts at epoch 0 with them")


def weights_of_run(folder: Path) -> dict[str, Tensor]:
    return checkpoint_file.load(folder / "last_model.pt").weights


K400 = {"epochs": 30, "temporal_adapters": 1, "scale": 0.5, "smoothing": 0, "num_segments": 8}
RECIPES = {
    "k400": {**K400, "dense": True, "num_classes": 400},
    "ssv2": {**K400, "epochs": 50, "temporal_adapters": 2, "scale": 1, "smoothing": 0.1, "dense": False, "num_classes": 174,
             "flip": False, "rand_aug": True, "rand_erase": True},
    "diving48": {**K400, "epochs": 50, "num_segments": 32, "dense": False, "num_classes": 48},
    "hmdb51": {**K400, "num_classes": 51},  # these two by analogy
    "ucf101": {**K400, "num_classes": 101},
}  # fmt: skip
ALL = {"lr": 3e-4, "lr_base_batch": 64, "lr_warmup_step": 2.5, "optim": "adamw", "betas": (0.9, 0.999), "weight_decay": 0.05,
       "decay_norms": False, "clip_ratio": 1, "drop_path": 0.2, "drop_fc": 0.5, "feature": "class_token", "input_size": 224,
       "model": "aim", "arch": "ViT-B/16", "init": True, "mixup": False, "layer_decay": 1}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes(name: str) -> None:
    chosen = load_config(ROOT / f"configs/{name}/aim.yaml")
    found = {**vars(chosen.data), **vars(chosen.network), **vars(chosen.solver), **chosen.network.options}
    wanted = {**ALL, **RECIPES[name]}
    assert {key: found[key] for key in wanted} == wanted
    data = chosen.data.with_pixel_statistics()
    pixels = [255 * value for value in (*data.mean, *data.std)]
    theirs = (122.769, 116.74, 104.04, 68.493, 66.63, 70.321)
    published = name in ("k400", "ssv2", "diving48")
    assert pixels == pytest.approx(theirs, abs=0.001 if published else 0.1)


def test_every_recipe_is_known() -> None:
    assert {path.parent.name for path in (ROOT / "configs").glob("*/aim.yaml")} == set(RECIPES)
