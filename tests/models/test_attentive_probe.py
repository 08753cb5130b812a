"""The attentive probe: equal to attention with keys and values, what it counts, the order of frames, its cache."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clip.towers.openclip_vit import build_openclip_tower
from configs.schema import ConfigError, load_config
from models.attentive_probe import AttentiveProbe, TokenPooling
from models.parameters import freeze_all_but_trainable, parameter_report
from models.registry import build_model

WIDTH, CLASSES, FRAMES, SIDE = 64, 5, 4, 32


def probe(**options: object) -> AttentiveProbe:
    vision = {"width": WIDTH, "layers": 2, "heads": 2, "patch_size": 8, "image_size": SIDE}
    network = {"arch": "custom", "vision": vision, "init": False, "model": "attentive_probe", "options": options}
    data = {"dataset": "hmdb51", "num_classes": CLASSES, "num_segments": FRAMES, "input_size": SIDE}
    return build_model(load_config({"data": data, "network": network}))


def clips() -> torch.Tensor:
    return torch.randn(3, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_it_is_cross_attention_of_one_query() -> None:
    """Against PyTorch's own, which computes a key and a value of each token: output and gradients."""
    torch.manual_seed(0)
    pooling, attention = TokenPooling(WIDTH, 4).double(), nn.MultiheadAttention(WIDTH, 4, batch_first=True).double()
    nn.init.normal_(pooling.value.bias)
    tokens = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        # The query is not projected: W_q is the identity.
        attention.in_proj_weight.copy_(torch.cat([torch.eye(WIDTH), pooling.key.weight, pooling.value.weight]))
        attention.in_proj_bias.copy_(torch.cat([torch.zeros(2 * WIDTH), pooling.value.bias]))
        attention.out_proj.load_state_dict(pooling.out.state_dict())
    attended, _ = attention(pooling.query.expand(2, 1, -1), tokens, tokens)
    x = pooling.query + attended[:, 0]
    expected = x + pooling.mlp(pooling.norm(x))
    torch.testing.assert_close(pooling(tokens), expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(pooling(tokens).square().sum(), [pooling.query, pooling.norm.weight])
    theirs = torch.autograd.grad(expected.square().sum(), [pooling.query, pooling.norm.weight])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_counts_by_hand() -> None:
    block = WIDTH + 4 * WIDTH * WIDTH + 2 * WIDTH - WIDTH * WIDTH  # query, three maps, two biases
    block += 2 * WIDTH + 8 * WIDTH * WIDTH + 5 * WIDTH  # norm and MLP
    report = parameter_report(probe())
    assert report.by_module == {
        "temporal_embedding": FRAMES * WIDTH,
        "pooling": block,
        "head": WIDTH * CLASSES + CLASSES,
    }
    assert "temporal_embedding" not in parameter_report(probe(temporal_embedding=False)).by_module


def test_counts_of_vit_b16() -> None:
    with torch.device("meta"):
        model = AttentiveProbe(build_openclip_tower("ViT-B/16", 224), num_classes=51, frames=8, heads=12)
    report = parameter_report(freeze_all_but_trainable(model))
    assert report.trainable == 6_501_888 + report.by_module["head"]


def test_only_the_temporal_embedding_sees_the_order_of_frames() -> None:
    for sees in (False, True):
        model = probe(temporal_embedding=sees).double().eval()
        if sees:
            nn.init.normal_(model.temporal_embedding)
        video = clips().double()
        difference = (model.features(video) - model.features(video[:, [1, 0, 3, 2]])).abs().max()
        assert (difference > 1e-6) == sees and (sees or difference < 1e-12)


def test_its_features_can_be_kept() -> None:
    model, video = probe().eval(), clips()
    kept = model.frozen_features(video)
    assert kept.shape == (3, FRAMES * (1 + 16) * WIDTH) and not kept.requires_grad
    assert torch.equal(model(kept), model(video))


def test_refusals() -> None:
    for heads in (3, 0):
        with pytest.raises(
            ConfigError, match=f"^network.options.heads: {heads} does not divide the width of .*, {WIDTH}"
        ):
            probe(heads=heads)
    model = probe()
    with pytest.raises(RuntimeError):
        model(clips()[:, :3])
