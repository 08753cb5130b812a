"""The frame-order dataset keeps its promise: only the order of frames tells its classes apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.prepare import synthetic
from datasets.prepare.plan import PrepareError
from datasets.prepare.synthetic import CLASSES, FLIP_PAIRS, FRAMES, STEPS

Video = tuple[str, int, np.ndarray]  # path, label, frames (8, H, W, 3) uint8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("frame_order") / "data"
    assert synthetic.main(["--out", str(out)]) == 0
    return out


def rows(out: Path, split: str) -> list[tuple[str, int, int]]:
    lines = (out / f"{split}.txt").read_text().splitlines()
    return [(path, int(frames), int(label)) for path, frames, label in (line.split(" ") for line in lines)]


def files(out: Path, video: str) -> list[bytes]:
    return [(out / "frames" / video / f"{number:06d}.jpg").read_bytes() for number in range(1, FRAMES + 1)]


def videos(out: Path, split: str) -> list[Video]:
    read = []
    for path, frames, label in rows(out, split):
        paths = [out / "frames" / path / f"{number:06d}.jpg" for number in range(1, frames + 1)]
        read.append((path, label, np.stack([np.asarray(Image.open(file)) for file in paths])))
    return read


def nearest_mean_accuracy(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of the nearest class mean, features (videos, D)."""
    means = np.stack([train[train_labels == label].mean(0) for label in range(len(CLASSES))])
    distances = ((val[:, None] - means[None]) ** 2).sum(-1)  # (videos, classes)
    return float((distances.argmin(1) == labels).mean())


def shift_per_frame(frames: np.ndarray) -> int:
    """Places (of W / 8 pixels) that the moving part travels a frame, by circular correlation of neighbouring frames."""
    moving = frames.astype(np.float64) - frames.mean(0)  # the still background falls out
    spectrum = np.fft.fft(moving, axis=2)  # along W
    correlation = np.fft.ifft(spectrum[1:] * spectrum[:-1].conj(), axis=2).real.sum(axis=(0, 1, 3))  # (W,)
    width = frames.shape[2]
    return int(correlation[:: width // FRAMES].argmax())


def test_layout_and_lists(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == [
        "dataset.json", "frames", "labels.csv", "train.txt", "val.txt"
    ]  # fmt: skip
    assert (made / "labels.csv").read_text() == "id,name\n0,right slow\n1,right fast\n2,left fast\n3,left slow\n"
    for split, count in (("train", 256), ("val", 128)):
        listed = rows(made, split)
        assert len({path for path, _, _ in listed}) == count
        assert [label for _, _, label in listed].count(2) == count // 4
        assert {path for path, _, _ in listed} == {
            str(folder.relative_to(made / "frames")) for folder in (made / "frames" / split).iterdir()
        }
        for path, frames, _ in listed:
            names = sorted(file.name for file in (made / "frames" / path).iterdir())
            assert frames == 8 and names == [f"{number:06d}.jpg" for number in range(1, 9)]


def test_lists_read_back(made: Path) -> None:
    annotation = pytest.importorskip("datasets.annotation", reason="datasets.annotation is not there")
    records = annotation.read_list(str(made / "val.txt"), "RGB", num_classes=4)
    assert [(record.path, record.num_frames, record.label) for record in records] == rows(made, "val")
    assert annotation.read_labels(str(made / "labels.csv"), num_classes=4) == CLASSES


def test_twins_hold_the_same_files_in_different_orders(made: Path) -> None:
    seen: dict[str, set[str]] = {}
    for split in ("train", "val"):
        scenes: dict[str, list[list[bytes]]] = {}
        for path, _, _ in rows(made, split):
            scenes.setdefault(path.split("_")[0], []).append(files(made, path))
        seen[split] = set()
        for twins in scenes.values():
            assert len(twins) == 4
            assert all(sorted(twin) == sorted(twins[0]) for twin in twins)
            assert len(set(twins[0])) == FRAMES
            rotations = {
                tuple(twin[(start + t) % FRAMES] for t in range(FRAMES)) for twin in twins for start in range(8)
            }
            assert len(rotations) == 4 * FRAMES, "two classes show the same cycle"
            seen[split] |= {hashlib.sha256(jpeg).hexdigest() for jpeg in twins[0]}
        assert len(seen[split]) == len(scenes) * FRAMES
    assert not seen["train"] & seen["val"]


def test_mean_image_of_twins_is_bit_identical(made: Path) -> None:
    by_scene: dict[str, list[np.ndarray]] = {}
    for path, _, frames in videos(made, "val"):
        by_scene.setdefault(path.split("_")[0], []).append(frames.sum(0, dtype=np.int64))
    assert all((total == totals[0]).all() for totals in by_scene.values() for total in totals)


def test_start_phases_do_not_depend_on_the_class(tmp_path: Path) -> None:
    """The twins' first frames, as places relative to class 0's first frame: each place 1/8 of the time."""
    synthetic.make(tmp_path / "data", train=2400, val=4, size=32)
    counts = np.zeros((len(CLASSES), FRAMES), int)
    origin: list[bytes] = []
    for path, _, label in rows(tmp_path / "data", "train"):
        shown = files(tmp_path / "data", path)
        if label == 0:
            origin = shown
        counts[label, origin.index(shown[0])] += 1
    expected = 600 / FRAMES
    for label in (1, 2, 3):
        chi2 = ((counts[label] - expected) ** 2 / expected).sum()
        assert chi2 < 24.3, (label, counts[label])  # 7 degrees of freedom: p = 0.001


def test_blind_to_order_is_at_chance_and_order_separates(made: Path) -> None:
    train, val = videos(made, "train"), videos(made, "val")
    train_labels, labels = (np.array([label for _, label, _ in split]) for split in (train, val))
    mean, val_mean = (np.stack([f.sum(0, dtype=np.int64).ravel() for _, _, f in s]) for s in (train, val))
    assert nearest_mean_accuracy(mean, train_labels, val_mean, labels) == 0.25

    every, val_every = (np.concatenate([f.reshape(FRAMES, -1) for _, _, f in s]).astype(float) for s in (train, val))
    accuracy = nearest_mean_accuracy(every, train_labels.repeat(FRAMES), val_every, labels.repeat(FRAMES))
    assert accuracy == pytest.approx(0.25, abs=1e-9)

    first, val_first = (np.stack([f[0].ravel() for _, _, f in s]).astype(float) for s in (train, val))
    assert abs(nearest_mean_accuracy(first, train_labels, val_first, labels) - 0.25) < 0.12  # 3 sigma of 128 videos

    found = np.array([STEPS.index(shift_per_frame(frames)) for _, _, frames in val])
    assert (found == labels).all()


def test_flip_exchanges_the_named_pairs(made: Path) -> None:
    exchanged = {a: b for pair in FLIP_PAIRS for a, b in (pair, pair[::-1])}
    for _, label, frames in videos(made, "val")[:16]:
        assert STEPS.index(shift_per_frame(frames[:, :, ::-1])) == exchanged[label]


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_and_other_seed_other_scenes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert synthetic.make(tmp_path / name, train=8, val=4, seed=seed)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    jpegs = [{data for name, data in snapshot(tmp_path / which).items() if name.endswith("jpg")} for which in "ac"]
    assert not jpegs[0] & jpegs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "temporary folders stay behind"


def test_finished_output_is_kept(tmp_path: Path) -> None:
    assert synthetic.make(tmp_path, train=4, val=4) is True  # an empty folder is taken
    (tmp_path / "train.txt").write_text("touched")
    assert synthetic.make(tmp_path, train=4, val=4) is False
    assert (tmp_path / "train.txt").read_text() == "touched"
    with pytest.raises(PrepareError, match=r"was made with --seed 0;"):
        synthetic.make(tmp_path, train=4, val=4, seed=1)


@pytest.mark.parametrize("content", [None, "not json", json.dumps({"maker": "another"})])
def test_foreign_folder_is_refused(tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    before = snapshot(tmp_path)
    assert synthetic.main(["--out", str(tmp_path), "--train", "4", "--val", "4"]) == 1
    assert f"{tmp_path} is not empty" in caplog.text and "Traceback" not in caplog.text
    assert snapshot(tmp_path) == before


def test_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "write_labels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        synthetic.make(tmp_path / "data", train=4, val=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "option"),
    [({"train": 6}, "--train"), ({"val": 0}, "--val"), ({"size": 60}, "--size"), ({"seed": -1}, "--seed")],
)
def test_arguments_out_of_range(tmp_path: Path, arguments: dict[str, int], option: str) -> None:
    with pytest.raises(PrepareError, match=option):
        synthetic.make(tmp_path / "data", **arguments)
