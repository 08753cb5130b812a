"""A pack gives back every frame byte for byte, in any process, and a broken one is refused with one sentence."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from datasets.pack.format import FRAME, HEADER, UNFINISHED, Pack, Settings, is_pack, shard_name
from datasets.pack.verify import reindex, verify
from datasets.pack.writer import write_index, write_pack
from tests.helpers.packs import SMALL, VIDEOS, assert_equal, content, failure, make_frames


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return make_frames(tmp_path_factory.mktemp("data") / "frames")


@pytest.fixture(scope="module")
def whole(frames):
    """For reading only."""
    write_pack(frames, frames.parent / "frames.pack", settings=SMALL, jobs=2)
    return frames.parent / "frames.pack"


@pytest.fixture
def pack(whole, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "copy.pack"))


def test_every_frame_is_the_folders(frames, whole):
    pack = Pack(whole)
    assert is_pack(whole) and not is_pack(frames) and len(pack) == len(VIDEOS) and list(pack) == sorted(VIDEOS)
    assert {name: pack.num_frames(name) for name in pack} == VIDEOS
    assert pack.num_shards > 2 and not (whole / UNFINISHED).exists()
    assert_equal(pack, frames)
    assert pack.read("a/./v_1/", 3) == pack.read("a/v_1", 3)  # spelled as a path of the file system may be
    assert "a/v_1" in pack and "a" not in pack and "zz" not in pack and "" not in pack


def test_unknown_videos_and_frames(whole):
    pack = Pack(whole)
    assert "no video a/v_2" in failure(pack.num_frames, "a/v_2") and "no video" in failure(pack.read, "A/v_1", 0)
    for index in (-1, 12):
        assert f"holds 12 frames, there is no frame {index}" in failure(pack.read, "a/v_1", index)


def test_prefetch_changes_nothing(frames, whole):
    pack = Pack(whole)
    pack.prefetch("z", np.array([9, 0, 0]))
    assert pack.read("z", np.int64(9)) == (frames / "z/000010.jpg").read_bytes()
    assert "no frame 10" in failure(pack.prefetch, "z", [3, 10])


def test_a_video_is_in_one_shard_and_shards_are_about_as_large_as_asked(frames, whole):
    names = [zipfile.ZipFile(file).namelist() for file in sorted(whole.glob("*.zip"))]
    videos = [{name.rpartition("/")[0] for name in shard} for shard in names]
    assert sum(map(len, videos)) == len(VIDEOS) and set.union(*videos) == set(VIDEOS)
    sizes = [file.stat().st_size for file in sorted(whole.glob("*.zip"))]
    assert max(sizes) < 101_000 and len(sizes) < 2 * sum(sizes) / 100_000 + 1


def test_unzipping_gives_the_folders_back(frames, whole, tmp_path):
    for shard in whole.glob("*.zip"):
        with zipfile.ZipFile(shard) as archive:
            assert archive.testzip() is None
            archive.extractall(tmp_path)
    assert content(tmp_path) == content(frames)


@pytest.mark.skipif(shutil.which("unzip") is None, reason="the program unzip is not installed")
def test_the_program_unzip_agrees(frames, whole, tmp_path):
    for shard in whole.glob("*.zip"):
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        subprocess.run(["unzip", "-q", shard, "-d", tmp_path], check=True, env=environment, capture_output=True)
    assert (tmp_path / "b c/Größe 動画/000011.jpg").read_bytes() == (frames / "b c/Größe 動画/000011.jpg").read_bytes()


class Frames:
    """A dataset of all frames, as numbers, for the loaders below."""

    def __init__(self, pack: Pack):
        self.pack, self.items = pack, [(name, index) for name in pack for index in range(pack.num_frames(name))]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return list(self.pack.read(*self.items[number]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(whole, frames, method):
    """The parent has read before, so that forked workers inherit descriptors and must not disturb each other."""
    dataset = Frames(Pack(whole, max_open=2))
    wanted = [dataset[number] for number in range(len(dataset))]
    options = {"num_workers": 2, "multiprocessing_context": method, "batch_size": 4, "collate_fn": list}
    found = [frame for batch in DataLoader(dataset, **options) for frame in batch]
    assert found == wanted


def test_pickles_small_and_without_descriptors(frames, whole):
    pack = Pack(whole)
    pack.read("z", 0)
    text = pickle.dumps(pack)
    assert len(text) < 500
    assert_equal(pickle.loads(text), frames)


def test_threads_share_fewer_descriptors_than_shards(frames, whole):
    pack, failures = Pack(whole, max_open=1), []

    def read():
        try:
            for _ in range(20):
                assert_equal(pack, frames)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


def test_descriptors_are_few_and_closed(frames, whole):
    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        pack = Pack(whole, max_open=2)
        mapped = count() - before
        assert_equal(pack, frames)
        assert count() - before == mapped + 2
        pack.close()
        assert count() - before == mapped
        assert_equal(pack, frames)
        del pack
        assert count() == before


# ---- broken packs


def test_a_shard_that_is_short_or_missing(pack):
    shard = pack / shard_name(1)
    opened = Pack(pack)
    os.truncate(shard, shard.stat().st_size // 2)
    assert f"{shard}: holds" in failure(Pack, pack)
    last = opened.name(int(np.flatnonzero(opened.videos["shard"] == 1)[-1]))
    message = failure(opened.read, last, opened.num_frames(last) - 1)  # cut off while a run reads it
    assert f"{shard}: {last}/" in message and "ends after" in message
    shard.unlink()
    assert f"{shard}: cannot be opened (No such file or directory)" in failure(Pack, pack)


def test_headers_of_another_version_or_damaged(pack):
    header = json.loads((pack / HEADER).read_text())
    (pack / HEADER).write_text(json.dumps({**header, "version": 2}))
    assert "is of version 2, this program reads version 1" in failure(Pack, pack)
    for text in ("", "[]", "{}", "null", json.dumps({**header, "settings": {}, "frames": None}), '{"format": "zip"}'):
        (pack / HEADER).write_text(text)
        assert f"{pack / HEADER}: is not the header of a pack" in failure(Pack, pack)
    (pack / HEADER).unlink()
    assert "pack.json: is missing; `python -m datasets.pack --reindex" in failure(Pack, pack) and is_pack(pack)
    assert "this is no pack" in failure(Pack, pack.parent) and not is_pack(pack.parent)


@pytest.mark.parametrize("name", ["names.txt", "videos.npy", "frames.npy"])
def test_index_files_that_are_damaged(pack, whole, name):
    for size in (0, 50, (pack / name).stat().st_size - 12):
        os.truncate(pack / name, size)
        message = failure(Pack, pack)
        assert "is missing, damaged or of another pack" in message and "--reindex" in message
    (pack / name).unlink()
    assert f"{pack / name}: is missing" in failure(Pack, pack)
    reindex(pack)
    assert content(pack) == content(whole)


def test_reindex_from_the_shards_alone(pack, whole, tmp_path):
    for file in pack.iterdir():
        if file.suffix != ".zip":
            file.unlink()
    reindex(pack, jobs=2)
    assert content(pack) == content(whole)
    (tmp_path / "x").mkdir()
    assert "holds no shards" in failure(reindex, tmp_path / "x")
    last = max(pack.glob("*.zip"))
    shutil.copy(last, pack / shard_name(0))
    assert f"{pack / shard_name(0)}: is no {shard_name(0)} but the pack's {last.name}" in failure(reindex, pack)
    write_pack(make_frames(tmp_path / "one", {"z": 3}), tmp_path / "one.pack", settings=SMALL)
    shutil.copy(tmp_path / "one.pack" / shard_name(0), pack)
    message = failure(reindex, pack)
    assert message == f"{pack / shard_name(0)}: is a shard of another pack than {shard_name(1)}"
    shutil.copy(whole / shard_name(0), pack)
    last.unlink()
    assert f"{last}: is missing" in failure(reindex, pack)
    with zipfile.ZipFile(last, "w") as archive:
        archive.writestr("x/000001.jpg", b"")
    assert f"{last}: is no shard of a pack" in failure(reindex, pack)
    last.write_bytes(b"PK")
    assert f"{last}: is no whole zip file" in failure(reindex, pack)


def test_verify_names_the_damaged_frames(pack, caplog):
    verify(pack)
    opened = Pack(pack)
    wrong = [("a/v_1", 3), ("z", 9)]
    for name, index in wrong:
        shard, first, _, _ = opened.videos[list(opened).index(name)].item()
        with open(opened.shard(shard), "r+b") as file:
            file.seek(int(opened.frames[first + index]["offset"]) + 100)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    assert "2 problems in" in failure(verify, pack)
    rows = np.load(pack / "frames.npy")
    rows["offset"][:12] += 1
    np.save(pack / "frames.npy", rows)
    assert f"{12 + 1} problems in" in failure(verify, pack)


def test_200_000_videos(tmp_path):
    """A made index over one sparse shard: right rows are found, and opening copies none of it into memory."""
    count, each = 200_000, 45
    names = [f"class {number % 400:03d}/clip_{number:06d}" for number in range(count)]
    rows = np.zeros(count * each, dtype=FRAME)
    rows["offset"], rows["length"] = np.arange(count * each) * 4, 4
    (tmp_path / shard_name(0)).touch()
    os.truncate(tmp_path / shard_name(0), count * each * 4)
    write_index(tmp_path, sorted(names), [each] * count, [count], rows, Settings())
    before = resident()
    pack = Pack(tmp_path)
    assert resident() - before < 20 << 20
    wanted = sorted(names)
    for row in (0, 1, 77_777, count - 1):
        assert pack.name(row) == wanted[row] and pack.num_frames(wanted[row]) == each
        assert pack.where(wanted[row], 2).endswith(f"{wanted[row]}/000003.jpg") and pack.read(wanted[row], 2) == bytes(
            4
        )
    assert "class 000/clip" not in pack and "zzz" not in pack


def resident() -> int:
    """Bytes of this process's own memory, mapped files left out."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
