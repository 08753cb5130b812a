"""Two configurations beside each other: a resumed run is the same run, and null settings follow the checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from configs.compare import check_same_run, difference, fill_from_checkpoint
from configs.schema import CLIP_STD, ConfigError, load_config

SMALL = "data: {dataset: hmdb51, num_classes: 5}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_a_resumed_run_is_the_same_run(write):
    former = load_config(write(SMALL)).to_dict()
    check_same_run(
        former, load_config(write(SMALL), ["data.workers=0", "logging.print_freq=3", "data.val_root=x"]), "a.pt"
    )
    with pytest.raises(ConfigError, match=r"a\.pt: solver\.lr was 0\.001 in this run and is now 0\.007; .* pretrain"):
        check_same_run(former, load_config(write(SMALL), ["solver.lr=7e-3"]), "a.pt")
    with pytest.warns(UserWarning, match="solver.epochs was 30 and is now 40"):
        check_same_run(former, load_config(write(SMALL), ["solver.epochs=40"]), "a.pt")


def test_values_that_the_model_fills_in_make_no_other_run(write):
    config = load_config(write(SMALL))
    filled = dataclasses.replace(config, data=config.data.with_pixel_statistics((0.5, 0.5, 0.5)))
    assert (filled.data.mean, filled.data.std) == ((0.5, 0.5, 0.5), CLIP_STD)
    assert filled.data.with_pixel_statistics() == filled.data
    check_same_run(filled.to_dict(), config, "a.pt")
    check_same_run(config.to_dict(), filled, "a.pt")
    assert difference(filled.to_dict(), config, more_epochs=False, same_start=True) is None
    assert fill_from_checkpoint(config, filled.to_dict()) == filled
    assert fill_from_checkpoint(config, config.to_dict()) == fill_from_checkpoint(config, None) == config
    assert fill_from_checkpoint(config, {"data": "of another project"}) == config
    other = load_config(write(SMALL), ["data.mean=[0.4, 0.4, 0.4]"])
    assert fill_from_checkpoint(other, filled.to_dict()).data.mean == (0.4, 0.4, 0.4)
    with pytest.raises(ConfigError, match=r"data\.mean was \[0\.5, 0\.5, 0\.5\] in this run and is now \[0\.4"):
        check_same_run(filled.to_dict(), other, "a.pt")
    assert "data.mean was" in difference(filled.to_dict(), other, more_epochs=False, same_start=True)
