"""scripts.check_arch: a row for each tower, what to do in words, and an exit status that says whether all models work."""

from __future__ import annotations

import pytest
import timm

from models.registry import MODELS
from scripts.check_arch import configure, main, token_option
from tests.helpers.tiny_models import TOWER_MODELS

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**TINY, **options}))


def table(capsys, *arguments):
    status = main(["--size", "32", *arguments])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert len({len(row) for row in rows}) == 1 and set("".join(rows[1])) == {"-"}
    return status, rows[0], rows[2:]


def test_every_model_has_a_cell(capsys):
    archs = ("vit_base_patch16_224", "ViT-B-16-SigLIP", "vit_base_patch16_dinov3")
    status, head, rows = table(capsys, *archs, "--models", *TOWER_MODELS)
    assert head == ["arch", "tower", *TOWER_MODELS, "to do"] and status == 0
    probe = head.index("linear_probe")
    assert [row[0] for row in rows] == ["vit_base_patch16_224", "ViT-B-16-SigLIP", "vit_base_patch16_dinov3"]
    assert all(row[probe] == str(32 * 10 + 10) for row in rows)
    assert all(cell.replace(",", "").isdigit() for row in rows for cell in row[2:-1])
    assert rows[0][1] == "3 blocks of 32, 2 x 2 patches of 16 px" and rows[0][-1] == rows[2][-1] == "nothing"
    assert rows[1][-1].startswith("no class token: set network.options.token (td4v_side) and network.options.feature (")
    assert rows[2][1].endswith("4 more tokens (registers)")


def test_errors_are_shown(capsys):
    status, _, (odd, size) = table(capsys, "resnet50", "vit_base_patch14_dinov2", "--models", "linear_probe")
    assert status == 1 and odd[1:3] == size[1:3] == ["no", "no"]
    assert "resnet50 is no vision transformer" in odd[-1]
    assert "data.input_size: 32 is not divisible by the patch size 14" in size[-1]


def test_one_model_alone_may_fail(capsys, monkeypatch):
    def refuse(*_):
        raise ValueError("nothing for it")

    monkeypatch.setattr(MODELS["aim"], "build", refuse)
    status, head, (row,) = table(capsys, "vit_base_patch16_224", "--forward")
    assert "tdn" not in head and status == 1 and row[head.index("aim")] == row[head.index("tadaformer")] == "no"
    assert row[-1].startswith(
        "aim: nothing for it; tadaformer: network.arch: tadaformer needs a vision transformer of o"
    )
    assert row[head.index("linear_probe")] == "330"


def test_side_widths_are_spread_over_the_blocks():
    widths = configure("ViT-L-14", "td4v_side", 224, 2, 24).network.pyramid.n_embs
    assert (
        len(widths) == 24
        and widths[::2] == widths[1::2] == configure("ViT-B-16", "td4v_side", 224, 2).network.pyramid.n_embs
    )
    assert token_option("td4v_side") == "token" and token_option("aim") == "feature"


def test_an_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["ViT-B-16", "--models", "aym"])
    assert "--models: aym is unknown; choose from " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ViT-B-16", "--models", "tdn"])
    assert "--models: tdn stands on no tower; choose from td4v_side" in capsys.readouterr().err
