"""Packs are the same bytes however they came about, and folders that cannot be packed are named."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datasets.pack.__main__ import main
from datasets.pack.format import HEADER, UNFINISHED, Pack, Settings, is_pack, shard_name
from datasets.pack.verify import reindex
from datasets.pack.workers import Work, run_tasks
from datasets.pack.writer import write_pack
from tests.helpers.packs import SMALL, VIDEOS, assert_equal, content, failure, make_frames

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return make_frames(tmp_path_factory.mktemp("data") / "frames")


@pytest.fixture(scope="module")
def whole(frames):
    """For reading only; hidden files and folders do not count."""
    (frames / ".cache").mkdir()
    (frames / "z/.DS_Store").write_bytes(b"x")
    write_pack(frames, frames.parent / "frames.pack", settings=SMALL, jobs=2)
    return frames.parent / "frames.pack"


@pytest.fixture
def pack(whole, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "copy.pack"))


def test_two_runs_give_the_same_bytes(frames, whole, tmp_path):
    """Other times of the files, another order of making them, other jobs."""
    copy = tmp_path / "frames"
    for name in reversed(VIDEOS):
        shutil.copytree(frames / name, copy / name, copy_function=shutil.copyfile)
    write_pack(copy, tmp_path / "one.pack", settings=SMALL, jobs=1)
    assert content(tmp_path / "one.pack") == content(whole)


def test_a_complete_pack_is_left_alone_and_another_one_refused(frames, whole, pack, tmp_path):
    times = {file: file.stat().st_mtime_ns for file in pack.iterdir()}
    write_pack(frames, pack, settings=SMALL)
    assert {file: file.stat().st_mtime_ns for file in pack.iterdir()} == times
    assert "has shard_size 100000, not 7" in failure(write_pack, frames, pack, settings=Settings(shard_size=7))
    other = make_frames(tmp_path / "other", {"z": 10})
    assert "holds other videos or frames" in failure(write_pack, other, pack, settings=SMALL)
    assert content(pack) == content(whole)
    assert "holds files that are no pack" in failure(write_pack, frames, other)
    assert "must not lie inside" in failure(write_pack, other, other / "x.pack")


def test_list_files_choose_and_are_verified(frames, tmp_path):
    train, val = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("b c/Größe 動画 11 0\na/v_1 10 1\n", encoding="utf-8")
    val.write_text("a/v_1/ 12 1\n")
    write_pack(frames, tmp_path / "x.pack", [str(train), str(val)])
    assert list(Pack(tmp_path / "x.pack")) == ["a/v_1", "b c/Größe 動画"]
    assert Pack(tmp_path / "x.pack").num_frames("a/v_1") == 12  # all that are there
    for row, sentence in {
        "a/v_1 13 1": "line 1: declares 13 frames, ",
        "a/v_2 3 1": "line 1: " + str(frames / "a/v_2"),
        "../x 3 1": "is not below",
        "/x 3 1": "is not below",
        "z 0 0": "must be above 0",
    }.items():
        val.write_text(row + "\n")
        message = failure(write_pack, frames, tmp_path / "y.pack", [str(train), str(val)])
        assert sentence in message and str(val) in message and not (tmp_path / "y.pack").exists()


@pytest.mark.parametrize("kind", ["gap", "stray", "low", "empty", "folder", "nested", "outside", "name", "loop"])
def test_folders_that_cannot_be_packed(tmp_path, kind):
    frames = make_frames(tmp_path / "frames", {"a/v": 5, "b": 3})
    if kind == "gap":
        (frames / "a/v/000003.jpg").unlink()
    elif kind == "stray":
        (frames / "a/v/notes.txt").touch()
    elif kind == "low":
        (frames / "a/v/000000.jpg").touch()
    elif kind == "empty":
        (frames / "c/v").mkdir(parents=True)
    elif kind == "folder":
        (frames / "a/v/000006.jpg").mkdir()
    elif kind == "nested":
        (frames / "a/v/w").mkdir()
    elif kind == "outside":
        (frames / "README").touch()
    elif kind == "name":
        (frames / "a/v").rename(os.fsdecode(os.fsencode(frames) + b"/a/\xe9"))
    else:
        (frames / "c").mkdir()
        (frames / "c/up").symlink_to(frames)
    sentence = {
        "gap": f"{frames}/a/v: 000003.jpg is missing, though 000005.jpg is there",
        "stray": f"{frames}/a/v/notes.txt: does not fit '{{:06d}}.jpg' from 1 on",
        "low": f"{frames}/a/v/000000.jpg: does not fit",
        "empty": f"{frames}/c/v: holds no frames",
        "folder": f"{frames}/a/v/000006.jpg: is no file",
        "nested": f"{frames}/a/v/w: does not fit",
        "outside": f"{frames}/README: lies outside",
        "name": "is not UTF-8",
        "loop": f"{frames}/c/up: is a link to a folder that holds it",
    }
    assert sentence[kind] in failure(write_pack, frames, tmp_path / "x.pack")
    assert not (tmp_path / "x.pack").exists()


def test_all_bad_folders_are_named(tmp_path, caplog):
    frames = make_frames(tmp_path / "frames", {"a": 2, "b": 3, "c": 3})
    for name in "bc":
        (frames / name / "000002.jpg").unlink()
    assert "2 of 3 videos cannot be packed" in failure(write_pack, frames, tmp_path / "x.pack")
    (tmp_path / "nothing").mkdir()
    assert "holds no frame folders" in failure(write_pack, tmp_path / "nothing", tmp_path / "x.pack")
    assert "no such folder" in failure(write_pack, tmp_path / "nowhere", tmp_path / "x.pack")


@pytest.mark.parametrize("template", ["frame.jpg", "{:d}/{:d}.jpg", "img/{:05d}.jpg", "{", "{:q}", "{a}", "{0}{1}"])
def test_bad_templates(template):
    assert "image template" in failure(Settings, template)


def test_frames_from_zero_with_another_template(tmp_path):
    folder = tmp_path / "frames/v"
    folder.mkdir(parents=True)
    for number in range(11):
        (folder / f"img2_{number}.png").write_bytes(bytes([number]) * number)  # the first one is empty: packed as it is
    write_pack(tmp_path / "frames", tmp_path / "x.pack", settings=Settings("img2_{}.png", 0))
    assert [Pack(tmp_path / "x.pack").read("v", index) for index in range(11)] == [bytes([n]) * n for n in range(11)]
    Pack(tmp_path / "x.pack").prefetch("v", range(11))


def test_command_line(frames, whole, tmp_path, capsys):
    assert main(["--verify", str(whole), "--jobs", "1"]) == 0
    assert main(["--verify", str(frames)]) == 1
    assert main(["--frames", str(frames), "--out", str(tmp_path / "x"), "--image-tmpl", "x"]) == 1
    assert main(["--frames", str(frames), "--out", str(tmp_path / "x"), "--list", str(tmp_path / "no.txt")]) == 1
    for wrong in (
        ["--frames", "x"],
        ["--verify", "x", "--shard-size", "1 apple"],
        ["--verify", "x", "--shard-size", "0.5B"],
        ["--verify", "x", "--jobs", "0"],
    ):
        with pytest.raises(SystemExit):
            main(wrong)
    said = capsys.readouterr().err
    assert "is no size such as 1GiB" in said and "is less than one byte" in said


def run_module(*words: object) -> tuple[int, str]:
    """Exit code and last line of the command as one types it: processes that it starts import everything anew."""
    command = [sys.executable, "-m", "datasets.pack", *map(str, words)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in run.stderr
    return run.returncode, run.stderr.strip().splitlines()[-1]


def test_verify_and_reindex_as_commands(frames, whole, pack):
    code, told = run_module("--verify", pack, "--jobs", 2)
    assert code == 0 and told.endswith("all as written")
    for file in pack.iterdir():
        if file.suffix != ".zip":
            file.unlink()
    code, told = run_module("--reindex", pack)
    assert code == 0 and f"indexed {len(VIDEOS)} videos" in told and content(pack) == content(whole)
    shard = pack / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:50] + bytes(50) + shard.read_bytes()[100:])
    code, told = run_module("--verify", pack)
    assert code == 1 and str(shard) in told
    shard.write_bytes(shard.read_bytes()[:-200])
    code, told = run_module("--reindex", pack)
    assert code == 1 and told.startswith(f"{shard}: is no whole zip file")
    assert run_module("--verify", frames) == (1, f"{frames / HEADER}: is missing: this is no pack")


# ---- interrupted, full, out of space


def command(frames: Path, out: Path, *more: str) -> list[str]:
    size = str(SMALL.shard_size)
    return [sys.executable, "-m", "datasets.pack", "--frames", frames, "--out", out, "--shard-size", size, *more]


def wait_for(condition, process) -> None:
    for _ in range(3000):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.005)
    raise AssertionError("nothing happened for 15 seconds")


def test_kill_and_resume(frames, whole, tmp_path):
    out = tmp_path / "x.pack"
    process = subprocess.Popen(command(frames, out, "--jobs", "1"), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for((out / shard_name(1)).exists, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.5)  # the worker ends by itself, at its next video
    done = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.glob("*.zip")}
    assert 2 <= len(done) < len(list(whole.glob("*.zip")))
    assert "unfinished; run the command that writes it again" in failure(Pack, out) and is_pack(out)
    assert "unfinished" in failure(reindex, out)
    assert "has index_base 1, not 0" in failure(write_pack, frames, out, settings=Settings("{:06d}.jpg", 0, 100_000))
    (out / UNFINISHED / "half.zip").write_bytes(b"PK\3\4")
    shutil.copy(out / shard_name(0), out / shard_name(2))  # a whole zip, but nothing says that it is finished
    subprocess.run(command(frames, out), cwd=ROOT, check=True, capture_output=True)
    assert content(out) == content(whole)
    now = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.glob("*.zip")}
    assert {name: now[name] for name in done} == done


def test_ctrl_c_and_a_full_disk_keep_finished_shards(tmp_path):
    """A limit on the size of files stands for the full disk: the second shard's one video is larger than it.

    That video is long, so that the interrupt comes while it is packed, and most of its frames are links to one.
    """
    many = 8000
    frames = make_frames(tmp_path / "frames", {"a": 20, "b": 100})
    for number in range(101, many + 1):
        os.link(frames / "b/000001.jpg", frames / f"b/{number:06d}.jpg")
    out = tmp_path / "x.pack"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    run = subprocess.run(
        command(frames, out, "--jobs", "1"), cwd=ROOT, preexec_fn=limit, capture_output=True, text=True
    )
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert last.startswith(f"{out / shard_name(1)}: cannot be written (File too large); finished shards are kept")
    assert (out / shard_name(0)).is_file() and not list((out / UNFINISHED).glob("*.zip"))

    number = (out / shard_name(0)).stat().st_ino
    process = subprocess.Popen(command(frames, out), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((out / UNFINISHED).glob("*.zip")), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors and "interrupted" in errors.splitlines()[-1]
    write_pack(frames, out, settings=SMALL)
    assert_equal(Pack(out), frames, {"a": 20, "b": many})
    assert (out / shard_name(0)).stat().st_ino == number


def test_shards_whose_frames_changed_are_made_again(tmp_path, monkeypatch):
    frames, out = make_frames(tmp_path / "frames", {"a": 20, "b": 20, "c": 20}), tmp_path / "x.pack"
    monkeypatch.setattr("datasets.pack.writer.write_index", lambda *_: 1 / 0)  # stops after the last shard
    with pytest.raises(ZeroDivisionError):
        write_pack(frames, out, settings=SMALL)
    monkeypatch.undo()
    times = [(out / shard_name(number)).stat().st_mtime_ns for number in range(3)]
    file = frames / "b/000007.jpg"
    file.write_bytes(file.read_bytes()[::-1])  # as large as before
    write_pack(frames, out, settings=SMALL)
    same = [(out / shard_name(number)).stat().st_mtime_ns == times[number] for number in range(3)]
    assert same == [True, False, True]
    assert_equal(Pack(out), frames, {"a": 20, "b": 20, "c": 20})


def test_shards_that_a_finished_pack_lost_are_made_again(frames, whole, pack, monkeypatch, caplog):
    (pack / shard_name(0)).unlink()
    os.truncate(pack / shard_name(2), 1000)
    kept = (pack / shard_name(1)).stat().st_ino
    advice = "run the command that wrote the pack, which makes it again"
    assert str(pack / shard_name(0)) in (message := failure(Pack, pack)) and advice in message
    monkeypatch.setattr("datasets.pack.writer.run_tasks", lambda *_: 1 / 0)  # stopped before anything is made again
    with pytest.raises(ZeroDivisionError):
        write_pack(frames, pack, settings=SMALL)
    assert "unfinished" in failure(Pack, pack)
    monkeypatch.undo()
    write_pack(frames, pack, settings=SMALL)
    assert content(pack) == content(whole) and (pack / shard_name(1)).stat().st_ino == kept
    assert sum("makes it again from the frames" in message for message in caplog.messages) == 2
    (pack / shard_name(0)).unlink()
    other = make_frames(frames.parent / "other", {"z": 10})
    assert "holds other videos or frames" in failure(write_pack, other, pack, settings=SMALL)
    assert (pack / HEADER).is_file()


def die(marker: Path, deaths: int) -> Work:
    yield 5
    if len(list(marker.iterdir())) < deaths:
        (marker / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield 5
    return "alive"


class Bar:
    n = 0

    def update(self, step):
        self.n += step


def test_a_shard_whose_process_dies_is_begun_once_more_and_then_named(tmp_path, caplog):
    bar = Bar()
    assert run_tasks(die, {"one.zip": (tmp_path, 1)}, 1, bar) == ["alive"] and bar.n == 10
    assert "one.zip: the process at work on it died (killed by SIGKILL); once more" in caplog.text
    message = failure(run_tasks, die, {"two.zip": (tmp_path, 9)}, 1, bar)
    assert message.startswith("two.zip: the process at work on it died twice (killed by SIGKILL)")
    assert "the same command goes on" in message


def test_too_little_space_is_seen_before(frames, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 0, 200_000))
    message = failure(write_pack, frames, tmp_path / "x.pack")
    assert "needs 2" in message and "has 195.3 KiB free" in message and not (tmp_path / "x.pack").exists()
