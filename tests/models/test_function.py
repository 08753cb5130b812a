"""Settings that no weight shows: what counts as one, and what testing, resuming and starting from weights do about it."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import parse
from configs.schema import Config, ConfigError, load_config
from models.function import FREE, FUNCTION, check_class_names, check_function, differences
from models.registry import MODELS
from tests.helpers.cli_harness import command, content, evaluated, refusal, settings, train

SMALL = {
    "data": {"dataset": "hmdb51", "num_classes": 4},
    "network": {"arch": "custom", "init": False, "vision": {"width": 32, "layers": 2, "heads": 2, "patch_size": 16,
                                                            "image_size": 224}},
}  # fmt: skip


def config(*overrides: str) -> Config:
    return load_config(SMALL, [word for override in overrides for word in override.split(" ")])


def test_every_key_is_decided_once() -> None:
    sections = {field.name for field in dataclasses.fields(Config)} - {"resume", "pretrain", "pretrain_head", "seed"}
    for key in set(parse.all_keys(Config)) - sections:
        found = [entry for entry in (*FUNCTION, *FREE) if key.startswith(entry)]
        found = [entry for entry in found if not any(entry != other and other.startswith(entry) for other in found)]
        assert len(found) == 1, f"{key}: say in models/function.py whether it changes what a model computes or sees"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("network.options.token_shift=false", "network.options.token_shift"),
        ("network.vision.heads=4", "network.vision.heads"),
        ("network.vision.quick_gelu=false", "network.vision.quick_gelu"),
        ("network.model=aim", "network.model"),
        ("network.fine_tuning=true", "network.model"),
        ("network.sample_mode=FC", "network.sample_mode"),
        ("network.DA_ratio=1/3", "network.DA_ratio"),
        ("network.pyramid.mlp_ratio=2", "network.pyramid.mlp_ratio"),
        ("data.num_segments=4", "data.num_segments"),
        ("data.dense=true", "data.dense"),
        ("data.style=something", "data.style"),
        ("network.vision.image_size=112 data.input_size=112", "data.input_size"),
        ("data.scale_size=300", "data.scale_size"),
        ("data.eval_crop=tdn", "data.eval_crop"),
    ],
)
def test_what_is_a_difference(override: str, key: str) -> None:
    assert key in differences(config().to_dict(), config(override))
    with pytest.raises(ConfigError, match=rf"^a\.pt: its weights were trained for another function: .*{key} was"):
        check_function(config().to_dict(), config(override), "a.pt")


@pytest.mark.parametrize(
    "override",
    [
        "data.mean=[0.5,0.5,0.5]",  # null follows the checkpoint
        "data.scale_size=256",
        "data.style=kinetics",
        "data.dataset=ucf101",
        "network.options.token_shift=true",
        "network.model=td4v_side",
        "network.drop_fc=0.5",
        "network.recompute=true",
        "solver.precision=bf16",
        "data.decoder=decord",
        "data.modality=video",
        "data.test_size=256",
        "data.test_scale=288",
        "data.workers=0",
        "seed=3",
    ],
)
def test_what_is_none(override: str) -> None:
    assert differences(config().to_dict(), config(override)) == {}


def test_options_of_training_alone_are_no_function() -> None:
    aim = config("network.model=aim").to_dict()
    assert differences(aim, config("network.model=aim", "network.options.drop_path=0")) == {}
    assert "network.options.scale" in differences(aim, config("network.model=aim", "network.options.scale=1"))
    known = {"drop_path", "zero_init"}
    fields = [field for file in MODELS.values() for field in dataclasses.fields(file.Options)]
    assert {field.name for field in fields if field.metadata.get("training_only")} == known


def test_a_model_without_a_tower_reads_none_of_its_settings() -> None:
    assert (
        differences(config("network.model=tdn").to_dict(), config("network.model=tdn", "network.vision.heads=4")) == {}
    )


def test_names_of_one_network() -> None:
    values = {"data": {"dataset": "hmdb51", "num_classes": 4}, "network": {"arch": "ViT-B/16"}}
    plain = load_config(values, ["network.arch=ViT-B-16"])
    assert differences(values, load_config(values, ["network.arch=ViT-B-16-quickgelu"])) == {}
    assert differences(values, plain) == {"network.arch": ("ViT-B-16-quickgelu", "ViT-B-16")}


def test_named_settings_win_loudly(caplog: pytest.LogCaptureFixture) -> None:
    other = config("network.vision.heads=4", "data.num_segments=4")
    with caplog.at_level(logging.WARNING, "td4v"):
        check_function(config().to_dict(), other, "a.pt", explicit=["network.vision", "data.num_segments"])
    assert [record.getMessage() for record in caplog.records] == [
        "a.pt: its weights were trained with data.num_segments 8 and are used with 4",
        "a.pt: its weights were trained with network.vision.heads 2 and are used with 4",
    ]
    with pytest.raises(ConfigError, match="data.num_segments was 8 and is now 4"):
        check_function(config().to_dict(), other, "a.pt", explicit=["network.vision"])


def test_configurations_that_cannot_be_compared(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "td4v"):
        check_function(None, config(), "a.pt")
        check_function({"data": {"dataset": "x"}}, config(), "b.pt")
    assert "a.pt: holds no configuration" in caplog.text and "b.pt: its configuration is of another" in caplog.text


NAMES = ("run", "walk", "sit down")


@pytest.mark.parametrize(
    ("names", "explicit", "outcome"),
    [
        (NAMES, False, "same"),
        (None, False, "saved"),
        (("walk", "run", "sit down"), False, "refused"),
        (("walk", "run", "sit down"), True, "refused"),
        (("Run", "walk", "Sit_Down"), False, "refused"),
        (("Run", "walk", "Sit_Down"), True, "warned"),
        (("laufen", "gehen", "sitzen"), True, "warned"),
        (("run", "walk"), False, "other number"),
    ],
)
def test_class_names(names: Any, explicit: bool, outcome: str, caplog: pytest.LogCaptureFixture) -> None:
    if outcome == "refused":
        with pytest.raises(ConfigError, match=r"^a\.pt: class 0 was trained as 'run' and is '(walk|Run)'"):
            check_class_names(NAMES, names, "a.pt", explicit=explicit)
        return
    assert check_class_names(NAMES, names, "a.pt", explicit=explicit) == (NAMES if names is None else names)
    assert bool(caplog.records) == (outcome == "warned")


def test_a_test_of_another_function(tiny: Path, trained: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.yaml"
    changed.write_text(tiny.read_text().replace("heads: 2", "heads: 4"))
    best, out = trained / "model_best.pt", tmp_path / "x.json"
    message = refusal("test_vision.py", "--config", changed, "--weights", best, "--json", out)
    assert (
        "model_best.pt: its weights were trained for another function: network.vision.heads was 2 and is now 4"
        in message
    )
    assert list(tmp_path.iterdir()) == [changed]
    status, text = command("test_vision.py", "--weights", trained, "--json", out, "--set", "network.vision.heads=4")
    assert status == 0 and text.count("trained with network.vision.heads 2 and are used with 4") == 1
    status, text = command("test_vision.py", "--weights", trained, "--json", out)
    assert status == 0 and "trained with" not in text


def test_class_names_of_a_checkpoint(tiny: Path, trained: Path, tmp_path: Path) -> None:
    saved = content(trained / "model_best.pt")["meta"]["class_names"]
    assert len(saved) == 4
    other = tmp_path / "labels.csv"
    other.write_text("id,name\n" + "".join(f"{label},{name}\n" for label, name in enumerate(reversed(saved))))
    best = trained / "model_best.pt"
    message = refusal("test_vision.py", "--weights", best, "--set", f"data.label_list={other}")
    assert f"class 0 was trained as {saved[0]!r} and is {saved[3]!r} in data.label_list" in message
    evaluated(tiny, best, tmp_path / "x.json", "data.label_list=null")
    first = (tmp_path / "x_per_class.csv").read_text().splitlines()[1]
    assert saved[0] in first


def test_videos_that_were_trained_on(tiny: Path, tiny_data: Path, trained: Path, tmp_path: Path) -> None:
    rows = (tiny_data / "train.txt").read_text().splitlines()
    both = tmp_path / "both.txt"
    both.write_text("\n".join([*(tiny_data / "val.txt").read_text().splitlines(), *rows[:3]]) + "\n")
    test = ("test_vision.py", "--weights", trained, "--json", tmp_path / "x.json")
    _, text = command(*test, "--set", f"data.test_list={both}")
    assert text.count("3 of the 14 videos in") == 1 and rows[0].split()[0] in text
    _, text = command(*test, "--set", f"data.test_list={tiny_data / 'train.txt'}")
    assert text.count("is the list that") == 1 and "nothing about new videos" in text
    _, text = command(*test)
    assert "new videos" not in text
    moved = shutil.copytree(tiny_data, tmp_path / "moved")
    places = (
        f"data.train_list={moved / 'train.txt'}",
        *(f"data.{s}_root={moved / 'frames'}" for s in ("train", "val")),
    )
    _, text = command(*test, *settings((f"data.test_list={both}", *places)))
    assert text.count("3 of the 14 videos in") == 1 and str(moved / "train.txt") in text
    chosen = settings((f"data.val_list={both}", "solver.epochs=1"))
    _, text = command("train_vision.py", "--config", tiny, "--output", tmp_path / "run", "--dry-run", *chosen)
    assert text.count("3 of the 14 videos in") == 1


def test_starting_from_weights_of_another_function(tiny: Path, trained: Path, tmp_path: Path) -> None:
    chosen = settings(
        (f"pretrain={trained / 'model_best.pt'}", "data.num_segments=4", "network.options={token_shift: false}")
    )
    status, text = command("train_vision.py", "--config", tiny, "--output", tmp_path / "run", "--dry-run", *chosen)
    for key in ("data.num_segments 8 and are used with 4", "network.options.token_shift True and are used with False"):
        assert text.count(f"its weights were trained with {key}") == 1, text


def test_dense_testing_follows_the_training(tiny: Path, tmp_path: Path) -> None:
    run = train(tiny, tmp_path / "run", "data.dense=true", "solver.epochs=1")
    status, text = command("test_vision.py", "--weights", run)
    assert status == 0 and json.loads((run / "model_best_1crops_1clips_dense.json").read_text())["dense"] is True, text
    status, _ = command("test_vision.py", "--weights", run, "--no-dense")
    assert status == 0 and (run / "model_best_1crops_1clips.json").is_file()
    assert torch.load(run / "model_best.pt", weights_only=True)["config"]["data"]["dense"] is True


@pytest.mark.parametrize(
    ("former", "override", "key"),
    [
        ("data.dataset=hmdb51", "data.dataset=ssv2", "data.style"),
        ("data.input_size=224", "data.input_size=112", "data.scale_size"),
    ],
)
def test_a_named_setting_names_what_follows_it(
    former: str, override: str, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"data": {"dataset": "hmdb51", "num_classes": 4}}
    before, now = load_config(values, [former]), load_config(values, [override])
    check_function(before.to_dict(), now, "a.pt", explicit=[override.partition("=")[0]])
    assert f"a.pt: its weights were trained with {key}" in caplog.text


def test_dense_views_of_a_training_without_are_a_warning(trained: Path, tmp_path: Path) -> None:
    test = ("test_vision.py", "--weights", trained, "--json", tmp_path / "x.json")
    status, text = command(*test, "--dense")
    assert status == 0 and text.count("trained with data.dense False and are used with True") == 1, text


def test_evaluating_is_testing(tiny: Path, trained: Path, tmp_path: Path) -> None:
    """solver.evaluate refuses what test_vision.py refuses, and `--set` forces it."""
    changed = tmp_path / "changed.yaml"
    changed.write_text(tiny.read_text().replace("heads: 2", "heads: 4"))
    chosen = settings((f"pretrain={trained / 'model_best.pt'}", "solver.evaluate=true"))
    assert "network.vision.heads was 2 and is now 4" in refusal("train_vision.py", "--config", changed, *chosen)
    status, text = command("train_vision.py", "--config", tiny, *chosen, "--set", "network.vision.heads=4")
    assert status == 0 and text.count("trained with network.vision.heads 2 and are used with 4") == 1, text


def test_a_resumed_run_keeps_its_class_names(tiny: Path, tmp_path: Path) -> None:
    run = train(tiny, tmp_path / "run", "solver.epochs=1")
    names = content(run / "last_model.pt")["meta"]["class_names"]
    train(tiny, run, "solver.epochs=2", "data.label_list=null")
    assert content(run / "last_model.pt")["meta"]["class_names"] == names and len(names) == 4


def test_a_linked_folder_is_the_same_folder(tiny: Path, tiny_data: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(tiny_data / "frames")
    both = tmp_path / "both.txt"
    both.write_text((tiny_data / "val.txt").read_text() + (tiny_data / "train.txt").read_text().splitlines()[0] + "\n")
    chosen = settings((f"data.test_list={both}", f"data.test_root={tmp_path / 'linked'}"))
    _, text = command("test_vision.py", "--weights", trained, "--json", tmp_path / "x.json", *chosen)
    assert "1 of the 12 videos in" in text
