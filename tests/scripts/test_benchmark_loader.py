"""The benchmark of reading: it runs, its table holds what it measured, and our pixels are the recipe's."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from datasets.build import train_loader
from engine.log import close_logging
from scripts.benchmarks.loader.command import cases_of, main
from scripts.benchmarks.loader.reference import Reference


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Eight folders of ten smooth frames of 256 x 341 pixels."""
    folder = tmp_path_factory.mktemp("bench")
    rng = np.random.default_rng(0)
    for video in range(8):
        (folder / f"frames/{video}").mkdir(parents=True)
        for frame in range(10):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
            coarse.resize((341, 256), Image.Resampling.BICUBIC).save(folder / f"frames/{video}/{frame + 1:06d}.jpg")
    (folder / "train.txt").write_text("".join(f"{video} 10 0\n" for video in range(8)))
    data = {
        "dataset": "bench", "style": "kinetics", "num_classes": 1, "train_root": str(folder / "frames"),
        "train_list": str(folder / "train.txt"),
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"data": data}))
    return path


@pytest.fixture
def run(capfd):
    """Starts the command; afterwards this process may use all its cores and threads again, to one of which it is tied.
    Returns its status and what it wrote to stdout and stderr."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield lambda *arguments: (main([*map(str, arguments)]), *capfd.readouterr())
    close_logging()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def test_the_command(config, tmp_path, run):
    status, said, errors = run(config, "--videos", "8", "--repeats", "1", "--out", tmp_path)
    assert status == 0, errors
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert [result["case"] for result in results] == [
        "frames", "frames, two draws a video", "frames, RandAugment", "frames, RandAugment before the crop"
    ]  # fmt: skip
    first = results[0]["times"]["item"]
    ratio = first["recipe"][0] / first["ours"][0]
    assert "\n| frames  " in said and f"{ratio:.2f}" in (tmp_path / "table.md").read_text()
    assert Image.open(tmp_path / "stages.png").width > 800


def test_bad_arguments(config, tmp_path, run, capfd):
    for arguments, message in (
        ((tmp_path / "none.yaml",), "none.yaml"),
        ((config, "--core", "4000"), "Invalid argument"),
    ):
        status, _, errors = run(*arguments)
        assert status == 1 and message in errors and "Traceback" not in errors
    with pytest.raises(SystemExit):
        main([str(config), "--videos", "1"])
    assert "--videos must be at least 8" in capfd.readouterr().err


@pytest.mark.parametrize(("rand_aug", "mean", "most"), [(False, 1.2, 6), (True, 1.5, 10)])
def test_training_pixels_are_the_recipes(config, rand_aug, mean, most):
    """The same draw by PIL; frames of the scaled size, so that nothing is resampled twice. `most` bounds 99 %;
    beyond that RandAugment's thresholds turn a difference of 1 into a large one."""
    data = replace(next(cases_of(str(config))).data, rand_aug=rand_aug, workers=0)
    dataset = train_loader(data, 0).dataset
    reference = Reference(dataset, data, augments_whole=True)
    differences = []
    for key in ((epoch, index) for epoch in range(3) for index in range(8)):
        ours = dataset[key]["video"][0].numpy().astype(int)
        differences.append(np.abs(ours - reference.with_our_draw(key)))
    assert np.mean(differences) < mean and np.percentile(differences, 99) <= most
