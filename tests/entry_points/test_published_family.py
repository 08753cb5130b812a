"""TDN and the TAdaConv family from files of their authors and from runs of their own, through both entry points."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
import torch
import torchvision
import yaml

from configs.schema import load_config
from datasets.build import test_loader as loader_of_tests  # which pytest would take for a test
from engine.normalize import Normalizer
from models.registry import MODELS, build_model, with_pixel_statistics
from tests.helpers.cli_harness import command, content, evaluated, refusal, settings, train, training_refusal
from tests.helpers.published_family import FAMILY, VISION, published_file, published_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


def configured(tiny: Path, folder: Path, name: str) -> Path:
    """The tiny configuration for the small copy of a published model."""
    file, values = FAMILY[name], yaml.safe_load(tiny.read_text())
    values["data"] |= {"num_segments": file.frames, "input_size": file.size, "batch_size": 6}
    for key in ("train_list", "val_list"):
        few = folder / f"{key}.txt"
        few.write_text("\n".join(Path(values["data"][key]).read_text().splitlines()[:6]) + "\n")
        values["data"][key] = str(few)
    values["network"] = {"model": name, "init": False, "options": file.options}
    if name == "tadaformer":
        values["network"] |= {"arch": "custom", "vision": VISION}
    values["solver"] |= {"epochs": 1, "lr": 0.001, "lr_warmup_step": 0}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", FAMILY)
def test_a_published_file_is_tested(tiny: Path, folder: Path, name: str) -> None:
    """The scores are those of the model with the weights put into it by hand."""
    path, weights = configured(tiny, folder, name), published_file(name, folder / f"{name}.pth")
    result = evaluated(path, weights, folder / f"{name}.json")
    assert (result["epoch"], result["videos"], result["weights"]) == (63, 6, str(weights))
    config = load_config(path)
    model = build_model(config, pretrained=False)
    plain = {key.removeprefix("module."): value for key, value in published_weights(name).items()}
    model.load_state_dict(MODELS[name].from_published(plain))
    pixels = with_pixel_statistics(config, model.eval()).data
    loader = loader_of_tests(config.data, frames_per_segment=model.frames_per_segment)
    with torch.inference_mode():
        videos = [Normalizer(pixels.mean, pixels.std)(batch["video"]).flatten(0, 1) for batch in loader]
        scores = torch.cat([model(video) for video in videos]).softmax(1)
    with numpy.load(folder / f"{name}.npz") as saved:
        numpy.testing.assert_allclose(saved["score"], scores, atol=1e-4)
        assert saved["score"].std(0).max() > 1e-3  # videos differ


@pytest.mark.parametrize("name", FAMILY)
def test_training_starts_from_a_published_file(tiny: Path, folder: Path, tmp_path: Path, name: str) -> None:
    """With its classifier, or for other classes with a new one; one step at a tiny rate changes next to nothing."""
    path, weights = configured(tiny, folder, name), published_file(name, folder / f"{name}.pth")
    chosen = [f"pretrain={weights}", "solver.lr=1.e-9"]
    run = train(path, tmp_path / "run", *chosen)
    plain = {key.removeprefix("module."): value for key, value in published_weights(name).items()}
    expected = MODELS[name].from_published(plain)
    trained = content(run / "last_model.pt")["model_state_dict"]
    parameters = {key for key in expected if not re.search(r"running_|num_batches", key)}
    for key in parameters:
        torch.testing.assert_close(trained[key], expected[key], rtol=0, atol=1e-6, msg=key)

    more = [*chosen, "data.num_classes=7", "data.label_list=null"]
    assert training_refusal(path, tmp_path / "more", *more) == (
        f"{weights}: its classifier has 4 classes, data.num_classes is 7; "
        "to start a new classifier, name the file in pretrain and set pretrain_head: drop"
    )
    words = ("--config", path, "--output", tmp_path / "more", "--dry-run", *settings((*more, "pretrain_head=drop")))
    status, text = command("train_vision.py", *words)
    assert status == 0 and f"{weights}: its classifier is not used, and a new one starts" in text, text
    assert not (tmp_path / "more").exists()


def test_what_a_file_of_tdn_does_not_say_is_logged(tiny: Path, folder: Path, tmp_path: Path) -> None:
    path, weights = configured(tiny, folder, "tdn"), published_file("tdn", folder / "tdn.pth")
    words = ("--config", path, "--weights", weights, "--json", tmp_path / "x.json")
    status, text = command("test_vision.py", *words, "--set", "network.arch=ViT-L/14")
    assert status == 0 and text.count("data.num_segments must be as in their training, 8 or 16") == 1
    assert "base_model.conv1_temp.* is left out" in text
    assert "network.arch: tdn stands on no image tower and does not read this" in text


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("tdn", {"module.base_model.bn1.weight": None},
         "does not fit this network: 1 keys missing (first base_model.bn1.weight), 0 unexpected; it has "),
        ("tdn", {"module.base_model.conv1_5.0.weight": None, "module.base_model.layer2_bak.0.mse.x": torch.ones(1)},
         "holds the weights of another model or another network: 1 keys missing (first base_model.conv1_5.0.weight), 1 unexpected (first "
         "base_model.layer2_bak.0.mse.x); it has "),
        ("tada2d", {"backbone.conv3.res_1.conv_branch.b_rf.b.weight": None},
         "does not fit this network: 1 keys missing (first backbone.conv3.res_1.conv_branch.b_rf.b.weight), 0 "),
        ("tadaformer", {"backbone.layers.0.tada2.tadaconv.rf_func.b_bias.weight": torch.ones(1)},
         "1 shapes differ (first backbone.layers.0.tada2.tadaconv.rf_func.b_bias.weight): (1,) in the file, "),
        ("tadaconvnextv2", {"head.out.bias": None}, "its classifier is incomplete: 1 keys missing (first head.out.bias)"),
    ],
)  # fmt: skip
def test_sets_that_are_not_complete(
    tiny: Path, folder: Path, tmp_path: Path, name: str, change: dict, sentence: str
) -> None:
    values = {key: value for key, value in {**published_weights(name), **change}.items() if value is not None}
    weights, path = published_file(name, tmp_path / "part.pth", values), configured(tiny, folder, name)
    message = refusal("test_vision.py", "--config", path, "--weights", weights)
    assert message.startswith(f"{weights}: {sentence}")
    assert training_refusal(path, tmp_path / "run", f"pretrain={weights}") == message
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.parametrize(
    ("name", "other"), [("tdn", "tada2d"), ("tadaconvnextv2", "tadaformer"), ("tadaformer", "tdn")]
)
def test_a_file_of_another_model(tiny: Path, folder: Path, tmp_path: Path, name: str, other: str) -> None:
    weights, path = published_file(name, tmp_path / "theirs.pth"), configured(tiny, folder, other)
    sentence = f"{weights}: holds the weights of {name} by its authors, and network.model is {other}"
    assert refusal("test_vision.py", "--config", path, "--weights", weights) == sentence
    assert training_refusal(path, tmp_path / "run", f"pretrain={weights}") == sentence


def test_a_run_of_other_segments(tiny: Path, folder: Path, tmp_path: Path) -> None:
    """T is in no weight of TDN: a checkpoint of 8 segments would load into 16."""
    path, eight = configured(tiny, folder, "tdn"), tmp_path / "eight.pt"
    config = load_config(path)
    weights = build_model(config, pretrained=False).state_dict()
    torch.save({"model_state_dict": weights, "config": config.to_dict()}, eight)
    other = tmp_path / "sixteen.yaml"
    other.write_text(path.read_text().replace("num_segments: 8", "num_segments: 16"))
    sentence = refusal("test_vision.py", "--config", other, "--weights", eight)
    assert sentence.startswith(
        f"{eight}: its weights were trained for another function: data.num_segments was 8 and is now 16. "
    )
    words = ("--config", other, "--output", tmp_path / "run", "--dry-run", "--set", f"pretrain={eight}")
    status, text = command("train_vision.py", *words)
    warning = f"{eight}: its weights were trained with data.num_segments 8 and are used with 16"
    assert status == 0 and text.count(warning) == 1, text
    assert {each.name for each in tmp_path.iterdir()} == {"eight.pt", "sixteen.yaml"}


@pytest.mark.parametrize(
    ("name", "override", "sentence"),
    [
        ("tdn", "data.input_size=32", "data.input_size: tdn needs at least 33 pixels, not 32: "),
        ("tdn", "network.options={depth: 34}", "network.options.depth: must be one of 50, 101"),
        ("tdn", "data.seg_length=1", "data.seg_length: 1 is given, but network.model tdn reads 5 frames a segment"),
        ("tdn", "network.cache_features=val", "network.cache_features: tdn has no frozen features of its own"),
        ("tada2d", "data.num_segments=2", "data.num_segments: tada2d averages over 3 neighbouring frames and needs as "),
        ("tada2d", "network.head=text", "network.head: text needs features in CLIP's space, which network.model tada2d "),
        ("tadaformer", "data.num_segments=4", "data.num_segments: tadaformer halves the frames and needs 5 or more, "),
        ("tadaformer", "network.options.head_width=64", "network.options.head_width: the route functions of tadaformer "
         "have a quarter of the width of custom, 64 / 4, which must be a multiple of 64"),
        ("tadaformer", "network.options.drop_path=1", "network.options.drop_path: must lie in [0, 1), not 1"),
        ("tadaformer", "network={vision: null, arch: vit_tiny_patch16_224}", "network.arch: tadaformer needs a vision "
         "transformer of open_clip, which vit_tiny_patch16_224 is not"),
        ("tadaconvnextv2", "data.num_segments=4", "data.num_segments: tadaconvnextv2 halves the frames and needs 5 or "),
        ("tadaconvnextv2", "network.options.head_width=48", "network.options.head_width: 48 does not divide 8, half of "),
        ("tadaconvnextv2", "network.options.drop_path=-0.1", "network.options.drop_path: must lie in [0, 1), not -0.1"),
    ],
)  # fmt: skip
def test_settings_that_no_such_model_can_have(
    tiny: Path, folder: Path, tmp_path: Path, name: str, override: str, sentence: str
) -> None:
    path = configured(tiny, folder, name)
    if override.startswith("network={"):
        values = yaml.safe_load(path.read_text())
        values["network"] |= yaml.safe_load(override.removeprefix("network="))
        path, override = folder / "other.yaml", "seed=0"
        path.write_text(yaml.safe_dump(values))
    message = training_refusal(path, tmp_path / "run", override)
    assert message.removeprefix(f"{path}: ").startswith(sentence)
    weights = published_file(name, tmp_path / "theirs.pth")
    assert refusal("test_vision.py", "--config", path, "--weights", weights, "--set", override) == message
    assert list(tmp_path.iterdir()) == [weights]


def test_an_image_network_of_another_depth(tiny: Path, folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "r50.pth"
    torch.save(torchvision.models.resnet50().state_dict(), weights)
    chosen = ("network.options={depth: 101}", "network.init=true", f"network.weights={weights}")
    assert training_refusal(configured(tiny, folder, "tdn"), tmp_path / "run", *chosen) == (
        f"network.weights: {weights} does not hold the weights of resnet101: has no layer3.6.conv1.weight"
    )
    assert list(tmp_path.iterdir()) == [weights]
