"""Weights for use elsewhere: what is in the files, that they give the same logits, and their sizes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from configs.schema import Config, SolverConfig, load_config
from engine import checkpoint_file, checkpointer
from engine.checkpointer import Progress
from engine.distributed import Process
from engine.ema import ModelEma
from engine.optim import build_scheduler
from engine.results import load_scores
from engine.train_step import TrainingState
from models.loading import WeightsError, load_weights
from models.parameters import frozen_identity
from models.registry import build_model
from scripts.export import main
from tests.clip.test_published import authors_shapes
from tests.helpers.cli_harness import command

SUFFIXES = (".pt", ".safetensors")
MODELS = ("td4v_side", "td4v_finetune")
VALUES = {
    "seed": 3,
    "data": {"dataset": "hmdb51", "num_classes": 5, "num_segments": 4, "input_size": 32},
    "network": {
        "arch": "custom", "init": False, "pyramid": {"n_embs": [16, 32, 32]},
        "vision": {"width": 64, "layers": 3, "heads": 2, "patch_size": 8, "image_size": 32},
    },
}  # fmt: skip


def configuration(model_name: str = "td4v_side", **network: object) -> Config:
    return load_config(VALUES | {"network": VALUES["network"] | {"model": model_name} | network})


def trained(config: Config, full: bool = False, ema: bool = False) -> tuple[torch.nn.Module, dict]:
    """A model whose every trainable value is another than at the start, and its last_model.pt's content."""
    model = build_model(config).eval()
    parts = _parts(model, ema)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for value in (*model.parameters(), *model.buffers()):
            if value.requires_grad or not isinstance(value, torch.nn.Parameter):
                value.add_(torch.rand(value.shape) if value.is_floating_point() else 3)
    if ema:
        parts.ema.update()
    history = Progress(epoch=7, step=70, best=56.125)
    content = checkpointer.run_content(parts, history, {}, Process(), full) | {
        "config": config.to_dict(),
        "meta": {"seed": 3},
    }
    return model, content


def _parts(model: torch.nn.Module, ema: bool = False) -> TrainingState:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for group in optimizer.param_groups:  # what a step leaves behind, without one
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": p.detach() + 0, "exp_avg_sq": p.detach() ** 2}
    average = ModelEma(model, 0.5) if ema else None
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainingState(
        model,
        optimizer,
        build_scheduler(optimizer, SolverConfig(epochs=2, lr_warmup_step=1), 4),
        scaler,
        average,
        frozen_identity(model),
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    video = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return model.eval()(video)


def loaded(path: Path, config: Config) -> torch.nn.Module:
    """As test_vision.py and `pretrain` do it."""
    checkpoint = checkpoint_file.load(path)
    model = build_model(config, pretrained=not checkpoint.has_backbone)
    load_weights(model, checkpoint.weights, str(path), backbone=checkpoint.missing_backbone)
    return model


def written(folder: Path, content: dict, name: str = "last_model.pt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint_file.save(folder / name, content)
    return folder / name


def exported(source: Path, target: Path, *options: str | Path) -> Path:
    assert main([str(source), "--out", str(target), *map(str, options)]) == 0
    return target


def refusal(caplog: pytest.LogCaptureFixture, *arguments: str | Path) -> str:
    """The one sentence with which it refuses."""
    caplog.clear()
    assert main([*map(str, arguments)]) == 1
    (sentence,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("saved_full", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_both_kinds_in_both_formats_give_the_same_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_name: str, saved_full: bool, suffix: str
):
    config = configuration(model_name)
    model, content = trained(config, full=saved_full)
    source = written(tmp_path, content)
    lean = exported(source, tmp_path / f"lean{suffix}")
    full = exported(source, tmp_path / f"full{suffix}", "--full")
    for path in (lean, full):
        checkpoint = checkpoint_file.load(path)
        found = checkpoint.content
        assert (found["epoch"], found["best"], found["meta"]) == (7, 56.125, {"seed": 3})
        assert found["config"] == config.to_dict() and found["backbone"] == frozen_identity(model)
        assert found["full"] is (path == full) is checkpoint.has_backbone
        assert found["model_state_dict"].keys() == checkpointer.weights_to_save(model, full=path == full).keys()
        assert not checkpoint.is_run
        assert torch.equal(logits(loaded(path, config)), logits(model))
    again = exported(full, tmp_path / f"again{suffix}")  # and back
    assert str(checkpoint_file.load(again).content) == str(checkpoint_file.load(lean).content)
    assert torch.equal(logits(loaded(again, config)), logits(model))
    table = capsys.readouterr().out
    kind = "all" if saved_full else "trainable"
    assert (
        f"a complete run: {kind} weights after 7 epochs, best top-1 56.12, on custom, random weights of seed 3 ("
        in table
    )
    assert re.search(
        rf"lean{suffix} +\| +{lean.stat().st_size / 1e6:.2f} MB \| +[\d,]+ \| trainable weights after 7 epochs", table
    )
    assert re.search(
        rf"full{suffix} +\| +{full.stat().st_size / 1e6:.2f} MB \| +[\d,]+ \| all weights after 7 epochs", table
    )


def test_a_full_export_needs_nothing_else(tmp_path: Path):
    """Frozen weights from a file: with --full the file is not needed any more, without it the same one is."""
    towers = []
    for seed in (8, 9):
        tower = build_model(load_config(VALUES | {"seed": seed})).tower
        towers.append(tmp_path / f"clip{seed}.pt")
        torch.save({f"visual.{name}": value for name, value in tower.visual.state_dict().items()}, towers[-1])
    config = configuration(init=True, weights=str(towers[0]))
    model, content = trained(config)
    source = written(tmp_path, content)
    lean, full = (exported(source, tmp_path / name, *more) for name, *more in (("a.pt",), ("b.safetensors", "--full")))
    assert checkpoint_file.load(full).content["backbone"]["weights"] == str(towers[0])

    other = configuration(init=True, weights=str(towers[1]))
    with pytest.raises(WeightsError, match=r"a\.pt: was trained on the frozen weights .*clip8.*, here are .*clip9"):
        loaded(lean, other)
    towers[0].unlink()
    wanted, again = logits(model), exported(full, tmp_path / "c.pt", "--full")
    assert checkpoint_file.load(again).content["backbone"] == checkpoint_file.load(full).content["backbone"]
    assert torch.equal(logits(loaded(full, other)), wanted) and torch.equal(
        logits(loaded(full, configuration())), wanted
    )


def test_a_lean_export_needs_no_backbone_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = written(tmp_path, trained(configuration())[1])
    monkeypatch.setattr("models.registry.build_model", lambda *_: pytest.fail("no model is needed"))
    exported(source, tmp_path / "a.pt")


@pytest.mark.parametrize("full", [False, True])
def test_averaged_weights_are_the_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str], full: bool):
    config = configuration("td4v_finetune")
    model, content = trained(config, ema=True)
    path = exported(written(tmp_path, content), tmp_path / "a.safetensors", *(["--full"] if full else []))
    found = checkpoint_file.load(path).content["model_state_dict"]
    assert all(torch.equal(found[name], value) for name, value in content["ema_state_dict"].items())
    assert not torch.equal(logits(loaded(path, config)), logits(model))
    assert "a complete run: trainable weights and their averages after 7 epochs" in capsys.readouterr().out


def test_best_and_step_files(tmp_path: Path):
    config = configuration()
    model, content = trained(config)
    bare = {
        "epoch": 7,
        "best": 56.125,
        "config": config.to_dict(),
        "meta": {},
        **checkpointer.weights_content(_parts(model), full=False),
    }
    for name, kept in (("model_best.pt", bare), ("step_00000070.pt", content)):
        path = exported(written(tmp_path / "run", kept, name), tmp_path / f"{name}.safetensors")
        assert torch.equal(logits(loaded(path, config)), logits(model))


def authors(tmp_path: Path, config: Config, **changed: torch.Tensor) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file as the authors' code saves it, on the frozen tower of `config`."""
    tower = build_model(config).tower.visual.state_dict()
    generator = torch.Generator().manual_seed(4)
    theirs = {}
    for name, shape in authors_shapes().items():
        own = tower.get(name.removeprefix("visual."))
        theirs[f"module.{name}"] = own if own is not None else torch.rand(shape, generator=generator) + 0.5
    path = tmp_path / "theirs.pt"
    torch.save({"epoch": 29, "model_state_dict": theirs | changed}, path)
    return path, theirs


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_the_authors_becomes_one_of_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str):
    config = configuration()
    path, theirs = authors(tmp_path, config)
    wanted = build_model(config)
    load_weights(wanted, theirs, "theirs.pt")
    chosen = tmp_path / "tiny.yaml"
    chosen.write_text(yaml.safe_dump(VALUES))
    for more in ((), ("--full",)):
        ours = exported(path, tmp_path / f"ours{suffix}", "--config", chosen, "--set", "network.model=td4v_side", *more)
        found = checkpoint_file.load(ours).content
        assert found["epoch"] == 29 and found["best"] is None and found["config"]["network"]["model"] == "td4v_side"
        assert found["model_state_dict"].keys() == checkpointer.weights_to_save(wanted, full=bool(more)).keys()
        assert torch.equal(logits(loaded(ours, config)), logits(wanted))
    assert "theirs.pt: holds no configuration: give" in refusal(caplog, path, "--out", tmp_path / "b.pt")

    path, _ = authors(tmp_path, config, **{"module.visual.conv1.weight": torch.ones(64, 3, 8, 8)})
    message = refusal(caplog, path, "--out", tmp_path / "c.pt", "--config", chosen)
    assert re.search(r"its frozen weights \(\w{12}\) are not those .* random weights of seed 3 \(\w{12}\)", message)
    assert "--full" in message and not (tmp_path / "c.pt").exists()
    full = checkpoint_file.load(exported(path, tmp_path / "c.pt", "--config", chosen, "--full")).content
    assert full["backbone"]["weights"] == "theirs.pt"


def test_another_function_is_not_exported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A configuration that differs is refused, or forced by --set; null pixel statistics are the checkpoint's."""
    config = load_config(VALUES, ["data.mean=[0.5,0.4,0.3]"])
    source = written(tmp_path, trained(config)[1])
    chosen, changed = tmp_path / "tiny.yaml", tmp_path / "changed.yaml"
    chosen.write_text(yaml.safe_dump(VALUES))
    changed.write_text(yaml.safe_dump(VALUES | {"network": VALUES["network"] | {"options": {"token_shift": False}}}))
    assert checkpoint_file.load(exported(source, tmp_path / "a.pt", "--config", chosen)).config["data"]["mean"] == [
        0.5,
        0.4,
        0.3,
    ]
    message = refusal(caplog, source, "--out", tmp_path / "b.pt", "--config", changed)
    assert "network.options.token_shift was True and is now False" in message and not (tmp_path / "b.pt").exists()
    exported(source, tmp_path / "b.pt", "--config", chosen, "--set", "network.options.token_shift=false")
    assert "trained with network.options.token_shift True and are used with False" in caplog.text


def test_tensors_with_two_names(tmp_path: Path):
    """Safetensors refuses memory that is shared."""
    config = configuration("td4v_finetune")
    model, content = trained(config)
    first, second = [name for name in content["model_state_dict"] if name.endswith("down.weight")][:2]
    content["model_state_dict"][second] = content["model_state_dict"][first]
    found = safetensors.torch.load_file(exported(written(tmp_path, content), tmp_path / "a.safetensors"))
    assert torch.equal(found[first], found[second]) and torch.equal(found[first], model.state_dict()[first])


def test_refusals(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = configuration()
    content = trained(config)[1]
    source = written(tmp_path / "run", content)
    (source.parent / "run.json").write_text("[]")
    before = source.read_bytes()
    (tmp_path / "link.pt").hardlink_to(source)
    (tmp_path / "soft.pt").symlink_to(source)
    for target in (
        source,
        tmp_path / "link.pt",
        tmp_path / "soft.pt",
        tmp_path / "run" / ".." / "run" / "last_model.pt",
    ):
        assert refusal(caplog, source, "--out", target).endswith("is the checkpoint itself and would be overwritten")
    for name in ("model_best.pt", "step_00000007.pt", "failed_model.pt"):
        assert "is the name of a checkpoint of the run" in refusal(caplog, source, "--out", source.with_name(name))
    assert "must end with .safetensors or .pt" in refusal(caplog, source, "--out", tmp_path / "a.bin")
    assert "there is no folder" in refusal(caplog, source, "--out", tmp_path / "nowhere" / "a.pt")
    assert "no such checkpoint" in refusal(caplog, tmp_path / "none.pt", "--out", tmp_path / "a.pt")
    assert "--set changes the file given by --config" in refusal(
        caplog, source, "--out", tmp_path / "a.pt", "--set", "seed=1"
    )
    assert "no/such.yaml" in refusal(caplog, source, "--out", tmp_path / "a.pt", "--config", "no/such.yaml")
    assert source.read_bytes() == before and sorted(p.name for p in source.parent.iterdir()) == [
        "last_model.pt",
        "run.json",
    ]

    chosen = tmp_path / "tiny.yaml"
    chosen.write_text(yaml.safe_dump(VALUES | {"seed": 4}))  # another frozen tower
    message = refusal(caplog, source, "--out", tmp_path / "a.pt", "--full", "--config", chosen)
    assert "random weights of seed 3" in message and "random weights of seed 4" in message
    written(tmp_path, content | {"config": {"data": {"nonsense": 1}}}, "odd.pt")
    assert "odd.pt: its configuration is not" in refusal(
        caplog, tmp_path / "odd.pt", "--out", tmp_path / "a.pt", "--full"
    )
    written(tmp_path, content | {"meta": {"a": torch.ones(1)}}, "odd.pt")
    message = refusal(caplog, tmp_path / "odd.pt", "--out", tmp_path / "a.safetensors")
    assert "a.safetensors: holds more than weights and plain values" in message
    (tmp_path / "cut.pt").write_bytes(before[:-100])
    assert "truncated" in refusal(caplog, tmp_path / "cut.pt", "--out", tmp_path / "a.pt")
    assert not list(tmp_path.glob("a.*"))


def test_tested_and_trained_on_from_the_command_line(tiny: Path, tmp_path: Path):
    """test_vision.py gives the same scores to the bit, and `pretrain` begins with the same weights."""
    run = tmp_path / "run"
    status, text = command("train_vision.py", "--config", tiny, "--output", run, "--set", "solver.epochs=1")
    assert status == 0, text
    files = [run / "model_best.pt"]
    for suffix in SUFFIXES:
        files += [
            exported(files[0], tmp_path / f"lean{suffix}"),
            exported(files[0], tmp_path / f"full{suffix}", "--full"),
        ]
    results = []
    for path in files:
        report = tmp_path / f"{path.name}.json"
        status, text = command("test_vision.py", "--config", tiny, "--weights", path, "--json", report)
        assert status == 0, text
        saved = load_scores(report.with_suffix(".npz")).table
        results.append((json.loads(report.read_text())["top1"], json.loads(report.read_text())["epoch"], saved.score))
    assert all(result[:2] == results[0][:2] and torch.equal(result[2], results[0][2]) for result in results[1:])
    assert results[0][1] == 1
    wanted = checkpoint_file.load(files[0]).content["model_state_dict"]
    for number, path in enumerate(files[1:]):
        again = tmp_path / f"again{number}"
        status, text = command(
            "train_vision.py", "--config", tiny, "--output", again, "--set", f"pretrain={path}", "--set", "solver.lr=1e-30",
            "--set", "solver.epochs=1", "--set", "solver.weight_decay=0",
        )  # fmt: skip
        assert status == 0, text
        found = checkpoint_file.load(again / "last_model.pt").content["model_state_dict"]
        trainable = [name for name in wanted if "running" not in name and "num_batches" not in name]
        assert all(torch.allclose(found[name], wanted[name], atol=1e-12, rtol=0) for name in trainable)


@pytest.mark.parametrize(("file", "millions", "megabytes"), [("hmdb51/td4v_finetune", 2.14, 8.7), ("ssv2", 20.4, 82)])
def test_sizes_for_vit_b_16(tmp_path: Path, file: str, millions: float, megabytes: float):
    """What a checkpoint costs follows what is trainable, not the 86 million frozen parameters below."""
    chosen = load_config(Path(__file__).parents[2] / "configs" / f"{file}.yaml", ["network.init=false"])
    model = build_model(chosen)
    parts = _parts(model)
    origin = {"config": chosen.to_dict(), "meta": {}}
    content = checkpointer.run_content(parts, Progress(), {}, Process(), full=False) | origin
    paths = {
        "last": written(tmp_path, content),
        "best": written(tmp_path, checkpointer.weights_content(parts, full=False) | origin, "model_best.pt"),
    }
    paths["lean"] = exported(paths["best"], tmp_path / "lean.safetensors")
    size = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) / 1e6
    assert trainable == pytest.approx(millions, abs=0.05) and frozen > 85
    assert size["best"] == pytest.approx(megabytes, rel=0.03) and size["lean"] == pytest.approx(size["best"], rel=0.03)
    assert size["last"] == pytest.approx(3 * size["best"], rel=0.03)  # and both of AdamW's moments
    if file == "hmdb51/td4v_finetune":
        full = exported(paths["best"], tmp_path / "full.safetensors", "--full").stat().st_size / 1e6
        assert full == pytest.approx(4 * (trainable + frozen), rel=0.01) and full > 350
        again = build_model(chosen, pretrained=False)
        load_weights(again, checkpoint_file.load(tmp_path / "full.safetensors").weights, "full")
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    shutil.rmtree(tmp_path)
