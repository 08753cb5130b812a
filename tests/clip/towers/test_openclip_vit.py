"""CLIP's own tower: names, weights in every format people have, refusals. The tests make files in those formats."""

from __future__ import annotations

import json
import pickle

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import nn

from clip.towers.base import CHUNK, TowerError
from clip.towers.openclip_vit import OpenClipTower, build_custom_tower, build_openclip_tower
from clip.towers.weights import ClipWeights, find_weights
from common import weights_file

SMALL = dict(width=32, layers=2, heads=2, patch_size=8, image_size=32)


def visual_weights(tower: OpenClipTower) -> dict[str, torch.Tensor]:
    """What a complete CLIP's file holds of a tower, with the projection to the text space."""
    values = {f"visual.{key}": torch.randn_like(value) for key, value in tower.visual.state_dict().items()}
    return {
        **values,
        "visual.proj": torch.randn(32, 16),
        "logit_scale": torch.ones([]),
        "text_projection": torch.ones(3, 3),
    }


class Archive(nn.Module):
    """A module whose TorchScript archive has the names of OpenAI's."""

    def __init__(self, values: dict[str, torch.Tensor]):
        super().__init__()
        for key, value in values.items():
            *folders, leaf = key.split(".")
            module = self
            for folder in folders:
                if folder not in module._modules:
                    module.add_module(folder, nn.Module())
                module = module._modules[folder]
            module.register_parameter(leaf, nn.Parameter(value))

    def forward(self, x):
        return x


def _traced(clip):
    """As OpenAI made its archives."""
    inputs = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 16, dtype=torch.long)}
    return torch.jit.trace_module(clip, inputs, check_trace=False)


def write(folder, kind, values):
    path = folder / {"safetensors": "model.safetensors", "torchscript": "ViT.pt"}.get(kind, "model.bin")
    if kind == "safetensors":
        save_file({key: value.contiguous() for key, value in values.items()}, path)
    elif kind == "torchscript":
        torch.jit.save(torch.jit.trace(Archive(values).half(), torch.zeros(1)), str(path))
    elif kind == "wrapped":
        torch.save({"state_dict": {f"module.{key}": value for key, value in values.items()}, "epoch": 3}, path)
    elif kind == "visual only":
        torch.save(
            {key.removeprefix("visual."): value for key, value in values.items() if key.startswith("visual.")}, path
        )
    else:
        torch.save(values, path)
    return path


def transformers_layout(values):
    """open_clip's names become those of Hugging Face's CLIPVisionModel."""
    named = {}
    for key, value in values.items():
        key = key.removeprefix("visual.").replace("transformer.resblocks", "encoder.layers")
        if "in_proj" in key:
            leaf = key.rpartition("_")[2]
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                named[f"vision_model.{key.replace(f'attn.in_proj_{leaf}', f'self_attn.{part}_proj.{leaf}')}"] = piece
            continue
        for ours, theirs in (
            ("conv1.weight", "embeddings.patch_embedding.weight"), ("ln_pre", "pre_layrnorm"), ("c_proj", "fc2"),
            ("positional_embedding", "embeddings.position_embedding.weight"), ("ln_post", "post_layernorm"),
            ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("c_fc", "fc1"),
        ):  # fmt: skip
            key = key.replace(ours, theirs)
        named[f"vision_model.{'embeddings.' if key == 'class_embedding' else ''}{key}"] = value
    return {**named, "vision_model.embeddings.position_ids": torch.arange(17), "text_model.x": torch.ones(1)}


def test_weights_of_transformers(tmp_path):
    values = visual_weights(build_custom_tower(**SMALL))
    kept = {key: value for key, value in values.items() if key.startswith("visual.") and key != "visual.proj"}
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in transformers_layout(kept).items()}, path)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "quick_gelu"}}))
    tower = build_custom_tower(**SMALL, weights=ClipWeights("custom", path))
    for key, value in tower.visual.state_dict().items():
        assert torch.equal(value, kept[f"visual.{key}"]), key
    with pytest.raises(TowerError, match="built with GELU.*trained with QuickGELU"):
        build_custom_tower(**SMALL, quick_gelu=False, weights=ClipWeights("custom", path))


@pytest.mark.parametrize("kind", ["safetensors", "bare", "wrapped", "visual only", "torchscript"])
def test_weights_of_every_format(tmp_path, kind):
    values = visual_weights(build_custom_tower(**SMALL))
    tower = build_custom_tower(**SMALL, weights=ClipWeights("custom", write(tmp_path, kind, values)))
    for key, value in tower.visual.state_dict().items():
        expected = values[f"visual.{key}"].half().float() if kind == "torchscript" else values[f"visual.{key}"]
        assert value.dtype == torch.float32 and torch.equal(value, expected)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model.", "module.model."])
@pytest.mark.parametrize("place", ["model", "module", "state_dict_ema"])
def test_weights_behind_wrappers(tmp_path, prefix, place):
    values = visual_weights(build_custom_tower(**SMALL))
    torch.save({place: {prefix + key: value for key, value in values.items()}}, tmp_path / "w.pt")
    tower = build_custom_tower(**SMALL, weights=ClipWeights("custom", tmp_path / "w.pt"))
    assert torch.equal(tower.visual.conv1.weight, values["visual.conv1.weight"])


@pytest.mark.parametrize("make", [torch.jit.script, _traced], ids=["script", "trace"])
@pytest.mark.filterwarnings("ignore")
def test_archives_are_read_as_torch_jit_reads_them(tmp_path, make):
    """OpenAI's layout: names and values, half precision, numbers as buffers."""
    vision, text = (
        CLIPVisionCfg(2, 48, 16, patch_size=8, image_size=32),
        CLIPTextCfg(16, 50, width=32, heads=2, layers=2),
    )
    clip = CLIP(32, vision, text, quick_gelu=True).eval()
    for name, value in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 50)):
        clip.__dict__.pop(name, None)
        clip.register_buffer(name, torch.tensor(value))
    path = tmp_path / "ViT.pt"
    make(clip).half().save(path)
    expected, found = torch.jit.load(path).state_dict(), weights_file.read(path)
    assert found.is_torchscript and found.content.keys() == expected.keys() >= {"visual.conv1.weight", "vocab_size"}
    for key, value in expected.items():
        assert found.content[key].dtype == value.dtype and torch.equal(found.content[key], value), key


@pytest.mark.parametrize("kind", ["safetensors", "bare", "torchscript"])
@pytest.mark.filterwarnings("ignore")
def test_weights_are_read_without_running_code(tmp_path, monkeypatch, kind):
    path = write(tmp_path, kind, visual_weights(build_custom_tower(**SMALL)))
    load = torch.load

    def careful(*arguments, **options):
        assert options["weights_only"] is True
        return load(*arguments, **options)

    def refuse(*arguments, **options):
        raise AssertionError("would run code")

    monkeypatch.setattr(torch, "load", careful)
    for module, name in ((torch.jit, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    assert ClipWeights("custom", path).visual()


def test_positions_of_a_grid_that_is_not_square_are_refused(tmp_path):
    values = visual_weights(build_custom_tower(**SMALL))
    path = write(tmp_path, "bare", values | {"visual.positional_embedding": torch.zeros(16, 32)})
    with pytest.raises(
        TowerError, match="model.bin: its .*positional_embedding holds 15 positions, which are no square"
    ):
        build_custom_tower(**SMALL, weights=ClipWeights("custom", path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.int(), "its conv1.weight holds int32, not floats"),
        (lambda value: value * float("nan"), "its conv1.weight holds NaN or infinite values"),
        (lambda value: value.to_sparse(), "its visual.conv1.weight is sparse"),
        (lambda value: value.to(torch.complex64), "its visual.conv1.weight is of complex64"),
    ],
)
def test_strange_weights_are_refused(tmp_path, change, message):
    values = visual_weights(build_custom_tower(**SMALL))
    path = write(tmp_path, "bare", values | {"visual.conv1.weight": change(values["visual.conv1.weight"])})
    with pytest.raises(TowerError, match=f"model.bin: {message}"):
        build_custom_tower(**SMALL, weights=ClipWeights("custom", path))


def test_positions_are_interpolated(tmp_path):
    values = visual_weights(build_custom_tower(**SMALL))
    path = write(tmp_path, "bare", values)
    tower = build_custom_tower(**{**SMALL, "image_size": 48}, weights=ClipWeights("custom", path))
    assert tower.visual.positional_embedding.shape == (37, 32)
    assert torch.equal(tower.visual.positional_embedding[0], values["visual.positional_embedding"][0])
    assert tower(torch.randn(2, 3, 48, 48)).shape == (2, 37, 32)


def test_activation_mismatch_is_an_error(tmp_path):
    values = visual_weights(build_custom_tower(**SMALL))
    archive = write(tmp_path, "torchscript", values)
    with pytest.raises(TowerError, match="built with GELU.*trained with QuickGELU"):
        build_custom_tower(**SMALL, quick_gelu=False, weights=ClipWeights("custom", archive))
    file = write(tmp_path, "bare", values)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": False}}))
    with pytest.raises(TowerError, match="built with QuickGELU.*trained with GELU"):
        build_custom_tower(**SMALL, weights=ClipWeights("custom", file))
    with pytest.raises(TowerError, match="ViT-B-16 is built with GELU.*openai.*QuickGELU"):
        build_openclip_tower("ViT-B-16", 32, ClipWeights("ViT-B-16", "openai"))


def test_refusals(tmp_path):
    values = visual_weights(build_custom_tower(**SMALL))
    for change, message in (({"width": 48, "heads": 3}, "does not fit"), ({"layers": 3}, "does not fit")):
        with pytest.raises(TowerError, match=message):
            build_custom_tower(**{**SMALL, **change}, weights=ClipWeights("custom", write(tmp_path, "bare", values)))
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no weights")
    with pytest.raises(TowerError, match="broken.pt: truncated, damaged or not a file of weights"):
        ClipWeights("custom", broken).visual()
    code = tmp_path / "code.pt"
    torch.save({"visual.conv1.weight": print}, code)
    with pytest.raises(TowerError, match=r"code.pt: holds pickled code .*print.*, refused: load it once where you"):
        ClipWeights("custom", code).visual()
    text = write(tmp_path, "bare", {"token_embedding.weight": torch.ones(2)})
    with pytest.raises(TowerError, match="no CLIP vision transformer"):
        ClipWeights("custom", text).visual()
    with pytest.raises(TowerError, match="'ViT-B/17' is not a known CLIP"):
        build_openclip_tower("ViT-B/17", 224)
    with pytest.raises(TowerError, match="not a plain vision transformer"):
        build_openclip_tower("RN50", 224)
    with pytest.raises(TowerError, match="neither a file nor a tag of ViT-B-16-quickgelu; its tags are"):
        build_openclip_tower("ViT-B/16", 224, ClipWeights("ViT-B/16", "laion9b"))
    with pytest.raises(TowerError, match="not divisible by the patch size"):
        build_openclip_tower("ViT-B/16", 225)


def test_a_block_runs_a_few_images_at_a_time():
    tower, x = build_custom_tower(**SMALL), torch.randn(2 * CHUNK + 3, 5, 32)
    block = tower.blocks[0]
    whole = block.transform(block.attend(x))
    torch.testing.assert_close(block.run(x), whole, rtol=1e-5, atol=1e-6)
    assert len(whole) == len(x) and not whole.requires_grad


def test_find_weights(tmp_path):
    assert find_weights("ViT-B/16", None, tmp_path) == "openai"
    (tmp_path / "ViT-B-16.pt").touch()
    assert find_weights("ViT-B/16", None, tmp_path) == str(tmp_path / "ViT-B-16.pt")
    assert find_weights("ViT-B-16", "laion2b_s34b_b88k", tmp_path) == "laion2b_s34b_b88k"
    with pytest.raises(TowerError, match="no file"):
        find_weights("ViT-B/16", str(tmp_path / "absent.pt"), tmp_path)
    with pytest.raises(TowerError, match="needs an open_clip tag or a file"):
        find_weights("ViT-B-16", None, tmp_path)


def test_frozen_and_never_training():
    tower = build_custom_tower(**SMALL)
    nn.Sequential(tower).train()
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    with pytest.raises(ValueError, match="built for"):
        tower(torch.randn(1, 3, 40, 40))


@pytest.mark.parametrize("arch", ["ViT-B/32", "ViT-B-32", "ViT-S-16-alt"])
def test_equals_open_clip(arch):
    """The blocks give what open_clip's own forward gives, for OpenAI's names and open_clip's."""
    torch.manual_seed(0)
    tower = build_openclip_tower(arch, 64)
    name = {"ViT-B/32": "ViT-B-32-quickgelu"}.get(arch, arch)
    assert tower.quick_gelu == name.endswith("quickgelu")
    model = open_clip.create_model(name, load_weights=False, force_image_size=64).visual.eval()
    model.load_state_dict({**tower.visual.state_dict(), "proj": model.proj})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.proj = None
        expected = model(images)
        torch.testing.assert_close(tower.visual.ln_post(tower(images))[:, 0], expected, rtol=1e-4, atol=1e-4)
