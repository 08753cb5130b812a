"""Which run a command resumes, and that it ends as if nothing had happened, on synthetic data and a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import engine.checkpoint_file
import engine.trainer
from engine.evaluation import DataError
from engine.run_record import read_record
from tests.helpers.cli_harness import (
    assert_same,
    command,
    content,
    files,
    metrics,
    refusal,
    script,
    settings,
    train,
    training_refusal,
)

MODELS = ("td4v_side", "td4v_finetune", "aim")


@pytest.mark.parametrize("model_name", MODELS)
def test_a_resumed_run_equals_an_uninterrupted_one(tiny: Path, tmp_path: Path, monkeypatch, model_name: str):
    # Mixup, dropout and the dropped paths of AIM draw from generators that continue from epoch to epoch; 8 batches in steps
    # of 3 leave a short one.
    chosen = (
        f"network.model={model_name}",
        "solver.mixup=true",
        "network.drop_fc=0.3",
        "solver.grad_accumulation_steps=3",
    )
    uninterrupted = train(tiny, tmp_path / "uninterrupted", *chosen)
    save = engine.checkpoint_file.save

    def interrupted(path: Path, saved: dict) -> None:
        if saved["epoch"] == 2:
            raise KeyboardInterrupt
        save(path, saved)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(engine.checkpoint_file, "save", interrupted)
        status, text = command("train_vision.py", "--config", tiny, "--output", parts, *settings(chosen))
    assert status == 130 and "interrupted: last_model.pt" in text and "Traceback" not in text
    assert content(parts / "last_model.pt")["epoch"] == 1
    train(tiny, parts, *chosen)  # rerun
    for name in ("last_model.pt", "model_best.pt"):
        one, other = content(uninterrupted / name), content(parts / name)
        untimed = one.keys() - {"meta", "meters", "history"}
        assert_same({key: one[key] for key in untimed}, {key: other[key] for key in untimed})
    timed = ("clips_per_s", "data_wait")
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in metrics(folder)]
        for folder in (uninterrupted, parts)
    ]
    assert rows[0] == rows[1] and [row["epoch"] for row in rows[0]] == [0, 1]
    assert len(json.loads((parts / "run.json").read_text())) == 2


def test_a_failing_evaluation_does_not_cost_the_epoch(tiny: Path, trained: Path, tmp_path: Path, monkeypatch):
    folder = tmp_path / "run"

    def broken(*arguments, **options):
        raise DataError("a validation video is broken")

    with monkeypatch.context() as patched:
        patched.setattr(engine.trainer, "evaluate", broken)
        assert training_refusal(tiny, folder, "solver.epochs=1") == "a validation video is broken"
    assert content(folder / "last_model.pt")["unevaluated_epoch"]["epoch"] == 0 and not metrics(folder)
    resume = f"resume={folder / 'last_model.pt'}"  # which stands for the folder
    status, text = command("train_vision.py", "--config", tiny, *settings((resume, "solver.epochs=1")))
    assert status == 0, text
    assert [line["top1"] for line in metrics(folder)] == [line["top1"] for line in metrics(trained)]
    one, other = (content(path / "last_model.pt") for path in (folder, trained))
    for key in ("model_state_dict", "optimizer_state_dict", "rng", "best", "unevaluated_epoch"):
        assert_same(one[key], other[key])


def test_a_folder_of_another_run_is_left_alone(tiny: Path, trained: Path):
    before = files(trained)
    sentence = training_refusal(tiny, trained, "solver.epochs=1", "solver.lr=0.5")
    assert sentence == f"{trained}: already holds another run: solver.lr was 0.001 and is now 0.5"
    status, text = command("train_vision.py", "--config", tiny, "--output", trained, "--fresh")
    assert status == 1 and "already holds a run (last_model.pt), which --fresh does not resume" in text
    assert files(trained) == before


def test_rerunning_a_command_resumes_its_run(tiny: Path, tmp_path: Path):
    """Without a folder: an unfinished run with the same settings, data and processes is resumed."""
    chosen = settings((f"logging.output_dir={tmp_path}", "solver.epochs=1"))
    home = tmp_path / "frame_order" / "custom"

    def again(*more: str) -> set[str]:
        status, text = command("train_vision.py", "--config", tiny, *chosen, *more)
        assert status == 0, text
        return {folder.name for folder in home.iterdir()}

    (first,) = again()
    record = home / first / "run.json"
    (start,) = json.loads(record.read_text())
    del start["finished"]
    record.write_text(json.dumps([start]))
    assert again() == {first} and len(json.loads(record.read_text())) == 2  # which finishes it
    assert len(again()) == 2
    starts = json.loads(record.read_text())
    del starts[-1]["finished"]
    record.write_text(json.dumps(starts))
    assert len(again("--set", "seed=6")) == 3
    assert len(again("--fresh")) == 4
    starts[-1]["world_size"] = 2
    record.write_text(json.dumps(starts))
    assert len(again()) == 5


def test_a_changed_list_is_another_run(tiny: Path, tiny_data: Path, trained: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    changed = tmp_path / "train.txt"
    changed.write_text("\n".join((tiny_data / "train.txt").read_text().splitlines()[::-1]) + "\n")
    sentence = training_refusal(tiny, folder, "solver.epochs=1", f"data.train_list={changed}")
    assert "began with another train_list" in sentence and "32 rows" in sentence


def test_a_restart_resumes_a_fresh_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = train(tiny, tmp_path / "run", "solver.epochs=1")
    call = ("train_vision.py", "--config", tiny, "--output", folder, "--fresh", *settings(("solver.epochs=1",)))
    assert "--fresh does not resume" in refusal(*call)
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert command(*call)[0] == 0


def test_more_and_fewer_epochs(tiny: Path, tmp_path: Path):
    """More of them follow the longer schedule from their first step on; fewer than were made are refused."""
    chosen = ("logging.print_freq=1",)
    folder = train(tiny, tmp_path / "run", "solver.epochs=1", *chosen)
    train(tiny, folder, "solver.epochs=2", *chosen)
    rates = [float(rate) for rate in re.findall(r"epoch 1/2 step .* lr (\S+) ", (folder / "log.txt").read_text())]
    assert len(rates) == 8 and rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(5e-4, rel=0.01)
    assert "2 epochs were trained already" in training_refusal(tiny, folder, "solver.epochs=1", *chosen)


def test_other_code_is_logged_when_a_run_is_resumed(tiny: Path, trained: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    saved = content(folder / "last_model.pt")
    saved["meta"]["versions"]["torch"] = "1.0"
    torch.save(saved, folder / "last_model.pt")
    status, text = command("train_vision.py", "--config", tiny, "--output", folder, *settings(("solver.epochs=1",)))
    assert status == 0 and "this run is resumed with other code or machines: versions torch was 1.0 and is now" in text


def test_resuming_from_bare_weights_starts_a_run_of_its_own(tiny: Path, trained: Path, tmp_path: Path, monkeypatch):
    """The folder of somebody's weights is not a run folder: nothing in it may change."""
    weights = tmp_path / "weights" / "last_model.pt"
    weights.parent.mkdir()
    saved, output = content(trained / "last_model.pt"), f"logging.output_dir={tmp_path / 'exp'}"
    torch.save({"model_state_dict": saved["model_state_dict"], "epoch": 7}, weights)
    sentence = refusal("train_vision.py", "--config", tiny, *settings((f"resume={weights}", output)))
    assert "lacks the frozen backbone" in sentence
    torch.save({key: saved[key] for key in ("model_state_dict", "backbone", "epoch")}, weights)
    before = files(weights.parent)
    status, output_text = command(
        "train_vision.py", "--config", tiny, *settings((f"resume={weights}", output, "solver.epochs=1"))
    )
    assert status == 0 and "no run to resume" in output_text
    assert files(weights.parent) == before and len(list((tmp_path / "exp").rglob("last_model.pt"))) == 1


def test_resuming_from_an_older_checkpoint_leaves_its_run_alone(tiny: Path, trained: Path, tmp_path: Path):
    before, older = files(trained), trained / "step_00000008.pt"
    assert content(older)["unevaluated_epoch"]["epoch"] == 0  # trained, not validated
    output_text = training_refusal(tiny, trained, f"resume={older}")
    assert "already holds another run: resume was None" in output_text and files(trained) == before
    folder = train(tiny, tmp_path / "run", f"resume={older}")
    assert files(trained) == before and content(folder / "last_model.pt")["epoch"] == 2
    assert train(tiny, folder, f"resume={older}") == folder  # rerun: it is finished
    assert len(json.loads((folder / "run.json").read_text())) == 2


def test_a_refused_resume_writes_nothing(tiny: Path, trained: Path, tmp_path: Path):
    """Whatever does not fit is found before the folder is touched, also by a run that was finished."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    longer = train(tiny, tmp_path / "longer", "solver.epochs=2")
    before = {path: files(path) for path in (folder, longer)}
    assert "2 epochs were trained already" in training_refusal(tiny, longer, "solver.epochs=1")
    assert files(longer) == before[longer]
    saved = content(folder / "last_model.pt")
    broken = {
        "made 9 steps in 1 epoch and 0 steps": {"step": 9},
        "was written by 2 processes": {"rng": saved["rng"] * 2},
        "holds no weights of this network": {"model_state_dict": {}},
        "does not fit this optimizer": {"optimizer_state_dict": {"state": {}, "param_groups": []}},
    }
    for sentence, part in broken.items():
        torch.save(saved | part, folder / "last_model.pt")
        before[folder] = files(folder)
        assert sentence in training_refusal(tiny, folder, "solver.epochs=1")
        assert files(folder) == before[folder], sentence


def test_a_refused_start_leaves_every_file_as_it_was(tiny: Path, trained: Path, tiny_data: Path, tmp_path: Path):
    """Resuming a finished run, without its lock file as in a copy, or starting one: other settings, lists, weights, ..."""
    folder, new = Path(shutil.copytree(trained, tmp_path / "run")), tmp_path / "new"
    (folder / ".lock").unlink()
    other, absent = tmp_path / "train.txt", tmp_path / "absent"
    other.write_text("\n".join((tiny_data / "train.txt").read_text().splitlines()[::-1]) + "\n")
    weights = tmp_path / "weights.pt"
    torch.save({"model_state_dict": {"head.bias": torch.ones(3)}}, weights)
    before = files(folder)
    for override, refuses_new in (
        ("solver.lr=0.5", False),
        ("seed=77", False),
        ("network.drop_fc=0.5", False),
        (f"data.train_list={other}", False),
        (f"data.train_list={absent}", True),
        (f"data.val_root={absent}", True),
        (f"data.label_list={absent}", True),
        (f"pretrain={weights}", True),
        (f"resume={absent}", True),
        ("solver.lrr=1", True),
        ("solver.lr=fast", True),
        ("data.num_classes=3", True),
    ):
        chosen = ("solver.epochs=1", override)
        for target in (folder, *([new] if refuses_new else [])):
            assert training_refusal(tiny, target, *chosen), override
            assert files(folder) == before and not new.exists(), override
    for words in (("--fresh",), ("--log_time", "x", "--fresh"), ("--dry-run", "--set", "solver.lrr=1")):
        refusal("train_vision.py", "--config", tiny, "--output", folder, *words)
        assert files(folder) == before
    if not torch.cuda.is_available():
        done = script(sys.executable, "train_vision.py", "--config", tiny, "--output", folder, "--device", "cuda")
        assert done.returncode == 1 and files(folder) == before


def test_a_cut_configuration_is_mended_wherever_it_is_cut(trained: Path, tmp_path: Path):
    """A cut file may still be YAML, of a run with other settings."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    text, right = (folder / "config.yaml").read_text(), read_record(trained)
    for cut in range(0, len(text) - 60, 131):
        (folder / "config.yaml").write_text(text[:cut])
        record = read_record(folder)
        assert record.config == right.config and record.mended.keys() == {"config.yaml"}, cut
        assert record.starts == right.starts and record.finished
    starts = json.loads((folder / "run.json").read_text())
    (folder / "config.yaml").write_text(text)
    (folder / "run.json").write_text(json.dumps([starts[0] | {"started": "2020-01-01T00:00:00+00:00"}]))
    assert read_record(folder).mended.keys() == {"run.json"}  # of another run
    (folder / "config.yaml").write_text(text.replace("seed: 5", "seed: 6"))
    assert not read_record(folder).mended  # the checkpoint is of another run
    (folder / "run.json").write_text(json.dumps(starts))
    (folder / "config.yaml").unlink()
    (folder / "run.json").write_text((folder / "run.json").read_text()[:500])
    record = read_record(folder)
    assert record.config == right.config and record.finished and record.mended.keys() == {"config.yaml", "run.json"}


def test_a_run_with_damaged_files_is_resumed_without_its_name(tiny: Path, tmp_path: Path, monkeypatch):
    """Never a new run beside it: with config.yaml cut, run.json gone, or both."""
    chosen = settings((f"logging.output_dir={tmp_path}", "solver.epochs=1"))
    home = tmp_path / "frame_order" / "custom"
    with monkeypatch.context() as patched:
        patched.setattr(engine.trainer, "evaluate", lambda *_, **__: (_ for _ in ()).throw(DataError("stopped")))
        refusal("train_vision.py", "--config", tiny, *chosen, "--log_time", "run")
    interrupted = Path(shutil.copytree(home / "run", tmp_path / "interrupted"))
    for names in (("config.yaml",), ("run.json",), ("config.yaml", "run.json")):
        shutil.rmtree(home / "run")
        shutil.copytree(interrupted, home / "run")
        for name in names:
            path = home / "run" / name
            path.write_bytes(path.read_bytes()[:700]) if name == "config.yaml" else path.unlink()
        status, text = command("train_vision.py", "--config", tiny, *chosen)
        assert status == 0 and [folder.name for folder in home.iterdir()] == ["run"], text
        for name in names:
            assert f"{home / 'run' / name}: " in (home / "run" / "log.txt").read_text()
        assert len(metrics(home / "run")) == 1 and len(json.loads((home / "run" / "run.json").read_text())) == 2


def test_a_finished_run_gets_its_best_model_back_or_is_refused(tiny: Path, trained: Path, tmp_path: Path):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    right = content(folder / "model_best.pt")
    (folder / "model_best.pt").write_bytes(b"")
    train(tiny, folder, "solver.epochs=1")
    assert_same(content(folder / "model_best.pt"), right)
    assert "it is made again from" in (folder / "log.txt").read_text()
    saved = content(folder / "last_model.pt")
    torch.save(saved | {"best": 99.0}, folder / "last_model.pt")  # of an epoch that no checkpoint holds any more
    (folder / "model_best.pt").unlink()
    before = files(folder)
    sentence = training_refusal(tiny, folder, "solver.epochs=1")
    assert sentence.startswith(f"{folder / 'model_best.pt'}: ") and "test last_model.pt instead" in sentence
    assert files(folder) == before
    train(tiny, folder, "solver.epochs=2")  # the next evaluation makes another
    assert content(folder / "model_best.pt")["epoch"] == 2


def test_a_run_whose_checkpoints_are_lost_is_not_begun_again(tiny: Path, trained: Path, tmp_path: Path):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    for path in (folder / "last_model.pt", *folder.glob("step_*.pt")):
        path.unlink()
    before = files(folder)
    assert "its last_model.pt is lost" in training_refusal(tiny, folder, "solver.epochs=1")
    assert files(folder) == before


@pytest.mark.parametrize("override", ["solver.lr=7e-3", "solver.optim=sgd", "seed=77"])
def test_another_run_is_not_resumed(tiny: Path, trained: Path, override: str):
    before = files(trained)
    output_text = training_refusal(tiny, trained, f"resume={trained / 'last_model.pt'}", override)
    assert f"{override.split('=')[0]} was" in output_text and files(trained) == before
