"""Packed frames are the folder's, byte for byte; a zip is complete or absent; what is broken is named in one sentence."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common.files import try_lock
from datasets import packed_frames
from datasets.frame_names import FrameNames
from datasets.packed_frames import PackedVideo, main, pack, write_packed
from tests.helpers.packs import VIDEOS, assert_packed, content, failure, make_frames

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Hidden files and folders do not count."""
    frames = make_frames(tmp_path_factory.mktemp("data") / "frames")
    (frames / ".cache").mkdir()
    (frames / "z/.DS_Store").write_bytes(b"x")
    return frames


@pytest.fixture(scope="module")
def packed(frames):
    """For reading only."""
    pack(frames, frames.parent / "packed", jobs=2)
    return frames.parent / "packed"


# ---- packing


def test_every_frame_is_the_folders(frames, packed):
    assert_packed(packed, frames)


def test_frames_are_stored_under_plain_names_in_order(packed):
    with zipfile.ZipFile(packed / "a/v_1.zip") as archive:
        assert archive.namelist() == [f"{number:06d}.jpg" for number in range(1, 13)]
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        assert archive.testzip() is None


@pytest.mark.skipif(shutil.which("unzip") is None, reason="the program unzip is not installed")
def test_the_program_unzip_gives_the_folder_back(frames, packed, tmp_path):
    subprocess.run(["unzip", "-q", packed / "d/e/f.zip", "-d", tmp_path], check=True, capture_output=True)
    assert content(tmp_path) == content(frames / "d/e/f")
    assert stat.S_IMODE((tmp_path / "000001.jpg").stat().st_mode) == 0o644


def test_equal_frames_give_equal_zips(frames, packed, tmp_path):
    """Other times of the files, another order of making them, other jobs."""
    for name in reversed(VIDEOS):
        shutil.copytree(frames / name, tmp_path / "frames" / name, copy_function=shutil.copyfile)
    pack(tmp_path / "frames", tmp_path / "packed", jobs=1)
    assert content(tmp_path / "packed") == content(packed)


def test_packed_videos_are_left_out_and_missing_ones_made(frames, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    (tmp_path / "copy/a/v_10.zip").unlink()
    (tmp_path / "copy/a/.v_10.zip.partial").write_bytes(b"PK\3\4")  # of a run that was killed
    before = {file: file.stat().st_ino for file in (tmp_path / "copy").rglob("*.zip")}
    pack(frames, tmp_path / "copy", jobs=2)
    assert {file: file.stat().st_ino for file in before} == before
    assert_packed(tmp_path / "copy", frames)


def test_zips_may_stand_beside_their_folders(tmp_path):
    frames = make_frames(tmp_path / "frames", {"a/v": 3, "b": 2})
    for _ in range(2):  # the second time, the zips are there already
        pack(frames, frames)
    assert (frames / "a/v.zip").is_file() and (frames / "b.zip").is_file() and len(content(frames)) == 5 + 2


def test_another_zip_is_refused_and_stays(frames, packed, tmp_path):
    other = make_frames(tmp_path / "other", {"z": 9, "new": 2})
    shutil.copytree(packed, tmp_path / "copy")
    message = failure(pack, other, tmp_path / "copy")
    assert message.startswith(f"{tmp_path}/copy/z.zip: holds other frames than {other}/z; delete it")
    assert content(tmp_path / "copy") == content(packed)
    os.truncate(tmp_path / "copy/z.zip", 100)
    assert "z.zip: is damaged or no zip" in failure(pack, frames, tmp_path / "copy")
    assert f"lies inside the frames, {other}" in failure(pack, other, other / "x")


KINDS = {
    "gap": "a/v: 000003.jpg is missing, but 000005.jpg is there; frames are named '{:06d}.jpg' from 1 on",
    "stray": "a/v: 000006.jpg is missing, but notes.txt is there",
    "low": "a/v: 000006.jpg is missing, but 000000.jpg is there",
    "empty": "c/v: holds no frames",
    "nested": "a/v/000001.jpg: lies outside the frame folders",
    "outside": "README: lies outside the frame folders",
    "loop": "c/up: is a link to a folder that holds it",
}


@pytest.mark.parametrize("kind", KINDS)
def test_folders_that_cannot_be_packed(tmp_path, kind):
    """Nothing is written, not even the other videos."""
    frames = make_frames(tmp_path / "frames", {"a/v": 5, "b": 3})
    if kind == "gap":
        (frames / "a/v/000003.jpg").unlink()
    elif kind == "stray":
        (frames / "a/v/notes.txt").touch()
    elif kind == "low":
        (frames / "a/v/000000.jpg").touch()
    elif kind == "empty":
        (frames / "c/v").mkdir(parents=True)
    elif kind == "nested":
        (frames / "a/v/w").mkdir()
    elif kind == "outside":
        (frames / "README").touch()
    else:
        (frames / "c").mkdir()
        (frames / "c/up").symlink_to(frames)
    assert failure(pack, frames, tmp_path / "packed").startswith(f"{frames}/{KINDS[kind]}")
    assert not (tmp_path / "packed").exists()


def test_all_bad_folders_are_named(tmp_path, caplog):
    frames = make_frames(tmp_path / "frames", {"a": 2, "b": 3, "c": 3})
    for name in "bc":
        (frames / name / "000002.jpg").unlink()
    assert "2 videos cannot be packed" in failure(pack, frames, tmp_path / "packed")
    assert all(f"{frames / name}: 000002.jpg is missing" in caplog.text for name in "bc")
    (tmp_path / "nothing").mkdir()
    assert "holds no frame folders" in failure(pack, tmp_path / "nothing", tmp_path / "packed")
    assert "there is no such folder" in failure(pack, tmp_path / "nowhere", tmp_path / "packed")


@pytest.mark.parametrize("template", ["frame.jpg", "img/{:05d}.jpg", ".{}", "{", "{:q}", "{a}", "{0}{1}"])
def test_bad_templates(template, tmp_path):
    assert "--image-tmpl" in failure(pack, tmp_path, tmp_path / "out", FrameNames(template))


def test_frames_of_another_template(tmp_path):
    (tmp_path / "frames/v").mkdir(parents=True)
    for number in range(1, 12):
        (tmp_path / f"frames/v/img2_{number}.png").write_bytes(bytes([number]) * (number - 1))  # the first is empty
    pack(tmp_path / "frames", tmp_path / "packed", FrameNames("img2_{}.png"))
    video = PackedVideo(tmp_path / "packed/v.zip")
    assert [video.read(f"img2_{number}.png") for number in range(1, 12)] == [bytes([n]) * (n - 1) for n in range(1, 12)]


def test_frames_that_are_numbered_from_0(tmp_path):
    frames = make_frames(tmp_path / "frames", {"v": 3})
    for number in range(3):
        (frames / f"v/{number + 1:06d}.jpg").rename(frames / f"v/{number:06d}.jpg")
    message = failure(pack, frames, tmp_path / "packed")
    assert message.endswith("its files are 000000.jpg to 000002.jpg: set --index-base 0")
    assert main([str(frames), str(tmp_path / "packed"), "--index-base", "0"]) == 0
    assert list(PackedVideo(tmp_path / "packed/v.zip").sizes()) == ["000000.jpg", "000001.jpg", "000002.jpg"]


def test_too_little_space_is_seen_before(frames, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 0, 200_000))
    assert "needs 245.0 kB, but the disk has 200.0 kB free" in failure(pack, frames, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_one_run_at_a_time(frames, tmp_path):
    (tmp_path / "packed").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, tmp_path / "packed/.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert "another process is packing frames there" in failure(pack, frames, tmp_path / "packed")
        other.communicate(b"\n")
    with open(tmp_path / "packed/.lock", "w") as lock:
        assert try_lock(lock)
    pack(frames, tmp_path / "packed")


def test_frames_that_fail_leave_what_was_there(tmp_path):
    def broken():
        yield "000001.jpg", b"1"
        raise ValueError("the decoder failed")

    for _ in range(2):
        with pytest.raises(ValueError, match="the decoder failed"):
            write_packed(tmp_path / "a/v.zip", broken())
        assert list((tmp_path / "a").iterdir()) == []
    write_packed(tmp_path / "a/v.zip", [("000001.jpg", b"1")])
    with pytest.raises(ValueError, match="the decoder failed"):
        write_packed(tmp_path / "a/v.zip", broken())
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a/v.zip"]
    assert PackedVideo(tmp_path / "a/v.zip").read("000001.jpg") == b"1"


# ---- the command


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "datasets.packed_frames", *map(str, words)]


def test_command_line(frames, tmp_path, capsys):
    run = subprocess.run(command(frames, tmp_path / "packed", "--jobs", 2), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_packed(tmp_path / "packed", frames)
    assert main([str(frames), str(tmp_path / "packed")]) == 0
    assert main([str(tmp_path / "none"), str(tmp_path / "x")]) == 1
    assert main([str(frames), str(tmp_path / "x"), "--image-tmpl", "x"]) == 1
    for wrong in ([str(frames)], [str(frames), "x", "--jobs", "0"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "--jobs must be 1 or more" in capsys.readouterr().err


def test_a_full_disk_and_ctrl_c_keep_finished_zips_and_leave_no_half(tmp_path):
    """A limit on the size of files stands for the full disk: the second video is larger than it.

    That video is long, so that the interrupt comes while it is packed, and most of its frames are links to one.
    """
    many = 8000
    frames, out = make_frames(tmp_path / "frames", {"a": 20, "b": 100}), tmp_path / "packed"
    for number in range(101, many + 1):
        os.link(frames / "b/000001.jpg", frames / f"b/{number:06d}.jpg")
    run = subprocess.run(
        command(frames, out, "--jobs", 1),
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        capture_output=True,
        text=True,
    )
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert last.startswith(f"{out}/b.zip: cannot be written ([Errno 27] File too large") and "continues" in last
    assert sorted(file.name for file in out.iterdir()) == [".lock", "a.zip"]

    number = (out / "a.zip").stat().st_ino
    process = subprocess.Popen(command(frames, out), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for((out / ".b.zip.partial").exists, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors and "interrupted" in errors.splitlines()[-1]
    assert {file.name for file in out.iterdir()} <= {".lock", "a.zip", "b.zip"}
    pack(frames, out)
    assert_packed(out, frames, {"a": 20, "b": many})
    assert (out / "a.zip").stat().st_ino == number


def test_a_run_that_is_killed_is_continued(tmp_path):
    """Whether its worker, which ends half a second later, has finished the zip meanwhile or not."""
    many = 16000
    frames, out = make_frames(tmp_path / "frames", {"a": 20, "b": 1}), tmp_path / "packed"
    for number in range(2, many + 1):
        os.link(frames / "b/000001.jpg", frames / f"b/{number:06d}.jpg")
    process = subprocess.Popen(command(frames, out, "--jobs", 1), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for((out / ".b.zip.partial").exists, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(1)
    assert not (out / "b.zip").exists() or len(PackedVideo(out / "b.zip")) == many
    subprocess.run(command(frames, out), cwd=ROOT, check=True, capture_output=True)
    assert_packed(out, frames, {"a": 20, "b": many})
    assert not list(out.glob(".*.partial"))


def wait_for(condition, process) -> None:
    for _ in range(6000):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.005)
    raise AssertionError("nothing happened for 30 seconds")


def test_a_worker_that_is_killed_is_named(frames, tmp_path, monkeypatch):
    class Dead:
        __init__ = __exit__ = lambda self, *_: None
        __enter__ = lambda self: self  # noqa: E731

        def run(self, function, tasks):
            for task in tasks:
                yield task, function(task) if function is not packed_frames._pack_folder else None

    monkeypatch.setattr(packed_frames, "Workers", Dead)
    assert "the process at work on it was killed; run the command again" in failure(pack, frames, tmp_path / "packed")


# ---- reading


def test_frames_and_zips_that_are_not_there(packed, tmp_path):
    video = PackedVideo(packed / "b c/v.zip")
    assert len(video) == 1 and "000001.jpg" in video and "000002.jpg" not in video
    assert failure(video.read, "000002.jpg") == f"{packed}/b c/v.zip: 000002.jpg is missing; the zip holds 1 frames"
    assert "none.zip: cannot be read (No such file or directory)" in failure(PackedVideo, tmp_path / "none.zip")


def test_a_zip_that_is_cut_off_or_something_else(packed, tmp_path):
    whole = (packed / "a/v_1.zip").read_bytes()
    for part in (b"", b"no zip" * 100, whole[:-1], whole[: len(whole) // 2]):
        (tmp_path / "v.zip").write_bytes(part)
        assert failure(PackedVideo, tmp_path / "v.zip").startswith(f"{tmp_path}/v.zip: is damaged or no zip")


def test_damage_anywhere_is_an_error_or_harmless(packed, tmp_path):
    """Whatever byte is changed: each frame is right, or an error that names the zip."""
    path = tmp_path / "v.zip"
    whole = (packed / "a/v_1.zip").read_bytes()
    frames = {name: PackedVideo(packed / "a/v_1.zip").read(name) for name in PackedVideo(packed / "a/v_1.zip").sizes()}
    rng = np.random.default_rng(0)
    positions = [*rng.integers(len(whole), size=100), *range(100), *range(len(whole) - 800, len(whole), 3)]
    damaged = 0
    for position in positions:
        path.write_bytes(
            whole[:position] + bytes([whole[position] ^ int(rng.integers(1, 256))]) + whole[position + 1 :]
        )
        try:
            video = PackedVideo(path)
        except packed_frames.PackError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            damaged += 1
            continue
        for name, data in frames.items():
            try:
                assert video.read(name) == data
            except packed_frames.PackError as error:
                assert str(path) in str(error) and name in str(error)
                damaged += 1
    assert damaged > 200


def test_handles_are_closed(packed):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    video = PackedVideo(packed / "a/v_1.zip")
    assert count() == before + 1 and video.read("000003.jpg")
    del video
    assert count() == before
