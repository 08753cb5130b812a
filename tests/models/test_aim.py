"""AIM: its formulas in plain layers, trainable parameters, dropped paths, and its options.

test_golden.py compares with the authors' numbers, test_aim_published.py reads their files and recipes.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.towers.base import TowerError
from clip.towers.openclip_vit import build_openclip_tower
from configs.schema import Config, ConfigError, load_config
from engine.profiling import saved_for_backward
from models.aim import AIM, Options
from models.parameters import freeze_all_but_trainable, parameter_groups, parameter_report
from models.registry import build_model
from scripts.profile.measure import block_calls

WIDTH, LAYERS, HEADS, FRAMES, CLASSES, SIDE = 32, 3, 2, 4, 5, 16
TOKENS = 1 + (SIDE // 8) ** 2
KINDS = [(1, "class_token"), (2, "class_token"), (2, "mean_tokens")]
kinds = pytest.mark.parametrize(("adapters", "feature"), KINDS)


def config(frames: int = FRAMES, classes: int = CLASSES, network: dict | None = None, **options: object) -> Config:
    vision = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "patch_size": 8, "image_size": SIDE}
    network = {"arch": "custom", "vision": vision, "init": False, "model": "aim", **(network or {})}
    data = {"dataset": "hmdb51", "num_classes": classes, "num_segments": frames, "input_size": SIDE}
    return load_config({"data": data, "network": {**network, "options": options}})


def tiny(filled: bool = True, **options: object) -> AIM:
    """In training mode, with frozen norms and biases that are not 0 or 1; `filled`: nor is anything trainable."""
    model = build_model(config(**options)).train()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if filled if parameter.requires_grad else parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def clips(count: int = 3, frames: int = FRAMES) -> Tensor:
    return torch.randn(count, frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def formulas(model: AIM, video: Tensor, scale: float, drops: list[Tensor] | None = None) -> Tensor:
    """The authors' block in plain layers and their layout (tokens, frames, D): (B, T, 3, H, W) -> frame features (B, T, D).

    `drops`: factors (2, B) of the two branches, one a block.
    """
    visual, (B, T) = model.tower.visual, video.shape[:2]
    x = visual.conv1(video.flatten(0, 1)).flatten(2).permute(2, 0, 1)  # (N, B*T, D)
    x = torch.cat([visual.class_embedding.expand(1, B * T, -1), x]) + visual.positional_embedding[:, None]
    x = visual.ln_pre(x + model.temporal_embedding.repeat(B, 1))
    factors = [[torch.ones(B)] * 2] * len(model.adapters) if drops is None else drops
    for block, adapters, factor in zip(visual.transformer.resblocks, model.adapters, factors, strict=True):
        plain = nn.MultiheadAttention(WIDTH, HEADS, dtype=x.dtype)
        plain.load_state_dict(block.attn.state_dict())
        in_time, in_space = (each.repeat_interleave(T)[:, None].to(x.dtype) for each in factor)  # (B*T, 1)

        def adapt(name: str, y: Tensor, adapters: nn.ModuleDict = adapters) -> Tensor:
            down, up = adapters[name].down, adapters[name].up
            return F.linear(F.gelu(F.linear(y, down.weight, down.bias)), up.weight, up.bias)

        y = block.ln_1(x).unflatten(1, (B, T)).permute(2, 0, 1, 3).flatten(1, 2)  # (T, tokens * B, D)
        if "temporal_in" in adapters:
            y = y + adapt("temporal_in", y)
        y = adapt("temporal", plain(y, y, y)[0])
        x = x + in_time * y.unflatten(1, (-1, B)).permute(1, 2, 0, 3).flatten(1, 2)
        y = block.ln_1(x)
        y = plain(y, y, y)[0]
        x = x + y + adapt("spatial", y)
        y = block.ln_2(x)
        x = x + block.mlp(y) + in_space * scale * adapt("joint", y)
    x = visual.ln_post(x)
    return (x[0] if model.feature == "class_token" else x.mean(0)).unflatten(0, (B, T))


@kinds
@pytest.mark.parametrize("recompute", [False, True])
def test_the_formulas(adapters: int, feature: str, recompute: bool) -> None:
    """Outputs and gradients of everything trainable and of the pixels, in float64."""
    model = tiny(temporal_adapters=adapters, feature=feature, scale=0.7, drop_path=0).double()
    model.recompute = recompute
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for function in (model.frame_features, lambda video: formulas(model, video, 0.7)):
        video = clips().double().requires_grad_()
        features = function(video)
        logits = model.head(features.mean(1))
        results.append([features, logits, *torch.autograd.grad(logits.square().mean(), [video, *trainable])])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(clips().double()), results[1][1], rtol=1e-10, atol=1e-12)


def test_more_sequences_than_a_gpu_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(drop_path=0)
    expected = model(clips())
    monkeypatch.setattr("models.aim.MAX_SEQUENCES", 4)  # of 3 clips x 5 tokens
    torch.testing.assert_close(model(clips()), expected)


@kinds
def test_step_0_is_the_frozen_clip(adapters: int, feature: str) -> None:
    model = tiny(False, temporal_adapters=adapters, feature=feature)
    tokens = model.tower.final_norm(model.tower(clips().flatten(0, 1)))
    tokens = tokens[:, 0] if feature == "class_token" else tokens.mean(1)
    torch.testing.assert_close(model.frame_features(clips()), tokens.unflatten(0, (3, FRAMES)), rtol=1e-5, atol=1e-6)


def test_what_is_trainable_starts_as_the_authors_start_it() -> None:
    model = tiny(False, temporal_adapters=2)
    for name in ("temporal_in", "temporal", "spatial", "joint"):
        weights = torch.cat([adapters[name].down.weight.flatten() for adapters in model.adapters])
        assert weights.std().item() == pytest.approx(0.02, rel=0.12) and weights.abs().max() < 0.1  # of 768 draws
        others = [
            value for each in model.adapters for value in each[name].parameters() if value.shape != (WIDTH // 4, WIDTH)
        ]
        assert not any(value.any() for value in others)
    assert not model.temporal_embedding.any()


def test_what_options_are_by_default() -> None:
    """Those of Kinetics-400, and the same for who builds the module."""
    defaults = {"temporal_adapters": 1, "scale": 0.5, "drop_path": 0.2, "ratio": 0.25, "feature": "class_token"}
    assert vars(Options()) == defaults
    given = {name: parameter.default for name, parameter in inspect.signature(AIM).parameters.items()}
    assert {name: given[name] for name in defaults} == defaults and (given["dropout"], given["recompute"]) == (0, False)
    model = build_model(config())
    assert (model.scale, model.drop_path, model.feature, model.dropout.p) == (0.5, 0.2, "class_token", 0)


def test_dropout_stands_before_the_classifier() -> None:
    model = tiny(drop_path=0, network={"drop_fc": 0.4})
    features, model.head = model.features(clips(64)), nn.Identity()
    dropped = model(clips(64))
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.06)  # of 2048
    torch.testing.assert_close(dropped[kept], features[kept] / 0.6)
    torch.testing.assert_close(model.eval()(clips(64)), features)


def test_the_text_head_needs_the_class_token() -> None:
    with pytest.raises(
        ConfigError, match="which network.model aim and network.options.feature mean_tokens does not give"
    ):
        build_model(config(network={"head": "text"}, feature="mean_tokens"))
    with pytest.raises(TowerError, match="needs a pretrained CLIP"):  # and nothing else
        build_model(config(network={"head": "text"}))


def test_counts() -> None:
    """Without the classifier: adapters of D/4, T x D, the last norm."""
    for arch, width, layers, count, trainable in (
        ("ViT-B/16", 768, 12, 1, 10_659_072), ("ViT-B/16", 768, 12, 2, 14_209_536), ("ViT-L/14", 1024, 24, 1, 37_851_136),
    ):  # fmt: skip
        adapter = 2 * width * (width // 4) + width // 4 + width
        assert (2 + count) * layers * adapter + 8 * width + 2 * width == trainable
        with torch.device("meta"):
            model = freeze_all_but_trainable(
                AIM(build_openclip_tower(arch, 224), num_classes=51, frames=8, temporal_adapters=count)
            )
        report = parameter_report(model)
        assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert report.trainable - report.by_module["head"] == trainable
    assert round(report.total - report.by_module["head"], -6) == 341_000_000


def test_what_is_trainable_and_how_fast() -> None:
    model = tiny(temporal_adapters=2)
    assert list(model.trainable_modules()) == ["adapters", "temporal_embedding", "final_norm", "head"]
    model(clips()).square().sum().backward()
    trainable = ("adapters.", "temporal_embedding", "tower.visual.ln_post.", "head.")
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and parameter.grad.abs().max() > 0
        assert moved == parameter.requires_grad == name.startswith(trainable), name
    assert not any(module.training for module in model.tower.modules())
    groups = parameter_groups(model, lr=0.1, weight_decay=0.05, layer_decay=0.5, decay_norms=False)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    by_layer = [*(each["joint"].up.weight for each in model.adapters), model.tower.final_norm.weight, model.head.bias]
    assert [rates[parameter] for parameter in by_layer] == pytest.approx([0.1 * 0.5**n for n in (4, 3, 2, 1, 0)])
    assert rates[model.temporal_embedding] == rates[by_layer[0]]
    exempt = {parameter for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    assert exempt == {parameter for parameter in rates if parameter.ndim == 1}


def test_a_clip_loses_a_branch_as_a_whole() -> None:
    model, many = tiny(drop_path=0.6, scale=0.7), 2000
    drops = torch.stack(model.draw_drops(many, torch.device("cpu")))  # (layers, 2, B*T, 1, 1)
    assert drops.shape == (LAYERS, 2, many * FRAMES, 1, 1)
    per_clip = drops.view(LAYERS, 2, many, FRAMES)
    assert torch.equal(per_clip, per_clip[..., :1].expand_as(per_clip)) and (drops[0] == 1).all()
    for index, rate in enumerate((0, 0.3, 0.6)):
        torch.testing.assert_close(per_clip[index].unique(), torch.tensor([0, 1 / (1 - rate)] if rate else [1.0]))
        assert per_clip[index].mean().item() == pytest.approx(1, abs=0.1)
    assert not torch.equal(per_clip[1, 0], per_clip[1, 1])
    torch.manual_seed(5)
    drawn = [each.view(2, 3, FRAMES)[..., 0] for each in model.draw_drops(3, torch.device("cpu"))]
    assert 0 in torch.stack(drawn)
    torch.manual_seed(5)
    torch.testing.assert_close(
        model.frame_features(clips()), formulas(model, clips(), 0.7, drawn), rtol=1e-4, atol=1e-5
    )
    assert model.eval().draw_drops(3, torch.device("cpu")) == [None] * LAYERS
    torch.testing.assert_close(model.frame_features(clips()), formulas(model, clips(), 0.7), rtol=1e-4, atol=1e-5)


@kinds
def test_recomputing_blocks_changes_no_bit(adapters: int, feature: str) -> None:
    results, saved = [], []
    for recompute in (False, True):
        model = tiny(temporal_adapters=adapters, feature=feature, drop_path=0.6, network={"recompute": recompute})
        torch.manual_seed(5)
        model.zero_grad()
        logits = model(clips())
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
        saved.append(sum(entry.bytes for entry in saved_for_backward(model, clips())))
    assert all(map(torch.equal, *results))
    assert saved[1] < saved[0] / 4


def test_what_is_kept_for_backward() -> None:
    """Once a block, in maps of all tokens: two norms' inputs, two attentions, three adapters' inputs, the MLP's inner."""
    maps = 3 * FRAMES * TOKENS * WIDTH * 4
    model = tiny(drop_path=0)
    saved = saved_for_backward(model, clips(), calls=block_calls(model))
    sizes = {entry.module: entry.bytes / maps for entry in saved}
    block = {name.split(".", 2)[2]: size for name, size in sizes.items() if name.split(".")[1:2] == ["1"]}
    wanted = {"norm_attention": 2, "attention": 8, "norm_mlp": 1, "mlp": 4}
    wanted |= {
        f"{name}{leaf}": size for name in ("temporal", "spatial", "joint") for leaf, size in ((".down", 1), ("", 0.25))
    }
    assert block == pytest.approx(wanted, abs=0.15)  # and statistics
    assert sizes["tower.2.mlp"] == pytest.approx(4 / TOKENS)  # of the class token alone


@kinds
def test_bfloat16_is_close(adapters: int, feature: str) -> None:
    model = tiny(temporal_adapters=adapters, feature=feature, drop_path=0.3)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(clips())
        logits.float().square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        results.append([logits.detach().float(), *gradients])
    for exact, low in zip(*results, strict=True):
        assert (exact - low).norm() < 0.06 * exact.norm() + 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal_adapters": 3}, "network.options.temporal_adapters: must be one of 1, 2"),
        ({"drop_path": 1}, r"network.options.drop_path: must lie in \[0, 1\), not 1"),
        ({"ratio": "1/64"}, "network.options.ratio: an adapter of width 32 .* has no channels left"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**options)


def test_another_number_of_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="built for 4 frames and got 3"):
        tiny()(clips(frames=3))
