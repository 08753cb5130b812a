"""Videos in class folders: groups stay together, the draw, labels, and messages about folders that do not fit."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from datasets.prepare import __main__ as command
from datasets.prepare.catalogue import scan
from datasets.prepare.formats.folder import Grouping, parse_groups, read
from datasets.prepare.plan import PrepareError
from datasets.prepare.report import Report
from tests.helpers.video_files import write_avi

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
UCF = SHARED / "ucf101_10" / "UCF-101"
CLASS_IND = SHARED / "annotations" / "ucf101" / "classInd.txt"


def touch(root: Path, *names: str) -> Path:
    """Files that are no videos: splitting looks at names only."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def splits(root: Path, grouping: Grouping) -> tuple[set[str], set[str]]:
    """The training and the validation videos."""
    entries = read(scan(root), grouping, "mine").entries
    return tuple({entry.path for entry in entries if entry.split == split} for split in ("train", "val"))


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """Two classes with ten groups each, one to three videos a group."""
    names = [f"{c}/v_g{group:02d}_c{n}.avi" for c in ("A", "b") for group in range(10) for n in range(group % 3 + 1)]
    return touch(tmp_path / "videos", *names)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_never_split(grouped, across, seed):
    train, val = splits(grouped, Grouping(r"_g(\d+)_", across_classes=across, val_share=0.3, seed=seed))
    groups = [{(path[0] if not across else "", path[5:7]) for path in paths} for paths in (train, val)]
    assert not groups[0] & groups[1] and len(train) + len(val) == 38
    assert abs(len(val) - 0.3 * 38) <= 3
    assert {path[0] for path in train} == {path[0] for path in val} == {"A", "b"}


def test_the_draw_depends_on_the_seed_and_the_class_alone(grouped):
    grouping = Grouping(r"_g(\d+)_", seed=1)
    before = splits(grouped, grouping)
    assert before == splits(grouped, grouping)
    assert any(before != splits(grouped, Grouping(r"_g(\d+)_", seed=seed)) for seed in range(2, 6))
    touch(grouped, "A0/v_g01_c0.avi", "A0/v_g02_c0.avi")
    after = splits(grouped, grouping)
    assert before[1] == {path for path in after[1] if not path.startswith("A0/")}


def test_named_groups(grouped):
    train, val = splits(grouped, Grouping(r"_g(\d+)_", val_groups=parse_groups("8-9")))
    assert {path[5:7] for path in val} == {"08", "09"} and {path[5:7] for path in train} == {
        f"{n:02d}" for n in range(8)
    }


def test_without_a_pattern_every_video_is_a_group(tmp_path):
    touch(tmp_path, *(f"{c}/{n}.mp4" for c in "ab" for n in range(10)))
    train, val = splits(tmp_path, Grouping(val_share=0.2))
    assert len(val) == 4 and len(train) == 16


def published_classes() -> list[str]:
    """UCF101's classes in the published order: all of them, or a part in which the case of letters matters."""
    if CLASS_IND.is_file():
        return [line.split()[1] for line in CLASS_IND.read_text().splitlines()]
    return ["BandMarching", "Basketball", "BasketballDunk", "JumpingJack", "JumpRope", "YoYo"]


def test_labels_follow_the_published_order(tmp_path):
    classes = published_classes()
    for name in reversed(classes):
        touch(tmp_path, f"UCF-101/{name}/v_{name}_g01_c01.avi")
    plan = read(scan(tmp_path), Grouping(), "mine")
    assert plan.classes == tuple(classes) and [entry.label for entry in plan.entries] == list(range(len(classes)))


def lists_by_groups(videos: Path, out: Path) -> dict[str, list[str]]:
    """The rows of both lists of UCF101-like videos; groups 8 to 12 of 8 to 25 are validation."""
    pattern = ["--group-pattern", r"_g(\d+)_", "--val-groups", "8-12"]
    assert command.main(["folder", "--videos", str(videos), "--out", str(out), "--videos-only", *pattern]) == 0
    rows = {split: (out / f"{split}.txt").read_text().splitlines() for split in ("train", "val")}
    groups = {split: {int(line.split("_g")[1][:2]) for line in lines} for split, lines in rows.items()}
    assert groups == {"train": set(range(13, 26)), "val": set(range(8, 13))}
    return rows


def test_videos_named_like_ucf101_by_groups(tmp_path):
    names = [f"{c}/v_{c}_g{group:02d}_c01.avi" for c in ("YoYo", "TaiChi") for group in range(8, 26)]
    for number, name in enumerate(names):
        write_avi(tmp_path / "UCF-101" / name, frames=2, seed=number)
    rows = lists_by_groups(tmp_path / "UCF-101", tmp_path / "out")
    assert (len(rows["train"]), len(rows["val"])) == (26, 10)
    assert rows["train"][0] == "TaiChi/v_TaiChi_g13_c01.avi 0" and rows["train"][-1] == "YoYo/v_YoYo_g25_c01.avi 1"


if UCF.is_dir():

    def test_ucf101_by_groups(tmp_path):
        rows = lists_by_groups(UCF, tmp_path)
        assert (len(rows["train"]), len(rows["val"])) == (242, 95)
        assert rows["train"][0] == "BodyWeightSquats/v_BodyWeightSquats_g13_c01.avi 0"


def test_identical_files_across_the_splits(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    videos = tmp_path / "videos"
    for number in range(1, 5):
        write_avi(videos / "ab"[number % 2] / f"v_g{number}_.avi", frames=number)
    arguments = ["folder", "--videos", str(videos), "--out", str(tmp_path / "out"), "--videos-only", "--jobs", "1"]
    arguments += ["--group-pattern", r"_g(\d+)_", "--val-groups", "1-2"]
    assert command.main(arguments) == 0 and "byte-identical" not in caplog.text
    shutil.copy(videos / "b" / "v_g1_.avi", videos / "b" / "v_g2_.avi")  # both in val: nothing to say
    shutil.copy(videos / "b" / "v_g1_.avi", videos / "a" / "v_g7_.avi")
    assert command.main(arguments) == 0
    assert "a/v_g7_.avi (train) and b/v_g1_.avi (val) are byte-identical" in caplog.text
    assert caplog.text.count("byte-identical") == 2  # 1 and 2 against 7


@pytest.mark.parametrize(
    ("names", "grouping", "sentence"),
    [
        ([], Grouping(), "holds no video; there is no file at all"),
        (["a/readme.txt"], Grouping(), r"holds no video; there are 1 files \(1 \.txt\)"),
        (["a/x.avi", "y.avi"], Grouping(), r"y\.avi: is not in a class folder"),
        (["a/x.avi", "a/y.avi"], Grouping(), "there is only one class folder"),
        (
            ["a/p1/x.avi", "a/p2/y.avi", "b/z.rar"],
            Grouping(),
            r"of its folders a, b only a holds videos; give that folder",
        ),
        (["train/a/x.avi", "val/a/y.avi"], Grouping(), "there is only one class folder"),
        (
            ["train/a/x.avi", "b/y.avi"],
            Grouping(),
            "train is named as a split, beside the class folders b; keep one kind",
        ),
        (["a/x.avi", "b/y.avi", "test/z.txt"], Grouping(), "test is named as a split, beside the class folders a, b"),
        (["train/a/x.avi", "Val/b/y.avi", "valid/b/z.avi"], Grouping(), "its folders Val and valid are the same split"),
        (["a/train/x.avi", "b/y.avi"], Grouping(), r"b/y\.avi: is not in a folder train, val or test of its class"),
        (["train/a/x.avi", "val/b/y.avi"], Grouping(seed=1), "its folders give the split; leave out the options"),
        (["a/1.jpg", "b/v/1.jpg"], Grouping(), r"/a: is not in a class folder, .*frames in CLASS/VIDEO/000001\.jpg"),
        (
            ["a/v/1.jpg", "b/v/01.jpg"],
            Grouping(),
            r"frames of a/v start with 1\.jpg, those of b/v with 01\.jpg; name them",
        ),
        (
            ["a/v/7.jpg", "b/v/x.jpg"],
            Grouping(),
            r"a/v: its first frame is 7\.jpg; frames must be numbered from 0 or 1",
        ),
        (["a/x.avi", "b/v_g01_.avi"], Grouping(r"_g(\d+)_"), r"a/x\.avi: --group-pattern .* is not found"),
        (["a/x.avi", "a/x.mp4", "b/y.avi"], Grouping(), r"a/x\.avi and a/x\.mp4 differ only in suffix"),
        (["a/x.avi", "b/y.avi"], Grouping("("), "is not a regular expression"),
        (["a/x.avi", "b/y.avi"], Grouping(val_share=1.0), "--val-share must be between 0 and 1"),
        (["a/x.avi", "b/y.avi"], Grouping(val_groups=frozenset((1,))), "need --group-pattern"),
        (["a/x.avi", "b/y.avi"], Grouping(".", val_groups=frozenset((1,))), "--group-pattern finds 'x'"),
        (["a/2.avi", "b/3.avi"], Grouping(".", val_groups=frozenset((1, 4))), "no video is in one of the groups 1, 4"),
        (["train/x.avi", "train/a/y.avi", "val/a/z.avi"], Grouping(), r"train/x\.avi: is not in a class folder"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, names, grouping, sentence):
    with pytest.raises(PrepareError, match=sentence):
        read(scan(touch(tmp_path, *names)), grouping, "mine")


@pytest.mark.parametrize("name", [" c/x.avi", "c/x .avi", "c/line\nbreak.avi", "c/\udcff.avi"])
def test_names_that_a_list_cannot_hold(tmp_path, caplog, name):
    videos = touch(tmp_path / "videos", "b/y.avi", "a/y.avi")
    write_avi(videos / name)
    assert command.main(["folder", "--videos", str(videos), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 1
    assert "a list file" in caplog.text


def test_parse_groups():
    assert parse_groups("8-12") == {8, 9, 10, 11, 12}
    assert parse_groups("1,3, 24-25") == {1, 3, 24, 25}
    for text in ("", "8-", "12-8", "a", "1,,2", "-3"):
        with pytest.raises(PrepareError, match="--val-groups"):
            parse_groups(text)


def test_a_report_shows_control_characters_escaped(tmp_path: Path) -> None:
    Report("x", {}, 1, {}, missing=[("a\x1b[2J.mp4", "train, c")]).write(tmp_path)
    assert r"a\x1b[2J.mp4: train, c" in (tmp_path / "report.txt").read_text()
