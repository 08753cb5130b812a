"""From list to batch: what a batch holds, that nothing but (seed, epoch, index) matters, and what broken videos do."""

import errno
import logging
import os
import random
import resource
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import CLIP_MEAN, CLIP_STD, ConfigError, DataConfig
from datasets.annotation import AnnotationError, VideoRecord
from datasets.build import class_names, listed_loader, log_doubts, read_sources, train_loader, val_loader
from datasets.build import test_loader as loader_of_test
from datasets.decoders import DecoderMissing
from datasets.packed_frames import pack
from datasets.readers import Clip, DecodedFrames
from datasets.registry import dataset_traits
from datasets.sampler import ShuffledSampler, StridedSampler
from datasets.sampling import ClipSampling, train_indices, val_indices
from datasets.sampling import test_indices as indices_of_test
from datasets.seeding import seeded
from datasets.transforms import EvalTransform, RandomResizedCrop, TrainTransform
from datasets.video_dataset import BadVideo, EvalDataset, TrainDataset, VideoSource, collate
from tests.helpers.video_files import overwrite, write_avi, write_video


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Seven folders of 9..15 small noisy frames, two classes, in train and val lists."""
    rng = np.random.default_rng(0)
    rows = []
    for video in range(7):
        folder = tmp_path / f"frames/video {video}"
        folder.mkdir(parents=True)
        for frame in range(1, 10 + video):
            pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((42, 30)).save(folder / f"{frame:06d}.jpg")
        rows.append(f"video {video} {9 + video} {video % 2}")
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("\n".join(rows) + "\n")
    root = str(tmp_path / "frames")
    return DataConfig(
        dataset="hmdb51",
        num_classes=2,
        num_segments=4,
        batch_size=3,
        workers=0,
        input_size=16,
        scale_size=20,
        train_root=root,
        val_root=root,
        train_list=str(tmp_path / "train.txt"),
        val_list=str(tmp_path / "val.txt"),
    )


def batches(data, epoch=0, **arguments):
    loader = train_loader(data, **{"seed": 5, **arguments})
    loader.set_epoch(epoch)
    return list(loader)


def same(one, other):
    return all(
        torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in ("video", "label", "index")
    ) and [batch["path"] for batch in one] == [batch["path"] for batch in other]


def test_training_batches(data):
    found = batches(replace(data, num_sample=2))
    assert len(found) == 2
    for batch in found:
        assert batch["video"].shape == (6, 4, 3, 16, 16) and batch["video"].dtype == torch.uint8
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        assert batch["label"].shape == batch["index"].shape == (6,)
        assert (batch["index"][::2] == batch["index"][1::2]).all() and (batch["label"] == batch["index"] % 2).all()
        assert (batch["video"][0] != batch["video"][1]).any()  # another draw
        assert batch["path"] == [f"video {index}" for index in batch["index"].tolist()]
        assert batch["skipped"] == [] and batch["error"] is None
    seen = torch.cat([batch["index"] for batch in found]).tolist()
    assert len(set(seen)) == 6


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_do_not_change_batches(data, workers):
    data = replace(data, num_sample=2, rand_aug=True, rand_erase=True)
    for epoch in (0, 1):
        assert same(batches(data, epoch), batches(replace(data, workers=workers), epoch))
    evaluated = [list(loader_of_test(replace(data, workers=n), crops=3, clips=2)) for n in (0, workers)]
    assert same(*evaluated)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_resumes_in_its_middle(data, workers):
    data = replace(data, batch_size=2, num_sample=2, rand_aug=True)
    whole = batches(data, epoch=1)
    for done in range(len(whole)):
        loader = train_loader(replace(data, workers=workers), seed=5)
        loader.set_epoch(1, first_batch=done)
        assert same(whole[done:], list(loader))


def test_epochs_and_seeds_differ_and_repeat(data):
    assert same(batches(data), batches(data))
    assert not same(batches(data), batches(data, epoch=1))
    assert not same(batches(data), batches(data, seed=6))


def test_videos_do_not_depend_on_the_batch_they_are_in(data):
    of_index = {i.item(): v for b in batches(data) for i, v in zip(b["index"], b["video"], strict=True)}
    for batch in batches(replace(data, batch_size=1), world_size=2, rank=1):
        if batch["index"].item() in of_index:
            assert torch.equal(batch["video"][0], of_index[batch["index"].item()])


def test_repeated_augmentation_reads_once_and_keeps_frames(data):
    class Reader(Clip):
        fetched, num_frames = [], 60

        def open(self, path, declared):
            return self

        def fetch(self, indices):
            self.fetched.append(indices.tolist())
            pixels = np.random.default_rng(0).integers(0, 256, (60, 24, 24, 3), dtype=np.uint8)
            return DecodedFrames(pixels[indices])

    source = VideoSource((VideoRecord("a", 60, 1, 1),), "root", Reader(), "list")
    transform = TrainTransform(16, RandomResizedCrop(20), mean=CLIP_MEAN, std=CLIP_STD)
    dataset = TrainDataset(source, ClipSampling(4, "kinetics"), transform, seed=0, num_sample=3)
    item = dataset[0]
    assert len(Reader.fetched) == 1 and item["video"].shape == (3, 4, 16, 16, 3)
    assert len({draw.numpy().tobytes() for draw in item["video"]}) == 3
    dataset[(0, 0)], dataset[(1, 0)]
    assert Reader.fetched[0] == Reader.fetched[1] != Reader.fetched[2]


def test_intervals_follow_the_frames_a_second(data):
    """15 of 60 frames a second span as many frames as 30 of 30; a video that does not state them is refused by name."""

    class Reader(Clip):
        fetched, num_frames, fps = [], 60, 15

        def open(self, path, declared):
            return self

        def fetch(self, indices):
            self.fetched.append(indices.tolist())
            return DecodedFrames(np.zeros((len(indices), 24, 24, 3), np.uint8))

    reader, sampling = Reader(), ClipSampling(4, "tada_interval", interval=8)
    source = VideoSource((VideoRecord("a", 60, 1, 1),), "root", reader, "list")
    train = TrainTransform(16, RandomResizedCrop(20), mean=CLIP_MEAN, std=CLIP_STD)
    val = EvalTransform(16, 20, 1)
    EvalDataset(source, sampling, val)[0]
    EvalDataset(source, sampling, val, clips=3)[0]
    TrainDataset(source, sampling, train, seed=0)[0]
    TrainDataset(source, sampling, train, seed=0, random_frames=False)[0]
    centre, three, random, fixed = reader.fetched
    assert centre == fixed == sampling.val(60, fps=15).tolist() == [22, 27, 32, 37]  # 16 frames from 22 to 37
    assert three == sampling.test(60, 3, fps=15).reshape(-1).tolist() and 15 <= random[-1] - random[0] <= 16
    reader.fps = None
    bad = EvalDataset(source, sampling, val)[0]
    assert bad.message == (
        "root/a: does not state its frames a second, which data.style: tada_interval needs (list, line 1)"
    )
    assert "video" in EvalDataset(source, ClipSampling(4, "tada_segment"), val)[0]


@pytest.mark.parametrize("style", ["tdn", "tada_segment", "tada_interval"])
def test_styles_of_the_families_in_every_split(data, style):
    data = replace(data, style=style, fps=10.0 if style == "tada_interval" else None)
    f = 5 if style == "tdn" else 1
    assert batches(data, frames_per_segment=f)[0]["video"].shape == (3, 4 * f, 3, 16, 16)
    (first, *_) = val_loader(data, frames_per_segment=f)
    assert first["video"].shape == (3, 1, 4 * f, 3, 16, 16)
    (first, *_) = loader_of_test(replace(data, test_size=20), crops=3, clips=2, frames_per_segment=f)
    assert first["video"].shape == (1, 6, 4 * f, 3, 20, 20)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": "multi_scale"},
        {"crop": "multi_scale", "crop_scales": (1.0, 0.7)},
        {"crop": "random_short_side", "short_side": (20, 24)},
        {"rand_aug": True, "rand_aug_policy": "rand-m9-n2-mstd1"},
    ],
)
def test_other_crops_and_policies(data, changes):
    changed = replace(data, num_sample=2, **changes)
    found = batches(changed)
    assert all(batch["video"].shape == (6, 4, 3, 16, 16) for batch in found)
    assert same(found, batches(replace(changed, workers=1))) and not same(found, batches(replace(data, num_sample=2)))
    assert [batch["index"].tolist() for batch in found] == [
        batch["index"].tolist() for batch in batches(replace(data, num_sample=2))
    ]


def test_an_unknown_policy_names_its_key(data):
    with pytest.raises(
        ConfigError, match=r"^data\.rand_aug_policy: 'rand-m7-q3' has an unknown part 'q3'; write e\.g\."
    ):
        train_loader(replace(data, rand_aug=True, rand_aug_policy="rand-m7-q3"), seed=0)


def test_random_shift_off_takes_validation_frames(data):
    data = replace(data, random_shift=False, flip=False, gray_prob=0, crop_scale=(1.0, 1.0))
    assert not same(batches(replace(data, random_shift=True)), batches(data))


def test_global_generators_are_left_alone(data):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    batches(replace(data, rand_aug=True, rand_erase=True))
    list(val_loader(data))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    with seeded(1, 2):
        first = random.random(), torch.rand(1)
    with seeded(1, 2):
        assert first == (random.random(), torch.rand(1))


def test_evaluation_batches(data):
    found = list(val_loader(data))
    assert [len(batch["index"]) for batch in found] == [3, 3, 1]
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(7))
    assert found[0]["video"].shape == (3, 1, 4, 3, 16, 16) and found[0]["label"].tolist() == [0, 1, 0]
    assert [batch["path"] for batch in found] == [[f"video {i}" for i in part] for part in ((0, 1, 2), (3, 4, 5), (6,))]
    tested = list(loader_of_test(replace(data, batch_size=12), crops=3, clips=2))
    assert [batch["video"].shape for batch in tested] == [(2, 6, 4, 3, 16, 16)] * 3 + [(1, 6, 4, 3, 16, 16)]


def test_views_are_clip_after_clip_crop_after_crop(data):
    together = next(iter(loader_of_test(data, crops=3, clips=2)))["video"][0]
    centre = next(iter(loader_of_test(data, crops=1, clips=2)))["video"][0]
    assert torch.equal(together[[2, 5]], centre) and not torch.equal(centre[0], centre[1])


def test_processes_share_evaluation_exactly(data):
    parts = [list(StridedSampler(7, rank, 3)) for rank in range(3)]
    assert sorted(index for part in parts for _, index in part) == list(range(7))
    assert [len(StridedSampler(7, rank, 3)) for rank in range(3)] == [3, 2, 2]
    found = [i for rank in range(3) for b in val_loader(data, rank=rank, world_size=3) for i in b["index"].tolist()]
    assert sorted(found) == list(range(7))


def test_processes_share_training_equally():
    for epoch in range(3):
        parts = []
        for rank in range(3):
            sampler = ShuffledSampler(50, 4, seed=9, rank=rank, world_size=3)
            sampler.set_epoch(epoch)
            assert {key[0] for key in sampler} == {epoch}
            parts.append([index for _, index in sampler])
        assert [len(part) for part in parts] == [16, 16, 16] and len(sampler) == 16
        assert len({index for part in parts for index in part}) == 48
    with pytest.raises(ValueError, match=r"data\.train_list: 7 videos are fewer .* 4 .* 2 processes"):
        ShuffledSampler(7, 4, 0, 0, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_video_ends_the_run_with_one_sentence(data, workers):
    (Path(data.val_root) / "video 1/000010.jpg").write_bytes(b"broken")
    (Path(data.val_root) / "video 4/000013.jpg").unlink()
    first, second, _ = val_loader(replace(data, workers=workers, num_segments=16))
    message = first["error"]
    assert "video 1/000010.jpg" in message and f"({data.val_list}, line 2)" in message and "\n" not in message
    assert first["video"] is None and first["skipped"] == first["path"] == []
    assert "video 4" in second["error"] and "line 5" in second["error"]


def test_broken_videos_are_skipped_and_listed(data):
    for video in (1, 6):
        (Path(data.val_root) / f"video {video}/{9 + video:06d}.jpg").unlink()
    data = replace(data, on_error="skip")
    first, second, third = val_loader(data)
    assert first["index"].tolist() == [0, 2] and first["video"].shape[0] == 2 and first["error"] is None
    assert first["path"] == ["video 0", "video 2"] and third["path"] == []
    assert len(first["skipped"]) == 1 and "video 1" in first["skipped"][0]
    assert second["skipped"] == []
    assert (
        third["video"] is None and third["label"].shape == third["index"].shape == (0,) and len(third["skipped"]) == 1
    )
    trained = batches(replace(data, batch_size=7, num_sample=2))
    assert trained[0]["video"].shape[0] == 10 and len(trained[0]["skipped"]) == 2


class Failing:
    """A reader whose videos raise."""

    def __init__(self, error):
        self.error = error

    def open(self, path, declared_frames):
        raise self.error


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "needs more memory than there is to be decoded"),
        (RecursionError("maximum depth"), "cannot be read (RecursionError: maximum depth)"),
        (OSError(errno.EIO, "Input/output error"), "cannot be read (OSError: [Errno 5] Input/output error)"),
        (ValueError("all input arrays must have\nthe same shape"), "(ValueError: all input arrays must have)"),
        (zlib.error(), "cannot be read (error)"),
        (Image.DecompressionBombError("too large"), "cannot be read (DecompressionBombError: too large)"),
        (ZeroDivisionError("division by zero"), "cannot be read (ZeroDivisionError: division by zero)"),
    ],
)
def test_whatever_a_video_raises_is_one_sentence_with_its_name(data, error, reason, on_error):
    dataset = val_loader(replace(data, on_error=on_error)).dataset
    dataset.source = replace(dataset.source, reader=Failing(error))
    item = dataset[2]
    assert item == BadVideo(item.message, 2, skip=on_error == "skip")
    assert item.message.startswith(f"{data.val_root}/video 2: ") and reason in item.message
    assert item.message.endswith(f"({data.val_list}, line 3)") and "\n" not in item.message


@pytest.mark.parametrize("error", [TypeError("no"), KeyError("no"), AssertionError("no"), DecoderMissing("no")])
def test_mistakes_in_code_or_setup_are_no_fault_of_the_video(data, error):
    dataset = val_loader(replace(data, on_error="skip")).dataset
    dataset.source = replace(dataset.source, reader=Failing(error))
    with pytest.raises(type(error), match="no"):
        dataset[2]


def test_too_many_open_files_are_no_fault_of_the_video(data):
    loader = val_loader(replace(data, on_error="skip"))
    os.close(files := os.open(os.devnull, os.O_RDONLY))  # the lowest free number
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, allowed[1]))
    try:
        batch = next(iter(loader))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    assert f"may have {files} at once; raise that, e.g. by ulimit -n" in batch["error"] and batch["skipped"] == []


def test_collate_prefers_the_error():
    batch = collate([BadVideo("unreadable", 0, True), BadVideo("fatal", 1, False)])
    assert batch["error"] == "fatal" and batch["skipped"] == ["unreadable"] and batch["video"] is None


def test_few_shot_keeps_the_length(data):
    loader = train_loader(replace(data, shot=1), seed=0)
    assert len(loader.dataset) == 6 and len(set(loader.dataset.source.records)) == 2


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train_list": None}, "data.train_list: is not set"),
        ({"train_root": None}, "data.train_root: is not set"),
        ({"train_list": "/no/such/list"}, "data.train_list: there is no file /no/such/list"),
        ({"train_root": "/no/such/root"}, "data.train_root: there is no folder /no/such/root"),
    ],
)
def test_missing_settings_name_the_key(data, changes, key):
    with pytest.raises(ConfigError, match=key):
        train_loader(replace(data, **changes), seed=0)


def test_testing_falls_back_to_validation(data):
    with pytest.raises(ConfigError, match=r"data\.test_list or data\.val_list"):
        loader_of_test(replace(data, val_list=None))
    assert len(loader_of_test(data).dataset) == 7
    with pytest.raises(ConfigError, match=r"data\.test_root"):
        loader_of_test(replace(data, test_root="/no/such"))
    for arguments in ({"crops": 2}, {"clips": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            loader_of_test(data, **arguments)


def test_other_refusals(data, tmp_path):
    with pytest.raises(AnnotationError, match="line 2: label 1 is outside"):
        train_loader(replace(data, num_classes=1), seed=0)
    with pytest.raises(ValueError, match="fewer than one batch"):
        train_loader(replace(data, batch_size=8), seed=0)


def test_class_names(data, tmp_path):
    assert class_names(data) is None
    (tmp_path / "labels.csv").write_text("id,name\n0,run\n1,walk\n")
    assert class_names(replace(data, label_list=str(tmp_path / "labels.csv"))) == ("run", "walk")


def test_traits(caplog):
    def of(dataset, num_classes=174, **changes):
        return dataset_traits(DataConfig(dataset=dataset, num_classes=num_classes, **changes))

    kinetics, v2, v1 = of("hmdb51"), of("somethingv2"), of("somethingv1")
    assert (kinetics.scale_size, kinetics.flip, kinetics.flip_pairs, kinetics.gray_prob) == (256, True, (), 0.2)
    assert (v2.scale_size, v2.flip, v2.gray_prob) == ((256, 320), True, 0.0)
    assert v2.flip_pairs == ((86, 87), (93, 94), (166, 167))
    assert not v1.flip and v1.gray_prob == 0 and not caplog.records
    assert of("somethingv1", flip_pairs=((1, 2),)).flip
    assert of("mine", style="something") == v1 and of("mine", style="kinetics") == kinetics
    assert of("hmdb51", input_size=112).scale_size == 112
    for style in ("tdn", "tada_segment"):  # another sampling, the same videos
        family = of("somethingv2", style=style)
        assert family.scale_size == 256 and (family.flip, family.flip_pairs, family.gray_prob) == (
            True,
            v2.flip_pairs,
            0,
        )
    mirrored = of("somethingv2", flip=True, flip_pairs=())  # as TAdaConv's first flip: the labels stay
    assert mirrored.flip and mirrored.flip_pairs == ()
    with caplog.at_level(logging.WARNING, "td4v"):
        few = of("somethingv2", num_classes=10)
    assert not few.flip and few.flip_pairs == () and "10 classes" in caplog.text
    assert of("somethingv2", num_classes=10, flip=True).flip
    assert not of("hmdb51", flip=False).flip and of("hmdb51", gray_prob=0.0).gray_prob == 0
    assert not of("somethingv2", flip=False).flip


@pytest.mark.parametrize("workers", [0, 2])
def test_video_files_and_a_corrupt_one(data, tmp_path, workers):
    write_video(tmp_path / "videos/wide.webm", codec="libvpx-vp9", size=(48, 80))
    overwrite(write_video(tmp_path / "videos/corrupted.mp4", frames=100), 0.4, 0.6)
    write_video(tmp_path / "videos/rotated.mov", frames=3, rotation=90)
    write_video(tmp_path / "videos/b.mkv", codec="mpeg4", bf=2)
    names = ["wide.webm", "corrupted.mp4", "rotated.mov", "b.mkv"]
    (tmp_path / "videos.txt").write_text("".join(f"{name} 1\n" for name in names))
    settings = {"modality": "video", "val_root": str(tmp_path / "videos"), "val_list": str(tmp_path / "videos.txt")}
    data = replace(data, workers=workers, on_error="skip", batch_size=4, **settings)
    (batch,) = val_loader(data)
    assert batch["index"].tolist() == [0, 2, 3] and batch["video"].shape == (3, 1, 4, 3, 16, 16)
    assert "corrupted.mp4" in batch["skipped"][0] and "line 2" in batch["skipped"][0]


def test_a_missing_decoder_is_one_sentence(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ConfigError, match=r"^data\.decoder: decord needs the package decord: pip install decord$"):
        val_loader(replace(data, modality="video", decoder="decord"))
    val_loader(replace(data, modality="video"))  # pyav needs no decord


@pytest.mark.parametrize("dense", [False, True])
def test_without_augmentation_training_shuffles_what_validation_sees(data, dense):
    """The same pixels in every epoch, validation's; another order in each."""
    plain = replace(data, augment=False, dense=dense)
    seen = {}
    for batch in val_loader(plain):
        seen |= dict(zip(batch["index"].tolist(), batch["video"][:, 0], strict=True))
    orders = []
    for epoch in range(3):
        found = batches(plain, epoch)
        assert [tuple(batch["video"].shape) for batch in found] == [(3, 4, 3, 16, 16)] * 2
        for batch in found:
            assert batch["label"].tolist() == [index % 2 for index in batch["index"].tolist()]
            assert batch["path"] == [f"video {index}" for index in batch["index"].tolist()]
            assert all(map(torch.equal, batch["video"], (seen[index] for index in batch["index"].tolist())))
        orders.append([index for batch in found for index in batch["index"].tolist()])
        assert orders[-1] == [index for batch in batches(data, epoch) for index in batch["index"].tolist()]
    assert len({tuple(order) for order in orders}) == 3


def test_the_list_of_training_in_order(data):
    """What training draws from, as validation sees it, few shots included."""
    found = list(listed_loader(data, seed=5))
    assert [index for batch in found for index in batch["index"].tolist()] == list(range(7))
    for ours, theirs in zip(found, val_loader(data), strict=True):
        assert torch.equal(ours["video"], theirs["video"]) and ours["path"] == theirs["path"]
    few = replace(data, shot=1, batch_size=1)
    assert len(listed_loader(few, seed=5).dataset) == len(train_loader(few, seed=5).dataset) < 7
    assert {p for b in listed_loader(few, 5) for p in b["path"]} == {p for b in batches(few) for p in b["path"]}
    parts = [[i for b in listed_loader(data, 5, rank, 2) for i in b["index"].tolist()] for rank in range(2)]
    assert parts == [[0, 2, 4, 6], [1, 3, 5]]


# ---- several frames a segment

LENGTHS = (3, 9, 12)
F = 3


def grey_of(number: int) -> int:
    return 20 * number


@pytest.fixture(params=["folders", "packed", "video files"])
def numbered(request, data, tmp_path) -> DataConfig:
    """Three videos of 3, 9 and 12 frames; frame i is of one grey, 20 * i, which no crop or flip changes."""
    root = tmp_path / "numbered"
    for length in LENGTHS:
        if request.param == "video files":
            write_avi(root / f"v{length}", length)
            continue
        (root / f"v{length}").mkdir(parents=True)
        for i in range(length):
            Image.new("RGB", (42, 30), (grey_of(i),) * 3).save(root / f"v{length}/{i + 1:06d}.jpg")
    if request.param == "packed":
        pack(root, tmp_path / "packed")
        root = tmp_path / "packed"
    (tmp_path / "numbered.txt").write_text("".join(f"v{length} {length} 0\n" for length in LENGTHS))
    roots = dict.fromkeys(("train_root", "val_root"), str(root))
    lists = dict.fromkeys(("train_list", "val_list"), str(tmp_path / "numbered.txt"))
    modality = "video" if request.param == "video files" else "RGB"
    return replace(data, modality=modality, batch_size=3, gray_prob=0.0, **roots, **lists)


def frame_numbers(videos: torch.Tensor) -> list[list[int]]:
    """(N, T * f, 3, S, S) uint8 -> the number of each frame."""
    return (videos.float().mean((2, 3, 4)) / 20).round().long().tolist()


def neighbours(indices, length: int) -> list[int]:
    return [min(index + step, length - 1) for index in indices for step in range(F)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dense", [False, True])
def test_evaluation_reads_neighbouring_frames(numbered, dense, workers):
    numbered = replace(numbered, dense=dense, workers=workers)
    for loader in (val_loader, listed_loader):
        arguments = {"seed": 0, "frames_per_segment": F}
        (batch,) = loader(numbered, **arguments)
        assert batch["video"].shape == (3, 1, 4 * F, 3, 16, 16)
        for found, length in zip(frame_numbers(batch["video"][:, 0]), LENGTHS, strict=True):
            assert found == neighbours(val_indices(length, 4, "kinetics", dense).tolist(), length)
    views = {"crops": 3, "clips": 2, "dense": dense}
    for batch in loader_of_test(replace(numbered, batch_size=18), frames_per_segment=F, **views):
        assert batch["video"].shape == (3, 6, 4 * F, 3, 16, 16)
        for video, length in zip(batch["video"], LENGTHS, strict=True):
            clips = indices_of_test(length, 4, 2, "kinetics", dense).tolist()
            assert frame_numbers(video) == [neighbours(clip, length) for clip in clips for _ in range(3)]


@pytest.mark.parametrize("changes", [{}, {"rand_erase": True}, {"random_shift": False}, {"augment": False}])
@pytest.mark.parametrize("dense", [False, True])
def test_training_reads_neighbouring_frames(numbered, dense, changes):
    """Whatever is drawn is alike for all T * f frames, and buffers hold them all."""
    if changes.get("augment", True):
        changes = {"num_sample": 2, **changes}
    numbered = replace(numbered, dense=dense, **changes)
    loaders = [train_loader(replace(numbered, workers=n), seed=5, frames_per_segment=F) for n in (0, 1)]
    for loader in loaders:
        loader.set_epoch(2)
    (batch,), (same_batch,) = map(list, loaders)
    assert same([batch], [same_batch])
    draws = numbered.num_sample
    assert batch["video"].shape == (3 * draws, 4 * F, 3, 16, 16)
    size = batch["video"].numel() * batch["video"].element_size()
    assert loaders[1].buffers.memory.shape[1] == size
    if numbered.rand_erase:
        return  # whose noise hides the numbers
    for found, index in zip(frame_numbers(batch["video"]), batch["index"].tolist(), strict=True):
        length = LENGTHS[index]
        if numbered.augment and numbered.random_shift:
            indices = train_indices(length, 4, "kinetics", dense, np.random.default_rng([5, 2, index]))
        else:
            indices = val_indices(length, 4, "kinetics", dense)
        assert found == neighbours(indices.tolist(), length)


def test_lists_are_read_once_and_their_doubts_are_logged(data, caplog):
    data = replace(data, num_classes=3)
    sources = read_sources(data, ("train", "val"))
    log_doubts(data, sources, names=None)
    classes, trained = [record.message for record in caplog.records]  # a validation list may lack classes
    assert classes == f"{data.train_list}: 1 of 3 classes have no video: 2"
    assert trained.startswith(f"7 of the 7 videos in {data.val_list} stand in the training list {data.train_list} too")
    os.unlink(data.train_list)
    os.unlink(data.val_list)
    loaders = (train_loader(data, 5, source=sources["train"]), listed_loader(data, 5, source=sources["train"]))
    assert [len(loader.dataset) for loader in (*loaders, val_loader(data, source=sources["val"]))] == [7, 7, 7]
