"""Which folder a run takes: a new one, the newest unfinished run's, or the one that the user names."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from engine import resume
from engine.checkpoint_file import save
from engine.distributed import Process
from engine.log import close_logging
from engine.resume import choose_folder
from engine.run_dir import RunDirError
from tests.engine.test_run_dir import CONFIG, META, begin, chosen, made


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    close_logging()


def test_a_new_folder_where_there_is_no_run(tmp_path: Path):
    assert chosen(tmp_path / "nowhere") == (tmp_path / "nowhere" / "new", False)
    assert chosen(tmp_path) == (tmp_path / "new", False) and not (tmp_path / "new").exists()  # nothing is written
    assert chosen(tmp_path, tmp_path / "mine") == (tmp_path / "mine", False)
    (tmp_path / "mine").mkdir()
    assert chosen(tmp_path, tmp_path / "mine") == (tmp_path / "mine", False)


def test_the_newest_unfinished_run_of_the_same_kind_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    made(tmp_path / "other", {"solver": {"lr": 1}}, age_s=10)
    made(tmp_path / "done", age_s=20, finished=True)
    made(tmp_path / "newer", age_s=30)
    made(tmp_path / "older", age_s=40)
    with caplog.at_level(logging.INFO, "td4v"):
        assert chosen(tmp_path) == (tmp_path / "newer", True)
    assert f"resuming {tmp_path / 'newer'}" in caplog.text
    assert chosen(tmp_path, fresh=True) == (tmp_path / "new", False)
    assert chosen(tmp_path, tmp_path / "older") == (tmp_path / "older", True)
    assert chosen(tmp_path, tmp_path / "done") == (tmp_path / "done", True)  # by its name
    caplog.clear()
    assert chosen(tmp_path, differs=lambda config, start: "all differ") == (tmp_path / "new", False)
    assert f"{tmp_path / 'other'}: not finished, but another run: all differ; a new run starts" in caplog.text


def test_a_damaged_description_is_taken_from_the_newest_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = made(tmp_path / "run")
    save(path / "last_model.pt", {"config": CONFIG, "meta": META})
    damages = (
        ("run.json", "[]"),
        ("run.json", '{"a": 1}'),
        ("config.yaml", "- 1"),
        ("config.yaml", ""),
        ("config.yaml", "a: 1"),
    )
    for name, text in (*damages, ("config.yaml", None), ("run.json", None)):
        (path / name).unlink() if text is None else (path / name).write_text(text)
        assert chosen(tmp_path) == (path, True)
        caplog.clear()
        with closing(begin(path, resume=True)):
            assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG
            assert json.loads((path / "run.json").read_text())[-2:] == [META, META]
        what = "is missing" if text is None else "cannot be read" if text != "a: 1" else "is damaged"
        mended = f"{path / name}: {what}"
        assert mended in caplog.text and f"it is written again from {path / 'last_model.pt'}" in caplog.text
        assert mended in (path / "log.txt").read_text()
    assert (path / "run.json.damaged").read_text() == '{"a": 1}'  # somebody may still want to read it


def test_a_run_that_may_not_be_written_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    made(tmp_path / "theirs")

    def refuse(folder: Path) -> str | None:
        raise PermissionError(13, "Permission denied", str(folder / ".lock"))

    monkeypatch.setattr(resume, "wait_for_user", refuse)
    assert chosen(tmp_path) == (tmp_path / "new", False)
    assert f"{tmp_path / 'theirs'}: passed over" in caplog.text


def test_the_newest_start_decides_what_is_another_run(tmp_path: Path):
    made(tmp_path / "run")
    begin(tmp_path / "run", resume=True, meta=META | {"seed": 6}).close()
    seen = []
    chosen(tmp_path, tmp_path / "run", differs=lambda *what: seen.append(what))
    assert seen == [(CONFIG, META | {"seed": 6})]


def test_a_damaged_folder_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    made(tmp_path / "valid", age_s=10)
    for name, file, text in (("a", "run.json", ""), ("b", "config.yaml", "a: ["), ("c", "run.json", "[{")):
        (made(tmp_path / name) / file).write_text(text)
    assert chosen(tmp_path) == (tmp_path / "valid", True)
    for name in "abc":
        file = "config.yaml" if name == "b" else "run.json"
        assert f"{tmp_path / name}: its {file} cannot be read" in caplog.text
    with pytest.raises(RunDirError, match="a: .*cannot be read"):
        chosen(tmp_path, tmp_path / "a")


@pytest.mark.parametrize("name", ["last_model.pt", "config.yaml", "run.json", "log.txt"])
def test_a_named_folder_of_another_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_text("old")
    with pytest.raises(RunDirError, match=f"{tmp_path}: holds {name}, but no run to resume"):
        chosen(tmp_path, tmp_path)
    with pytest.raises(RunDirError, match=rf"already holds a run \({name}\), which --fresh"):
        chosen(tmp_path, tmp_path, fresh=True)
    with pytest.raises(RunDirError, match=rf"already holds a run \({name}\)"):
        begin(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "old"


def test_a_named_folder_of_another_run_is_refused(tmp_path: Path):
    made(tmp_path / "run", {"solver": {"lr": 1}})
    with pytest.raises(RunDirError, match="run: already holds another run: solver.lr is another"):
        chosen(tmp_path, tmp_path / "run")
    with pytest.raises(RunDirError, match="run: already holds a run .* --fresh does not resume"):
        chosen(tmp_path, tmp_path / "run", fresh=True)


def test_every_process_gets_the_answer_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for answer in ((tmp_path / "theirs", True), "a sentence"):
        monkeypatch.setattr(resume, "gather", lambda own, answer=answer: [answer, own])
        other = (Process(1, 2), None, tmp_path / "new", lambda *_: None)
        if isinstance(answer, str):
            with pytest.raises(RunDirError, match="a sentence"):
                choose_folder(*other)
        else:
            assert choose_folder(*other) == answer
