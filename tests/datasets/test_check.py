"""`python -m datasets.check`: a sound dataset passes and gives its files, and each way to be broken is named with its line."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from configs.schema import ConfigError, DataConfig
from datasets.annotation import VideoRecord
from datasets.check.__main__ import main
from datasets.check.figures import to_pixels
from datasets.check.rows import RowChecker, check_rows
from datasets.check.speed import Rate, advise, measure, need_of_run
from datasets.packed_frames import pack
from datasets.prepare.synthetic import make
from datasets.video_dataset import VideoSource
from tests.helpers.video_files import cut_off, overwrite, write_video

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared/data/samples"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "data"
    make(folder, train=8, val=4, size=32)
    return folder


@pytest.fixture
def dataset(pristine, tmp_path):
    """Eight training and four validation folders of eight frames, four classes, and config.yaml."""
    folder = tmp_path / "data"
    shutil.copytree(pristine, folder)
    data = {
        "dataset": "order",
        "style": "kinetics",
        "num_classes": 4,
        "batch_size": 2,
        "workers": 1,
        "num_sample": 2,
        "train_root": str(folder / "frames"),
        "val_root": str(folder / "frames"),
        "train_list": str(folder / "train.txt"),
        "val_list": str(folder / "val.txt"),
        "label_list": str(folder / "labels.csv"),
        "input_size": 32,
        "scale_size": 36,
        "flip_pairs": [[0, 3], [1, 2]],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


def run(dataset, *words):
    """The exit code and report.json of a check without measurement."""
    out = dataset / "out"
    code = main([str(dataset / "config.yaml"), "--out", str(out), "--jobs", "2", "--seconds", "0", *map(str, words)])
    return code, json.loads((out / "report.json").read_text())


def findings(report, level):
    """(kind, line, message) of the findings of a level."""
    return [(f["kind"], f["line"], f["message"]) for f in report["findings"] if f["level"] == level]


def edit(file, *changes):
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    file.write_text(text)


def test_sound_dataset_as_a_command(dataset):
    """The real entry, with the loader measured and told what training needs."""
    out = dataset / "out"
    command = [sys.executable, "-m", "datasets.check", str(dataset / "config.yaml"), "--out", str(out), "--jobs", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = ["--seconds", "1", "--need", "1", "--set", "seed=3"]
    ended = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "No problems, 0 warnings." in ended.stderr and "clips/s" in ended.stderr and "Traceback" not in ended.stderr
    report = json.loads((out / "report.json").read_text())
    assert findings(report, "problem") == findings(report, "warning") == []
    assert report["config"]["seed"] == 3 and "--set seed=3" in report["command"]
    train = report["values"]["train"]
    assert train["videos_of_class"] == [2, 2, 2, 2] and train["frames_min_max"] == [8, 8]
    assert train["frame_sizes"] == {"32x32": 8}
    assert train["bytes"] == sum(f.stat().st_size for f in (dataset / "frames/train").rglob("*.jpg"))
    loader = report["values"]["loader"]
    assert loader["clips_per_s"] > 0 and loader["enough"] == 1 and loader["suggested_workers"] == 1
    assert loader["rates"][0]["clips_per_s"] == pytest.approx(2 * loader["rates"][0]["videos_per_s"])
    text = (out / "report.md").read_text()
    assert report["command"] in text and report["config_file"] in text and re.search(r"\| videos +\| 8 +\| 4 +\|", text)
    for figure in ("contact_sheet.png", "class_balance.png"):
        with Image.open(out / figure) as image:
            assert 800 < image.width < 3000 and np.asarray(image.convert("RGB")).std() > 10


def test_broken_folders_are_named_with_their_line(dataset):
    broken = [dataset / "frames/train" / name for name in sorted(os.listdir(dataset / "frames/train"))]
    lines = [row.split()[0] for row in (dataset / "train.txt").read_text().splitlines()]
    line = {folder: lines.index(f"train/{folder.name}") + 1 for folder in broken}
    (broken[0] / "000004.jpg").unlink()
    jpeg = broken[1] / "000008.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-300])
    shutil.rmtree(broken[2])
    Image.new("RGB", (40, 32)).save(broken[3] / "000008.jpg")
    (broken[4] / "000005.jpg").write_bytes(b"")
    shutil.copy(broken[5] / "000001.jpg", broken[5] / "000009.jpg")
    edit(dataset / "train.txt", (f"{broken[6].name} 8", f"{broken[6].name} 11"))
    code, report = run(dataset)
    problems = findings(report, "problem")
    assert code == 1 and len(problems) == 6
    assert [line for _, line, _ in problems] == sorted(line for _, line, _ in problems)  # in the order of the list
    found = {number: (kind, message) for kind, number, message in problems}
    for number, (kind, words) in enumerate(
        [
            ("frames missing", "1 of 8 declared frames are missing (000004.jpg)"),
            ("unreadable", "000008.jpg"),
            ("folder missing", "does not exist"),
            ("unreadable", "40x32"),
            ("unreadable", "1 of 8 frames are empty files, first 000005.jpg"),
        ]
    ):
        assert found[line[broken[number]]][0] == kind and words in found[line[broken[number]]][1]
        assert str(broken[number]) in found[line[broken[number]]][1]
    assert "3 of 11 declared frames are missing (000009.jpg" in found[line[broken[6]]][1]
    assert findings(report, "note") == [
        ("more frames", line[broken[5]], f"{broken[5]}: holds 9 frames, the list declares 8")
    ]
    assert all(f["list_file"] == str(dataset / "train.txt") for f in report["findings"] if f["level"] == "problem")
    assert (dataset / "out/contact_sheet.png").is_file()  # of those that can be read


def test_a_broken_middle_frame_is_found_by_decoding_everything(dataset):
    jpeg = dataset / "frames/val/scene0000_right_slow/000004.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-300])
    assert run(dataset)[0] == 0
    code, report = run(dataset, "--full")
    ((kind, line, message),) = findings(report, "problem")
    assert code == 1 and kind == "unreadable" and line == 1 and str(jpeg) in message


def test_rows_that_are_probably_not_what_was_meant_are_warnings(dataset):
    file, frames = dataset / "train.txt", dataset / "frames"
    rows = [row.rsplit(maxsplit=2) for row in file.read_text().splitlines()]
    names = [line.split(",")[1] for line in (dataset / "labels.csv").read_text().splitlines()[1:]]
    folders = {0: names[int(rows[0][2])].title().replace(" ", "_"), 1: names[3 - int(rows[1][2])].upper()}
    for number, folder in folders.items():  # the first in the folder of its class, the second in another's
        path = f"train/{folder}/{number}"
        shutil.move(frames / rows[number][0], frames / path)
        rows[number][0] = path
    rows[2][1] = "5"
    rows[3][1] = "1"
    for jpeg in (frames / rows[3][0]).iterdir():
        Image.new("RGB", (40, 31)).save(jpeg)
    shutil.copy(frames / rows[4][0] / "000001.jpg", frames / rows[4][0] / "000000.jpg")
    file.write_text("\n".join(map(" ".join, rows)))
    code, report = run(dataset)
    warnings = {kind: message for kind, _, message in findings(report, "warning")}
    assert code == 0 and sorted(warnings) == ["class folders", "one frame", "tiny videos", "unused frames"]
    label = int(rows[1][2])
    assert warnings["class folders"] == (
        f"1 video in the folder of another class: {rows[1][0]} (line 2) has label {label} ({names[label]})"
    )
    assert f"{rows[2][0]} (line 3): 3 beside the declared 5" in warnings["unused frames"]
    assert warnings["unused frames"].startswith("3 of 8 videos hold frames")
    assert warnings["tiny videos"].endswith(f"less than 32 pixels: {rows[3][0]} (line 4): 40x31")
    assert warnings["one frame"].endswith(f"have one frame: {rows[3][0]} (line 4): 1")
    assert any("000000.jpg too" in text and line == 5 for _, line, text in findings(report, "note"))


def test_help_does_not_wait_for_torch():
    code = "import runpy, sys; sys.argv = ['check', '--help']; runpy.run_module('datasets.check', run_name='__main__')"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.rstrip().endswith("False")


def test_labels(dataset, caplog):
    rows = (dataset / "train.txt").read_text().splitlines()
    rows[1], rows[6] = f"{rows[1][:-1]}4", f"{rows[6][:-1]}77"
    (dataset / "train.txt").write_text("\n".join(rows))
    edit(dataset / "labels.csv", ("left slow", "left fast"))
    with caplog.at_level(logging.INFO, "td4v"):
        code, report = run(dataset)
    assert code == 1
    assert findings(report, "problem") == [
        ("label", 2, "label 4 is outside 0..3"),
        ("label", 7, "label 77 is outside 0..3"),
    ]
    assert "train.txt, line 7: label 77 is outside 0..3" in caplog.text
    assert "'left fast' names several classes" in findings(report, "warning")[0][2]
    assert "not drawn" not in caplog.text

    code, report = run(dataset, "--set", "data.num_classes=90")
    kinds = [kind for kind, _, _ in findings(report, "problem")]
    assert code == 1 and kinds == ["labels"] and "holds 4 classes" in findings(report, "problem")[0][2]
    assert any("86 of 90 classes have no video: 4, 5, 6, ..." in text for _, _, text in findings(report, "warning"))


def test_all_bad_rows_are_listed_and_the_others_checked(dataset, caplog):
    out, rows = dataset / "out", (dataset / "train.txt").read_text().splitlines()
    assert run(dataset)[0] == 0
    videos = [row.split()[0] for row in rows]
    rows[1], rows[4], rows[6] = f"{videos[1]} eight 1", "x", f"{videos[6]} 8 -1"
    (dataset / "train.txt").write_text("\n".join(rows))
    (dataset / "frames" / videos[7] / "000002.jpg").unlink()
    code, report = run(dataset)
    file = dataset / "train.txt"
    problems = [message for _, _, message in findings(report, "problem")]
    assert code == 1 and problems[:3] == [
        f"{file}, line 2: the number of frames must be a whole number, not 'eight'",
        f"{file}, line 5: the label must be a whole number, not 'x'",
        f"{file}, line 7: label -1 is outside 0..3",
    ]
    assert "1 of 8 declared frames are missing" in problems[3] and len(problems) == 4
    assert report["values"]["train"]["videos"] == 5 and report["values"]["val"]["videos"] == 4
    # the sheet shows what there is, and the report says what it lacks
    lacks = f"contact_sheet.png lacks training: {file}, line 2: the number of frames"
    assert (out / "contact_sheet.png").is_file() and lacks in caplog.text and lacks in (out / "report.md").read_text()

    (dataset / "val.txt").write_text("\n")
    file.write_text("x\ny\n")
    code, report = run(dataset)
    assert code == 1 and [kind for kind, *_ in findings(report, "problem")] == ["list"] * 3
    assert f"{dataset / 'val.txt'}: data.val_list has no rows" in caplog.text
    assert sorted(file.name for file in out.iterdir()) == ["report.json", "report.md"] and not report["figures"]


def test_leaks_and_repeated_rows(dataset, caplog):
    train, val = dataset / "train.txt", dataset / "val.txt"
    rows = train.read_text().splitlines()
    train.write_text("\n".join([*rows, rows[1], rows[2][:-1] + "0"]))
    val.write_text(val.read_text() + rows[4] + "\nval/copy 8 1\n")
    shutil.copytree(dataset / "frames" / rows[0].split()[0], dataset / "frames/val/copy")
    code, report = run(dataset)
    warnings = {kind: message for kind, _, message in findings(report, "warning")}
    assert code == 0 and findings(report, "problem") == []
    repeated, torn = rows[1].split()[0], rows[2].split()[0]
    assert warnings["duplicates"] == f"2 videos more than once: {repeated} (lines 2, 9), {torn} (lines 3, 10)"
    assert warnings["labels"] == f"1 video with different labels: {torn} (lines 3 and 10)"
    shared = f"share 1 video: {rows[4].split()[0]} (lines 5 and 5)"
    assert shared in warnings["shared videos"] and str(train) in warnings["shared videos"]
    assert f"{rows[0].split()[0]} (line 1) = val/copy (line 6)" in warnings["copies"]

    pack(dataset / "frames", dataset / "packed")
    packed = run(dataset, *(word for s in ("train", "val") for word in ("--set", f"data.{s}_root={dataset}/packed")))
    assert packed[0] == 0 and findings(packed[1], "warning") == findings(report, "warning")
    for split in ("train", "val"):
        assert packed[1]["values"][split]["bytes"] == report["values"][split]["bytes"] > 0
    os.truncate(dataset / "packed/val/copy.zip", 100)
    code, report = run(dataset, "--set", f"data.val_root={dataset}/packed")
    assert code == 1 and any("copy.zip: is damaged or no zip" in text for *_, text in findings(report, "problem"))

    code, report = run(dataset, "--set", f"data.test_list={val}", "--set", f"data.test_root={dataset}/frames")
    assert "test" not in report["values"]  # the validation list again
    shutil.copy(val, dataset / "test.txt")
    code, report = run(dataset, "--set", f"data.test_list={dataset}/test.txt")
    assert report["values"]["test"]["videos"] == 6 and code == 0
    assert any(kind == "shared videos" and "share 6 videos" in text for kind, _, text in findings(report, "note"))


def test_what_cannot_be_used_is_one_sentence(dataset, caplog):
    config = str(dataset / "config.yaml")
    for words, sentence in [
        (["--set", "data.train_list=/no/list"], "data.train_list: there is no file /no/list"),
        (["--set", "data.val_root=/no/root"], "data.val_root: there is no folder /no/root"),
        (["--set", "data.train_list="], "data.train_list: is not set"),
        (["--set", "data.batch=3"], "data.batch: unknown key"),
        (["--run", str(dataset)], "metrics.jsonl"),
    ]:
        caplog.clear()
        assert main([config, "--out", str(dataset / "out"), *words]) == 1
        assert sentence in caplog.messages[-1] and "\n" not in caplog.messages[-1] and not (dataset / "out").exists()
    code, report = run(dataset, "--set", "data.train_root=" + str(dataset))
    assert code == 1 and "is this the right folder?" in findings(report, "problem")[-1][2]
    code, report = run(dataset, "--set", "data.batch_size=9", "--seconds", "0.2")
    assert code == 1 and "fewer than one batch" in findings(report, "problem")[0][2]


def test_words_of_the_command_that_cannot_be(dataset, caplog, capsys):
    config = str(dataset / "config.yaml")
    for seconds in ("nan", "-5", "inf", "x"):
        with pytest.raises(SystemExit):
            main([config, f"--seconds={seconds}"])
    assert "must be 0 or more, not nan" in capsys.readouterr().err
    for out in (config, f"{config}/below"):
        assert main([config, "--out", out]) == 1
        assert caplog.messages[-1] == f"--out {out}: is a file or lies below one, not a folder"


def test_ctrl_c_is_one_sentence(dataset, caplog, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("datasets.check.__main__.measure", interrupted)
    try:
        assert main([str(dataset / "config.yaml"), "--out", str(dataset / "out"), "--jobs", "1"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert caplog.messages[-1] == "interrupted: no report was written"


def copy_samples(videos: Path) -> None:
    for name in ("something_like.webm", "v_SoccerJuggling_g23_c01.avi", "corrupted.mp4", "rotated_90.mov"):
        shutil.copy(SAMPLES / name, videos)
    shutil.copy(SAMPLES / "SOX5yA1l24A.mp4", videos / "cut.mp4")


def write_samples(videos: Path) -> None:
    """Videos of the same names and kinds."""
    write_video(videos / "something_like.webm", codec="libvpx", frames=58, size=(240, 428))
    write_video(videos / "v_SoccerJuggling_g23_c01.avi", codec="mpeg4", size=(240, 320))
    overwrite(write_video(videos / "corrupted.mp4", size=(240, 320), crf=1), 1 / 3, 2 / 3)
    write_video(videos / "rotated_90.mov", frames=3, rotation=90)
    write_video(videos / "cut.mp4", size=(240, 320))


@pytest.mark.parametrize("make_videos", [write_samples, *([copy_samples] if SAMPLES.is_dir() else [])])
def test_videos(dataset, tmp_path, make_videos):
    videos = tmp_path / "videos"
    videos.mkdir()
    make_videos(videos)
    cut_off(videos / "cut.mp4", 0.5)
    (videos / "empty.mp4").touch()
    rows = ["something_like.webm 0", "v_SoccerJuggling_g23_c01.avi 5 1", "rotated_90.mov 2"]
    (dataset / "train.txt").write_text("\n".join(rows))
    rows = ["corrupted.mp4 0", "rotated_90.mov 9999 1", "no.mp4 2", "something_like.webm 3", "empty.mp4 3", "cut.mp4 0"]
    (dataset / "val.txt").write_text("\n".join(rows))
    words = [f"data.{split}_root={videos}" for split in ("train", "val")]
    code, report = run(dataset, *(w for word in ["data.modality=video", *words] for w in ("--set", word)))
    problems = {line: (kind, message) for kind, line, message in findings(report, "problem")}
    assert code == 1 and sorted(problems) == [1, 2, 3, 5, 6]
    assert problems[3] == ("file missing", f"{videos}/no.mp4: does not exist")
    assert problems[1][0] == problems[5][0] == problems[6][0] == "unreadable" and "9999" in problems[2][1]
    ((kind, line, message),) = findings(report, "note")
    assert (kind, line) == ("more frames", 2) and "the list declares 5" in message
    sizes = report["values"]["train"]["frame_sizes"]
    assert sum(sizes.values()) == 3 and "320x240" in sizes


class _Fragile:
    """A reader of three-frame videos that takes its process down at some of them."""

    num_frames = declared_frames = 3

    def stored_at(self, path):
        return path

    def open(self, path, declared):
        if "crash" in os.path.basename(path):
            os._exit(3)
        if "odd" in os.path.basename(path):
            raise KeyError(-1)
        return self

    def read(self, indices):
        return np.zeros((len(indices), 4, 6, 3), np.uint8)


def test_a_crashing_decoder_costs_one_row(tmp_path):
    crashing = {7, 8, 40}
    names = [f"crash{i}" if i in crashing else f"video{i}" for i in range(60)]
    names[50] = "odd"
    for name in names:
        (tmp_path / name).touch()
    records = [VideoRecord(name, 3, 0, line) for line, name in enumerate(names, 1)]
    source = VideoSource(records, str(tmp_path), _Fragile(), "l")
    results = list(check_rows(RowChecker(source), source.records, jobs=2))
    assert sorted(result.record.line for result in results) == list(range(1, 61))
    assert {r.record.line - 1: r.problems[0][0] for r in results if r.problems} == {
        **dict.fromkeys(crashing, "crash"),
        50: "unreadable",
    }
    assert all((r.frames, r.size) == (3, (6, 4)) for r in results if not r.problems)


def test_pixels_come_back_from_both_kinds_of_items():
    data = DataConfig(dataset="hmdb51", num_classes=2).with_pixel_statistics()
    pixels = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    for video in (pixels, (pixels / 255 - mean) / std):
        assert np.array_equal(to_pixels(video, data), pixels.numpy())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_list_shorter_than_the_measurement(dataset, workers):
    data = DataConfig(**yaml.safe_load((dataset / "config.yaml").read_text())["data"])
    rate = measure(data, 0, workers, seconds=0.4)
    assert rate.workers == workers and rate.batches > 8 and 0.3 <= rate.seconds < 5
    assert rate.clips_per_s == pytest.approx(4 * rate.batches / rate.seconds) and rate.cpu_ms >= 0
    shutil.rmtree(dataset / "frames/train")
    with pytest.raises(ValueError, match="no training video can be read"):
        measure(data, 0, workers, seconds=0.2)


def test_advice_and_the_need_of_a_previous_run(tmp_path):
    one = Rate(1, 50, 50, 20.0, 99, 9.0, 0.1)
    two = replace(one, workers=2, clips_per_s=80)
    text, numbers = advise([two, one], 200, cores=16)
    assert numbers["suggested_workers"] == 6 and not numbers["enough"]  # 200 * 1.15 / (80 / 2) = 5.75
    assert "40% of it" in text and "data.workers: 6" in text
    text, numbers = advise([two, one], 400, cores=4)
    assert numbers["suggested_workers"] == 4 and "12 workers" in text and "about 160 clips/s" in text
    text, numbers = advise([one, one], 49, cores=1)
    assert numbers["enough"] == 1 and "It would take" not in text and numbers["suggested_workers"] == 1
    assert "enough, with little to spare: 2 workers would give 15% headroom, this machine has 1 core." in text
    text, numbers = advise([one, one], None, cores=4)
    assert "about 200 clips/s" in text and "--need" in text and "need" not in numbers
    assert "does not scale" in advise([replace(two, clips_per_s=55), one], None, cores=4)[0]

    with pytest.raises(ConfigError, match="--run"):
        need_of_run(tmp_path)
    rows = [{"epoch": epoch, "clips_per_s": rate, "data_wait": 0.5} for epoch, rate in enumerate((10, 100, 100))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text(json.dumps([{"world_size": 4}]))
    need, how = need_of_run(tmp_path)
    assert need == pytest.approx(50) and "50%" in how and "4 process" in how
