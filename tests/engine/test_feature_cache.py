"""Features that are computed once: results with them are those without, and nothing half done is taken for whole.

Batches of PASS_CLIPS clips go through the tower as the computation of features does, so that losses are the same bit for
bit; for other batches within TOLERANCE.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import engine.checkpoint_file
import engine.feature_cache
from configs.schema import Config, ConfigError, load_config
from datasets.annotation import VideoRecord
from datasets.build import listed_loader, train_loader, val_loader
from datasets.prepare.synthetic import make
from datasets.readers import FrameFolderReader, VideoReader
from datasets.video_dataset import VideoSource
from engine.distributed import Process, start
from engine.evaluation import PASS_CLIPS, DataError, evaluate
from engine.feature_cache import FeatureCache, FeatureError, FeatureLoader, Features
from engine.normalize import Normalizer
from engine.optim import resolve_precision
from engine.run_info import run_info
from models.parameters import frozen_identity
from models.registry import build_model, with_pixel_statistics
from tests.helpers.cli_harness import assert_same, command, content, metrics, settings, train, training_refusal
from tests.helpers.processes import run_in_two

TRAIN, VIDEOS, WIDTH = 20, 11, 32
TOLERANCE = 1e-6  # of weights and losses of about 1, after two epochs
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of a linear probe without augmentation, and its data."""
    folder = tmp_path_factory.mktemp("features")
    make(folder / "data", train=TRAIN, val=12, seed=3, size=32)
    rows = (folder / "data/val.txt").read_text().splitlines()[:VIDEOS]
    (folder / "data/val.txt").write_text("\n".join(rows) + "\n")
    values = {
        "seed": 5,
        "data": {
            "dataset": "frame_order", "style": "kinetics", "num_classes": 4, "num_segments": 4, "workers": 0,
            "batch_size": PASS_CLIPS, "input_size": 32, "augment": False,
            **{f"{split}_root": str(folder / "data/frames") for split in ("train", "val")},
            **{f"{split}_list": str(folder / f"data/{split}.txt") for split in ("train", "val")},
        },
        "network": {
            "arch": "custom", "init": False, "model": "linear_probe",
            "vision": {"width": WIDTH, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32},
        },
        "solver": {"epochs": 2, "lr": 1e-2, "lr_warmup_step": 0},
        "logging": {"output_dir": str(folder / "exp"), "print_freq": 1},
    }  # fmt: skip
    (folder / "probe.yaml").write_text(yaml.safe_dump(values))
    return folder / "probe.yaml"


@pytest.fixture
def config(path: Path, tmp_path: Path) -> Config:
    """The same for calls in this process, with a place of its own."""
    return load_config(path, [f"logging.output_dir={tmp_path}", "network.cache_features=all"])


def cache_of(config: Config, process: Process | None = None) -> FeatureCache:
    model = build_model(config)
    config = with_pixel_statistics(config, model)
    data = config.data
    lists = run_info({f"{split}_list": getattr(data, f"{split}_list") for split in ("train", "val")})["lists"]
    precision = resolve_precision(config.solver.precision, CPU)
    frozen = frozen_identity(model)["sha256"]
    return FeatureCache(config, lists, model, frozen, process or Process(), precision, Normalizer(data.mean, data.std))


def validation_of(config: Config, cache: FeatureCache) -> FeatureLoader:
    loader = val_loader(config.data, 0, cache.process.rank, cache.process.world_size)
    return cache.loader("val", loader, loader)


def folders(home: Path) -> list[Path]:
    return sorted(folder for folder in (home / "features").iterdir() if folder.is_dir())


def untimed(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in ("clips_per_s", "data_wait")} for row in rows]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("feature", ["class_token", "mean_tokens"])
def test_an_evaluation_with_them_is_the_one_without_bit_for_bit(config: Config, precision: str, feature: str) -> None:
    config = replace(config, network=replace(config.network, options={"feature": feature}))
    config = replace(config, solver=replace(config.solver, precision=precision))
    cache = cache_of(config)
    arguments = (cache.process, cache.precision, VIDEOS, None, cache.normalizer)
    plain = evaluate(cache.model, val_loader(config.data), *arguments)
    loader = validation_of(config, cache)
    assert_same(vars(evaluate(cache.model, loader, *arguments).table), vars(plain.table))
    assert plain.table.score.unique(dim=0).shape[0] > VIDEOS // 2  # or all would agree on anything
    for ours, theirs in zip(loader, val_loader(config.data), strict=True):
        assert ours.keys() == theirs.keys() and ours["video"].shape == (len(theirs["label"]), 1, WIDTH)
        assert_same({k: v for k, v in ours.items() if k != "video"}, {k: v for k, v in theirs.items() if k != "video"})
    size = replace(config, data=replace(config.data, batch_size=3))  # batches do not matter: passes have one size
    assert_same(vars(evaluate(cache.model, validation_of(size, cache), *arguments).table), vars(plain.table))


def test_they_are_computed_once_and_tell_what_they_cost(config: Config, caplog, monkeypatch) -> None:
    with caplog.at_level(logging.INFO, "td4v"):
        first = validation_of(config, cache_of(config))
        assert f"data.val_list: {VIDEOS} videos x {4 * WIDTH} bytes, 0.0 MB in" in caplog.text
        assert "features of data.val_list: batch 1/2 eta" in caplog.text
        cache = cache_of(config)
        monkeypatch.setattr(cache.model, "frozen_features", None)
        second = validation_of(config, cache)
    assert f"features of {VIDEOS} videos read from {folders(Path(config.logging.output_dir))[0]}" in caplog.text
    assert_same(list(first), list(second))


def test_training_gives_each_video_its_own_features(config: Config) -> None:
    """Shuffled as videos would be, from any place in an epoch on."""
    cache, seed = cache_of(config), 7
    videos = train_loader(config.data, seed)
    loader = cache.loader("train", listed_loader(config.data, seed), train_loader(config.data, seed))
    assert len(loader) == len(videos) == TRAIN // PASS_CLIPS and len(loader.dataset) == TRAIN
    for epoch, first in ((0, 0), (3, 0), (3, 1)):
        videos.set_epoch(epoch, first)
        loader.set_epoch(epoch, first)
        for ours, theirs in zip(loader, videos, strict=True):
            assert ours["index"].tolist() == theirs["index"].tolist() and ours["path"] == theirs["path"]
            assert ours["label"].tolist() == theirs["label"].tolist()
            expected = cache.model.frozen_features(cache.normalizer(theirs["video"]))
            assert torch.equal(ours["video"], expected) and ours["video"].shape == (PASS_CLIPS, WIDTH)
            assert torch.equal(cache.model(ours["video"]), cache.model(cache.normalizer(theirs["video"])))


@pytest.mark.parametrize("batch_size", [PASS_CLIPS, 5])
def test_a_run_with_them_is_the_run_without(path: Path, tmp_path: Path, batch_size: int) -> None:
    chosen = (f"data.batch_size={batch_size}", f"logging.output_dir={tmp_path}")
    plain, val, both = (
        train(path, tmp_path / mode, f"network.cache_features={mode}", *chosen) for mode in ("off", "val", "all")
    )
    weights = [content(run / "last_model.pt")["model_state_dict"] for run in (plain, val, both)]
    rows = [untimed(metrics(run)) for run in (plain, val, both)]
    assert rows[0] == rows[1] and rows[0][0]["train_loss"] != rows[0][1]["train_loss"]
    assert_same(weights[0], weights[1])
    assert weights[0].keys() == weights[2].keys() == {"head.weight", "head.bias"}
    if batch_size == PASS_CLIPS:
        assert rows[0] == rows[2]
        assert_same(weights[0], weights[2])
    for one, other in zip(rows[0], rows[2], strict=True):
        for name in ("train_loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=TOLERANCE)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[2][name], value, rtol=TOLERANCE, atol=TOLERANCE)
    assert len(folders(tmp_path)) == 2  # of both lists, the one for validation shared
    log = (both / "log.txt").read_text()
    assert f"{TRAIN} training and {VIDEOS} validation videos" in log


def test_a_run_that_goes_on_has_the_same_features(path: Path, tmp_path: Path, monkeypatch) -> None:
    """The frozen weights are those of another run's checkpoint, which a run that goes on has only in its own."""
    chosen = ("network.cache_features=all", f"logging.output_dir={tmp_path}", "checkpoint.full=true")
    former = train(path, tmp_path / "former", *chosen, "solver.epochs=1", "seed=8")
    chosen = (*chosen, f"pretrain={former / 'last_model.pt'}")
    whole = train(path, tmp_path / "whole", *chosen)
    save, before = engine.checkpoint_file.save, folders(tmp_path)

    def interrupted(file: Path, saved: dict) -> None:
        if saved["epoch"] == 2:
            raise KeyboardInterrupt
        save(file, saved)

    with monkeypatch.context() as patch:
        patch.setattr(engine.checkpoint_file, "save", interrupted)
        arguments = ("--config", path, "--output", tmp_path / "parts", *settings(chosen))
        assert command("train_vision.py", *arguments)[0] == 130
    parts = train(path, tmp_path / "parts", *chosen)
    assert_same(*(content(run / "last_model.pt")["model_state_dict"] for run in (whole, parts)))
    assert untimed(metrics(whole)) == untimed(metrics(parts)) and folders(tmp_path) == before and len(before) == 2
    arguments = ("--config", path, *settings((*chosen, "solver.evaluate=true")))
    status, text = command("train_vision.py", *arguments)
    assert status == 0 and f"features of {VIDEOS} videos read from" in text and "validation: top-1" in text
    status, text = command("train_vision.py", "--config", path, *settings(chosen), "--dry-run")
    assert status == 0 and "dry run: " in text and "features of" not in text and folders(tmp_path) == before
    rows = TRAIN + VIDEOS
    size = f"all would keep {rows} videos x {4 * WIDTH} bytes = 0.0 MB in {tmp_path / 'features'}"
    assert f"network.cache_features {size}; the estimate below is without it" in text


def test_what_is_not_finished_is_not_taken(config: Config, monkeypatch) -> None:
    """An end while rows are written, before the name is given, and rows that are lost later."""
    home = Path(config.logging.output_dir)
    good = list(validation_of(config, cache_of(config)))
    (folder,) = folders(home)

    def again() -> None:
        assert_same(list(validation_of(config, cache_of(config))), good)
        assert folders(home) == [folder] and sorted(p.name for p in folder.iterdir()) == ["features.json", "part_0.bin"]

    for place in ("watched", "write_atomic"):
        shutil.rmtree(folder)

        def end(*_: object, place: str = place) -> None:
            raise KeyboardInterrupt(place)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=place):
            patch.setattr(engine.feature_cache, place, end)
            validation_of(config, cache_of(config))
        assert not folder.exists() and (home / "features" / f".{folder.name}.partial" / "part_0.bin").exists()
        again()
    for file, damage in (("part_0.bin", b"cut"), ("features.json", b"{}"), ("features.json", b"\xff")):
        (folder / file).write_bytes(damage)
        with pytest.raises((ValueError, KeyError)):
            Features(folder)
        again()


def _flip_row(folder: Path, _: Path) -> None:
    values = bytearray((folder / "part_0.bin").read_bytes())
    values[3 * 4 * WIDTH] ^= 0x20
    (folder / "part_0.bin").write_bytes(values)


def _change_label(folder: Path, _: Path) -> None:
    index = json.loads((folder / "features.json").read_text())
    index["parts"][0][0][1] += 1
    (folder / "features.json").write_text(json.dumps(index))


def _swap_rows(folder: Path, _: Path) -> None:
    values = (folder / "part_0.bin").read_bytes()
    (folder / "part_0.bin").write_bytes(values[-4 * WIDTH :] + values[4 * WIDTH : -4 * WIDTH] + values[: 4 * WIDTH])


def _swap_parts(folder: Path, other: Path) -> None:
    values = (other / "part_0.bin").read_bytes()
    (folder / "part_0.bin").write_bytes(values[: VIDEOS * 4 * WIDTH])


def _swap_folders(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def _lose_part(folder: Path, _: Path) -> None:
    (folder / "part_0.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_row, f"1 of {VIDEOS} rows are damaged"),
        (_change_label, "features.json differs from its checksum"),
        (_swap_rows, f"2 of {VIDEOS} rows are damaged"),
        (_swap_parts, f"{VIDEOS} of {VIDEOS} rows are damaged"),
        (_swap_folders, "features.json is of other features"),
        (_lose_part, "No such file"),
    ],
)
def test_damaged_features_are_computed_again_with_a_warning(config: Config, caplog, damage, message: str) -> None:
    cache = cache_of(config)
    good = list(validation_of(config, cache))
    (folder,) = folders(Path(config.logging.output_dir))
    cache.loader("train", listed_loader(config.data, 5), train_loader(config.data, 5))
    (other,) = set(folders(Path(config.logging.output_dir))) - {folder}
    damage(folder, other)
    assert_same(list(validation_of(config, cache)), good)
    assert message in caplog.text and "so all videos are computed again" in caplog.text
    caplog.clear()
    assert_same(list(validation_of(config, cache)), good)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_row_that_is_damaged_after_the_start_ends_the_run(config: Config) -> None:
    loader = validation_of(config, cache_of(config))
    (folder,) = folders(Path(config.logging.output_dir))
    with open(folder / "part_0.bin", "r+b") as file:
        file.write(b"\x7f")
    with pytest.raises(FeatureError, match=r"the features of .* are damaged; start the run again"):
        list(loader)


def test_videos_that_changed_are_computed_again(config: Config, path: Path, tmp_path: Path, caplog) -> None:
    root = tmp_path / "frames"
    shutil.copytree(path.parent / "data/frames", root)
    config = replace(config, data=replace(config.data, val_root=str(root)))
    before = list(validation_of(config, cache_of(config)))
    (folder,) = folders(Path(config.logging.output_dir))
    first = next(iter(before))["path"][0]
    for image in sorted((root / first).iterdir()):
        pixels = Image.effect_noise((32, 32), 90).convert("RGB")
        image.unlink()
        pixels.save(image)
    after = list(validation_of(config, cache_of(config)))
    assert f"{folder}: videos or frames have changed since (size or time), computed again" in caplog.text
    same = before[0]["video"].flatten(1) == after[0]["video"].flatten(1)
    assert not same[0].any() and same[1:].all() and folders(Path(config.logging.output_dir)) == [folder]
    caplog.clear()
    with caplog.at_level(logging.INFO, "td4v"):
        assert_same(list(validation_of(config, cache_of(config))), after)
    assert "computed again" not in caplog.text and "videos read from" in caplog.text


@pytest.mark.parametrize("kind", ["video", "packed"])
def test_the_stamp_of_files_and_packed_frames(tmp_path: Path, kind: str) -> None:
    reader = VideoReader() if kind == "video" else FrameFolderReader("{:06d}.jpg")
    watched = tmp_path / ("1.mp4" if kind == "video" else "1.mp4.zip")
    records = [VideoRecord(f"{number}.mp4", None, 0, number) for number in range(3)]
    source = VideoSource(records, str(tmp_path), reader, "list")
    stamps = [source.stamp()]
    watched.write_bytes(b"1")
    stamps.append(source.stamp())
    os.utime(watched, ns=(5, 5))
    stamps.append(source.stamp())
    watched.write_bytes(b"12")
    os.utime(watched, ns=(5, 5))
    stamps.append(source.stamp())
    assert len(set(stamps)) == 4 and source.stamp() == stamps[-1]


def test_two_runs_at_once_compute_them_once(config: Config, caplog, monkeypatch) -> None:
    monkeypatch.setattr(engine.feature_cache, "WAIT_S", 0.05)
    validation_of(config, cache_of(config))
    lock = next((Path(config.logging.output_dir) / "features").glob(".*.lock"))
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); time.sleep(0.5)"
    with (
        caplog.at_level(logging.INFO, "td4v"),
        subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE) as other,
    ):
        other.stdout.readline()
        validation_of(config, cache_of(config))
    messages = [record.getMessage() for record in caplog.records]
    waited = next(place for place, message in enumerate(messages) if "waiting for another run" in message)
    assert "videos read from" in messages[waited + 1]


def test_a_disk_without_room_is_refused_before(config: Config, monkeypatch) -> None:
    usage = shutil.disk_usage(config.logging.output_dir)
    needed = VIDEOS * WIDTH * 4
    with monkeypatch.context() as patch:
        patch.setattr(engine.feature_cache.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(FeatureError, match=rf"{VIDEOS} videos x 128 bytes.*set logging.output_dir to another disk"):
            validation_of(config, cache_of(config))
        assert not folders(Path(config.logging.output_dir))
        patch.setattr(engine.feature_cache.shutil, "disk_usage", lambda _: usage._replace(free=needed))
        validation_of(config, cache_of(config))


def test_videos_that_cannot_be_read(path: Path, tmp_path: Path, caplog) -> None:
    """The same sentences, and the same results, as without."""
    rows = (path.parent / "data/val.txt").read_text().splitlines()
    rows[2] = f"missing_{rows[2]}"
    (tmp_path / "val.txt").write_text("\n".join(rows) + "\n")
    chosen = (f"data.val_list={tmp_path / 'val.txt'}", f"logging.output_dir={tmp_path}", "solver.epochs=1")
    refusals = [
        training_refusal(path, tmp_path / f"refused_{mode}", f"network.cache_features={mode}", *chosen)
        for mode in ("off", "val")
    ]
    assert refusals[0] == refusals[1] and "missing_" in refusals[0] and "line 3" in refusals[0]
    assert not folders(tmp_path)[1:] and folders(tmp_path)[0].name.endswith(".partial")
    runs = [
        train(path, tmp_path / mode, f"network.cache_features={mode}", "data.on_error=skip", *chosen)
        for mode in ("off", "val")
    ]
    assert untimed(metrics(runs[0])) == untimed(metrics(runs[1]))
    skipped = [
        [line.split(" ", 2)[2] for line in (run / "log.txt").read_text().splitlines() if "skipped" in line]
        for run in runs
    ]
    assert skipped[0] == skipped[1] and len(skipped[0]) == 2
    config = load_config(path, [*chosen, "network.cache_features=val"])
    loader = validation_of(config, cache_of(config))  # what was left out before is an error now
    with pytest.raises(DataError) as caught:
        evaluate(build_model(config), loader, Process(), resolve_precision("fp32", CPU), VIDEOS)
    assert str(caught.value) == refusals[0]
    assert "1 videos could not be read when it was made" in caplog.text


def test_features_that_are_not_finite_are_refused(config: Config) -> None:
    cache = cache_of(config)
    with torch.no_grad():
        cache.model.tower.visual.ln_post.weight.fill_(torch.inf)
    with pytest.raises(FeatureError, match="are not finite in precision fp32"):
        validation_of(config, cache)


def test_what_they_depend_on_and_what_not(config: Config, tmp_path: Path) -> None:
    def key(split: str = "train", **sections: dict) -> str:
        values = config.to_dict()
        for name, changes in sections.items():
            values[name] = values[name] | changes if isinstance(changes, dict) else changes
        return json.dumps(cache_of(load_config(values)).identity(split), sort_keys=True)

    shorter = tmp_path / "shorter.txt"
    shorter.write_text("\n".join(Path(config.data.train_list).read_text().splitlines()[:-1]) + "\n")
    (tmp_path / "same.txt").write_text(Path(config.data.train_list).read_text())
    usual, vision = key(), dataclasses.asdict(config.network.vision)
    others = [
        key("val"), key(data={"num_segments": 5}), key(data={"train_list": str(shorter)}), key(data={"shot": 2}),
        key(data={"shot": 2}, seed=6), key(data={"train_root": str(tmp_path)}), key(data={"scale_size": 40}),
        key(data={"style": "something"}), key(data={"dense": True}), key(data={"std": [1, 1, 1]}), key(seed=6),
        key(data={"decoder": "decord"}), key(solver={"precision": "bf16"}), key(solver={"tf32": True}),
        key(network={"options": {"feature": "mean_tokens"}}),
        *(key(network={"vision": vision | change}) for change in ({"heads": 4}, {"quick_gelu": False})),
    ]  # fmt: skip
    assert len({usual, *others}) == len(others) + 1
    assert usual == key(data={"train_list": str(tmp_path / "same.txt"), "batch_size": 2, "workers": 3})
    assert usual == key(solver={"lr": 1.0, "epochs": 9, "precision": "amp"}, network={"drop_fc": 0.5})


def test_models_without_frozen_features_are_refused(config: Config) -> None:
    for mode in ("val", "all"):
        network = replace(config.network, model="full_finetune", cache_features=mode)
        with pytest.raises(ConfigError, match="full_finetune has no frozen features .*linear_probe"):
            build_model(replace(config, network=network))


def test_recomputation_is_refused_where_nothing_is_kept(config: Config) -> None:
    with pytest.raises(ConfigError, match="network.recompute: linear_probe saves no"):
        build_model(replace(config, network=replace(config.network, recompute=True)))


def _two_processes(rank: int, path: str, output: str) -> None:
    config = load_config(path, [f"logging.output_dir={output}", "network.cache_features=all"])
    cache = cache_of(config, start("cpu"))
    loader = validation_of(config, cache)
    accuracy = evaluate(cache.model, loader, cache.process, cache.precision, VIDEOS, None, cache.normalizer)
    torch.save((list(loader), vars(accuracy.table)), Path(output) / f"{rank}.pt")


def test_two_processes_compute_their_shares(path: Path, config: Config, tmp_path: Path) -> None:
    run_in_two(_two_processes, str(path), str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    (folder,) = folders(tmp_path)
    assert {file.name for file in folder.iterdir()} == {"features.json", "part_0.bin", "part_1.bin"}
    there = validation_of(config, cache_of(config))  # one process reads what two have computed
    elsewhere = replace(config, logging=replace(config.logging, output_dir=str(tmp_path / "alone")))
    alone = validation_of(elsewhere, cache_of(elsewhere))
    assert_same(list(there), list(alone))
    for rank, (batches, _) in enumerate(found):
        assert [index for batch in batches for index in batch["index"].tolist()] == list(range(rank, VIDEOS, 2))
    cache = cache_of(config)
    whole = evaluate(cache.model, alone, Process(), cache.precision, VIDEOS)
    for _, table in found:
        assert_same(table, vars(whole.table))
