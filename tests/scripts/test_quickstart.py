"""The quickstart's table and verdict on made-up results; the training itself is the script's."""

from __future__ import annotations

import pytest
from PIL import Image

from datasets.prepare.synthetic import make
from scripts.quickstart import CHANCE, EXPECTED, VARIANTS, QuickstartError, check, make_table
from scripts.quickstart_figure import draw

SEEDS = [0, 3]
GOOD = {"side": 97.5, "finetune": 90.0, "blind": CHANCE, "no_td4v": 60.0}


def results(**changed: float) -> dict:
    """What test_vision.py reports of each run, as far as it is used; `side_3=40` changes one variant's one seed."""
    scores = {(key, seed): score + seed * (key == "finetune") for key, score in GOOD.items() for seed in SEEDS}
    scores |= {(name.rpartition("_")[0], int(name.rpartition("_")[2])): score for name, score in changed.items()}
    return {run: {"top1": score, "parameters": {"trainable": 12345}} for run, score in scores.items()}


def test_good_results_pass():
    check(list(VARIANTS), SEEDS, results())
    check([variant for variant in VARIANTS if variant.key in ("side", "blind")], [0], results())


@pytest.mark.parametrize("score", [CHANCE, EXPECTED - 0.1])
@pytest.mark.parametrize("seed", SEEDS)
def test_td4v_that_learns_nothing_in_any_seed_fails(seed, score):
    with pytest.raises(QuickstartError, match=rf"TD4V side-tuning reached only {score:.1f} % with seed {seed}"):
        check(list(VARIANTS), SEEDS, results(**{f"side_{seed}": score}))


@pytest.mark.parametrize("score", [CHANCE - 100 / 128, CHANCE + 100 / 128, 90.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_blind_network_must_be_exactly_at_chance(seed, score):
    with pytest.raises(QuickstartError, match=rf"temporal part reached {score:.1f} % with seed {seed}; .*exactly"):
        check(list(VARIANTS), SEEDS, results(**{f"blind_{seed}": score}))


def test_the_other_variants_are_shown_not_judged():
    check(list(VARIANTS), SEEDS, results(finetune_0=0.0, no_td4v_3=0.0))


def test_table():
    lines = make_table(list(VARIANTS), SEEDS, results()).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["variant", "top-1, mean of 2 seeds", "lowest to highest", "trainable parameters"]
    rows = rows[2 : 2 + len(VARIANTS)]
    assert [row[0] for row in rows] == [variant.title for variant in VARIANTS]
    assert rows[0][1:] == ["97.5 %", "97.5 to 97.5 %", "12,345"]
    assert rows[1][1:] == ["91.5 %", "90.0 to 93.0 %", "12,345"]
    assert "Seeds 0, 3" in lines[-1] and "Chance is 25 %" in lines[-1] and "random weights" in lines[-1]


@pytest.mark.parametrize("seeds", [1, 3])
def test_figure(tmp_path, seeds):
    make(tmp_path / "data", train=4, val=4, seed=0, size=64)
    scores = {variant.title: [90.0 + seed - 20 * row for seed in range(seeds)] for row, variant in enumerate(VARIANTS)}
    draw(tmp_path / "data", scores, tmp_path / "quickstart.png")
    with Image.open(tmp_path / "quickstart.png") as image:
        assert image.width > 1500 and len(image.convert("RGB").getcolors(2**20)) > 1000
