"""Run folders side by side: tables, picture, and what cannot be read."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from configs.schema import load_config
from scripts.compare_runs import different_environments, different_settings, main, over_seeds, overview
from scripts.run_reader import find_runs
from tests.helpers.cli_harness import evaluated, train

SECTIONS: dict[str, Any] = {
    "data": {"dataset": "ssv2", "num_classes": 174, "train_list": "train.txt"},
    "solver": {"epochs": 3, "lr_warmup_step": 0},
}


def make_run(
    folder: Path,
    scores: list[float | None],
    sections: dict[str, Any] = SECTIONS,
    starts: list[dict[str, Any]] | None = None,
    **keys: Any,
) -> Path:
    """A run folder with one epoch for each top-1 score. `keys` stand at the top of the configuration."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(load_config({**sections, **keys}).to_dict()))
    start = {"git": {"revision": "0123456789" * 4, "dirty": True}, "versions": {"torch": "2.11.0"}, "world_size": 1}
    (folder / "run.json").write_text(json.dumps([start] if starts is None else starts))
    lines = [
        {"epoch": epoch, "step": 9 * epoch, "train_loss": 3 / (epoch + 1), "clips_per_s": 10.0 + epoch,
         "memory_gib": None, "skipped_steps": 1, "top1": top1, "top5": 90.0, "mean_class": None}
        for epoch, top1 in enumerate(scores)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def compare(*arguments: str | Path) -> int:
    return main([*map(str, arguments)])


def test_what_each_run_reached(tmp_path: Path) -> None:
    make_run(tmp_path / "side", [10.0, 30.0, 20.0], seed=4)
    result = {"top1": 31.25, "crops": 3, "clips": 4, "weights": "x/model_best.pt", "parameters": {"trainable": 12345}}
    (tmp_path / "side" / "model_best_3crops_4clips.json").write_text(json.dumps(result))
    (tmp_path / "side" / "notes.json").write_text("[1, 2]")
    make_run(tmp_path / "young", [None])
    make_run(tmp_path / "unborn", [])
    rows = {row["run"]: row for row in overview(find_runs([tmp_path]), "top1")}
    side = rows["1 side"]
    assert (side["epochs"], side["seed"], side["revision"]) == ("3 of 3", 4, "0123456*")
    assert side["best top-1"] == "30.00 / 90.00 / – (epoch 2)" and side["last"] == "20.00 / 90.00 / – (epoch 3)"  # noqa: RUF001
    assert (side["loss"], side["clips/s"], side["skipped steps"]) == ("1.0000", "11.0", "3")
    assert (side["trainable"], side["tests"]) == ("12,345", "model_best 3x4: 31.25")
    assert rows["3 young"]["best top-1"] is None and rows["3 young"]["loss"] == "3.0000"
    assert rows["2 unborn"]["epochs"] == "0 of 3" and rows["2 unborn"]["loss"] is None


def test_only_settings_that_differ_are_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [1.0], resume="somewhere.pt", logging={"output_dir": "a"})
    make_run(tmp_path / "b", [1.0], logging={"output_dir": "b"}, network={"options": {"td4v": False}})
    make_run(
        tmp_path / "c", [1.0], sections={**SECTIONS, "solver": {**SECTIONS["solver"], "lr": 5e-4, "betas": [0.8, 0.9]}}
    )
    old = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    del old["checkpoint"], old["solver"]["ema_decay"]  # of a version that did not have these keys
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(old))
    assert different_settings(find_runs([tmp_path])) == {
        "network.options.td4v": ["–", False, "–"],  # noqa: RUF001
        "solver.betas": ["[0.9, 0.999]", "[0.9, 0.999]", "[0.8, 0.9]"],
        "solver.lr": [1e-3, 1e-3, 5e-4],
    }


def test_a_configuration_of_another_version_is_compared_without_defaults(tmp_path: Path, caplog) -> None:
    make_run(tmp_path / "a", [1.0])
    make_run(tmp_path / "b", [1.0])
    values = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    (tmp_path / "b" / "config.yaml").write_text(yaml.safe_dump({**values, "novelty": 1}))
    assert different_settings(find_runs([tmp_path])) == {"novelty": ["–", 1]}  # noqa: RUF001
    assert "compared without defaults" in caplog.text and "novelty" in caplog.text


def test_versions_machines_and_data_that_differ(tmp_path: Path) -> None:
    def start(torch: str, content: str, place: str) -> dict[str, Any]:
        train = {"path": place, "sha256": content * 64, "rows": 5}
        return {"versions": {"torch": torch, "numpy": "2.0"}, "lists": {"train_list": train, "val_list": None}}

    make_run(tmp_path / "a", [1.0], starts=[start("2.11", "a", "here")])
    make_run(tmp_path / "b", [1.0], starts=[start("2.11", "b", "there"), start("2.15", "b", "there")])
    make_run(tmp_path / "c", [1.0], starts=[{"versions": {"numpy": "2.0"}}])  # recorded less: no difference
    assert different_environments(find_runs([tmp_path])) == {
        "lists.train_list.sha256": ["a" * 12, "b" * 12, "–"],  # noqa: RUF001
        "lists.train_list.rows": ["5", "5", "–"],  # noqa: RUF001
        "versions.torch": ["2.11", "2.11 then 2.15", "–"],  # noqa: RUF001
    }
    assert different_environments(find_runs([tmp_path / "a", tmp_path / "c"])) == {}


def test_mean_over_runs_that_differ_in_the_seed_alone(tmp_path: Path) -> None:
    for seed, score in enumerate((29.5, 27.4, 17.9)):
        make_run(tmp_path / f"side{seed}", [50.0, 1.0, score], seed=seed)
    make_run(tmp_path / "side3", [50.0, 60.0], seed=3)  # still running
    make_run(tmp_path / "tuned0", [0.0, 0.0, 0.0], sections={**SECTIONS, "network": {"model": "td4v_finetune"}}, seed=9)
    make_run(tmp_path / "two0", [0.0, 0.0, 0.0], starts=[{"world_size": 2}], seed=9)
    (row,) = over_seeds(find_runs([tmp_path]), "top1")
    assert (row["runs"], row["seeds"], row["not finished"]) == ("1, 2, 3", "0, 1, 2", "4")
    assert row["last top-1"] == "24.93 ± 6.18" and row["best top-1"] == "50.00 ± 0.00"
    assert statistics.stdev([29.5, 27.4, 17.9]) == pytest.approx(6.18, abs=0.005)
    assert "last mean class" not in row  # nobody recorded it


def test_early_stop_does_not_make_a_killed_run_a_finished_one(tmp_path: Path) -> None:
    sections = {**SECTIONS, "solver": {**SECTIONS["solver"], "early_stop": 2}}
    ended = "2026-01-02T03:04:05+00:00"
    make_run(tmp_path / "0", [1.0, 40.0], sections, [{}, {"finished": ended}], seed=0)
    make_run(tmp_path / "1", [50.0, 2.0], sections, [{"finished": ended}], seed=1)
    make_run(tmp_path / "2", [9.0, 9.0], sections, [{}], seed=2)  # killed
    make_run(tmp_path / "3", [9.0, 9.0], sections, [{"finished": ended}, {}], seed=3)  # goes on
    make_run(tmp_path / "4", [9.0, 9.0], sections, [], seed=4)
    make_run(tmp_path / "5", [9.0, 9.0, 60.0], sections, [{}], seed=5)  # every epoch
    (row,) = over_seeds(find_runs([tmp_path]), "top1")
    assert (row["runs"], row["not finished"], row["last top-1"]) == ("1, 2, 6", "3, 4, 5", "34.00 ± 29.46")


def test_a_seed_counts_once(tmp_path: Path) -> None:
    days = {"a": (0, 10, 1.0), "b": (0, 12, 3.0), "c": (0, 11, 2.0), "d": (1, 13, 5.0)}  # seed, day, score
    for name, (seed, day, score) in days.items():
        make_run(tmp_path / name, [score] * 3, starts=[{"started": f"2026-01-{day}T00:00:00+01:00"}], seed=seed)
    (row,) = over_seeds(find_runs([tmp_path]), "top1")
    assert (row["runs"], row["seeds"], row["same seed, not counted"]) == ("2, 4", "0, 1", "1, 3")
    assert row["last top-1"] == "4.00 ± 1.41"
    assert over_seeds(find_runs([tmp_path / name for name in "abc"]), "top1") == []  # one seed has no deviation


def test_lists_that_moved_are_the_same_data(tmp_path: Path) -> None:
    for seed, (place, content) in enumerate((("x.txt", "a"), ("y.txt", "a"), ("y.txt", "b"))):
        lists = {"train_list": {"path": place, "sha256": content * 64, "rows": 5}}
        sections = {**SECTIONS, "data": {**SECTIONS["data"], "train_list": place}}
        make_run(tmp_path / str(seed), [1.0, 2.0, 3.0], sections, [{"lists": lists}], seed=seed)
    (row,) = over_seeds(find_runs([tmp_path]), "top1")
    assert row["runs"] == "1, 2"


@pytest.mark.parametrize("number", [1, 12])
def test_files_and_picture(tmp_path: Path, capsys, number: int) -> None:
    long = "a_very_long_name_of_a_run_that_tells_every_setting_it_was_given_" * 3
    for index in range(number):
        make_run(tmp_path / "runs" / f"{index:02d}_${long}", [float(index)] * (index % 4) or [None], seed=index)
    assert compare(tmp_path / "runs", "--out", tmp_path / "new" / "lr0.1", "--metric", "top5") == 0
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"lr0.1.md", "lr0.1.json", "lr0.1.png"}
    assert (tmp_path / "new" / "lr0.1.md").read_text() == printed and "best top-5" in printed
    content = json.loads((tmp_path / "new" / "lr0.1.json").read_text())
    assert [run["number"] for run in content["runs"]] == list(range(1, number + 1))
    with Image.open(tmp_path / "new" / "lr0.1.png") as picture:
        assert picture.width > 1200 and len(picture.convert("RGB").getcolors(2**20)) > 10
    assert compare(tmp_path / "runs", "--out", tmp_path) == 0 and (tmp_path / "compare.png").is_file()


def test_a_cut_last_line_is_skipped_and_not_a_number_is_unknown(tmp_path: Path, caplog) -> None:
    lines = make_run(tmp_path / "run", [1.0, 2.0]) / "metrics.jsonl"
    with open(lines, "a") as file:
        file.write('{"epoch": 2, "train_loss": NaN, "top1": null}\n{"epoch": 3, "tra')
    (run,) = find_runs([tmp_path / "run"])
    assert [row["epoch"] for row in run.epochs] == [0, 1, 2] and run.epochs[2]["train_loss"] is None
    assert "metrics.jsonl, line 4: skipped" in caplog.text


@pytest.mark.parametrize(
    "file, text, sentence",
    [
        ("metrics.jsonl", '{"epoch": 0}\n{"epo\n{"epoch": 2}\n', "metrics.jsonl, line 2: is not a line of metrics"),
        ("metrics.jsonl", '[1]\n{"epoch": 2}\n', "metrics.jsonl, line 1: is not a line of metrics"),
        ("run.json", "[{}\n", "run.json, line 2: not valid JSON"),
        ("run.json", "{}", "run.json: is not a list"),
        ("config.yaml", "a: [\n", "config.yaml, line 2: not valid YAML"),
        ("config.yaml", "1\n", "config.yaml: is not a configuration"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, caplog, file: str, text: str, sentence: str) -> None:
    (make_run(tmp_path / "run", [1.0]) / file).write_text(text)
    assert compare(tmp_path / "run", "--out", tmp_path / "out") == 1
    (line,) = caplog.messages
    assert sentence in line and "\n" not in line and not list(tmp_path.glob("out*"))


def test_no_folder_and_no_run(tmp_path: Path, caplog) -> None:
    assert compare(tmp_path / "nowhere") == compare(tmp_path) == 1
    assert [line.split(": ", 1)[1] for line in caplog.messages] == [
        "there is no such folder",
        "holds no run (config.yaml with run.json or metrics.jsonl), nor does any below",
    ]


def test_results_of_a_test_that_cannot_be_read_are_skipped(tmp_path: Path, caplog) -> None:
    (make_run(tmp_path / "run", [1.0]) / "model_best_1crops_1clips.json").write_text('{"top1": ')
    (run,) = find_runs([tmp_path])
    assert run.tests == {} and "model_best_1crops_1clips.json: skipped" in caplog.text


def test_a_run_of_train_vision(tiny: Path, tmp_path: Path, capsys) -> None:
    folder = train(tiny, tmp_path / "run", "solver.epochs=1")
    top1 = evaluated(tiny, folder / "last_model.pt", folder / "results.json")["top1"]
    (run,) = find_runs([folder])
    (row,) = overview([run], "top1")
    assert row["run"] == "1 run" and row["epochs"] == "1 of 1" and row["seed"] == 5 and row["trainable"]
    assert row["tests"] == f"last_model 1x1: {top1:.2f}" and row["last"].startswith(f"{top1:.2f} / 100.00 /")
    assert compare(folder, "--out", tmp_path / "out") == 0 and row["last"] in capsys.readouterr().out


def test_damaged_files_are_read_from_the_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A cut configuration would be compared with defaults, and a folder without one not at all."""
    shutil.copytree(trained, tmp_path / "a")
    right = find_runs([tmp_path / "a"])[0]
    assert not caplog.records
    for number, name in enumerate(("config.yaml", "run.json", "metrics.jsonl")):
        for size in (None, 0, 300):
            caplog.clear()
            damaged = tmp_path / f"b{number}{size}"
            shutil.copytree(trained, damaged)
            data = (damaged / name).read_bytes()
            (damaged / name).unlink() if size is None else (damaged / name).write_bytes(data[:size])
            (run,) = find_runs([damaged])
            assert run.settings == right.settings and run.epochs == right.epochs and run.epochs_done == 1
            assert run.finished and run.recorded("world_size") == [1]
            assert name == "metrics.jsonl" or f"{damaged / name}: " in caplog.text
    assert compare(tmp_path / "a", "--out", tmp_path / "run") == 1
    assert "would write run.json" in caplog.text
