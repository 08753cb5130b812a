"""Class-per-folder videos: whole groups, the draw, labels, and what is said about folders that do not fit."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from datasets.prepare import __main__ as command
from datasets.prepare.catalogue import scan
from datasets.prepare.formats.folder import Grouping, parse_groups, read
from datasets.prepare.lists import PrepareError
from tests.helpers.video_files import write_avi

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
UCF = SHARED / "ucf101_10" / "UCF-101"
CLASS_IND = SHARED / "annotations" / "ucf101" / "classInd.txt"


def place(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def sides(root: Path, grouping: Grouping) -> tuple[set[str], set[str]]:
    entries = read(scan(root), grouping, "mine").entries
    return tuple({entry.path for entry in entries if entry.split == side} for side in ("train", "val"))


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """Two classes with ten groups each, one to three videos a group."""
    names = [f"{c}/v_g{group:02d}_c{n}.avi" for c in ("A", "b") for group in range(10) for n in range(group % 3 + 1)]
    return place(tmp_path / "videos", *names)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_never_split(grouped, across, seed):
    train, val = sides(grouped, Grouping(r"_g(\d+)_", across_classes=across, val_share=0.3, seed=seed))
    groups = [{(path[0] if not across else "", path[5:7]) for path in side} for side in (train, val)]
    assert not groups[0] & groups[1] and len(train) + len(val) == 38
    assert abs(len(val) - 0.3 * 38) <= 3
    assert {path[0] for path in train} == {path[0] for path in val} == {"A", "b"}


def test_the_draw_depends_on_the_seed_and_the_class_alone(grouped):
    grouping = Grouping(r"_g(\d+)_", seed=1)
    before = sides(grouped, grouping)
    assert before == sides(grouped, grouping)
    assert any(before != sides(grouped, Grouping(r"_g(\d+)_", seed=seed)) for seed in range(2, 6))
    place(grouped, "A0/v_g01_c0.avi", "A0/v_g02_c0.avi")
    after = sides(grouped, grouping)
    assert before[1] == {path for path in after[1] if not path.startswith("A0/")}


def test_named_groups(grouped):
    train, val = sides(grouped, Grouping(r"_g(\d+)_", val_groups=parse_groups("8-9")))
    assert {path[5:7] for path in val} == {"08", "09"} and {path[5:7] for path in train} == {
        f"{n:02d}" for n in range(8)
    }


def test_without_a_pattern_every_video_is_a_group(tmp_path):
    place(tmp_path, *(f"{c}/{n}.mp4" for c in "ab" for n in range(10)))
    train, val = sides(tmp_path, Grouping(val_share=0.2))
    assert len(val) == 4 and len(train) == 16


@pytest.mark.skipif(not CLASS_IND.is_file(), reason=f"{CLASS_IND} is not there")
def test_labels_follow_the_owners_order(tmp_path):
    owners = [line.split()[1] for line in CLASS_IND.read_text().splitlines()]
    for name in reversed(owners):
        place(tmp_path, f"UCF-101/{name}/v_{name}_g01_c01.avi")
    plan = read(scan(tmp_path), Grouping(), "mine")
    assert plan.classes == tuple(owners) and [entry.label for entry in plan.entries] == list(range(101))


@pytest.mark.skipif(not UCF.is_dir(), reason=f"{UCF} is not there")
def test_ucf101_by_groups(tmp_path):
    pattern = ["--group-pattern", r"_g(\d+)_", "--val-groups", "8-12"]
    arguments = ["folder", "--videos", str(UCF), "--out", str(tmp_path), "--videos-only", *pattern]
    assert command.main(arguments) == 0
    rows = {side: (tmp_path / f"{side}.txt").read_text().splitlines() for side in ("train", "val")}
    groups = defaultdict(set)
    for side, lines in rows.items():
        groups[side] = {int(line.split("_g")[1][:2]) for line in lines}
    assert groups == {"train": set(range(13, 26)), "val": set(range(8, 13))}
    assert (len(rows["train"]), len(rows["val"])) == (242, 95)
    assert rows["train"][0] == "BodyWeightSquats/v_BodyWeightSquats_g13_c01.avi 0"


def test_identical_files_across_the_sides(tmp_path, caplog):
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
        (["train/a/x.avi", "val/a/y.avi"], Grouping(), "its folders train, val are splits, not classes"),
        (["a/x.avi", "b/v_g01_.avi"], Grouping(r"_g(\d+)_"), r"a/x\.avi: --group-pattern .* is not found"),
        (["a/x.avi", "a/x.mp4", "b/y.avi"], Grouping(), r"a/x\.avi and a/x\.mp4 differ only in suffix"),
        (["a/x.avi", "b/y.avi"], Grouping("("), "is not a regular expression"),
        (["a/x.avi", "b/y.avi"], Grouping(val_share=1.0), "--val-share must lie between 0 and 1"),
        (["a/x.avi", "b/y.avi"], Grouping(val_groups=frozenset((1,))), "need --group-pattern"),
        (["a/x.avi", "b/y.avi"], Grouping(".", val_groups=frozenset((1,))), "--group-pattern finds 'x'"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, names, grouping, sentence):
    with pytest.raises(PrepareError, match=sentence):
        read(scan(place(tmp_path, *names)), grouping, "mine")


@pytest.mark.parametrize("name", [" c/x.avi", "c/x .avi", "c/line\nbreak.avi", "c/\udcff.avi"])
def test_names_that_a_list_cannot_hold(tmp_path, caplog, name):
    videos = place(tmp_path / "videos", "b/y.avi", "a/y.avi")
    write_avi(videos / name)
    assert command.main(["folder", "--videos", str(videos), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 1
    assert "a list file" in caplog.text


def test_parse_groups():
    assert parse_groups("8-12") == {8, 9, 10, 11, 12}
    assert parse_groups("1,3, 24-25") == {1, 3, 24, 25}
    for text in ("", "8-", "12-8", "a", "1,,2", "-3"):
        with pytest.raises(PrepareError, match="--val-groups"):
            parse_groups(text)
