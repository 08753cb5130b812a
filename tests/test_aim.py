"""AIM: its formulas in plain layers, what is tuned and counted, dropped paths, and the files that its authors publish.

test_golden.py proves that the authors' numbers come out.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from clip.backbone import build_tower
from clip.build import WeightsError, build_model, load_weights, parameter_report, tune_only
from clip.groups import parameter_groups
from clip.methods.aim import AIM
from configs.schema import Config, ConfigError, config_from_dict
from datasets.prepare.frame_order import make
from engine import checkpoint
from engine.cost import saved_for_backward
from scripts.profile import BLOCK_PARTS
from tests.entry_bench import command

WIDTH, LAYERS, HEADS, FRAMES, CLASSES, SIDE = 32, 3, 2, 4, 5, 16
TOKENS = 1 + (SIDE // 8) ** 2
KINDS = [(1, "class_token"), (2, "class_token"), (2, "mean_tokens")]
kinds = pytest.mark.parametrize(("adapters", "feature"), KINDS)


def config(frames: int = FRAMES, classes: int = CLASSES, network: dict | None = None, **options: object) -> Config:
    vision = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "patch_size": 8, "image_size": SIDE}
    network = {"arch": "custom", "vision": vision, "init": False, "method": "aim", **(network or {})}
    data = {"dataset": "hmdb51", "num_classes": classes, "num_segments": frames, "input_size": SIDE}
    return config_from_dict({"data": data, "network": {**network, "options": options}})


def tiny(filled: bool = True, **options: object) -> AIM:
    """In training mode; `filled`: nothing tuned is left as it starts."""
    model = build_model(config(**options)).train()
    if filled:
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def clips(count: int = 3, frames: int = FRAMES) -> Tensor:
    return torch.randn(count, frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def formulas(model: AIM, video: Tensor, scale: float, kept: list[Tensor] | None = None) -> Tensor:
    """The authors' block in plain layers and their layout (tokens, frames, D): (B, T, 3, H, W) -> frame features (B, T, D).

    `kept`: factors (2, B) of the two branches, one a block.
    """
    visual, (B, T) = model.tower.visual, video.shape[:2]
    x = visual.conv1(video.flatten(0, 1)).flatten(2).permute(2, 0, 1)  # (N, B*T, D)
    x = torch.cat([visual.class_embedding.expand(1, B * T, -1), x]) + visual.positional_embedding[:, None]
    x = visual.ln_pre(x + model.temporal_embedding.repeat(B, 1))
    factors = [[torch.ones(B)] * 2] * len(model.adapters) if kept is None else kept
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
    """Outputs and gradients of everything tuned and of the pixels, in float64."""
    model = tiny(temporal_adapters=adapters, feature=feature, scale=0.7, drop_path=0).double()
    model.recompute = recompute
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for function in (model.frame_features, lambda video: formulas(model, video, 0.7)):
        video = clips().double().requires_grad_()
        features = function(video)
        logits = model.head(features.mean(1))
        results.append([features, logits, *torch.autograd.grad(logits.square().mean(), [video, *tuned])])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(clips().double()), results[1][1], rtol=1e-10, atol=1e-12)


def test_more_sequences_than_a_gpu_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(drop_path=0)
    whole = model(clips())
    monkeypatch.setattr("clip.methods.aim.MOST_SEQUENCES", 4)  # of 3 clips x 5 tokens
    torch.testing.assert_close(model(clips()), whole)


@kinds
def test_step_0_is_the_frozen_clip(adapters: int, feature: str) -> None:
    model = tiny(False, temporal_adapters=adapters, feature=feature)
    tokens = model.tower.final_norm(model.tower(clips().flatten(0, 1)))
    tokens = tokens[:, 0] if feature == "class_token" else tokens.mean(1)
    torch.testing.assert_close(model.frame_features(clips()), tokens.unflatten(0, (3, FRAMES)), rtol=1e-5, atol=1e-6)
    assert model.adapters[0]["spatial"].down.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_counts() -> None:
    """Without the classifier: adapters of D/4, T x D, the last norm."""
    for arch, width, layers, count, tuned in (
        ("ViT-B/16", 768, 12, 1, 10_659_072), ("ViT-B/16", 768, 12, 2, 14_209_536), ("ViT-L/14", 1024, 24, 1, 37_851_136),
    ):  # fmt: skip
        adapter = 2 * width * (width // 4) + width // 4 + width
        assert (2 + count) * layers * adapter + 8 * width + 2 * width == tuned
        with torch.device("meta"):
            model = tune_only(AIM(build_tower(arch, 224), 51, 8, count))
        report = parameter_report(model)
        assert report.tuned == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert report.tuned - report.by_module["head"] == tuned
    assert round(report.total - report.by_module["head"], -6) == 341_000_000


def test_what_is_tuned_and_how_fast() -> None:
    model = tiny(temporal_adapters=2)
    assert list(model.tuned_modules()) == ["adapters", "temporal_embedding", "final_norm", "head"]
    model(clips()).square().sum().backward()
    own = ("adapters.", "temporal_embedding", "tower.visual.ln_post.", "head.")
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and parameter.grad.abs().max() > 0
        assert moved == parameter.requires_grad == name.startswith(own), name
    assert not any(module.training for module in model.tower.modules())
    groups = parameter_groups(model, 0.1, 1.0, layer_decay=0.5, decay_norms=False)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    by_layer = [*(each["joint"].up.weight for each in model.adapters), model.tower.final_norm.weight, model.head.bias]
    assert [rates[parameter] for parameter in by_layer] == pytest.approx([0.1 * 0.5**n for n in (4, 3, 2, 1, 0)])
    assert rates[model.temporal_embedding] == rates[by_layer[0]]
    exempt = {parameter for group in groups if group.get("weight_decay") == 0 for parameter in group["params"]}
    assert exempt == {parameter for parameter in rates if parameter.ndim == 1}


def test_a_clip_loses_a_branch_as_a_whole() -> None:
    model, many = tiny(drop_path=0.6, scale=0.7), 2000
    kept = torch.stack(model.draw_kept(many, torch.device("cpu")))  # (layers, 2, B*T, 1, 1)
    assert kept.shape == (LAYERS, 2, many * FRAMES, 1, 1)
    per_clip = kept.view(LAYERS, 2, many, FRAMES)
    assert torch.equal(per_clip, per_clip[..., :1].expand_as(per_clip)) and (kept[0] == 1).all()
    for index, rate in enumerate((0, 0.3, 0.6)):
        torch.testing.assert_close(per_clip[index].unique(), torch.tensor([0, 1 / (1 - rate)] if rate else [1.0]))
        assert per_clip[index].mean().item() == pytest.approx(1, abs=0.1)
    assert not torch.equal(per_clip[1, 0], per_clip[1, 1])
    torch.manual_seed(5)
    drawn = [each.view(2, 3, FRAMES)[..., 0] for each in model.draw_kept(3, torch.device("cpu"))]
    assert 0 in torch.stack(drawn)
    torch.manual_seed(5)
    torch.testing.assert_close(
        model.frame_features(clips()), formulas(model, clips(), 0.7, drawn), rtol=1e-4, atol=1e-5
    )
    assert model.eval().draw_kept(3, torch.device("cpu")) == [None] * LAYERS
    torch.testing.assert_close(model.frame_features(clips()), formulas(model, clips(), 0.7), rtol=1e-4, atol=1e-5)


@kinds
def test_recomputing_blocks_changes_no_bit(adapters: int, feature: str) -> None:
    results, kept = [], []
    for recompute in (False, True):
        model = tiny(temporal_adapters=adapters, feature=feature, drop_path=0.6, network={"recompute": recompute})
        torch.manual_seed(5)
        model.zero_grad()
        logits = model(clips())
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
        kept.append(sum(entry.bytes for entry in saved_for_backward(model, clips())))
    assert all(map(torch.equal, *results))
    assert kept[1] < kept[0] / 4


def test_what_is_kept_for_backward() -> None:
    """Once a block, in maps of all tokens: two norms' inputs, two attentions, three adapters' inputs, the MLP's inner."""
    maps = 3 * FRAMES * TOKENS * WIDTH * 4
    saved = saved_for_backward(tiny(drop_path=0), clips(), methods=BLOCK_PARTS)
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


# What the authors publish.


def published(adapters: int = 1, frames: int = FRAMES, classes: int = CLASSES) -> dict[str, Tensor]:
    """Names and shapes as their code saves them, from the published modules' structure."""
    D, shapes = WIDTH, {"temporal_embedding": (1, frames, WIDTH), "class_embedding": (WIDTH,)}
    shapes |= {"positional_embedding": (TOKENS, D), "conv1.weight": (D, 3, 8, 8)}

    def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    shapes |= pair("ln_pre", D) | pair("ln_post", D)
    for block in (f"transformer.resblocks.{index}" for index in range(LAYERS)):
        shapes |= {f"{block}.attn.in_proj_weight": (3 * D, D), f"{block}.attn.in_proj_bias": (3 * D,)}
        shapes |= pair(f"{block}.attn.out_proj", D, D) | pair(f"{block}.ln_1", D) | pair(f"{block}.ln_2", D)
        shapes |= pair(f"{block}.mlp.c_fc", 4 * D, D) | pair(f"{block}.mlp.c_proj", D, 4 * D)
        for name in ("MLP_Adapter", "S_Adapter", "T_Adapter", "T_Adapter_in")[: 2 + adapters]:
            shapes |= pair(f"{block}.{name}.D_fc1", D // 4, D) | pair(f"{block}.{name}.D_fc2", D, D // 4)
    shapes = {f"backbone.{name}": shape for name, shape in shapes.items()} | pair("cls_head.fc_cls", classes, D)
    generator = torch.Generator().manual_seed(7)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def file(path: Path, values: dict[str, Tensor]) -> Path:
    """As mmcv's runner writes it, the best one with NumPy's number of how good it is."""
    meta = {"epoch": 30, "iter": 900, "mmcv_version": "1.4.0", "config": "model = dict(type='Recognizer3D')\n",
            "hook_msgs": {"best_score": numpy.float64(0.839), "last_ckpt": "epoch_29.pth"}}  # fmt: skip
    optimizer = {"state": {0: {"step": 900, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 3e-4, "params": [0]}]}
    torch.save({"meta": meta, "state_dict": OrderedDict(values), "optimizer": optimizer}, path)
    return path


@pytest.mark.parametrize("adapters", [1, 2])
def test_a_published_file_loads(tmp_path: Path, adapters: int) -> None:
    theirs = published(adapters)
    path = file(tmp_path / "best.pth", theirs)
    model = tiny(temporal_adapters=adapters)
    load_weights(model, checkpoint.weights_of(checkpoint.load(path), path), str(path))
    loaded, block = model.state_dict(), "backbone.transformer.resblocks.2"
    pairs = {
        "adapters.2.joint.down.weight": f"{block}.MLP_Adapter.D_fc1.weight",
        "adapters.2.temporal.up.weight": f"{block}.T_Adapter.D_fc2.weight",
        "adapters.2.spatial.up.bias": f"{block}.S_Adapter.D_fc2.bias",
        "tower.visual.transformer.resblocks.2.attn.in_proj_weight": f"{block}.attn.in_proj_weight",
        "tower.visual.ln_post.bias": "backbone.ln_post.bias",
        "head.weight": "cls_head.fc_cls.weight",
    }
    assert all(torch.equal(loaded[ours], theirs[name]) for ours, name in pairs.items())
    assert torch.equal(loaded["temporal_embedding"], theirs["backbone.temporal_embedding"][0])
    assert ("adapters.2.temporal_in.up.bias" in loaded) == (adapters == 2)
    assert model.tower.weights == f"those in {path}"
    other = tiny(temporal_adapters=adapters, classes=7)
    load_weights(other, theirs, "best.pth", drop_head=True)
    assert torch.equal(other.temporal_embedding, model.temporal_embedding)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"temporal_adapters": 2}, {}, "has one temporal adapter a block, network.options.temporal_adapters is 2"),
        ({"frames": 8}, {}, "was made for T = 4 frames, data.num_segments is 8"),
        ({"classes": 9}, {}, "classifier has 5 classes, data.num_classes is 9"),
        ({}, {"backbone.ln_post.bias": None}, r"1 keys missing \(first tower.visual.ln_post.bias\)"),
        ({}, {"backbone.ln_mid.bias": 1, "neck.a": 1}, "2 keys are not of the authors' AIM, first backbone.ln_mid.bias"),
        ({"network": {"method": "td4v_side", "pyramid": {"n_embs": [8, 8, 32]}}}, {}, "another method's weights"),
    ],
)  # fmt: skip
def test_published_files_that_do_not_fit(options: dict, changes: dict, message: str) -> None:
    theirs = {**published(), **{name: torch.ones(WIDTH) if value else None for name, value in changes.items()}}
    model = build_model(config(**options))
    with pytest.raises(WeightsError, match=rf"^best\.pth: .*{message}") as caught:
        load_weights(model, {name: value for name, value in theirs.items() if value is not None}, "best.pth")
    assert "\n" not in str(caught.value)


def test_ours_with_another_number_of_adapters() -> None:
    with pytest.raises(WeightsError, match="has two temporal adapters a block, network.options.temporal_adapters is 1"):
        load_weights(tiny(), tiny(temporal_adapters=2).state_dict(), "a.pt")


def test_both_scripts_take_a_published_file(tmp_path: Path) -> None:
    """test_vision.py --weights, and pretrain of train_vision.py, which then keeps the file's frozen weights."""
    make(tmp_path / "data", train=8, val=4, seed=3, size=32)
    theirs = published(classes=4)
    weights = file(tmp_path / "epoch_30.pth", theirs)
    lists = {f"{part}_list": str(tmp_path / "data" / f"{part}.txt") for part in ("train", "val")}
    data = {"dataset": "frame_order", "style": "kinetics", "num_classes": 4, "num_segments": FRAMES, "batch_size": 4,
            "workers": 0, "input_size": SIDE, "train_root": str(tmp_path / "data" / "frames"),
            "val_root": str(tmp_path / "data" / "frames"), **lists}  # fmt: skip
    values = {"data": data, "network": config().to_dict()["network"], "solver": {"epochs": 1, "lr_warmup_step": 0}}
    path = tmp_path / "aim.yaml"
    path.write_text(yaml.safe_dump(values))
    status, text = command("test_vision.py", "--config", path, "--weights", weights)
    assert status == 0, text
    run = tmp_path / "run"
    status, text = command("train_vision.py", "--config", path, "--output", run, "--set", f"pretrain={weights}")
    assert status == 0, text
    trained = checkpoint.weights_of(checkpoint.load(run / "last_model.pt"), run)
    assert torch.equal(trained["tower.visual.conv1.weight"], theirs["backbone.conv1.weight"])
    assert not torch.equal(trained["head.weight"], theirs["cls_head.fc_cls.weight"])
    difference = (trained["temporal_embedding"] - theirs["backbone.temporal_embedding"][0]).abs().max()
    assert 0 < difference < 0.05  # two steps from where it was
    status, text = command("test_vision.py", "--config", path, "--weights", weights, "--set", "data.num_segments=8")
    assert status != 0 and "epoch_30.pth: was made for T = 4 frames, data.num_segments is 8" in text
