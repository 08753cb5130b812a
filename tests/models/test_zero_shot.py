"""CLIP's text head from the command line: testing CLIP itself, training from there, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from clip.text_head import TextSizes, tokenize
from configs.schema import CLIP_MEAN, CLIP_STD, load_config
from datasets.build import class_names, val_loader
from engine.normalize import Normalizer
from engine.results import load_scores
from scripts import export
from tests.clip.test_text_head import of_open_clip, random_clip
from tests.helpers.cli_harness import (
    VIDEOS,
    assert_same,
    command,
    content,
    evaluated,
    metrics,
    refusal,
    script,
    settings,
    train,
)

CLIP = {"vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text": {"width": 64, "heads": 1, "layers": 2}}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tiny: Path):
    return random_clip(24, **CLIP)


@pytest.fixture(scope="module")
def zero(tiny: Path, clip) -> Path:
    """The tiny configuration with a complete CLIP and its text head."""
    values = yaml.safe_load(tiny.read_text())
    weights = tiny.parent / "clip.pt"
    torch.save(clip.state_dict(), weights)
    values["network"] |= {"init": True, "weights": str(weights), "model": "linear_probe", "head": "text"}
    values["logging"] = {"output_dir": str(tiny.parent / "zero")}
    path = tiny.parent / "zero.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_clip_as_it_is(zero: Path, clip) -> None:
    config = load_config(zero)
    results = Path(config.logging.output_dir, "frame_order", "custom", "zero_shot_clip_1crops_1clips.json")
    done = script(sys.executable, "test_vision.py", "--config", zero, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads(results.read_text())
    assert (result["videos"], result["epoch"]) == (VIDEOS, None)
    assert result["weights"] == f"custom, {config.network.weights}" and result["parameters"]["trainable"] == 0
    texts = [f"a video of a person {name.replace('_', ' ')}." for name in class_names(config.data)]
    normalizer = Normalizer(CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        videos = [normalizer(batch["video"]).flatten(0, 1) for batch in val_loader(config.data)]
        wanted = torch.cat([of_open_clip(clip, video, texts) for video in videos]).softmax(1)
    scores = load_scores(results.with_suffix(".npz")).table.score
    torch.testing.assert_close(scores, wanted.double(), rtol=0, atol=1e-5)
    assert result["class_names"] == list(class_names(config.data)) and len(result["per_class"]) == 4
    assert "replaced" not in done.stderr
    other = zero.with_name("other.pt")
    other.write_bytes(zero.with_name("clip.pt").read_bytes())
    for weights, replaced in (("other.pt", False), ("clip.pt", True)):
        chosen = (f"network.weights={zero.with_name(weights)}",)
        status, text = command("test_vision.py", "--config", zero, *settings(chosen))
        assert status == 0 and (f"{results} and the files beside it are from an earlier test" in text) == replaced
    assert {path.name for path in results.parent.glob("*.json")} == {
        f"zero_shot_{name}_1crops_1clips.json" for name in ("clip", "other")
    }


def test_a_folder_for_the_results_is_made_with_them(zero: Path, tmp_path: Path) -> None:
    """A folder that cannot be made is refused before the test, and a refused test makes none."""
    (tmp_path / "file").touch()
    where = f"logging.output_dir={tmp_path / 'file' / 'exp'}"
    sentence = f"{tmp_path / 'file'}: is a file, so no folder can be made in it for the results"
    assert refusal("test_vision.py", "--config", zero, "--set", where, "--set", "network.weights=gone.pt") == sentence
    where = f"logging.output_dir={tmp_path / 'exp'}"
    refusal("test_vision.py", "--config", zero, "--set", where, "--set", "network.weights=gone.pt")
    assert not (tmp_path / "exp").exists()


def test_an_empty_name_of_weights_tests_nothing(zero: Path) -> None:
    done = script("bash", "scripts/run_test_vision.sh", zero, "")
    assert done.returncode == 2 and done.stderr.startswith(
        "run_test_vision.sh: WEIGHTS is empty: name a run or a checkpoint"
    )


@pytest.mark.parametrize(("tuned", "more"), [
    ("classifier", ("network.cache_features=all", "data.augment=false", "data.crop_scale=[0.08,1.0]")),
    ("tower", ("solver.ema_decay=0.5", "solver.mixup=true", "solver.clip_ratio=0.1", "network.model=full_finetune")),
])  # fmt: skip
def test_training_from_there_and_testing_it(zero: Path, tmp_path: Path, tuned: str, more: tuple[str, ...]) -> None:
    """The checkpoint, and what is exported of it, give the numbers of training without the class names."""
    chosen = (f"network.text.tuned={tuned}", *more, f"logging.output_dir={tmp_path}")
    run = train(zero, tmp_path / "run", "solver.epochs=1", *chosen)
    nameless = (*chosen, "data.label_list=null")
    result = evaluated(zero, run / "model_best.pt", tmp_path / "best.json", *nameless)
    (row,) = metrics(run)
    assert result["top1"] == row["top1"] and result["parameters"]["trainable"] > 4 * 24
    for flags in ((), ("--full",)):
        assert export.main([str(run / "model_best.pt"), "--out", str(tmp_path / "out.safetensors"), *flags]) == 0
        evaluated(zero, tmp_path / "out.safetensors", tmp_path / "again.json", *nameless)
        one, other = (load_scores(tmp_path / f"{name}.npz").table.score for name in ("best", "again"))
        assert torch.equal(one, other)
    train(zero, run, "solver.epochs=2", *chosen)  # resumes
    assert [row["epoch"] for row in metrics(run)] == [0, 1]
    evaluate = (*nameless, "solver.evaluate=true", f"pretrain={run / 'model_best.pt'}")
    status, text = command("train_vision.py", "--config", zero, *settings(evaluate))
    assert status == 0 and f"validation: top-1 {max(row['top1'] for row in metrics(run)):.2f}" in text, text


def test_a_resumed_run_makes_no_classes_again(zero: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it need the file with CLIP's text tower for them."""
    chosen = ("network.model=full_finetune", f"logging.output_dir={tmp_path}")
    run = train(zero, tmp_path / "run", "solver.epochs=1", *chosen)
    before = content(run / "last_model.pt")["model_state_dict"]["head.classes"]
    monkeypatch.setattr("clip.text_head.tokenize", lambda *_: pytest.fail("classes are made of names"))
    train(zero, run, "solver.epochs=2", *chosen)
    assert torch.equal(content(run / "last_model.pt")["model_state_dict"]["head.classes"], before)


def test_pretraining_on_other_names(zero: Path, tmp_path: Path) -> None:
    """Names and templates are the configuration's, the text tower is the checkpoint's; resuming changes no bit."""
    chosen = ("network.text.tuned=tower", "network.model=full_finetune", f"logging.output_dir={tmp_path}")
    first = train(zero, tmp_path / "first", "solver.epochs=1", *chosen) / "model_best.pt"
    names = ["wave", "clap", "jump over something high", "run"]
    labels = tmp_path / "labels.csv"
    labels.write_text("id,name\n" + "\n".join(f"{label},{name}" for label, name in enumerate(names)))
    chosen = (*chosen, f"data.label_list={labels}", "network.text.templates=['{}','a {}']", "network.recompute=true")
    run = train(zero, tmp_path / "run", "solver.epochs=1", "solver.lr=1e-9", *chosen, f"pretrain={first}")
    before, after = (content(path)["model_state_dict"] for path in (first, run / "last_model.pt"))
    tokens = tokenize(names, ["{}", "a {}"], TextSizes()).int()
    assert torch.equal(after["head.classes.tokens"], tokens) and len(before["head.classes.tokens"]) == 4
    key = "head.classes.tower.text_projection"
    torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6)
    complete = train(zero, tmp_path / "complete", *chosen, f"pretrain={first}", "checkpoint.keep=9")
    parts = train(zero, tmp_path / "parts", *chosen, f"resume={complete / 'step_00000008.pt'}")  # after the first epoch
    one, other = (content(folder / "last_model.pt")["model_state_dict"] for folder in (complete, parts))
    assert_same(one, other)
    assert not torch.equal(one[key], after[key])


@pytest.mark.parametrize(("file", "changes", "sentence"), [
    ("test", ("network.head=linear",), "--weights: is needed, for network.head linear starts with a random classifier"),
    ("test", ("network.model=td4v_finetune",), "network.model: needs a checkpoint (--weights), for it has parts that CLIP does not have: td4v, temporal_embedding"),
    ("test", ("network.model=td4v_side",), "network.head: text needs features in CLIP's space, which network.model td4v_side does not give"),
    ("test", ("network.init=false", "network.weights=null"), "network.head: text needs a pretrained CLIP, but network.init is false: set it to true, or network.head to linear"),
    ("test", ("data.label_list=null",), "network.head: text has no classes: it makes them of the names in data.label_list and of CLIP's weights, or takes a checkpoint's"),
    ("train", ("network.text.tuned=tower", "data.label_list=null"), "network.head: text has no classes: it makes them of the names in data.label_list and of CLIP's weights, or takes a checkpoint's"),
    ("train", (), "network.text.tuned: none leaves nothing to train in this model: test it with test_vision.py, without --weights"),
])  # fmt: skip
def test_refusals(zero: Path, tmp_path: Path, file: str, changes: tuple[str, ...], sentence: str) -> None:
    where = (f"logging.output_dir={tmp_path / 'exp'}",)
    assert refusal(f"{file}_vision.py", "--config", zero, *settings((*where, *changes))) == sentence
    assert not list(tmp_path.rglob("*.json"))
