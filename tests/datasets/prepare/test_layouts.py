"""Class folders as people have them: given splits, folders of frames, other files, links; and preparing once more."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from configs.schema import DataConfig
from datasets.annotation import read_labels, read_list
from datasets.build import build_reader
from datasets.prepare import __main__ as command
from datasets.prepare import extract
from datasets.prepare.catalogue import scan
from datasets.prepare.formats.folder import Grouping, read
from tests.helpers.video_files import write_avi


@pytest.fixture
def run(tmp_path, caplog):
    """Prepares tmp_path/videos, without frames unless asked for; (exit code, output folder, log)."""
    caplog.set_level(logging.INFO)

    def run(*more: str, videos: Path = tmp_path / "videos"):
        caplog.clear()
        arguments = ["folder", "--videos", str(videos), "--out", str(tmp_path / "out"), "--jobs", "1"]
        code = command.main([*arguments, *more])
        assert "Traceback" not in caplog.text
        return code, tmp_path / "out", caplog.text

    return run


def write(root: Path, *names: str) -> Path:
    """Videos, each with pixels of its own."""
    for name in names:
        write_avi(root / name, frames=2, seed=len(list(root.rglob("*.*"))))
    return root


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def rows(out: Path, split: str) -> list[str]:
    return (out / f"{split}.txt").read_text().splitlines()


def contents(out: Path) -> dict[Path, tuple[int, bytes]]:
    """Time of change and content of each file."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}


def test_folders_of_a_split_are_the_split(run, tmp_path):
    names = ["Train/A/1.avi", "Train/b/p/2.avi", "validation/b/3.avi", "TEST/A/4.avi"]
    write(tmp_path / "videos" / "data", *names)
    (tmp_path / "videos" / "data" / "validation" / "C").mkdir()
    code, out, log = run("--videos-only")
    assert code == 0, log
    assert rows(out, "train") == ["data/Train/A/1.avi 0", "data/Train/b/p/2.avi 1"]
    assert rows(out, "val") == ["data/validation/b/3.avi 1"] and rows(out, "test") == ["data/TEST/A/4.avi 0"]
    assert read_labels(str(out / "labels.csv"), 3) == ("A", "b", "C")
    assert "train: 1 of 3 classes have no video: C" in log and "val: 2 of 3 classes have no video: A, C" in log
    note = "the split is that of the folders TEST, Train, validation"
    assert note in log and note in (out / "report.txt").read_text()
    split = {"split_folders": ["TEST", "Train", "validation"], "classes": 3}
    assert json.loads((out / "prepare.json").read_text())["split"] == split


def test_folders_of_a_split_inside_the_class_folders(run, tmp_path):
    write(tmp_path / "videos", "a/train/1.avi", "a/val/2.avi", "b/train/3.avi", "b/val/4.avi")
    code, out, log = run("--videos-only")
    assert code == 0 and rows(out, "val") == ["a/val/2.avi 0", "b/val/4.avi 1"], log


def test_a_split_without_training_videos_is_named(run, tmp_path):
    write(tmp_path / "videos", "val/a/1.avi", "val/b/2.avi")
    code, out, log = run("--videos-only")
    assert code == 0 and "no train.txt: there is no such folder" in log and len(rows(out, "val")) == 2
    assert not (out / "train.txt").exists()


def test_files_that_are_passed_over_are_counted_and_listed(run, tmp_path):
    videos = write(tmp_path / "videos", "a/1.avi", "a/2.avi", "b/3.avi", "b/4.avi")
    (videos / "a/1.avi").rename(videos / "a/1.MTS")
    (videos / "b/3.avi").rename(videos / "b/3.ogv")
    touch(videos, "a/x.txt", "b/x.txt", "b/y.docx", "b/cover.JPG", "README", "a/.DS_Store", "a/Thumbs.db", "a/._1.avi")
    (videos / "a" / "na\nme.txt").touch()
    touch(videos, "__MACOSX/a/._1.avi", "b/@eaDir/thumb.jpg")
    code, out, log = run("--videos-only")
    assert code == 0, log
    assert "passed over: 3 .txt, 1 without suffix, 1 .docx, 1 .jpg, such as README" in log
    assert sorted(rows(out, "train") + rows(out, "val")) == ["a/1.MTS 0", "a/2.avi 0", "b/3.ogv 1", "b/4.avi 1"]
    passed_over = json.loads((out / "report.json").read_text())["passed_over"]
    assert passed_over == ["README", "a/na\nme.txt", "a/x.txt", "b/x.txt", "b/y.docx", "b: 1 .jpg"]
    report = (out / "report.txt").read_text()
    assert "passed over: 3 .txt" in report and "\nb/y.docx\n" in report
    assert "DS_Store" not in log + report and read_labels(str(out / "labels.csv"), 2) == ("a", "b")


def test_empty_class_folders_are_named(run, tmp_path):
    write(tmp_path / "videos", "a/1.avi", "a/2.avi", "b/3.avi", "b/4.avi")
    (tmp_path / "videos" / "c").mkdir()
    code, _, log = run("--videos-only")
    assert code == 0 and "train: 1 of 3 classes have no video: c" in log


def test_an_output_folder_among_the_class_folders_is_no_class(run, tmp_path):
    videos = write(tmp_path / "videos", "a/1.avi", "a/2.avi", "b/3.avi", "b/4.avi")
    for _ in range(2):
        code, _, log = run("--out", str(videos / "out"))
        assert code == 0 and read_labels(str(videos / "out/labels.csv"), 2) == ("a", "b"), log


@pytest.mark.parametrize("name", ["#1 jump", "-rf", "日本語", "é è", "a,b", '"', "100% 5", "{:06d}"])
def test_class_names_of_any_kind(run, tmp_path, name):
    write(tmp_path / "videos", f"{name}/video 5.avi", f"{name}/2.avi", "zz/3.avi", "zz/4.avi")
    code, out, log = run()
    assert code == 0, log
    assert name in read_labels(str(out / "labels.csv"), 2)
    records = [r for split in ("train", "val") for r in read_list(str(out / f"{split}.txt"), "RGB", 2)]
    assert sorted(r.path for r in records) == sorted([f"{name}/video 5", f"{name}/2", "zz/3", "zz/4"])
    assert all((out / "frames" / r.path / "000002.jpg").is_file() for r in records)


@pytest.mark.parametrize("name", ["b/a\\b.avi", "'b/a'.avi"])
def test_names_that_a_list_cannot_hold_are_refused(run, tmp_path, name):
    write(tmp_path / "videos", "a/1.avi", name)
    code, out, log = run()
    assert code == 1 and "in a list file, " in log and "rename it" in log and not out.exists()


def test_a_class_without_videos_whose_name_labels_cannot_hold(run, tmp_path):
    write(tmp_path / "videos", "a/1.avi", "b/2.avi")
    (tmp_path / "videos" / "c\nd").mkdir()
    code, out, log = run()
    assert code == 1 and "cannot hold a name with line breaks" in log and not out.exists()


def write_frames(root: Path, name: str, template: str, numbers: range) -> None:
    (root / name).mkdir(parents=True)
    for number in numbers:
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(root / name / template.format(number))


@pytest.mark.parametrize(
    ("template", "base"), [("{:06d}.jpg", 1), ("img_{:05d}.jpg", 1), ("{:d}.png", 0), ("frame{:04d}.JPG", 0)]
)
def test_folders_of_frames_in_class_folders(run, tmp_path, template, base):
    videos = tmp_path / "videos"
    for number, name in enumerate(["a/v 1", "a/v.2", "b/p/v3", "b/v4"]):
        write_frames(videos, name, template, range(base, base + 11 + number))
    touch(videos, "a/v 1/flow_x_0001.jpg", "a/v 1/audio.wav", "a/cover.jpeg")
    code, out, log = run()
    assert code == 0, log
    assert sorted(rows(out, "train") + rows(out, "val")) == ["a/v 1 11 0", "a/v.2 12 0", "b/p/v3 13 1", "b/v4 14 1"]
    note = f"frames are used as they are: image_tmpl '{template}', index_base {base}"
    assert note in log and note in (out / "report.txt").read_text()
    assert "passed over: 1 .jpeg, 1 .wav, 1 flow_*.jpg" in log
    data = yaml.safe_load((out / "config_snippet.yaml").read_text())["data"]
    assert (data["modality"], data["image_tmpl"], data["train_root"]) == ("RGB", template, str(videos))
    assert data.get("index_base", 1) == base and not (out / "frames").exists()
    data = DataConfig(**{key: value for key, value in data.items() if value is not None}, workers=0, batch_size=1)
    pixels = build_reader(data).open(str(videos / "b/v4"), 14).read(np.arange(14))
    np.testing.assert_allclose(pixels.mean((1, 2, 3)), base + np.arange(14), atol=1)
    (videos / "b/v4" / template.format(3)).unlink()
    code, _, log = run()
    assert code == 1 and f"b/v4 ({template.format(3)} is missing or empty" in log
    code, _, log = run("--pack")
    assert code == 1 and "`python -m datasets.packed_frames` packs them" in log


def test_frames_and_a_given_split(run, tmp_path):
    for name in ("train/a/1", "train/b/2", "val/a/3"):
        write_frames(tmp_path / "videos", name, "{:05d}.jpg", range(1, 4))
    code, out, log = run()
    assert code == 0 and rows(out, "val") == ["val/a/3 3 0"], log


def test_broken_links_are_missing_videos(run, tmp_path):
    videos = write(tmp_path / "videos", "a/1.avi", "a/2.avi", "b/3.avi", "b/4.avi")
    (videos / "a/5.avi").symlink_to(tmp_path / "gone.avi")
    os.mkfifo(videos / "b/6.avi")  # reading it would wait for ever
    code, out, log = run()
    assert code == 1 and "2 of 6 videos of out are missing" in log and not (out / "train.txt").exists()
    report = (out / "report.txt").read_text()
    assert "\na/5.avi: " in report and "\nb/6.avi: " in report
    code, out, log = run("--allow-missing", "--videos-only")
    listed = "".join(path.read_text() for path in out.glob("*.txt"))
    assert code == 0 and all(f"{name}.avi " in listed for name in ("a/1", "a/2", "b/3", "b/4")), log
    assert "a/5.avi " not in listed and "b/6.avi " not in listed


def test_links_to_folders(run, tmp_path):
    elsewhere = write(tmp_path / "disk", "x/1.avi", "x/2.avi", "y/3.avi", "y/4.avi")
    (tmp_path / "videos").mkdir()
    for name in "xy":
        (tmp_path / "videos" / f"class {name}").symlink_to(elsewhere / name)
    code, out, log = run("--videos-only")
    assert code == 0 and read_labels(str(out / "labels.csv"), 2) == ("class x", "class y"), log
    (tmp_path / "videos" / "class z").symlink_to(elsewhere / "y")
    code, _, log = run("--videos-only")
    assert code == 1 and "class z: a link shows its videos under two names; remove the link" in log


def test_names_that_differ_in_case_on_a_file_system_that_ignores_it(run, tmp_path, monkeypatch):
    write(tmp_path / "videos", "a/x.avi", "a/X.avi", "b/3.avi", "b/4.avi")
    monkeypatch.setattr(extract, "ignores_case", lambda folder: True)
    code, out, log = run()
    assert code == 1 and "a/X.avi and a/x.avi would share one folder of frames" in log and not out.exists()
    monkeypatch.undo()
    assert run()[0] == 0 and len(list((out / "frames/a").iterdir())) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["folder", "--videos", "nowhere"],
        ["folder", "--videos", "empty"],
        ["folder", "--videos", "videos", "--seed", "1", "--quality", "0"],
        ["folder", "--videos", "videos", "--group-pattern", "none"],
        ["ucf101", "--videos", "videos", "--annotations", "nowhere"],
        ["ucf101", "--videos", "nowhere", "--annotations", "empty"],
        ["ucf101", "--videos", "videos", "--annotations", "empty"],
        ["ssv1", "--videos", "videos", "--annotations", "empty"],
    ],
)
def test_what_is_refused_leaves_no_folder(tmp_path, arguments, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "videos", "a/1.avi", "b/2.avi")
    (tmp_path / "empty").mkdir()
    assert command.main([*arguments, "--out", "out"]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ([], ["--seed", "1"], "was prepared with seed 0, now 1;"),
        ([], ["--val-share", "0.5", "--seed", "3"], "was prepared with val_share 0.2, now 0.5; seed 0, now 3;"),
        ([], ["--group-pattern", "."], "was prepared with group_pattern none, now .;"),
        (["--group-pattern", ".", "--val-groups", "1-2"], ["--group-pattern", ".", "--val-groups", "3"], "val_groups 1,2, now 3"),
    ],
)  # fmt: skip
def test_another_split_is_refused_and_nothing_changes(run, tmp_path, first, second, sentence):
    write(tmp_path / "videos", *(f"{c}/{n}.avi" for c in "ab" for n in range(5)))
    assert run(*first)[0] == 0
    before = contents(tmp_path / "out")
    code, out, log = run(*second)
    assert code == 1 and sentence in log and "--new-split" in log
    assert contents(out) == before
    assert run(*first)[0] == 0 and rows(out, "val") == before[out / "val.txt"][1].decode().splitlines()
    code, out, log = run(*second, "--new-split")
    assert code == 0 and "10 of 10 videos were extracted by an earlier run" in log
    frames = {path: state for path, state in before.items() if path.suffix == ".jpg"}
    assert frames.items() <= contents(out).items()
    assert run(*second)[0] == 0


def test_the_settings_of_the_split_are_recorded(run, tmp_path):
    write(tmp_path / "videos", *(f"{c}/v_g{n}.avi" for c in "ab" for n in range(3)))
    code, out, _ = run("--videos-only", "--group-pattern", r"_g(\d+)", "--val-share", "0.3", "--seed", "7")
    split = {"group_pattern": r"_g(\d+)", "groups_across_classes": False, "val_share": 0.3, "seed": 7, "classes": 2}
    assert code == 0 and json.loads((out / "prepare.json").read_text())["split"] == split
    assert json.loads((out / "report.json").read_text())["split"] == split
    assert r"out: group_pattern _g(\d+), val_share 0.3, seed 7, classes 2" in (out / "report.txt").read_text()


def test_videos_that_change_sides_are_refused(run, tmp_path):
    """New videos change the draw: what was trained on could become test data."""
    write(tmp_path / "videos", *(f"{c}/{n}.avi" for c in "ab" for n in range(5)))
    assert run("--videos-only")[0] == 0
    write(tmp_path / "videos", *(f"a/{n}.avi" for n in range(5, 20)))
    before = contents(tmp_path / "out")
    code, out, log = run("--videos-only")
    assert code == 1 and "now be in" in log and "--new-split" in log and contents(out) == before
    assert run("--videos-only", "--new-split")[0] == 0


def test_videos_that_are_gone_are_named(run, tmp_path):
    write(tmp_path / "videos", "train/a/1.avi", "train/b/2.avi", "train/b/3.avi")
    assert run("--videos-only")[0] == 0
    (tmp_path / "videos/train/b/3.avi").unlink()
    code, out, log = run("--videos-only")
    assert code == 0 and "the videos of 1 rows are not there any more, such as train/b/3.avi 1" in log


def test_new_classes_are_refused(run, tmp_path):
    write(tmp_path / "videos", *(f"{c}/{n}.avi" for c in "bc" for n in range(2)))
    assert run("--videos-only")[0] == 0
    write(tmp_path / "videos", "a/1.avi", "a/2.avi")
    code, _, log = run("--videos-only")
    assert code == 1 and "was prepared with classes 2, now 3; --new-split" in log


def test_a_list_that_would_go_is_refused(run, tmp_path):
    write(tmp_path / "videos", "train/a/1.avi", "train/b/2.avi", "val/a/3.avi", "val/b/4.avi")
    assert run("--videos-only")[0] == 0
    (tmp_path / "out" / "prepare.json").write_text('{"dataset": "folder", "split": 1}')  # of an earlier version
    for name in ("a/3.avi", "b/4.avi"):
        (tmp_path / "videos" / "val" / name).unlink()
    code, _, log = run("--videos-only")
    assert code == 1 and "val.txt: this run has no video for this list; --new-split" in log


def test_suffixes_of_any_case(tmp_path):
    names = ["a/1.M2TS", "a/2.vob", "a/3.Gif", "b/4.rmvb", "b/5.y4m", "b/6.MPE", "b/7.divx", "b/8.3gp", "b/9.f4v"]
    plan = read(scan(touch(tmp_path, *names)), Grouping(), "mine")
    assert sorted(entry.path for entry in plan.entries) == sorted(names)
