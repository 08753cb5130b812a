"""The comparison of models: tables and files, resuming, failing runs, what it says about the numbers.

The two commands run in this process (cli_harness.command) but for the run that fails, which is a real one.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from configs.schema import load_config
from engine import profiling
from models.registry import MODELS, build_model
from scripts import experiments
from scripts.compare_models import accuracy as compare_accuracy
from scripts.compare_models import report
from scripts.compare_models.accuracy import prepare, recipe
from scripts.compare_models.cases import CompareError, chosen_models, labels_of, overrides_of
from scripts.compare_models.command import main, parse_arguments
from scripts.compare_models.report import Accuracy, Scores, accuracy_findings
from scripts.compare_models.study import Study, read_study
from scripts.experiments import ExperimentError, Work, seconds_left
from tests.helpers.cli_harness import command

PROBE, TUNED = "linear_probe", "td4v_finetune"


@pytest.fixture
def small(tiny: Path, tmp_path: Path) -> Path:
    """The tiny configuration, of one epoch, with options that only its own model has."""
    values = yaml.safe_load(tiny.read_text())
    values["solver"]["epochs"] = 1
    values["network"] |= {"options": {"td4v": True}}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def compare(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_collection: None):
    """Starts the comparison; `.calls` are the runs of the two commands, here and now, `.fails` is one of them."""
    monkeypatch.setattr(profiling, "matrix_rate", partial(profiling.matrix_rate, size=64))
    monkeypatch.setattr(profiling, "seconds", partial(profiling.seconds, least=0))

    def call(self: object, experiment: experiments.Experiment, script: str, *words: str) -> None:
        start.calls.append((experiment.folder.name, script))
        if start.fails == (experiment.folder.name, script):
            raise ExperimentError(f"{experiment.title}: broken")
        status, said = command(script, *words)
        assert status == 0, said

    def start(*words: str) -> int:
        start.calls.clear()
        fixed = ["--costs", str(small), "--accuracy", str(small), "--output", str(tmp_path / "out"), "--jobs", "1"]
        return main([*fixed, "--models", PROBE, "--device", "cpu", "--repeats", "1", *words])

    start.calls, start.fails = [], None
    monkeypatch.setattr(experiments._Commands, "run", call)
    return start


def test_tables_files_and_going_on(compare, tmp_path: Path, capsys, caplog) -> None:
    chosen, out = ["--models", PROBE, TUNED, "--seeds", "0", "1"], tmp_path / "out"
    compare.fails = (f"{TUNED}_seed1", "test_vision.py")
    assert compare(*chosen) == 1
    assert caplog.records[-1].getMessage() == f"small, {TUNED}, seed 1: broken" and not (out / "models.md").exists()
    compare.fails = None
    capsys.readouterr()
    caplog.clear()
    with caplog.at_level("INFO", "td4v"):
        assert compare(*chosen) == 0
    assert compare.calls == [(f"{TUNED}_seed1", script) for script in ("train_vision.py", "test_vision.py")]
    said = [record.getMessage() for record in caplog.records]
    assert "3 of 4 runs are already finished" in said and f"{TUNED}: costs are already measured" in said
    record = json.loads((out / "models.json").read_text())
    assert [row["model"] for row in record["costs"]] == [PROBE, TUNED] and record["costs"][1]["saved_bytes_a_clip"] > 0
    (accuracy,) = record["accuracy"]
    for one in accuracy["models"]:
        results = [
            json.loads((out / f"runs/small/{one['model']}_seed{seed}/results.json").read_text()) for seed in (0, 1)
        ]
        scores = [result["top1"] for result in results]
        assert list(one["top1"].values()) == scores and one["mean"] == pytest.approx(sum(scores) / 2)
        assert one["trainable"] == results[0]["parameters"]["trainable"]
        assert [result["config"]["seed"] for result in results] == [0, 1]
        assert results[0]["epoch"] == 1 and Path(results[0]["weights"]).name == "last_model.pt"
    assert accuracy["chance"] == 25 and accuracy["videos"] == 11
    text, printed = (out / "models.md").read_text(), capsys.readouterr().out
    assert "RANDOM weights" in text and "32 training and 11 test videos" in text and "Chance is 25.0 %" in text
    for line in printed.splitlines():
        assert line in text or line.startswith("Top-1 on small")
    assert f"{accuracy['models'][0]['trainable']:,}" in printed and "GFLOPs" in printed
    with Image.open(out / "models.png") as picture:
        assert min(picture.size) > 400 and len(picture.convert("RGB").getcolors(10**6)) > 50
    assert compare(*chosen, "--set", "solver.lr=0.1", "--skip", "costs") == 1 and not compare.calls
    assert "holds another run: solver.lr was 0.001 and is now 0.1; remove it" in caplog.records[-1].getMessage()


def test_a_skipped_half_is_what_earlier_calls_left(compare, tmp_path: Path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", "td4v")
    out, chosen = tmp_path / "out", ["--models", PROBE, "--seeds", "0"]

    def counts(*words: str) -> tuple[int, int]:
        """Numbers of rows of costs and of tables of accuracy."""
        caplog.clear()
        assert compare(*chosen, *words) == 0
        record = json.loads((out / "models.json").read_text())
        return len(record["costs"]), len(record["accuracy"])

    assert counts("--skip", "accuracy") == (1, 0)
    assert counts("--skip", "costs") == (1, 1)
    text = (out / "models.md").read_text()
    assert f"{torch.get_num_threads()} thread" in text and "## Top-1 on small" in text
    assert counts("--skip", "accuracy") == (1, 1) and not compare.calls
    assert counts("--skip", "accuracy", "--seeds", "0", "1") == (1, 0)  # seed 1 was never run
    assert counts("--skip", "costs", "--set", "solver.lr_warmup_step=0", "--repeats", "2") == (0, 1)
    file = out / "costs" / f"{PROBE}.json"
    file.write_text(file.read_text()[:100])
    assert counts("--skip", "costs") == (0, 1)
    assert any("cannot be read" in record.getMessage() for record in caplog.records)
    assert counts("--skip", "accuracy") == (1, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert counts("--skip", "costs") == (0, 1)
    assert f"{PROBE}: the costs of an earlier call are not used: threads changed" in [
        one.getMessage() for one in caplog.records
    ]


def test_a_failing_run_is_one_sentence(small: Path, tiny_data: Path, tmp_path: Path, caplog) -> None:
    """A real process, which meets a frame that is missing."""
    frames = tmp_path / "frames"
    shutil.copytree(tiny_data / "frames", frames)
    first = frames / (tiny_data / "train.txt").read_text().split()[0] / "000004.jpg"
    first.unlink()
    words = ["--accuracy", f"{small}+data.train_root={frames}", "--skip", "costs", "--models", PROBE, "--seeds", "7"]
    assert main([*words, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    sentence = caplog.records[-1].getMessage()
    assert (
        sentence.startswith(f"small, {PROBE}, seed 7: train_vision.py ended with status 1: ") and "\n" not in sentence
    )
    assert "000004.jpg is missing" in sentence and (tmp_path / f"out/runs/small/{PROBE}_seed7.txt").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--models", PROBE, "td4v_sidee"], "network.model: 'td4v_sidee' is unknown; did you mean td4v_side?"),
        (["--models", f"{PROBE}+network.options={{widht: 1}}"], "network.options.widht"),
        (
            ["--set", "data.train_list=none.txt"],
            "small.yaml: data.train_list: there is no file none.txt; choose --accuracy",
        ),
        (["--set", "network.head=text"], "network.head: text needs the pretrained CLIP"),
        (["--set", "network.options={drop_path: 0.3}"], "network.options.drop_path"),  # linear_probe has none
        (["--accuracy", "none.yaml"], "none.yaml: cannot read"),
        (["--accuracy", "a/small.yaml", "b/small.yaml"], "two configurations are called small"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(
    compare, small, tmp_path, caplog, words, sentence
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(small, tmp_path / folder)
    words = [str(tmp_path / word) if word.startswith(("a/", "b/")) else word for word in words]
    assert compare(*words) == 1
    said = caplog.records[-1].getMessage()
    assert sentence in said and "\n" not in said
    assert not compare.calls and not (tmp_path / "out").exists()


STUDIES = Path(__file__).parents[2] / "configs" / "studies"


def test_a_study_gives_what_the_command_line_does_not(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("models: [aim, tdn+seed=1]\naccuracy: [a.yaml]\nset: [solver.lr=1]\nseeds: [4, 5]\n")
    given = parse_arguments(["--study", str(study)])
    assert (given.models, given.costs, given.accuracy) == (("aim", "tdn+seed=1"), None, ("a.yaml",))
    assert (given.set, given.seeds) == (["solver.lr=1"], (4, 5))
    words = ["--models", "aim", "--costs", "c.yaml", "--accuracy", "b.yaml", "--set", "solver.lr=2", "--seeds", "6"]
    given = parse_arguments(["--study", str(study), *words])
    assert (given.models, given.costs, given.accuracy) == (["aim"], "c.yaml", ["b.yaml"])
    assert (given.set, given.seeds) == (["solver.lr=1", "solver.lr=2"], [6])  # the later override wins
    assert given.study == read_study(study)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("models: [aim]\nseed: [1]\n", "study.yaml, line 2: seed: unknown key; did you mean seeds?"),
        ("seeds: [1, x]\n", "study.yaml, line 1: seeds[1]: must be"),
        ("models: aim: tdn\n", "study.yaml, line 1: "),
    ],
)
def test_a_broken_study_is_one_sentence(tmp_path: Path, capsys, text: str, sentence: str) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(text)
    with pytest.raises(SystemExit):
        main(["--study", str(study)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: argument --study: " in last and sentence in last


def test_a_study_of_nothing_is_refused(tmp_path: Path, caplog) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("models: [aim]\n")
    assert main(["--study", str(study), "--output", str(tmp_path / "out")]) == 1
    assert caplog.records[-1].getMessage().startswith("costs, accuracy: neither is given")


def test_the_shipped_studies_have_every_model() -> None:
    small, full = read_study(STUDIES / "small.yaml"), read_study(STUDIES / "full_size.yaml")
    assert parse_arguments([]).study == small
    assert [labels_of(study.models)[model] for study in (small, full) for model in study.models] == 2 * list(MODELS)
    assert not full.accuracy and full.models == tuple(MODELS)
    for model in small.models:
        for path in small.accuracy:
            file, overrides = overrides_of(str(STUDIES.parents[1] / path), model, ["network.init=false"])
            built = build_model(load_config(file, overrides), pretrained=False)
            assert sum(parameter.numel() for parameter in built.parameters()) < 5e6, (model, path)


def test_a_name_alone_means_the_study_s_models_of_that_name() -> None:
    study = Study(models=("aim", "tdn+a=1", "tdn+a=2"))
    assert chosen_models(["tdn", "aim", "tdn+a=1", "tdn+a=3", "tada2d"], study.models) == [
        "tdn+a=1", "tdn+a=2", "aim", "tdn+a=3", "tada2d",
    ]  # fmt: skip
    assert labels_of(study.models) == {"aim": "aim", "tdn+a=1": "tdn+a=1", "tdn+a=2": "tdn+a=2"}
    assert labels_of(["aim+x=1", "tdn"]) == {"aim+x=1": "aim", "tdn": "tdn"}


def test_settings_of_the_command_line_hold_for_every_model(small: Path) -> None:
    file, overrides = overrides_of(str(small), "aim", ["network.options={drop_path: 0.3}"])
    assert load_config(file, overrides).network.options == {"drop_path": 0.3}
    file, overrides = overrides_of(str(small), "aim", [])
    assert load_config(file, overrides).network.options == {}


def test_the_recipe_names_what_is_not_the_same(small: Path) -> None:
    same = recipe(str(small), ["solver.lr=0.1"], [PROBE, "aim+network.options.drop_path=0"])
    assert "with `solver.lr=0.1`, the same for all models but for `network.model` and its options; the file" in same
    other = recipe(str(small), [], [PROBE, "aim+solver.lr=1+solver.epochs=2"])
    assert "its options, and for `solver.lr=1` of aim, `solver.epochs=2` of aim, which" in other


def test_an_empty_folder_of_made_data_is_filled(small: Path, tmp_path: Path, monkeypatch, tiny_data: Path) -> None:
    folder, made = tmp_path / "made", []
    folder.mkdir()
    monkeypatch.setattr(compare_accuracy, "make_data", lambda where: made.append(where))
    settings = [f"data.{split}_{what}" for split in ("train", "val") for what in ("root", "list")]
    places = [folder / "frames", folder / "train.txt", folder / "frames", folder / "val.txt"]
    words = tuple(f"{key}={place}" for key, place in zip(settings, places, strict=True))
    with pytest.raises(CompareError, match=f"small.yaml: .*; remove {folder}, and the data"):
        prepare(experiments.Experiment("x", "x", str(small), words, tmp_path))
    assert made == [folder]
    head = tmp_path / "prepared.yaml"
    head.write_text(f"# python -m datasets.prepare folder\n{small.read_text()}")
    with pytest.raises(CompareError, match=f"make the data as the head of {head} says, or choose"):
        prepare(experiments.Experiment("x", "x", str(head), ("data.val_list=none.txt",), tmp_path))


def scores(model: str, *top1: float) -> Scores:
    return Scores(model, dict(enumerate(top1)), 1, 2, ("abc",))


def test_the_findings_name_who_wins_and_what_no_seed_tells_apart() -> None:
    several = [scores("td4v_side", 40, 44), scores("aim", 60, 70), scores("probe", 11, 12), scores("full", 39, 41)]
    best, own, chance = accuracy_findings(Accuracy("x", "", 10.0, 12.0, 100, several))
    assert best == "Highest mean: aim, 65.0 ± 7.1 %."
    assert own == (
        "td4v_side (42.0 ± 2.8 %): every seed above every seed of probe; every seed below every seed of aim; "
        "not told apart by these seeds from full."
    )
    assert chance.startswith("Not told from chance (a mean up to 16.0 %") and chance.endswith(": probe.")
    _, own, _ = accuracy_findings(Accuracy("x", "", 10.0, 12.0, 100, [scores("td4v_side", 40), scores("aim", 60)]))
    assert "with one seed each" in own


def test_a_tie_names_all_who_share_it() -> None:
    several = [scores("td4v_side", 40, 44), scores("aim", 44, 40), scores("probe", 11, 12)]
    best, *_ = accuracy_findings(Accuracy("x", "", 10.0, 12.0, 100, several))
    assert best == "Highest mean: td4v_side, 42.0 ± 2.8 %; aim, 42.0 ± 2.8 % (a tie)."


def test_the_code_of_each_row_is_named_where_it_differs() -> None:
    assert report.revisions_text({"aim": ("a1",), "probe": ("a1",)}) == ""
    text = report.revisions_text({"aim": ("a1", "b2*"), "probe": ("a1",)})
    assert text.endswith(": aim a1, b2*; probe a1.\n")
    meta = {"hardware": {"gpus": [], "cpu": "c", "cores": 1, "memory_gib": 1}, "versions": {}, "device": "cpu",
            "command": ["python", "a b"], "started": "now", "models": {"aim": "aim+a=b", "probe": "probe"}}  # fmt: skip
    for revisions, legend in ((["a1"], False), (["a1", "b2*"], True)):
        text = report.markdown([], {}, "", [], meta | {"revisions": revisions})
        assert ("uncommitted" in text) is legend and "`python 'a b'`" in text
        assert "- aim is `aim+a=b`.\n" in text and "probe is" not in text


def test_every_seed_lies_within_its_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(report, "Figure", lambda **words: figures.append(Figure(**words)) or figures[0])
    report.draw([], [Accuracy("x", "", 10.0, 12.0, 9, [scores("aim", 5, 90), scores("probe", 30)])], tmp_path / "x.png")
    low, high = figures[0].axes[0].get_xlim()
    assert low == 0 and 90 < high < 100


def test_time_left() -> None:
    assert seconds_left([Work("a", 5.0, 0, 4), Work("b", 0.0, 0, 4)], 2) is None
    work = [Work(*run) for run in (("a", 10.0, 5, 0), ("a", 4.0, 2, 3), ("b", 0.0, 0, 5), ("a", 0.0, 0, 5))]
    assert seconds_left(work, 1) == pytest.approx(2 * 13) and seconds_left(work, 2) == pytest.approx(13)
    assert seconds_left(work, 8) == pytest.approx(10)  # no run is divided
