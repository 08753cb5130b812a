"""The contract of models/registry.py holds for every model, and for a convolutional one that has no CLIP.

The latter, tests/helpers/small_conv.py, goes through the entry points: training, resuming, testing, one and two processes.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from configs.schema import CLIP_MEAN, CLIP_STD, Config, ConfigError, load_config
from datasets.build import val_loader
from engine import results
from engine.normalize import Normalizer
from engine.optim import check_groups
from models import registry
from models.loading import WeightsError, load_weights
from models.parameters import Origin, frozen_identity, parameter_groups, parameter_report
from models.registry import MODELS, build_model, with_pixel_statistics
from tests.helpers import small_conv
from tests.helpers.cli_harness import (
    VIDEOS,
    assert_same,
    command,
    content,
    evaluated,
    metrics,
    script,
    settings,
    train,
    training_refusal,
)
from tests.helpers.tiny_models import adapted, random_clips


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolutional model is in the table."""
    monkeypatch.setitem(MODELS, "small_conv", small_conv)


@pytest.fixture(scope="module")
def conv(tiny: Path) -> Path:
    """The tiny configuration for the convolutional model, without any key of CLIP's."""
    values = yaml.safe_load(tiny.read_text())
    values["network"] = {"model": "small_conv", "init": False}
    values["solver"] |= {"lr": 0.01, "optim": "sgd", "nesterov": True, "type": "step", "milestones": [1]}
    values["logging"] = {"output_dir": str(tiny.parent / "conv")}
    path = tiny.parent / "conv.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def chosen(conv: Path, *overrides: str) -> Config:
    return load_config(conv, list(overrides))


def two_processes(*words: str | Path) -> str:
    """Run an entry point on two CPU processes, which must work; returns what it wrote to stderr."""
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.helpers.small_conv",
    )
    done = script(sys.executable, *launcher, *words, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_registry_knows_no_tower() -> None:
    imported = [node for node in ast.walk(ast.parse(inspect.getsource(registry))) if isinstance(node, ast.ImportFrom)]
    assert imported and not [node.module for node in imported if node.module.startswith("clip.towers")]


@pytest.mark.parametrize("name", [*MODELS, "small_conv"])
def test_every_model_has_what_the_contract_asks(tiny: Path, name: str) -> None:
    values = yaml.safe_load(tiny.read_text())
    config = load_config(adapted(name, values["data"], values["network"] | {"drop_fc": 0.5}))
    model = build_model(config)
    assert isinstance(model.origin, Origin) and all(isinstance(text, str) and text for text in model.origin)
    assert list(model.trainable_modules())[-1] == "head" and model.trainable_modules()["head"] is model.head
    assert isinstance(model.frames_per_segment, int)
    for statistics in (model.mean, model.std):
        assert statistics is None or len(statistics) == 3
    video = random_clips(model, config, 2)
    assert model.eval()(video).shape == (2, config.data.num_classes)
    check_groups(model, parameter_groups(model, lr=0.1, weight_decay=0.05))
    keywords = list(inspect.signature(type(model)).parameters.values())
    assert all(each.kind is each.KEYWORD_ONLY for each in keywords if each.name != "tower")
    assert all(each.annotation is not each.empty for each in keywords)


def test_building_one_without_clip(conv: Path) -> None:
    model = build_model(chosen(conv, "network.options={width: 6}", "network.drop_fc=0.5"))
    assert isinstance(model, small_conv.SmallConv) and model.stem[0].out_channels == 6 and model.dropout.p == 0.5
    assert all(parameter.requires_grad for parameter in model.parameters()) and frozen_identity(model) is None
    report = parameter_report(model)
    assert report.trainable == report.total and report.share == 1
    again = build_model(chosen(conv, "network.options={width: 6}"))
    assert_same(model.state_dict(), again.state_dict())  # follows from the seed
    assert not torch.equal(
        model.head.weight, build_model(chosen(conv, "network.options={width: 6}", "seed=6")).head.weight
    )
    with pytest.raises(ConfigError, match=r"network\.options\.width: must be above 0, not 0"):
        build_model(chosen(conv, "network.options={width: 0}"))
    with pytest.raises(
        ConfigError, match=r"network\.options\.widht: unknown key; did you mean network\.options\.width"
    ):
        build_model(chosen(conv, "network.options={widht: 6}"))


def test_what_only_models_with_clip_can_do_is_refused(conv: Path) -> None:
    with pytest.raises(
        ConfigError, match="needs features in CLIP's space, which network.model small_conv does not give"
    ):
        build_model(chosen(conv, "network.head=text"))
    with pytest.raises(
        ConfigError, match="small_conv has no frozen features of its own to keep; only .*linear_probe, .* have"
    ):
        build_model(chosen(conv, "network.cache_features=val"))


def test_pixels_and_frames_are_the_models_own(conv: Path, tiny: Path) -> None:
    config, model = chosen(conv), build_model(chosen(conv))
    data = with_pixel_statistics(config, model).data
    assert (data.mean, data.std) == (model.mean, model.std)
    given = with_pixel_statistics(chosen(conv, "data.mean=[0.1,0.2,0.3]", "data.seg_length=3"), model).data
    assert (given.mean, given.std) == ((0.1, 0.2, 0.3), model.std)
    model.mean = model.std = None
    data = with_pixel_statistics(config, model).data
    assert (data.mean, data.std) == (CLIP_MEAN, CLIP_STD)
    for path, length, frames, name in ((conv, 1, 3, "small_conv"), (tiny, 3, 1, "td4v_side")):
        config = chosen(path, f"data.seg_length={length}")
        with pytest.raises(
            ConfigError, match=rf"data.seg_length: {length} is given, but .*{name} reads {frames} frames"
        ):
            with_pixel_statistics(config, build_model(config))


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_groups_with_the_models_multipliers(conv: Path, layer_decay: float, decay_norms: bool) -> None:
    model = build_model(chosen(conv))
    groups = parameter_groups(
        model, lr=0.1, weight_decay=0.04, clip_ratio=0.5, layer_decay=layer_decay, decay_norms=decay_norms
    )
    check_groups(model, groups)
    assert len({group["name"] for group in groups}) == len(groups)
    held = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        lr = 0.1 if part == "head" else 0.05
        lr *= layer_decay ** (2 - ["stem", "body", "head"].index(part))
        bias, norm = name.endswith(".bias"), name in ("stem.1.weight", "body.1.weight")
        lr *= 2 if bias else 5 if name == "head.weight" else 1
        group = held[id(parameter)]
        assert group["lr"] == pytest.approx(lr), name
        assert group["weight_decay"] == (0 if bias or (norm and not decay_norms) else 0.04), name
    names = {"stem", "stem_lr_x2_no_decay", "body", "body_lr_x2_no_decay", "head_lr_x5", "head_lr_x2_no_decay"}
    if layer_decay == 1 and decay_norms:
        assert {group["name"] for group in groups} == names


def test_weights_in_and_out(conv: Path) -> None:
    """Strictly, without a tower's words, wherever they are from."""
    source, target = build_model(chosen(conv, "seed=9")), build_model(chosen(conv))
    load_weights(target, source.state_dict(), "a.pt")
    assert_same(source.state_dict(), target.state_dict())
    assert target.origin == Origin("small_conv", "those in a.pt")
    incomplete = {name: value for name, value in source.state_dict().items() if name != "stem.1.running_var"}
    backbone = {"name": "ViT-B/16", "weights": "openai", "sha256": "0" * 64}
    for values, options, message in (
        (incomplete, {}, r"does not fit this network: 1 keys missing \(first stem.1.running_var\), 0 unexpected"),
        (incomplete, {"backbone": backbone}, "does not fit this network: 1 keys missing"),
        (
            source.state_dict(),
            {"backbone": backbone},
            "was trained on the frozen weights ViT-B/16, and nothing is frozen",
        ),
    ):
        with pytest.raises(WeightsError, match=rf"^a\.pt: {message}"):
            load_weights(target, values, "a.pt", **options)
    wide = build_model(chosen(conv, "network.options={width: 6}"))
    with pytest.raises(WeightsError, match=r"^a\.pt: \d+ shapes differ \(first stem.0.weight"):
        load_weights(wide, source.state_dict(), "a.pt")


def test_training_and_testing_it(conv: Path, tmp_path: Path) -> None:
    """The checkpoint holds everything, and its accuracy is exact on one and two processes."""
    run = train(conv, tmp_path / "run", "solver.epochs=1", "solver.milestones=[0.5]")
    (row,) = metrics(run)
    saved = content(run / "last_model.pt")
    config = with_pixel_statistics(chosen(conv), model := build_model(chosen(conv)))
    assert saved["backbone"] is None and saved["model_state_dict"].keys() == model.state_dict().keys()
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["data"]["mean"] == list(model.mean) and written["data"]["std"] == list(model.std)

    load_weights(model, saved["model_state_dict"], "last_model.pt")
    loader = val_loader(config.data, config.seed, frames_per_segment=3)
    normalizer, scores, right = Normalizer(config.data.mean, config.data.std), [], 0
    with torch.inference_mode():
        for batch in loader:
            video = batch["video"].flatten(0, 1)  # (B, T*3, 3, H, W): one view a video
            assert video.shape[1] == 8 * 3
            scores.append(model.eval()(normalizer(video)).softmax(1))
            right += int((scores[-1].argmax(1) == batch["label"]).sum())
    assert row["top1"] == pytest.approx(100 * right / VIDEOS)

    result = evaluated(conv, run / "model_best.pt", tmp_path / "one.json")
    assert (result["top1"], result["videos"]) == (row["top1"], VIDEOS)
    assert result["parameters"]["trainable"] == parameter_report(model).total
    found = results.load_scores(tmp_path / "one.npz").table.score
    torch.testing.assert_close(found, torch.cat(scores).double(), rtol=0, atol=1e-6)
    assert len(found.unique(dim=0)) == VIDEOS  # no two videos look alike to it
    words = ("--config", conv, "--weights", run / "model_best.pt", "--test_crops", "3", "--test_clips", "2")
    status, text = command("test_vision.py", *words, "--json", tmp_path / "views.json")
    assert status == 0, text
    two_processes("test_vision.py", *words, "--json", tmp_path / "two.json")
    one, two = (results.load_scores(tmp_path / f"{name}.npz").table for name in ("views", "two"))
    assert torch.equal(one.index, two.index) and torch.equal(one.score, two.score)
    assert (
        json.loads((tmp_path / "two.json").read_text())["top1"]
        == json.loads((tmp_path / "views.json").read_text())["top1"]
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_it_changes_no_bit(conv: Path, tmp_path: Path, processes: int) -> None:
    def run(name: str, *overrides: str) -> Path:
        words = ("--config", conv, "--output", tmp_path / name, *settings(overrides))
        if processes == 2:
            two_processes("train_vision.py", *words)
        else:
            status, text = command("train_vision.py", *words)
            assert status == 0, text
        return tmp_path / name

    complete = run("complete", "checkpoint.keep=9")
    first_epoch = min(complete.glob("step_*.pt"))
    resumed = run("resumed", f"resume={first_epoch}")
    one, other = (content(folder / "last_model.pt") for folder in (complete, resumed))
    assert one["epoch"] == 2 and len(metrics(complete)) == 2
    for key in ("model_state_dict", "optimizer_state_dict", "scheduler", "rng", "best", "step"):
        assert_same({key: one[key]}, {key: other[key]})
    moved = content(first_epoch)["model_state_dict"]
    assert not torch.equal(moved["stem.0.weight"], one["model_state_dict"]["stem.0.weight"])


def test_starting_from_its_weights(conv: Path, tmp_path: Path) -> None:
    """A pretrained file of it needs no backbone, and the run that starts from it is complete as well."""
    first = train(conv, tmp_path / "first", "solver.epochs=1", "solver.milestones=[0.5]") / "model_best.pt"
    overrides = ("solver.epochs=1", "solver.milestones=[0.5]", f"pretrain={first}", "solver.lr=1e-9")
    sentence = training_refusal(conv, tmp_path / "run", *overrides, "data.num_classes=5", "data.label_list=null")
    assert "its classifier has 4 classes, data.num_classes is 5" in sentence
    run = train(conv, tmp_path / "run", *overrides)
    before, after = (content(path)["model_state_dict"] for path in (first, run / "last_model.pt"))
    torch.testing.assert_close(after["stem.0.weight"], before["stem.0.weight"], rtol=0, atol=1e-6)
    assert content(run / "last_model.pt")["backbone"] is None
    sentence = training_refusal(conv, tmp_path / "cached", "network.cache_features=val")
    assert "network.cache_features: small_conv has no frozen features of its own to keep" in sentence
    assert not (tmp_path / "cached").exists()
