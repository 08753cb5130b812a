"""Properties of the TD4V module and the small layers. test_golden.py compares them with the authors' numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clip.adapter import TD4V
from clip.layers import Attention, TemporalProjection, over_tokens, token_shift


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def plain_td4v(module: TD4V, x: torch.Tensor) -> torch.Tensor:
    """The formulas of the module on (B, D, T, H, W) with Conv3d, frame by frame."""
    x = nn.functional.batch_norm(x, None, None, module.norm.weight, module.norm.bias, training=True)
    kernel = module.down.kernel_size[0]
    x = nn.functional.conv3d(x, module.down.weight[..., None], module.down.bias, padding=(kernel // 2, 0, 0))
    streams = []
    for conv, other in ((module.conv_backward, 1), (module.conv_forward, -1)):
        frames = []
        for t in range(x.shape[2]):
            inside = 0 <= t + other < x.shape[2]
            difference = x[:, :, t] - x[:, :, t + other] if inside else torch.zeros_like(x[:, :, t])
            frames.append(conv(quick_gelu(difference)))
        streams.append(torch.stack(frames, 2))
    x = x + streams[0] + streams[1]
    return (
        nn.functional.conv3d(x, module.up.weight[..., None], module.up.bias, padding=(kernel // 2, 0, 0)) * module.scale
    )


@pytest.mark.parametrize("mode", ["FC", "CNN"])
@pytest.mark.parametrize(("frames", "grid", "width"), [(2, (3, 3), 12), (3, (2, 5), 24), (8, (4, 1), 13)])
def test_equals_the_formulas(mode, frames, grid, width):
    module = TD4V(width, 1 / 6, mode).double()
    nn.init.normal_(module.scale)
    x = torch.randn(2, frames, *grid, width, dtype=torch.float64)
    expected = plain_td4v(module, x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-12)


def test_a_still_clip_has_no_motion():
    """Without differences only the biases of the streams are left: all frames give the same branch."""
    module = TD4V(24, 1 / 4, "FC").eval()
    x = torch.randn(1, 1, 4, 4, 24).expand(1, 6, 4, 4, 24)
    y = module(x)
    torch.testing.assert_close(y, y[:, :1].expand_as(y))


def test_order_of_frames_matters():
    module = TD4V(24, 1 / 4, "FC").eval()
    x = torch.randn(1, 6, 4, 4, 24)
    assert not torch.allclose(module(x), module(x.flip(1)).flip(1), atol=1e-3)


def test_zero_init_is_zero_and_trains():
    module = TD4V(24, 1 / 4, "CNN", zero_init=True)
    y = module(torch.randn(2, 4, 3, 3, 24))
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert module.up.weight.grad.abs().sum() > 0


def test_the_example_fits_into_a_transformer_and_changes_nothing_at_first():
    """The lines of TD4V's docstring, on the patch tokens of 2 clips of 4 frames."""
    (B, T, H, W), tokens = (2, 4, 3, 3), torch.randn(8, 9, 24)
    td4v = TD4V(width=24, zero_init=True)
    video = tokens.view(B, T, H, W, 24)
    assert torch.equal(tokens + td4v(video).view_as(tokens), tokens)
    nn.init.normal_(td4v.up.weight)
    assert (tokens + td4v(video).view_as(tokens)).shape == tokens.shape and td4v(video).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_branch_low(dtype):
    module = TD4V(24, 1 / 4)
    x = torch.randn(2, 4, 3, 3, 24)
    with torch.autocast("cpu", dtype):
        y = module(x)
    assert y.dtype == dtype  # the float32 scalar must not lift it
    torch.testing.assert_close(y.float(), module(x), rtol=0.1, atol=0.1)


def test_bad_sizes():
    with pytest.raises(ValueError, match="no channels left"):
        TD4V(4, 1 / 6)
    with pytest.raises(ValueError, match="got 1 frame"):
        TD4V(24)(torch.randn(1, 1, 2, 2, 24))


def test_token_shift_is_its_definition():
    token, T = torch.randn(2, 4, 14), 4
    shifted, f = token_shift(token), 14 // 4
    for t in range(T):
        for j in range(T):
            assert torch.equal(shifted[:, t, j * f : (j + 1) * f], token[:, j, t * f : (t + 1) * f])
    assert torch.equal(shifted[..., T * f :], torch.zeros(2, 4, 2))


def test_over_tokens_is_batchnorm3d():
    three, one = nn.BatchNorm3d(6).double(), nn.BatchNorm1d(6).double()
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    expected = three(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(over_tokens(one, x), expected)
    torch.testing.assert_close(one.running_var, three.running_var)


def test_attention_is_multihead_attention():
    ours, theirs = Attention(32, 4).double(), nn.MultiheadAttention(32, 4, batch_first=True).double()
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})  # fmt: skip
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    norm = nn.LayerNorm(32).double()
    y = norm(x)
    torch.testing.assert_close(ours(x, norm, context=2), theirs(y[:, 2:], y, y, need_weights=False)[0])
    with pytest.raises(ValueError, match="not divisible"):
        Attention(30, 4)


@pytest.mark.parametrize("kernel", [1, 3])
def test_temporal_projection_is_conv3d(kernel):
    layer = TemporalProjection(5, 7, kernel).double()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected = nn.functional.conv3d(
        x.permute(0, 3, 1, 2)[..., None], layer.weight[..., None], layer.bias, padding=(kernel // 2, 0, 0)
    )
    torch.testing.assert_close(layer(x, torch.full((1,), 2.0)), 2 * expected[..., 0].permute(0, 2, 3, 1))
