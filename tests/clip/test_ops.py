"""The memory-saving functions: gradients by finite differences, results of the plain layers, bytes saved for backward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from clip.layers import recomputed
from clip.ops import (
    add_to_patches,
    difference_streams,
    gelu_linear,
    normed_linear,
    quick_gelu_linear,
    temporal_linear,
    temporal_sum,
)
from clip.towers.openclip_vit import build_custom_tower
from models.parameters import freeze_all_but_trainable
from models.td4v_finetune import TD4VFinetune
from models.td4v_side import TD4VSide


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def saved_bytes(function, *outside):
    """Bytes of the tensors saved for backward, each storage once, without those of `outside`."""
    known = {x.untyped_storage().data_ptr() for x in outside}
    seen = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage  # held, so that no other takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in seen.values())


def norms(width, training):
    norm = nn.BatchNorm1d(width).double().train(training)
    for values in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(values)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    layer = nn.LayerNorm(width).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return {"batch": norm, "layer": layer}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "training"), [("batch", True), ("batch", False), ("layer", True)])
def test_normed_linear(kind, training, bias):
    norm, plain = norms(5, training)[kind], norms(5, training)[kind]
    plain.load_state_dict(norm.state_dict())
    x, weight, bias = random(2, 7, 5), random(3, 5), random(3) if bias else None
    expected = F.linear(plain(x.flatten(0, 1)).view(x.shape), weight, bias)
    torch.testing.assert_close(normed_linear(x, norm, weight, bias), expected)
    for ours, theirs in zip(norm.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)

    def function(x, gamma, beta, weight, *bias):
        copy = norms(5, training)[kind]
        copy.load_state_dict(norm.state_dict())
        copy.weight, copy.bias = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
        del copy.weight, copy.bias
        copy.weight, copy.bias = gamma, beta
        return normed_linear(x, copy, weight, *(bias or (None,)))

    inputs = [x, norm.weight, norm.bias, weight, *([bias] if bias is not None else [])]
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("taps", [1, 3, 5])
@pytest.mark.parametrize("frames", [2, 4])
def test_convolutions_over_time(taps, frames):
    x, weight, bias, scale = random(2, frames, 3, 2), random(4, 2, taps, 1), random(4), random(1)
    padding = (taps // 2, 0, 0)
    expected = F.conv3d(x.permute(0, 3, 1, 2)[..., None], weight[..., None], bias, padding=padding)[..., 0]
    expected = expected.permute(0, 2, 3, 1)
    torch.testing.assert_close(temporal_linear(x, weight, bias, scale), expected * scale)
    products = F.linear(x, weight.squeeze(-1).permute(2, 0, 1).flatten(0, 1))
    torch.testing.assert_close(temporal_sum(products, taps) + bias, expected)
    assert gradcheck(temporal_linear, (x, weight, bias, scale))
    assert gradcheck(lambda x: temporal_sum(x, taps), (products.detach().requires_grad_(),))


def test_other_functions():
    backward, forward = nn.Conv2d(2, 2, 3, padding=1).double(), nn.Conv2d(2, 2, 3, padding=1).double()
    x = random(1, 3, 6, 2)
    images = x.detach()[0].unflatten(1, (2, 3)).permute(0, 3, 1, 2)  # (T, d, H, W)
    nothing = torch.zeros_like(images[:1])
    expected = images + backward(torch.cat([quick_gelu(images[:-1] - images[1:]), nothing]))
    expected = expected + forward(torch.cat([nothing, quick_gelu(images[1:] - images[:-1])]))
    found = difference_streams(x, backward, forward, (2, 3))
    torch.testing.assert_close(found[0].unflatten(1, (2, 3)).permute(0, 3, 1, 2), expected)

    def streams(x, *weights):
        convolutions = nn.Module(), nn.Module()
        for convolution, weight, bias in zip(convolutions, weights[::2], weights[1::2], strict=True):
            convolution.weight, convolution.bias = weight, bias
        return difference_streams(x, *convolutions, (2, 3))

    assert gradcheck(streams, (x, backward.weight, backward.bias, forward.weight, forward.bias))
    hidden, weight, bias = random(2, 3, 4), random(5, 4), random(5)
    torch.testing.assert_close(gelu_linear(hidden, weight, bias), F.linear(F.gelu(hidden), weight, bias))
    assert gradcheck(gelu_linear, (hidden, weight, bias))
    scale = random(5)
    expected = scale * F.linear(quick_gelu(hidden), weight, bias)
    torch.testing.assert_close(quick_gelu_linear(hidden, weight, bias, scale), expected)
    assert gradcheck(quick_gelu_linear, (hidden, weight, bias, scale))
    assert gradcheck(add_to_patches, (random(2, 4, 3), random(2, 3, 3)))


def test_a_small_scale_trains_in_float16():
    """A scale as ConvNeXt has at first, and gradients of the size that a scaled loss gives them."""
    torch.manual_seed(0)
    values = torch.randn(500, 8), torch.randn(4, 8), torch.randn(4), torch.full((4,), 1e-6)
    weights = 3000 * torch.randn(500, 4)
    found, expected = (
        [value.detach().to(dtype).requires_grad_() for value in values] for dtype in (torch.float32, torch.float64)
    )
    with torch.autocast("cpu", dtype=torch.float16):
        y = quick_gelu_linear(*found)
    (y * weights).sum().backward()
    x, weight, bias, scale = expected
    (scale * F.linear(quick_gelu(x), weight, bias) * weights).sum().backward()
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.grad - exact.grad).norm() < 5e-3 * exact.grad.norm()


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_frozen_block_is_open_clips(quick_gelu):
    tower = build_custom_tower(16, 1, 2, 8, 16, quick_gelu=quick_gelu).double()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = random(3, 5, 16)
    block = tower.blocks[0]
    expected = block.module(x)
    torch.testing.assert_close(block.transform(block.attend(x)), expected)
    torch.testing.assert_close(block.transform(block.attend(x, queries=2)), expected[:, :2])
    torch.testing.assert_close(block.run(x), expected)
    assert gradcheck(lambda x: block.transform(block.attend(x)), (x,))
    assert gradcheck(lambda x: block.transform(block.attend(x, queries=1)), (x,))
    saved = saved_bytes(lambda: block.transform(block.attend(x)), *tower.parameters())
    M, L, D = x.shape
    statistics = 4 * M * L + M * 2 * L  # two norms' means and deviations, attention's logarithms
    assert saved == 8 * (M * L * D * (2 + 4 + 4) + statistics)  # 2 norms, q k v and result, the MLP's inner width


def test_frozen_weights_follow_changes_and_evaluations():
    tower, images = build_custom_tower(16, 2, 2, 8, 16), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            first = tower(images).clone()
        x = tower.embed(tower.patchify(images)).requires_grad_()
        block = tower.blocks[0]
        block.transform(block.attend(x)).float().sum().backward()  # not on what an evaluation had made
        with torch.no_grad():
            tower.blocks[1].module.mlp.c_proj.bias.add_(1)
        moved = tower(images)
        torch.testing.assert_close(moved.float(), first.float() + 1, atol=0.05, rtol=0.02)
        tower.block_modules.requires_grad_(True)
        assert tower(images).requires_grad  # trainable now, so no longer run as frozen
    assert first.dtype == moved.dtype == torch.bfloat16


def small(model_name, recompute=False, **options):
    torch.manual_seed(0)
    tower = build_custom_tower(32, 3, 2, 8, 16)
    if model_name == "side":
        model = TD4VSide(tower, num_classes=5, frames=4, widths=[16, 16, 32], recompute=recompute, **options)
    else:
        model = TD4VFinetune(
            tower,
            num_classes=5,
            frames=4,
            mode="CNN",
            ratio=1 / 4,
            zero_init=False,
            recompute=recompute,
            **options,
        )
    return freeze_all_but_trainable(model).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_name", ["side", "finetune"])
def test_recomputation_changes_nothing_but_memory(model_name, dtype):
    video, results, sizes = torch.randn(2, 4, 3, 16, 16), [], []
    for recompute in (False, True):
        model = small(model_name, recompute)

        def run(model=model):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return model(video)

        tensors = (*model.parameters(), *model.buffers())
        buffers = [buffer.clone() for buffer in model.buffers()]
        sizes.append(saved_bytes(run, *tensors))
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        logits = run()
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((logits.detach(), gradients, dict(model.named_buffers())))
    for plain, again in zip(results[0][1:], results[1][1:], strict=True):
        assert plain.keys() == again.keys()
        for name, value in plain.items():
            assert torch.equal(value, again[name]), name
    assert torch.equal(results[0][0], results[1][0])
    assert sizes[1] < 0.5 * sizes[0], sizes


@pytest.mark.parametrize("model_name", ["side", "finetune"])
def test_low_precision_is_near_and_saves_half(model_name):
    video, sizes, logits = torch.randn(2, 4, 3, 16, 16), [], []
    for low in (False, True):
        model = small(model_name)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            model(video)  # the frozen weights are cast once
            sizes.append(saved_bytes(lambda model=model: model(video), *model.parameters(), *model.buffers()))
            logits.append(model.eval()(video).float())
    assert sizes[1] < 0.6 * sizes[0], sizes
    assert (logits[1] - logits[0]).norm() < 0.05 * logits[0].norm()


def test_side_tuning_from_frozen_features():
    model, video = small("side"), torch.randn(2, 4, 3, 16, 16)
    expected = model.eval()(video)
    features = model.frozen_features(video)
    assert features.ndim == 2 and not features.requires_grad
    assert torch.equal(model(features), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradient_through_batchnorm_is_as_near_as_the_plain_layers(dtype):
    """An error of the mean is the same in all rows: a sum over many rows shows it."""
    torch.manual_seed(0)
    rows, width = 16384, 24
    x, weight = 1 + torch.randn(rows, width), torch.randn(4 * width, width) / width**0.5
    towards = torch.randn(4 * width) + torch.randn(rows, 4 * width)
    found = {}
    for name in ("exact", "plain", "fused"):
        norm = nn.BatchNorm1d(width)
        first = torch.eye(width).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=name != "exact"):
            hidden = F.linear(x, first, torch.ones(width))
            y = normed_linear(hidden, norm, weight, None) if name == "fused" else F.linear(norm(hidden), weight)
        (y.float() * towards).sum().div(rows**0.5).backward()
        found[name] = first.grad
    error = {name: (value - found["exact"]).norm() / found["exact"].norm() for name, value in found.items()}
    assert error["fused"] < 4 * error["plain"] + 1e-3, error


@pytest.mark.parametrize("model_name", ["side", "finetune"])
def test_recomputation_again_and_after_a_change_of_mode(model_name):
    video, gradients = torch.randn(2, 4, 3, 16, 16), []
    for recompute in (False, True):
        model = small(model_name, recompute)
        loss = model(video).square().sum()
        loss.backward(retain_graph=True)
        model.eval()
        loss.backward()
        assert not any(norm.training for norm in model.modules())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-6, atol=0)


def test_a_frozen_block_with_a_replaced_layer_runs_as_it_is():
    tower, x = build_custom_tower(16, 1, 2, 8, 16), torch.randn(2, 5, 16)
    block = tower.blocks[0]
    expected = block.transform(x)

    class Louder(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    louder = Louder(64, 16).requires_grad_(False)
    louder.load_state_dict(block.module.mlp.c_proj.state_dict())
    block.module.mlp.c_proj = louder
    torch.testing.assert_close(block.transform(x), expected + 1)


def test_low_precision_copies_are_dropped_when_the_weights_move_or_are_copied():
    model = small("side")
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 4, 3, 16, 16))
    assert all(block._copy for block in model.tower.blocks)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(block._copy for block in again.tower.blocks)
        assert [block.module for block in again.tower.blocks] == list(again.tower.visual.transformer.resblocks)
    assert not any(block._copy for block in model.double().tower.blocks)


def test_features_of_another_size_are_refused():
    with pytest.raises(ValueError, match="frozen features are .* numbers a clip, not 100"):
        small("side")(torch.randn(2, 100))


def test_recomputed_puts_the_norms_back():
    norm = nn.BatchNorm1d(4)
    x = torch.randn(6, 4, requires_grad=True)
    recomputed(norm, norm, x).sum().backward()
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 1
    once = nn.BatchNorm1d(4)
    once(x)
    assert torch.equal(norm.running_mean, once.running_mean) and torch.equal(norm.running_var, once.running_var)
