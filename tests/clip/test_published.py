"""A complete state dict in the authors' layout loads. test_golden.py compares the numbers it then gives."""

from __future__ import annotations

import pytest
import torch

from clip.published import from_authors, is_authors_layout
from configs.schema import load_config
from models.loading import WeightsError, load_weights
from models.registry import build_model

CONFIG = load_config(
    {
        "data": {"dataset": "hmdb51", "num_classes": 5, "num_segments": 4, "input_size": 32},
        "network": {
            "arch": "custom", "init": False, "pyramid": {"n_embs": [16, 32, 32]},
            "vision": {"width": 64, "layers": 3, "heads": 2, "patch_size": 8, "image_size": 32},
        },
    }
)  # fmt: skip


def norm(name, width):
    keys = {
        "weight": (width,),
        "bias": (width,),
        "running_mean": (width,),
        "running_var": (width,),
        "num_batches_tracked": (),
    }
    return {f"{name}.{key}": shape for key, shape in keys.items()}


def linear(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def authors_shapes(widths=(16, 32, 32), D=64, patch=8, T=4, K=5):
    """Names and shapes as their code saves them, from the published modules' structure."""
    shapes = {"class_embedding": (D,), "positional_embedding": (17, D), "conv1.weight": (D, 3, patch, patch)}
    shapes |= {"ln_pre.weight": (D,), "ln_pre.bias": (D,)}
    for i, n in enumerate(widths):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * D, D), f"{block}.attn.in_proj_bias": (3 * D,)}
        shapes |= (
            linear(f"{block}.attn.out_proj", D, D)
            | linear(f"{block}.mlp.c_fc", 4 * D, D)
            | linear(f"{block}.mlp.c_proj", D, 4 * D)
        )
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{name}.weight": (D,), f"{block}.{name}.bias": (D,)}
        shapes |= {f"transformer.side_lns.{i}.weight": (D,), f"transformer.side_lns.{i}.bias": (D,)}
        shapes |= linear(f"transformer.side_linears.{i}", n, D)
        side, d = f"transformer.side_transformer.{i}", n // 6
        shapes |= {f"{side}.td4v.scale": (1,)} | norm(f"{side}.td4v.bn_down", n) | norm(f"{side}.bn_2", n)
        shapes |= linear(f"{side}.td4v.conv_down", d, n, 3, 1, 1) | linear(f"{side}.td4v.conv_up", n, d, 3, 1, 1)
        shapes |= linear(f"{side}.td4v.conv_1", d, d, 1, 3, 3) | linear(f"{side}.td4v.conv_2", d, d, 1, 3, 3)
        shapes |= {f"{side}.attn.in_proj_weight": (3 * n, n), f"{side}.attn.in_proj_bias": (3 * n,)} | linear(
            f"{side}.attn.out_proj", n, n
        )
        shapes |= linear(f"{side}.mlp.fc1", n, n) | linear(f"{side}.mlp.fc2", n, n)
        shapes |= {f"{side}.ln_1.weight": (n,), f"{side}.ln_1.bias": (n,)}
    shapes |= {"transformer.side_temporal_embeddings.0": (T, 16), "transformer.side_temporal_embeddings.1": (T, 32)}
    shapes |= linear("transformer.side_upsample.0", 32, 16)
    shapes |= {"transformer.side_upsample_ln.0.weight": (16,), "transformer.side_upsample_ln.0.bias": (16,)}
    shapes |= linear("side_conv1", 16, 3, 3, patch, patch) | norm("side_pre_bn3d", 16) | norm("side_post_bn", 32)
    shapes = {f"visual.{key}": shape for key, shape in shapes.items()}
    return shapes | {"visual.proj": (D, 32)} | linear("fc_proj", K, 32)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_complete_model(prefix):
    theirs = {f"{prefix}{key}": torch.randn(shape) for key, shape in authors_shapes().items()}
    assert is_authors_layout(theirs)
    model = build_model(CONFIG)
    load_weights(model, theirs, "theirs.pt")
    loaded = model.state_dict()
    assert torch.equal(loaded["head.weight"], theirs[f"{prefix}fc_proj.weight"])
    assert torch.equal(
        loaded["side.layers.1.upsample.1.weight"], theirs[f"{prefix}visual.transformer.side_upsample.0.weight"]
    )
    assert torch.equal(
        loaded["side.layers.1.temporal_embedding"], theirs[f"{prefix}visual.transformer.side_temporal_embeddings.1"]
    )
    down = theirs[f"{prefix}visual.transformer.side_transformer.2.td4v.conv_down.weight"]
    assert torch.equal(loaded["side.layers.2.block.td4v.down.weight"], down.squeeze(-1))


def test_incomplete_or_unknown_state_dicts_are_refused():
    theirs = {key: torch.randn(shape) for key, shape in authors_shapes().items()}
    del theirs["visual.side_post_bn.weight"]
    with pytest.raises(WeightsError, match=r"theirs\.pt: .*1 keys missing \(first side\.norm\.weight\)"):
        load_weights(build_model(CONFIG), theirs, "theirs.pt")
    with pytest.raises(ValueError, match=r"the key logit_scale is not of the authors' TD4V"):
        from_authors({"logit_scale": torch.ones(())})


def test_models_are_asked_for_their_layout_until_one_knows_it(monkeypatch):
    monkeypatch.setattr("models.aim.from_published", lambda _: pytest.fail("these are of another model"))
    load_weights(build_model(CONFIG), {key: torch.randn(shape) for key, shape in authors_shapes().items()}, "theirs.pt")


@pytest.mark.parametrize("norm", [{}, {"visual.ln_post.weight": 2.0, "visual.ln_post.bias": 3.0}])
def test_the_last_norm_that_nothing_reads_may_be_there_or_not(norm):
    model = build_model(CONFIG)
    model.tower.visual.ln_post.weight.data.fill_(5.0)
    theirs = {key: torch.randn(shape) for key, shape in authors_shapes().items()}
    load_weights(model, {**theirs, **{key: torch.full((64,), value) for key, value in norm.items()}}, "theirs.pt")
    last = model.tower.visual.ln_post
    assert [last.weight.unique().item(), last.bias.unique().item()] == (list(norm.values()) or [1.0, 0.0])


def test_our_layout_is_not_the_authors():
    assert not is_authors_layout(build_model(CONFIG).state_dict())
