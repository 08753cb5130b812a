"""Every dataset from the published annotations to lists, and messages about annotations and videos that do not fit."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from configs.schema import load_config
from datasets.annotation import read_labels, read_list
from datasets.prepare import __main__ as command
from datasets.prepare.annotation_files import AnnotationFiles
from datasets.prepare.formats import FORMATS
from tests.helpers.video_files import write_avi

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data"
ANNOTATIONS = DATA / "annotations"
UCF_CLIPS = DATA / "ucf101_10" / "UCF-101"

UCF = {
    "classInd.txt": "1 Archery\r\n2 HandstandPushups\r\n",
    "trainlist01.txt": "Archery/v_Archery_g08_c01.avi 1\r\nHandstandPushups/v_HandStandPushups_g08_c01.avi 2\r\n",
    "testlist01.txt": "Archery/v_Archery_g01_c01.avi\r\nHandstandPushups/v_HandStandPushups_g01_c01.avi\r\n",
}
HMDB = {
    "wave_test_split1.txt": "a_wave_1.avi 1 \nb(x)!_wave_2.avi 2 \nc_wave_3.avi 0 \n",
    "brush_hair_test_split1.txt": "a_brush_hair_1.avi 2 \nb_brush_hair_1.avi 1 \n",
}
SSV2 = {
    "labels.json": {"Closing something": "1", "Approaching something with your camera": "0"},
    "train.json": [{"id": "1", "template": "Closing [something]"}],
    "validation.json": [{"id": "2", "template": "Approaching [something] with your camera"}],
    "test.json": [{"id": "3"}],
}
SSV1 = {
    "something-something-v1-labels.csv": "Holding something\nTurning something, upside down\n",
    "something-something-v1-train.csv": "10;Turning something, upside down\n",
    "something-something-v1-validation.csv": "11;Holding something\n",
}
HEADER = "label,youtube_id,time_start,time_end,split\n"
K400 = {
    "kinetics_400_labels.csv": "id,name\n0,abseiling\n1,air drumming\n",
    "train.csv": f'{HEADER}"air drumming",-abc_DEFGHI,1,11,train\nabseiling,0123456789A,20,30,train\n',
    "validate.csv": f"{HEADER}abseiling,0123456789a,5,15,val\n",
}
DIVING = {
    "Diving48_vocab.json": [["Back", "15som", "05Twis", "FREE"], ["Inward", "Dive", "NoTwis", "PIKE"]],
    "Diving48_V2_train.json": [{"vid_name": "a_00001", "label": 1, "start_frame": 0, "end_frame": 9}],
    "Diving48_V2_test.json": [{"vid_name": "a_00002", "label": 0, "start_frame": 0, "end_frame": 9}],
}


def write(root: Path, files: dict[str, object]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=1), newline="")
    return root


@pytest.fixture
def run(tmp_path, caplog):
    """Prepares a dataset from the given annotations and video names; (exit code, output folder, log)."""

    def run(dataset: str, annotations: dict[str, object] | Path, videos: list[str] | Path, *more: str):
        caplog.clear()
        caplog.set_level(logging.INFO)
        if not isinstance(annotations, Path):
            annotations = write(tmp_path / "annotations", annotations)
        if not isinstance(videos, Path):
            for number, name in enumerate(videos):
                write_avi(tmp_path / "videos" / name, seed=number)
            videos = tmp_path / "videos"
            videos.mkdir(exist_ok=True)
        arguments = [
            dataset,
            "--videos",
            str(videos),
            "--annotations",
            str(annotations),
            "--out",
            str(tmp_path / "out"),
        ]
        code = command.main([*arguments, "--jobs", "1", *more])
        assert "Traceback" not in caplog.text
        return code, tmp_path / "out", caplog.text

    return run


def lists(out: Path, *splits: str) -> list[str]:
    return [(out / f"{split}.txt").read_text() for split in splits or ("train", "val")]


def contents(out: Path) -> dict[Path, tuple[int, bytes]]:
    """Time of change and content of each file."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}


UCF_NAMES = ["v_Archery_g08_c01", "v_HandStandPushups_g08_c01", "v_Archery_g01_c01", "v_HandStandPushups_g01_c01"]


@pytest.mark.parametrize("folder", ["", "UCF-101/any/"])
def test_ucf101_wherever_the_videos_lie(run, folder):
    names = [*UCF_NAMES[:3], "v_HandstandPushups_g01_c01"]  # some copies spell the files as the folder
    code, out, log = run("ucf101", UCF, [f"{folder}{name}.avi" for name in names])
    assert code == 0, log
    assert lists(out) == [
        f"{folder}v_Archery_g08_c01 4 0\n{folder}v_HandStandPushups_g08_c01 4 1\n",
        f"{folder}v_Archery_g01_c01 4 0\n{folder}v_HandstandPushups_g01_c01 4 1\n",
    ]
    assert read_labels(str(out / "labels.csv"), 2) == ("Archery", "HandstandPushups")


def test_the_snippet_makes_a_configuration(run, tmp_path):
    code, out, log = run("ucf101", UCF, [f"{name}.avi" for name in UCF_NAMES])
    snippet = yaml.safe_load((out / "config_snippet.yaml").read_text())
    assert all(line in log for line in (out / "config_snippet.yaml").read_text().splitlines())
    config = yaml.safe_load((ROOT / "configs" / "ssv2.yaml").read_text())
    config["data"].update(snippet["data"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    data = load_config(str(tmp_path / "config.yaml")).data
    assert data.dataset == "ucf101" and data.num_classes == 2
    for record in read_list(data.val_list, data.modality, data.num_classes):
        assert (Path(data.val_root) / record.path / data.image_tmpl.format(record.num_frames)).is_file()


def test_hmdb51(run):
    videos = ["wave/a_wave_1.avi", "wave/b(x)!_wave_2.avi", "brush_hair/a_brush_hair_1.avi", "b_brush_hair_1.avi"]
    code, out, log = run("hmdb51", HMDB, videos, "--videos-only")
    assert code == 0, log
    assert lists(out) == [
        "b_brush_hair_1.avi 0\nwave/a_wave_1.avi 1\n",
        "brush_hair/a_brush_hair_1.avi 0\nwave/b(x)!_wave_2.avi 1\n",
    ]


def test_another_split_in_the_same_folder(run):
    second = {"trainlist02.txt": UCF["trainlist01.txt"], "testlist02.txt": UCF["testlist01.txt"]}
    code, out, log = run("ucf101", UCF | second, [f"{name}.avi" for name in UCF_NAMES])
    assert code == 0
    before = contents(out)
    code, out, log = run("ucf101", UCF | second, [], "--split", "2")
    assert code == 1 and "was prepared with split 1, now 2; --new-split replaces the lists (frames stay)" in log
    assert contents(out) == before
    code, out, log = run("ucf101", UCF | second, [], "--split", "2", "--new-split")
    assert code == 0
    assert "4 of 4 videos were extracted by an earlier run" in log
    assert "UCF101: split 2, classes 2" in (out / "report.txt").read_text()
    assert "# UCF101, split 2, classes 2: replaces" in (out / "config_snippet.yaml").read_text()
    assert json.loads((out / "prepare.json").read_text())["split"] == {"split": 2, "classes": 2}


def test_a_finished_folder_stays_as_it_is_when_a_video_is_missing(run, tmp_path):
    code, out, log = run("ucf101", UCF, [f"{name}.avi" for name in UCF_NAMES])
    assert code == 0
    before = contents(out)
    (tmp_path / "videos" / f"{UCF_NAMES[0]}.avi").unlink()
    code, out, log = run("ucf101", UCF, [])
    assert (
        code == 1
        and f"1 of 4 videos of UCF101 are missing below {tmp_path / 'videos'}, such as {UCF_NAMES[0]}: " in log
    )
    assert contents(out) == before


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_something_v2(run, prefix):
    annotations = {prefix + name: content for name, content in SSV2.items()}
    code, out, log = run("ssv2", annotations, ["1.webm", "2.webm", "3.webm"])  # ffmpeg goes by the content
    assert code == 0, log
    assert lists(out) == ["1 4 1\n", "2 4 0\n"]
    assert "test.json has no labels" in log and not (out / "test.txt").exists()
    assert read_labels(str(out / "labels.csv"), 2)[0] == "Approaching something with your camera"


def test_something_v2_with_answers(run):
    answers = {"test-answers.csv": "3;Closing something\n"}
    code, out, log = run("ssv2", SSV2 | answers, ["1.webm", "2.webm", "3.webm"])
    assert code == 0 and lists(out, "test") == ["3 4 1\n"]
    snippet = yaml.safe_load((out / "config_snippet.yaml").read_text())["data"]
    assert snippet["test_list"] == str(out / "test.txt")


def write_frame_folder(root: Path, name: str, numbers: list[int]) -> None:
    (root / name).mkdir(parents=True)
    for number in numbers:
        (root / name / f"{number:05d}.jpg").write_bytes(b"jpeg")


def test_something_v1_keeps_its_frame_folders(run, tmp_path):
    write_frame_folder(tmp_path / "videos", "20bn/10", [1, 2, 3])
    write_frame_folder(tmp_path / "videos", "20bn/11", [1, 2])
    code, out, log = run("ssv1", SSV1, tmp_path / "videos")
    assert code == 0, log
    assert lists(out) == ["20bn/10 3 1\n", "20bn/11 2 0\n"]
    data = yaml.safe_load((out / "config_snippet.yaml").read_text())["data"]
    assert data["image_tmpl"] == "{:05d}.jpg" and data["train_root"] == str(tmp_path / "videos")
    assert not (out / "frames").exists()
    (tmp_path / "videos/20bn/10/00002.jpg").unlink()
    code, out, log = run("ssv1", SSV1, tmp_path / "videos")
    assert code == 1 and "20bn/10 (00002.jpg is missing or empty" in log


def test_labels_of_something_v1_are_those_of_published_checkpoints(run, tmp_path):
    """The families' list scripts sort the templates, whose published file has another order."""
    lines = ["Turning something, upside down", "Holding something", "[Some] thing"]
    annotations = SSV1 | {"something-something-v1-labels.csv": "\r\n".join([*lines, ""])}
    for video in ("10", "11"):
        write_frame_folder(tmp_path / "videos", video, [1])
    code, out, log = run("ssv1", annotations, tmp_path / "videos")
    note = "labels follow the sorted templates, as in the list scripts of TSM and TDN, not the lines of something-something"
    assert code == 0 and note in log and note in (out / "report.txt").read_text()
    assert read_labels(str(out / "labels.csv"), 3) == ("Holding something", lines[0], "[Some] thing")
    assert lists(out) == ["10 1 1\n", "11 1 0\n"]


@pytest.mark.parametrize("named", [True, False])
def test_kinetics(run, named):
    annotations = {name: content for name, content in K400.items() if named or "labels" not in name}
    videos = ["air drumming/-abc_DEFGHI_000001_000011.mp4", "0123456789A.mp4", "val/0123456789a_000005_000015.mp4"]
    code, out, log = run("k400", annotations, videos)
    assert code == 0, log
    assert lists(out) == [
        "air drumming/-abc_DEFGHI_000001_000011 4 1\n0123456789A 4 0\n",
        "val/0123456789a_000005_000015 4 0\n",
    ]
    assert (out / "labels.csv").read_text() == "id,name\n0,abseiling\n1,air drumming\n"


def test_diving48(run):
    code, out, log = run("diving48", DIVING, ["rgb/a_00001.mp4", "rgb/a_00002.mp4"])
    assert code == 0, log
    assert lists(out) == ["rgb/a_00001 4 1\n", "rgb/a_00002 4 0\n"]
    assert read_labels(str(out / "labels.csv"), 2) == ("Back 15som 05Twis FREE", "Inward Dive NoTwis PIKE")


if ANNOTATIONS.is_dir():

    def test_the_published_files():
        """The counts that the publishers state."""
        for split, train in ((1, 9537), (2, 9586), (3, 9624)):
            plan = FORMATS["ucf101"].read(AnnotationFiles(ANNOTATIONS / "ucf101", "UCF101"), split, None)
            plan.check()
            assert Counter(entry.split for entry in plan.entries) == {"train": train, "val": 13320 - train}
            assert len(plan.classes) == 101 and plan.classes[36] == "HandstandPushups"
            plan = FORMATS["hmdb51"].read(AnnotationFiles(ANNOTATIONS / "hmdb51", "HMDB51"), split, None)
            plan.check()
            assert Counter(entry.split for entry in plan.entries) == {"train": 3570, "val": 1530}
            assert len(plan.classes) == 51 and set(Counter(e.label for e in plan.entries).values()) == {100}
        plan = FORMATS["ssv2"].read(AnnotationFiles(ANNOTATIONS / "ssv2", "Something-Something v2"), 1, ("val",))
        plan.check()
        assert len(plan.entries) == 24777 and len(plan.classes) == 174
        (entry,) = (entry for entry in plan.entries if entry.names == ("74225",))
        assert plan.classes[entry.label] == "Spinning something that quickly stops spinning"

    def test_both_versions_of_something_have_the_same_labels(tmp_path):
        """Their 174 templates are the same; those of version 1 are published in another order."""
        of_v2 = tuple(json.loads((ANNOTATIONS / "ssv2" / "labels.json").read_text()))
        labels = "\n".join(sorted(of_v2, key=lambda name: name[::-1]))
        write(tmp_path, SSV1 | {"something-something-v1-labels.csv": labels, "something-something-v1-train.csv": ""})
        assert FORMATS["ssv1"].read(AnnotationFiles(tmp_path, "V1"), 1, ("train",)).classes == of_v2


def check_part_of_ucf101(run, annotations, videos, split: str, counts: dict[str, int | None]) -> None:
    """Prepare the videos that are there with a published split; `counts` are of videos and classes."""
    train, val, listed, classes = (counts[key] for key in ("train", "val", "listed", "classes"))
    more = ("--videos-only", "--split", split)
    code, out, log = run("ucf101", annotations, videos, *more)
    assert code == 1 and f"{listed - train - (val or 0)} of {listed} videos of UCF101 are missing" in log
    assert not (out / "train.txt").exists() and ": train, ApplyEyeMakeup\n" in (out / "report.txt").read_text()
    code, out, log = run("ucf101", annotations, videos, *more, "--allow-missing")
    assert code == 0, log
    assert len(read_list(str(out / "train.txt"), "video", classes)) == train
    assert f"train: {counts['classes_without_video']} of {classes} classes have no video" in log
    assert (out / "val.txt").exists() == (val is not None)
    if val is None:
        assert f"val: all of its {counts['listed_val']} videos are missing: no val.txt" in log
        snippet = (out / "config_snippet.yaml").read_text()
        assert "# There is no val list" in snippet and yaml.safe_load(snippet)["data"]["val_list"] is None
    else:
        assert len(read_list(str(out / "val.txt"), "video", classes)) == val
    assert len(read_labels(str(out / "labels.csv"), classes)) == classes


@pytest.mark.parametrize(("split", "train", "val"), [("1", 20, None), ("2", 3, 17)])
def test_a_part_of_ucf101_with_a_published_split(run, split, train, val):
    """Four classes of 15 groups. As published, split 1 tests on groups 1 to 7 and split 2 on 8 to 14; 1 to 7 are missing."""
    classes = ["ApplyEyeMakeup", "HandstandPushups", "TaiChi", "YoYo"]
    names = {c: [f"{c}/v_{c.replace('stand', 'Stand')}_g{g:02d}_c01.avi" for g in range(1, 16)] for c in classes}
    annotations = {"classInd.txt": "".join(f"{number} {name}\r\n" for number, name in enumerate(classes, 1))}
    for number, tested in ((1, range(7)), (2, range(7, 14))):
        train_rows = [(c, g) for c in classes for g in range(15) if g not in tested]
        trained = "".join(f"{names[c][g]} {classes.index(c) + 1}\r\n" for c, g in train_rows)
        annotations[f"trainlist0{number}.txt"] = trained
        annotations[f"testlist0{number}.txt"] = "".join(f"{names[c][g]}\r\n" for c in classes for g in tested)
    videos = names["HandstandPushups"][7:] + names["TaiChi"][7:] + names["YoYo"][11:]
    counts = {"train": train, "val": val, "listed": 60, "listed_val": 28, "classes": 4, "classes_without_video": 1}
    check_part_of_ucf101(run, annotations, videos, split, counts)


if ANNOTATIONS.is_dir() and UCF_CLIPS.is_dir():

    @pytest.mark.parametrize(("split", "train", "val"), [("1", 337, None), ("2", 205, 132)])
    def test_a_part_of_the_published_ucf101(run, split, train, val):
        counts = {"train": train, "val": val, "listed": 13320, "listed_val": 3783}
        counts |= {"classes": 101, "classes_without_video": 91}
        check_part_of_ucf101(run, ANNOTATIONS / "ucf101", UCF_CLIPS, split, counts)


def test_annotations_in_an_archive(run, tmp_path):
    write(tmp_path / "raw" / "ucfTrainTestlist", UCF)
    shutil.make_archive(str(tmp_path / "zips" / "UCF101TrainTestSplits"), "zip", tmp_path / "raw")
    code, out, log = run("ucf101", tmp_path / "zips", [f"{name}.avi" for name in UCF_NAMES])
    assert code == 0, log


def test_everything_in_one_folder(run, tmp_path):
    """Archives of both kinds, a note beside them, and a video that lies there too."""
    downloads = tmp_path / "downloads"
    write(downloads, {"README.txt": "from the publishers"})
    write(tmp_path / "raw" / "ucfTrainTestlist", UCF)
    shutil.make_archive(str(downloads / "UCF101TrainTestSplits"), "zip", tmp_path / "raw")
    for name in UCF_NAMES[:3]:
        write_avi(tmp_path / "raw2" / "UCF-101" / f"{name}.avi")
    shutil.make_archive(str(downloads / "UCF101"), "zip", tmp_path / "raw2")
    write_avi(downloads / f"{UCF_NAMES[0]}.avi")
    shutil.move(downloads / "UCF101.zip", tmp_path)
    code, out, log = run("ucf101", downloads, downloads, "--videos-only")
    assert code == 1 and f"3 of 4 videos of UCF101 are missing below {downloads}," in log
    shutil.move(tmp_path / "UCF101.zip", downloads)
    code, out, log = run("ucf101", downloads, downloads, "--videos-only")
    assert code == 1 and f"1 of 4 videos of UCF101 are missing below {out}/unpacked/videos" in log
    write_avi(downloads / f"{UCF_NAMES[3]}.avi")
    code, out, log = run("ucf101", downloads, downloads, "--videos-only")
    assert code == 1 and f"{UCF_NAMES[0]}.avi could both be {UCF_NAMES[0]}; keep one" in log
    (downloads / f"{UCF_NAMES[0]}.avi").unlink()
    for _ in range(2):
        code, out, log = run("ucf101", downloads, downloads, "--videos-only")
        assert code == 0, log
        assert lists(out)[1] == f"UCF101/UCF-101/{UCF_NAMES[2]}.avi 0\nloose/{UCF_NAMES[3]}.avi 1\n"
        assert not list((out / "unpacked" / "annotations").rglob("*.avi"))
    assert (downloads / "UCF101.zip").exists()


def test_archives_beside_class_folders_are_left_alone(tmp_path, caplog):
    for name in ("a/1.avi", "a/2.avi", "b/3.avi", "b/4.avi"):
        write_avi(tmp_path / "in" / name)
    shutil.make_archive(str(tmp_path / "more"), "zip", tmp_path / "in")
    shutil.move(tmp_path / "more.zip", tmp_path / "in" / "more.zip")
    arguments = ["folder", "--videos", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert command.main(arguments) == 0 and "more.zip is not unpacked, as videos lie beside it" in caplog.text


def test_videos_in_an_archive(run, tmp_path):
    for name in UCF_NAMES:
        write_avi(tmp_path / "raw" / "UCF-101" / name.split("_")[1] / f"{name}.avi")
    shutil.make_archive(str(tmp_path / "zips" / "UCF101"), "gztar", tmp_path / "raw")
    code, out, log = run("ucf101", UCF, tmp_path / "zips")
    assert code == 0, log
    assert lists(out)[1].startswith("UCF101/UCF-101/Archery/v_Archery_g01_c01 4 0\n")
    assert len(list((out / "frames").rglob("*.jpg"))) == 16


ALL_UCF = [f"{name}.avi" for name in UCF_NAMES]
LABELS = SSV2["labels.json"]


@pytest.mark.parametrize(
    ("dataset", "annotations", "videos", "more", "sentence"),
    [
        ("ucf101", {}, [], [], r"needs classInd\.txt; found no files"),
        ("ucf101", UCF, ALL_UCF, ["--split", "4"], r"--split 4: UCF101 has splits 1 to 3"),
        ("ssv2", SSV2, [], ["--split", "2"], r"--split 2: Something-Something v2 has one split"),
        ("ucf101", UCF, ALL_UCF, ["--splits", "test"], r"--splits test: UCF101 has train, val"),
        ("ucf101", UCF, ALL_UCF, ["--split", "2"], r"needs trainlist02\.txt; found classInd\.txt, testlist01\.txt"),
        ("ucf101", UCF, ALL_UCF, ["--jobs", "0"], "--jobs must be positive, not 0"),
        ("ucf101", UCF, ALL_UCF, ["--short-side", "-1"], "--short-side must be positive, or 0"),
        ("ucf101", UCF, ALL_UCF, ["--quality", "0"], "--quality must be between 1 and 100, not 0"),
        ("ucf101", UCF, [], [], r"holds none of the 4 videos of UCF101, .* v_Archery_g08_c01; there is no file at all"),
        ("ucf101", UCF, ["a/1.webm", "b.avi"], [], r"there are 2 files \(1 \.avi, 1 \.webm\), such as b\.avi"),
        ("ucf101", UCF, [*ALL_UCF, f"x/{ALL_UCF[0]}"], [], r"v_Archery_g08_c01\.avi and x/v_Archery_g08_c01\.avi could both"),
        ("ucf101", UCF, ALL_UCF[1:], [], r"1 of 4 videos of UCF101 are missing .*, such as v_Archery_g08_c01: nothing"),
        (
            "ucf101",
            UCF | {"testlist01.txt": "Bowling/v_Bowling_g01_c01.avi\n"},
            [],
            [],
            r"testlist01\.txt, line 1: class Bowling is not in .*classInd\.txt",
        ),
        (
            "ucf101",
            UCF | {"testlist01.txt": "\nArchery/v_Archery_g08_c01.avi\n"},
            [],
            [],
            r"v_Archery_g08_c01 is named in train and in val: .*trainlist01.txt, line 1 and .*testlist01\.txt, line 2",
        ),
        (
            "ucf101",
            UCF | {"testlist01.txt": "Archery/v_Archery_g01_c01.avi\n" * 2},
            [],
            [],
            r"v_Archery_g01_c01 is named twice: .*line 1 and .*line 2",
        ),
        ("ucf101", UCF | {"trainlist01.txt": "Archery/v_Archery_g08_c01.avi 2\n"}, [], [], r"gives Archery the id 2, .* 1"),
        ("ucf101", UCF | {"trainlist01.txt": "what\n"}, [], [], r"trainlist01\.txt, line 1: must be `Class/v_"),
        ("ucf101", UCF | {"classInd.txt": "1 Archery\n3 HandstandPushups\n"}, [], [], "not numbered without gaps"),
        ("hmdb51", HMDB | {"wave_test_split1.txt": "a.avi 3\n"}, [], [], r"wave_test_split1\.txt, line 1: must be `name"),
        ("hmdb51", HMDB | {"run_test_split2.txt": ""}, [], [], r"needs run_test_split1\.txt"),
        ("ssv2", SSV2 | {"train.json": '[{"id": "1"},\n oops]'}, [], [], r"train\.json, line 2: is not valid JSON"),
        ("ssv2", SSV2 | {"train.json": "{}"}, [], [], r"train\.json: must hold a list, not dict"),
        ("ssv2", SSV2 | {"train.json": [{"id": "1"}]}, [], [], r"train\.json, entry 1 \(id 1\): has no 'template'"),
        ("ssv2", SSV2 | {"labels.json": {"Closing something": "0"}}, [], [], r"entry 1 \(id 2\): template 'Approaching .* version"),
        ("ssv2", {"labels.json": LABELS, "validation.json": []}, [], [], r"needs train\.json .*--splits val prepares only"),
        ("ssv2", SSV2, ["10/00001.jpg", "11/00001.jpg"], [], r"none of the 2 videos .* video file named 1; .*\(2 \.jpg\)"),
        ("ssv1", SSV1, ["10.webm", "11.webm"], [], r"none of the 2 videos .*frame folder named 10; .*\(2 \.webm\)"),
        ("ssv1", SSV1, [], ["--videos-only"], "comes as frames, not as videos"),
        ("ssv1", SSV1, [], ["--pack"], "--pack: .* comes as frames; `python -m datasets.packed_frames` packs them"),
        ("ssv1", SSV2, [], [], r"needs something-something-v1-labels\.csv; found labels\.json"),
        (
            "ssv1",
            SSV1 | {"something-something-v1-train.csv": "1;Holding something\n2\n"},
            [],
            [],
            r"v1-train\.csv, line 2: must be `id;template`",
        ),
        ("k400", {"kinetics_400_labels.csv": "id,name\n"}, [], [], r"Kinetics-400 needs train\.csv"),
        ("k400", K400 | {"train.csv": f"{HEADER}juggling,x,1,2,train\n"}, [], [], r"train\.csv, line 2: class 'juggling' is not in"),
        ("k400", K400 | {"train.csv": "a,b\n"}, [], [], r"train\.csv: its header has no label, youtube_id"),
        ("k400", K400 | {"train.csv": f'{HEADER}"abs'}, [], [], r"train\.csv, line 2: is not valid csv"),
        ("k400", K400 | {"train.csv": f"{HEADER}abseiling,x,1,2,val\n"}, [], [], "names the split 'val', in the file of train"),
        ("diving48", DIVING | {"Diving48_V2_test.json": [{"vid_name": "x", "label": 2}]}, [], [], "label 2 is not one of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(run, dataset, annotations, videos, more, sentence):
    code, out, log = run(dataset, annotations, videos, *more)
    messages = [line for line in log.splitlines() if line.startswith("ERROR")]
    assert code == 1 and len(messages) == 1
    assert re.search(sentence, messages[0]), messages[0]
    assert not list(out.glob("*.csv")) and not list(out.glob("t*.txt"))


def test_not_utf8(run, tmp_path):
    annotations = write(tmp_path / "annotations", UCF)
    (annotations / "testlist01.txt").write_bytes(b"\xff\xfe")
    code, _, log = run("ucf101", annotations, ALL_UCF)
    assert code == 1 and "testlist01.txt: is not UTF-8 text" in log


def test_no_annotations(tmp_path, caplog):
    arguments = ["ucf101", "--videos", str(tmp_path), "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 1 and "ucf101 needs --annotations" in caplog.text
    assert command.main([*arguments, "--annotations", str(tmp_path / "no")]) == 1
    assert f"--annotations {tmp_path / 'no'}: there is no such file or folder" in caplog.text


def test_two_rows_of_one_video(run):
    rows = f"{HEADER}abseiling,x,1,2,train\nabseiling,x,5,6,train\n"
    code, _, log = run("k400", K400 | {"train.csv": rows}, ["x.mp4", "0123456789a.mp4"])
    assert code == 1 and "x.mp4 is the video of two rows" in log


def test_output_inside_the_videos_folder(run, tmp_path):
    """The frames of the first run are not taken for videos or ambiguities by the second."""
    code, out, log = run("ucf101", UCF, [f"{name}.avi" for name in UCF_NAMES])
    inside = ["ucf101", "--videos", str(tmp_path), "--annotations", str(tmp_path / "annotations"), "--jobs", "1"]
    for _ in range(2):
        assert command.main([*inside, "--out", str(out)]) == 0
