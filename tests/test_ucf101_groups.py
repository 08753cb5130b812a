"""UCF101 by whole groups: the split, the extraction of real clips, and what is said about broken ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import decord
import numpy as np
import pytest
from PIL import Image

from datasets.prepare import ucf101_groups
from datasets.prepare.lists import PrepareError
from datasets.prepare.ucf101_groups import parse_groups, prepare

UCF = Path(__file__).resolve().parents[2] / "shared" / "data" / "ucf101_10" / "UCF-101"
CLASS_IND = UCF.parents[1] / "annotations" / "ucf101" / "classInd.txt"
# Two classes, both sides; the folder's name and the files' differ in case; g20_c01 declares 120 frames, 116 decode.
CLIPS = (
    "HandstandPushups/v_HandStandPushups_g08_c03.avi",
    "HandstandPushups/v_HandStandPushups_g13_c01.avi",
    "JumpingJack/v_JumpingJack_g08_c01.avi",
    "JumpingJack/v_JumpingJack_g20_c01.avi",
)
missing = [clip for clip in CLIPS if not (UCF / clip).is_file()]
needs_clips = pytest.mark.skipif(bool(missing), reason=f"{UCF} lacks {', '.join(missing)}")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    for clip in CLIPS:
        (root / clip).parent.mkdir(parents=True, exist_ok=True)
        (root / clip).symlink_to(UCF / clip)
    return root


def rows(path: Path) -> list[list[str]]:
    return [line.split(" ") for line in path.read_text().splitlines()]


def place(root: Path, name: str, data: bytes = b"x") -> Path:
    """A file that is no video, under its class folder."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@needs_clips
def test_lists_of_videos(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ucf101_groups.main(["--videos", str(clips), "--out", str(out)]) == 0
    assert rows(out / "train.txt") == [[CLIPS[1], "0"], [CLIPS[3], "1"]]
    assert rows(out / "val.txt") == [[CLIPS[0], "0"], [CLIPS[2], "1"]]
    assert (out / "labels.csv").read_text() == "id,name\n0,HandstandPushups\n1,JumpingJack\n"
    assert sorted(path.name for path in out.iterdir()) == ["labels.csv", "train.txt", "val.txt"]


@needs_clips
def test_frames_are_those_that_decode(clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    assert prepare(clips, out, frames=True, short_side=32) == (2, 2)
    counts = {}
    for path, frames, _ in rows(out / "train.txt") + rows(out / "val.txt"):
        names = sorted(file.name for file in (out / "frames" / path).iterdir())
        assert names == [f"{number:06d}.jpg" for number in range(1, int(frames) + 1)]
        assert Image.open(out / "frames" / path / names[-1]).size == (43, 32)  # 320 x 240
        counts[Path(path).name] = int(frames)
    declared = {Path(clip).stem: len(decord.VideoReader(str(UCF / clip), num_threads=1)) for clip in CLIPS}
    assert declared.pop("v_JumpingJack_g20_c01") == 120 and counts.pop("v_JumpingJack_g20_c01") == 116
    assert counts == declared
    warnings = [record.getMessage() for record in caplog.records if "declares" in record.getMessage()]
    assert warnings == [f"{clips / CLIPS[3]} declares 120 frames, 116 decode"]


@needs_clips
def test_extracted_frames_show_the_video(clips: Path, tmp_path: Path) -> None:
    prepare(clips, tmp_path / "out", frames=True, short_side=240, quality=95)
    jpeg = Image.open(tmp_path / "out" / "frames" / CLIPS[2].removesuffix(".avi") / "000031.jpg")
    assert jpeg.size == (320, 240)
    reader = decord.VideoReader(str(UCF / CLIPS[2]), num_threads=1)
    distance = {index: np.abs(reader[index].asnumpy() - np.asarray(jpeg, int)).mean() for index in range(28, 33)}
    assert min(distance, key=distance.get) == 30 and distance[30] < 4, distance  # levels of 255


@needs_clips
def test_interrupted_extraction_resumes(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(clips, out, frames=True, short_side=32)
    lists = {name: (out / name).read_text() for name in ("train.txt", "val.txt")}
    kept, lost = (out / "frames" / clip.removesuffix(".avi") for clip in CLIPS[:2])
    before = kept.stat().st_mtime_ns, os.listdir(kept)
    half = lost.with_name(f".{lost.name}.partial")  # as a killed process leaves it
    lost.rename(half)
    (half / "000002.jpg").write_bytes(b"torn")
    prepare(clips, out, frames=True, short_side=32)
    assert (kept.stat().st_mtime_ns, os.listdir(kept)) == before
    assert not half.exists() and Image.open(lost / "000002.jpg").size == (43, 32)
    assert lists == {name: (out / name).read_text() for name in lists}
    with pytest.raises(PrepareError, match=r"frames\.json: frames were extracted with .*32.*not .*64"):
        prepare(clips, out, frames=True, short_side=64)


@needs_clips
@pytest.mark.parametrize("frames", [False, True])
def test_unreadable_video(clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, frames: bool) -> None:
    broken = place(clips, "JumpingJack/v_JumpingJack_g21_c01.avi", b"not a video")
    arguments = ["--videos", str(clips), "--out", str(tmp_path / "out"), *(["--frames"] if frames else [])]
    assert ucf101_groups.main(arguments) == 1
    assert f"{broken} cannot be read" in caplog.text and "1 of 5 videos cannot be read" in caplog.text
    assert not (tmp_path / "out" / "train.txt").exists()
    assert ucf101_groups.main([*arguments, "--allow-missing"]) == 0
    assert len(rows(tmp_path / "out" / "train.txt")) == len(rows(tmp_path / "out" / "val.txt")) == 2


@needs_clips
def test_identical_files_across_the_sides(clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(UCF / CLIPS[2], clips / "JumpingJack" / "v_JumpingJack_g12_c05.avi")  # both in val: nothing to say
    prepare(clips, tmp_path / "out")
    assert "byte-identical" not in caplog.text
    shutil.copy(UCF / CLIPS[2], clips / "JumpingJack" / "v_JumpingJack_g14_c01.avi")
    prepare(clips, tmp_path / "out")
    twin = clips / "JumpingJack" / "v_JumpingJack_g14_c01.avi"
    assert f"{twin} (train) and {clips / CLIPS[2]} (val) are byte-identical" in caplog.text
    assert caplog.text.count("byte-identical") == 2  # g08_c01 and g12_c05 against g14_c01


@pytest.mark.skipif(not UCF.is_dir(), reason=f"{UCF} is not there")
def test_groups_stay_whole_on_the_whole_subset(tmp_path: Path) -> None:
    train, val = prepare(UCF, tmp_path)
    files = list(UCF.rglob("*.avi"))
    assert train + val == len(files) and val == sum(8 <= int(path.stem[-6:-4]) <= 12 for path in files)
    groups = {
        side: {(path.split("/")[0], path.split("_g")[1][:2]) for path, _ in rows(tmp_path / f"{side}.txt")}
        for side in ("train", "val")
    }
    assert not groups["train"] & groups["val"]
    assert {group for _, group in groups["val"]} == {"08", "09", "10", "11", "12"}


@pytest.mark.skipif(not CLASS_IND.is_file(), reason=f"{CLASS_IND} is not there")
def test_labels_follow_the_owners_order(tmp_path: Path) -> None:
    owners = [line.split()[1] for line in CLASS_IND.read_text().splitlines()]
    for name in reversed(owners):
        place(tmp_path, f"{name}/v_{name}_g01_c01.avi")
    videos, names = ucf101_groups.find_videos(tmp_path)
    assert names == owners and [video.label for video in videos] == list(range(101))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Lunges/clip.avi", "does not fit v_<Class>_gNN_cMM.avi"),
        ("Lunges/v_Lunges_g01_c01.mp4", "does not fit"),
        ("Lunges/v_PullUps_g01_c01.avi", "the clip's class is PullUps, its folder's is Lunges"),
        ("Lunges/.hidden", "holds no <Class>"),
    ],
)
def test_names_that_do_not_fit(tmp_path: Path, name: str, sentence: str, caplog: pytest.LogCaptureFixture) -> None:
    place(tmp_path / "videos", name)
    assert ucf101_groups.main(["--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "out")]) == 1
    assert sentence in caplog.text and str(tmp_path / "videos") in caplog.text
    assert not (tmp_path / "out").exists()


def test_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="is not a folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out")


@needs_clips
def test_empty_side(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="no video falls on the val side"):
        prepare(clips, tmp_path / "out", test_groups=parse_groups("24-25"))


def test_foreign_frames_are_not_taken_for_ours(tmp_path: Path) -> None:
    place(tmp_path / "videos", "Lunges/v_Lunges_g01_c01.avi")
    place(tmp_path / "out", "frames/Lunges/v_Lunges_g01_c01/000001.jpg")
    with pytest.raises(PrepareError, match="not an output of this command"):
        prepare(tmp_path / "videos", tmp_path / "out", frames=True)


def test_parse_groups() -> None:
    assert parse_groups("8-12") == {8, 9, 10, 11, 12}
    assert parse_groups("1,3, 24-25") == {1, 3, 24, 25}
    for text in ("", "8-", "12-8", "a", "1,,2", "-3"):
        with pytest.raises(PrepareError, match="--test-groups"):
            parse_groups(text)
