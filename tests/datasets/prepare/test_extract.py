"""Extraction: the right frames, kill -9 and resuming, a full disk, crashes, damaged videos, and one run at a time."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from common import workers
from configs.schema import DataConfig
from datasets.annotation import read_list
from datasets.build import build_reader
from datasets.decoders import open_video
from datasets.frame_names import FrameNames
from datasets.packed_frames import PackedVideo
from datasets.prepare import __main__ as command
from datasets.prepare import decode, extract, output_dir
from datasets.prepare.decode import FrameSettings, FrameStore, Outcome, encode_jpeg, probe
from datasets.prepare.frame_folders import count_frames
from datasets.prepare.plan import PrepareError
from tests.helpers.video_files import overwrite, write_avi, write_video

ROOT = Path(__file__).parents[3]
UCF = ROOT.parent / "shared" / "data" / "ucf101_10" / "UCF-101"
SHORT_CLIP = UCF / "JumpingJack" / "v_JumpingJack_g20_c01.avi"  # declares 120 frames, 116 decode
OTHER_CLIP = SHORT_CLIP.with_name("v_JumpingJack_g08_c01.avi")
CORRUPTED = ROOT.parent / "shared" / "data" / "samples" / "corrupted.mp4"
DECODERS = ["pyav", *(["decord"] if importlib.util.find_spec("decord") else [])]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two classes of three videos; names with spaces."""
    for number in range(6):
        write_avi(tmp_path / "in" / f"class {number % 2}" / f"clip {number}.avi", frames=3 + number, seed=number)
    return tmp_path / "in"


def folder(videos: Path, out: Path, *more: str) -> int:
    return command.main(["folder", "--videos", str(videos), "--out", str(out), "--jobs", "2", *more])


def state(out: Path) -> dict[str, int]:
    """Every frame file or zip with its time of writing."""
    files = [path for path in (out / "frames").rglob("*") if path.suffix in (".jpg", ".zip")]
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in files}


def test_frames_lists_and_report(videos, tmp_path):
    out = tmp_path / "out"
    assert folder(videos, out, "--short-side", "24", "--val-share", "0.3") == 0
    records = [
        record for name in ("train", "val") for record in read_list(str(out / f"{name}.txt"), "RGB", num_classes=2)
    ]
    assert sorted((r.path, r.num_frames, r.label) for r in records) == sorted(
        (f"class {n % 2}/clip {n}", 3 + n, n % 2) for n in range(6)
    )
    for record in records:
        names = sorted(os.listdir(out / "frames" / record.path))
        assert names == [f"{number:06d}.jpg" for number in range(1, record.num_frames + 1)]
        shades = [np.asarray(Image.open(out / "frames" / record.path / name)).mean() for name in names]
        np.testing.assert_allclose(shades, int(record.path[-1]) + 20 * np.arange(len(names)), atol=3)
        assert Image.open(out / "frames" / record.path / names[0]).size == (32, 24)
    report = json.loads((out / "report.json").read_text())
    assert sum(split["frames"] for split in report["splits"].values()) == sum(range(3, 9))
    sizes = [path.stat().st_size for path in (out / "frames").rglob("*.jpg")]
    assert sum(split["bytes"] for split in report["splits"].values()) == sum(sizes)
    assert not (out / "partial").exists()


def test_videos_stay_as_they_are(videos, tmp_path):
    out = tmp_path / "out"
    assert folder(videos, out, "--videos-only") == 0
    paths = [record.path for record in read_list(str(out / "train.txt"), "video", num_classes=2)]
    assert paths and all((videos / path).is_file() for path in paths)
    assert not (out / "frames").exists()


def test_encode_jpeg():
    frame = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    frame = np.asarray(Image.fromarray(frame).resize((600, 500)))
    for short_side, size in ((250, (300, 250)), (0, (600, 500)), (1000, (1200, 1000))):
        image = Image.open(io.BytesIO(encode_jpeg(frame, short_side, 90)))
        image.load()
        assert image.size == size


def cut_after(video: Path, frames: int) -> Path:
    """Cut an AVI of `write_avi` off after so many frames; its header still declares all."""
    data = video.read_bytes()
    starts = [match.start() for match in re.finditer(b"00dc....\xff\xd8", data, re.DOTALL)]
    video.write_bytes(data[: [*starts, len(data)][frames]])
    return video


def encoded(path: Path) -> Path:
    return write_video(path, size=(240, 320), crf=1, **{"x264-params": "bframes=2:keyint=15"})


@pytest.mark.parametrize("real", [False, *([True] if SHORT_CLIP.is_file() else [])])
def test_frames_are_those_of_the_decoder(tmp_path, real):
    """A video that is a little shorter than it declares, and the place of a frame in an encoded video."""
    (tmp_path / "in" / "Short").mkdir(parents=True)
    (tmp_path / "in" / "Other").mkdir()
    other = OTHER_CLIP if real else encoded(tmp_path / "other.mp4")
    if real:
        (tmp_path / "in" / "Short" / "a.avi").symlink_to(SHORT_CLIP)
    else:
        cut_after(write_avi(tmp_path / "in" / "Short" / "a.avi", frames=120), 116)
    (tmp_path / "in" / "Other" / "b.avi").symlink_to(other)
    out = tmp_path / "out"
    assert folder(tmp_path / "in", out, "--short-side", "240", "--quality", "95") == 0
    assert len(list((out / "frames" / "Short" / "a").iterdir())) == 116
    assert "Short/a.avi: 120 declared, 116" in (out / "report.txt").read_text()
    jpeg = np.asarray(Image.open(out / "frames" / "Other" / "b" / "000031.jpg"), int)
    video = open_video(str(other), DECODERS[-1])
    distance = {index: np.abs(video.read(np.array([index]))[0] - jpeg).mean() for index in range(28, 33)}
    assert min(distance, key=distance.get) == 30 and distance[30] < 6, distance  # levels of 255


def test_pack(videos, tmp_path, caplog):
    """One zip a video with the files of its folder; lists, resuming, report and snippet as with folders."""
    folders, out = tmp_path / "folders", tmp_path / "out"
    assert folder(videos, folders) == 0
    assert folder(videos, out, "--pack") == 0
    zips = {path: path.stat().st_mtime_ns for path in out.glob("frames/**/*.zip")}
    assert len(zips) == 6 and not list(out.glob("frames/**/*.jpg")) and not (out / "partial").exists()
    for path in zips:
        packed, frames = PackedVideo(path), folders / path.relative_to(out).with_suffix("")
        assert {name: packed.read(name) for name in packed.sizes()} == {
            f.name: f.read_bytes() for f in frames.iterdir()
        }
    for name in ("train.txt", "val.txt", "labels.csv"):
        assert (out / name).read_bytes() == (folders / name).read_bytes()
    report = json.loads((out / "report.json").read_text())
    assert sum(split["bytes"] for split in report["splits"].values()) == sum(path.stat().st_size for path in zips)

    snippet = yaml.safe_load((out / "config_snippet.yaml").read_text())["data"]
    data = DataConfig(**{key: value for key, value in snippet.items() if value is not None}, workers=0, batch_size=1)
    for split in ("train", "val"):
        for record in read_list(str(out / f"{split}.txt"), "RGB", num_classes=2):
            path = os.path.join(snippet[f"{split}_root"], record.path)
            pixels = build_reader(data).open(path, record.num_frames).read(np.arange(record.num_frames))
            shades = int(record.path[-1]) + 20 * np.arange(record.num_frames)
            np.testing.assert_allclose(pixels.mean((1, 2, 3)), shades, atol=3)

    (out / "frames/class 0/clip 0.zip").unlink()
    os.truncate(out / "frames/class 1/clip 1.zip", 100)
    write_avi(videos / "class 0/clip 2.avi", frames=9)
    assert folder(videos, out, "--pack") == 0
    again = {path.stem for path in out.glob("frames/**/*.zip") if zips[path] != path.stat().st_mtime_ns}
    assert again == {"clip 0", "clip 1", "clip 2"} and len(PackedVideo(out / "frames/class 0/clip 2.zip").sizes()) == 9
    assert folder(videos, out) == 1 and "storage zips, not short_side 256, quality 90" in caplog.text


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.005)


SLOW_FRAMES = """
import time
from PIL import Image
save = Image.Image.save
def slow(*arguments, **options):
    time.sleep(0.02)
    return save(*arguments, **options)
Image.Image.save = slow
"""


@pytest.mark.parametrize(
    ("mode", "unfinished"), [("--frames", "partial/*/*/000005.jpg"), ("--pack", "partial/*/.*.zip.partial")]
)
def test_kill_and_resume(tmp_path, mode, unfinished):
    """kill -9 in mid-extraction: finished videos stay untouched, the half-written one is done again, workers end."""
    for number in range(12):
        write_avi(tmp_path / "in" / "ab"[number % 2] / f"{number}.avi", frames=60, size=(320, 240), seed=number)
    out = tmp_path / "out"
    arguments = ["folder", "--videos", str(tmp_path / "in"), "--out", str(out), "--jobs", "2", mode]
    slow = tmp_path / "slow"  # every process of the killed run imports this, so that the kill never comes too late
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW_FRAMES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{slow}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "datasets.prepare", *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(list(out.glob("frames/*/*"))) >= 3 and any(out.glob(unfinished)))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(is_running(int(child)) for child in children))
    before = state(out)
    assert (out / "partial").exists() and not (out / "train.txt").exists()  # workers may have finished their videos
    finished = {Path(name).parent if mode == "--frames" else name for name in before}
    assert 3 <= len(finished) < 12

    assert command.main(arguments) == 0
    after = state(out)
    assert before.items() <= after.items()
    assert len(after) == 12 * (60 if mode == "--frames" else 1) and not (out / "partial").exists()
    if mode == "--frames":
        assert all(Image.open(out / name).size == (341, 256) for name in after)
    else:
        assert all(len(PackedVideo(out / name)) == 60 for name in after)
    report = json.loads((out / "report.json").read_text())
    assert report["extracted_before"] == len(finished)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_half_written_folders_and_changed_videos_are_not_trusted(videos, tmp_path):
    out = tmp_path / "out"
    assert folder(videos, out) == 0
    before = state(out)
    (out / "frames/class 0/clip 0/000002.jpg").unlink()  # a folder that lost a file
    (out / "frames/class 0/clip 2/000001.jpg").write_bytes(b"")  # a file that lost its content
    changed = (videos / "class 1/clip 3.avi").stat().st_mtime_ns + 1
    os.utime(videos / "class 1/clip 3.avi", ns=(changed, changed))  # another video of the same size
    write_avi(videos / "class 1/clip 1.avi", frames=9)  # a video that was downloaded again
    with (out / "frames.jsonl").open("a") as file:
        file.write('\n{"video": "class 0/cl')  # a line that the end of power cut off
    (out / "partial" / "x").mkdir(parents=True)
    assert folder(videos, out) == 0
    after = state(out)
    again = {name for name in after if before.get(name) != after[name]}
    assert {str(Path(name).parent) for name in again} == {f"frames/class {n % 2}/clip {n}" for n in range(4)}
    assert len(list((out / "frames/class 1/clip 1").iterdir())) == 9
    assert not (out / "partial").exists()


def test_other_settings_and_other_datasets_are_refused(videos, tmp_path, caplog):
    out = tmp_path / "out"
    assert folder(videos, out) == 0
    lists = (out / "train.txt").read_text()
    assert folder(videos, out, "--short-side", "128") == 1
    assert (
        "was made with short_side 256, quality 90, decoder pyav, storage folders, not short_side 128, quality 90"
        in caplog.text
    )
    assert command.main(["ucf101", "--videos", str(videos), "--annotations", str(videos), "--out", str(out)]) == 1
    assert f"--out {out}: holds folder, not ucf101" in caplog.text
    assert (out / "train.txt").read_text() == lists


@pytest.mark.parametrize(
    "text", ["garbage", "[]", "{}", '{"dataset": "folder"}', '{"dataset": "folder", "frames": {}}']
)
def test_a_damaged_record_of_the_settings(videos, tmp_path, caplog, text):
    out = tmp_path / "out"
    assert folder(videos, out) == 0
    before = state(out)
    (out / "prepare.json").write_text(text)
    assert folder(videos, out, "--short-side", "64") == 1
    assert re.search(r"prepare\.json: does not say (which dataset|how) .*; choose another --out", caplog.text)
    assert state(out) == before


def test_a_mistyped_option_leaves_the_lists_of_a_finished_run(videos, tmp_path):
    out = tmp_path / "out"
    assert folder(videos, out) == 0
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert folder(tmp_path / "typo", out) == 1
    assert folder(videos, out, "--group-pattern", "typo") == 1
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("mode", ["--frames", "--videos-only"])
def test_decoder(videos, tmp_path, mode, monkeypatch, caplog):
    out = tmp_path / "out"
    monkeypatch.setattr(decode, "open_video", lambda path, decoder: pytest.fail(f"{path} is opened with {decoder}"))
    monkeypatch.setattr(extract, "Workers", InProcess)
    with pytest.raises(pytest.fail.Exception, match="is opened with pyav"):
        folder(videos, out, mode, "--decoder", "pyav")
    monkeypatch.undo()
    assert folder(videos, out, mode, "--decoder", "pyav") == 0
    assert json.loads((out / "prepare.json").read_text())["decoder"] == "pyav"
    assert ("decoder: pyav" in (out / "config_snippet.yaml").read_text()) == (mode == "--videos-only")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert folder(videos, out, mode, "--decoder", "pyav") == 1
    assert "--decoder pyav needs the package av: pip install av" in caplog.text


def test_frames_of_one_video_inside_the_folder_of_another(videos, tmp_path, caplog):
    write_avi(videos / "class 0" / "clip 0" / "x.avi")
    assert folder(videos, tmp_path / "out") == 1
    assert (
        "the frames of class 0/clip 0/x.avi would lie inside the folder of those of class 0/clip 0.avi" in caplog.text
    )
    assert not (tmp_path / "out" / "frames").exists()
    assert folder(videos, tmp_path / "out", "--videos-only") == 0


def test_foreign_output_is_left_alone(videos, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.txt").write_text("mine")
    assert folder(videos, tmp_path / "out") == 1
    assert "is not an output of this command" in caplog.text
    assert (tmp_path / "out" / "train.txt").read_text() == "mine"


def test_second_run_at_the_same_time(videos, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    arguments = [sys.executable, "-c", hold, str(tmp_path / "out" / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()  # it has the lock
        assert folder(videos, tmp_path / "out") == 1
        other.communicate(b"\n")
    assert folder(videos, tmp_path / "out") == 0
    assert "another run is writing there" in caplog.text


def test_out_and_the_videos_folder(videos, tmp_path, caplog):
    assert folder(videos, videos) == 1
    assert f"--out must not be the videos' folder {videos}" in caplog.text and not (videos / "prepare.json").exists()
    videos.rename(tmp_path / "videos")
    for _ in range(2):
        assert folder(tmp_path / "videos", tmp_path) == 0
    assert len((tmp_path / "train.txt").read_text().splitlines()) == 4


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_that_cannot_be_written(videos, tmp_path, caplog, out):
    (tmp_path / "file").write_text("x")
    assert folder(videos, tmp_path / out) == 1
    assert f"--out {tmp_path / out}: cannot be written" in caplog.text


@pytest.mark.parametrize("mode", ["--frames", "--videos-only", "--pack"])
def test_unreadable_videos(videos, tmp_path, caplog, mode):
    out = tmp_path / "out"
    (videos / "class 0" / "broken.avi").write_bytes(b"not a video")
    (videos / "class 0" / "empty.mp4").touch()
    cut = write_avi(videos / "class 1" / "cut.avi", frames=8)
    cut.write_bytes(cut.read_bytes()[:300])
    assert folder(videos, out, mode) == 1
    assert "3 of 9 videos cannot be read, such as class 0/broken.avi" in caplog.text
    assert "class 0/empty.mp4: is empty" in (out / "report.txt").read_text()
    assert not (out / "train.txt").exists() and not (out / "config_snippet.yaml").exists()
    assert folder(videos, out, mode, "--allow-missing") == 0
    rows = (out / "train.txt").read_text() + (out / "val.txt").read_text()
    assert rows.count("\n") == 6 and "broken" not in rows
    assert folder(videos, out, mode) == 1 and not (out / "train.txt").exists()  # no list of an earlier run stays


@pytest.mark.parametrize("real", [False, *([True] if CORRUPTED.is_file() else [])])
@pytest.mark.parametrize("mode", ["--frames", "--videos-only", "--pack"])
def test_a_damaged_video_is_unreadable(videos, tmp_path, mode, real):
    damaged = CORRUPTED if real else overwrite(encoded(tmp_path / "damaged.mp4"), 1 / 3, 2 / 3)
    (videos / "class 0" / "corrupted.mp4").symlink_to(damaged)
    assert folder(videos, tmp_path / "out", mode, "--allow-missing") == 0
    ((name, reason),) = json.loads((tmp_path / "out" / "report.json").read_text())["unreadable"]
    assert name == "class 0/corrupted.mp4" and re.match(r"only \d+ of [45]0 frames|cannot be decoded|frame \d+", reason)
    assert "corrupted" not in (tmp_path / "out" / "train.txt").read_text() + (tmp_path / "out" / "val.txt").read_text()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("kept", "readable"), [(20, True), (19, True), (17, False), (10, False)])
def test_a_loss_is_listed_up_to_a_tenth(tmp_path, decoder, kept, readable):
    outcome = probe(cut_after(write_avi(tmp_path / "a.avi", frames=20), kept), decoder)
    assert outcome.error == (None if readable else f"only {kept} of 20 frames decode")
    assert (outcome.declared, outcome.frames) == (20, kept)


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_that_are_not_to_be_shown_are_no_loss(tmp_path, decoder):
    """The edit list of an MP4 hides 12 of 40 frames."""
    path = write_video(
        tmp_path / "a.mp4", stamps=[40 * (i - 12) for i in range(40)], **{"x264-params": "bframes=2:keyint=15"}
    )
    outcome = probe(path, decoder)
    assert (outcome.declared, outcome.frames, outcome.error) == (28, 28, None)


@pytest.mark.parametrize("decoder", DECODERS)
def test_videos_narrower_than_64_pixels(tmp_path, decoder):
    for number in range(4):
        write_avi(tmp_path / "in" / "ab"[number % 2] / f"{number}.avi", size=(50, 40), seed=number)
    out = tmp_path / "out"
    assert folder(tmp_path / "in", out, "--short-side", "0", "--decoder", decoder) == 0
    for frame in out.glob("frames/*/*/*.jpg"):
        pixels = np.asarray(Image.open(frame), int)  # (H, W, 3)
        assert pixels.shape == (40, 50, 3)
        np.testing.assert_allclose(pixels, int(frame.parent.name) + 20 * (int(frame.stem) - 1), atol=3)
    assert len(state(out)) == 16


@pytest.mark.parametrize("mode", ["--frames", "--videos-only"])
def test_transport_streams(videos, tmp_path, mode):
    """decord misses their first frames, so it is not trusted with them; PyAV reads them."""
    pytest.importorskip("decord")
    write_video(videos / "class 0" / "stream.ts", **{"x264-params": "bframes=2:keyint=15"})
    out = tmp_path / "out"
    assert folder(videos, out, mode, "--decoder", "decord") == 1
    assert re.search(
        r"class 0/stream\.ts: .*\(h264 in mpegts\); use data\.decoder: pyav\n", (out / "report.txt").read_text()
    )
    assert folder(videos, tmp_path / "out2", mode, "--decoder", "pyav") == 0
    assert "stream" in "".join((tmp_path / "out2" / f"{side}.txt").read_text() for side in ("train", "val"))


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk(videos, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    monkeypatch.setattr(extract, "Workers", InProcess)
    written, original = [], Path.write_bytes

    def fill_up(path, data):
        written.append(path)
        return original(path, data) if len(written) < 12 else full()

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    assert folder(videos, out) == 1
    assert f"{out}: the disk is full; finished videos are kept" in caplog.text and "Traceback" not in caplog.text
    before = state(out)
    assert 3 <= len(before) < 12 and not (out / "train.txt").exists()
    assert not any((out / "partial").iterdir())
    monkeypatch.setattr(Path, "write_bytes", original)
    assert folder(videos, out) == 0
    assert before.items() <= state(out).items()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a small file system")
def test_full_disk_for_real(tmp_path, caplog, monkeypatch):
    """A file system of 3 MB, and an estimate that is blind to it."""
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for number in range(8):
            write_avi(tmp_path / "in" / "ab"[number % 2] / f"{number}.avi", frames=100, size=(320, 240))
        assert folder(tmp_path / "in", out) == 1
        assert "extracting 8 videos needs about" in caplog.text and "free" in caplog.text
        monkeypatch.setattr(extract, "require_space", lambda *_, **__: None)
        assert folder(tmp_path / "in", out) == 1
        assert "the disk is full" in caplog.text
        finished = {path.parent for path in out.glob("frames/*/*/*.jpg")}
        assert finished and all(len(list(path.iterdir())) == 100 for path in finished)
        before = state(out)
        subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
        assert folder(tmp_path / "in", out) == 0
        assert before.items() <= state(out).items() and len(state(out)) == 800
    finally:
        subprocess.run(["umount", str(out)], check=True)


class InProcess(workers.Workers):
    """The same, without processes, so that a test can change what a task does."""

    def __init__(self, jobs: int):
        self.jobs = jobs

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, function, tasks):
        return ((task, function(task)) for task in tasks)


def test_space_that_is_not_there(tmp_path, caplog):
    with pytest.raises(PrepareError, match=r"work needs about 1000000\.0 TB, the disk has .* free"):
        output_dir.require_space(tmp_path, 10**18, "work")
    with pytest.raises(PrepareError, match="work creates about 1000000000000000 files"):
        output_dir.require_space(tmp_path, 0, "work", files=10**15)
    free = os.statvfs(tmp_path)
    output_dir.require_space(tmp_path, int(free.f_bavail * free.f_frsize * 0.9), "work")
    assert "free" in caplog.text


def test_interrupt(videos, tmp_path, monkeypatch, caplog):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "prepare", interrupted)
    assert folder(videos, tmp_path / "out") == 130
    assert "interrupted" in caplog.text


def test_published_frame_folders(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"{number:05d}.jpg").write_bytes(b"x" * number)
    names = FrameNames("{:05d}.jpg", 1)
    assert count_frames(tmp_path, names) == Outcome(3, 3, 6)
    (tmp_path / "00002.jpg").rename(tmp_path / "00005.jpg")
    assert "00002.jpg is missing or empty" in count_frames(tmp_path, names).error


def test_no_frame_decodes(tmp_path):
    video = write_avi(tmp_path / "a.avi", frames=1)
    data = video.read_bytes()
    first, last = data.index(b"\xff\xd8"), data.index(b"idx1")
    video.write_bytes(data[:first] + bytes(last - first) + data[last:])
    store = FrameStore(tmp_path / "out", FrameSettings(short_side=32))
    store.unfinished.mkdir(parents=True)
    assert decode.extract(store, tmp_path, "a.avi").error
    assert not store.path_of("a.avi").exists() and not store.records.exists()
    assert probe(video).error
