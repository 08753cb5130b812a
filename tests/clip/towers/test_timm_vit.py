"""timm's models as towers: they compute what timm computes, every model trains on them, files load, errors say why."""

from __future__ import annotations

import logging
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import PatchEmbed
from torch import nn

from clip.towers.base import TowerError
from clip.towers.openclip_vit import timm_arguments
from clip.towers.timm_vit import build_timm_tower, find_timm_weights, timm_names
from configs.schema import CLIP_MEAN, CLIP_STD, load_config
from models.loading import load_weights
from models.parameters import freeze_all_but_trainable, frozen_identity, parameter_groups
from models.registry import build_model
from scripts.check_arch import token_option
from tests.helpers.tiny_models import TOWER_MODELS

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
# name: tokens before the patches, whether one is a class token, pixels a side
KINDS = {
    "vit_base_patch16_224": (1, True, 32),
    "vit_small_patch14_dinov2": (1, True, 28),  # layer scale
    "vit_small_patch14_reg4_dinov2": (5, True, 28),  # registers, no positions for what stands before the patches
    "vit_giant_patch14_dinov2": (1, True, 28),  # SwiGLU in one matrix
    "vit_base_patch16_siglip_224": (0, False, 32),  # attentional pooling instead of a class token
    "vit_medium_patch16_reg4_gap_256": (4, False, 32),  # registers alone; its last norm stands behind the average
    "vit_base_patch16_clip_224": (1, True, 32),  # a norm before the blocks, no bias of the patches
    "deit3_small_patch16_224": (1, True, 32),
    "deit_small_distilled_patch16_224": (2, True, 32),  # a distillation token
    "eva02_base_patch14_224": (1, True, 28),  # rotary positions, SwiGLU; last norm behind the average
    "eva02_base_patch16_clip_224": (1, True, 32),  # and norms inside attention and MLP
    "vit_base_patch16_dinov3": (5, True, 32),  # rotary positions and registers
    "vit_small_patch16_rope_mixed_224": (1, True, 32),  # learned rotations, of each block its own
    "EVA02-B-16": (1, True, 32),
    "ViT-B-16-SigLIP": (0, False, 32),
}
ROTARY = ("eva02_base_patch14_224", "vit_base_patch16_dinov3", "vit_small_patch16_rope_mixed_224")
SINGLE = {"vit_small_patch16_rope_mixed_224"}  # which older versions of timm cannot run in float64
OWN = [name for name in KINDS if timm.is_model(name)]


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Every model of timm is as narrow and shallow as TINY."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**TINY, **options}))


def shake(module: nn.Module) -> nn.Module:
    """Make every weight random: layer scales and the like start too near 0 or 1 to be seen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def exactness(name: str) -> tuple[torch.dtype, float]:
    """The dtype to compare in, and the largest difference allowed in it."""
    return (torch.float32, 1e-4) if name in SINGLE else (torch.float64, 1e-10)


def tower_of(name: str):
    return shake(build_timm_tower(name, KINDS[name][2])).to(exactness(name)[0])


def config(arch: str, model_name: str = "linear_probe", init: bool = False, given=None, **network):
    prefix, has_class, size = KINDS.get(arch, (1, True, 32))
    if not has_class and "options" not in network and (option := token_option(model_name)):
        network["options"] = {option: "mean_tokens"}
    network = {"arch": arch, "init": init, "model": model_name, "pyramid": {"n_embs": [16, 16]}, **network}
    data = {
        "dataset": "hmdb51",
        "num_classes": 3,
        "num_segments": 2,
        "input_size": size,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
    }
    data |= given or {}
    return load_config({"data": data, "network": network})


def random_clips(arch: str, frames: int = 2) -> torch.Tensor:
    size = KINDS[arch][2]
    return torch.randn(2, frames, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", OWN)
def test_a_tower_computes_what_timm_computes(name):
    prefix, has_class, size = KINDS[name]
    tower = tower_of(name)
    model = timm.create_model(name, img_size=size, num_classes=0, dynamic_img_size=False).eval().to(exactness(name)[0])
    missing, unexpected = model.load_state_dict(tower.model.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("attn_pool") for key in missing)
    x = torch.randn(3, 3, size, size, dtype=exactness(name)[0])
    ours, theirs = tower(x), model.forward_features(x)
    if next(model.norm.parameters(), None) is not None:
        ours = tower.final_norm(ours)
    else:
        assert next(tower.final_norm.parameters(), None) is not None  # the one behind the average
    torch.testing.assert_close(ours, theirs, rtol=0, atol=exactness(name)[1])
    assert (tower.prefix, tower.has_class_token, tower.width) == (prefix, has_class, 32)
    assert tower.grid == (2, 2) and tower.image_size == (size, size)
    assert tower.mean == tuple(model.pretrained_cfg["mean"]) and tower.std == tuple(model.pretrained_cfg["std"])
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not any(module.training for module in tower.train().modules())


@pytest.mark.parametrize("name", OWN)
def test_parts_of_a_block_are_the_block(name):
    tower = tower_of(name)
    dtype, most = exactness(name)
    x = torch.randn(2, tower.prefix + 4, 32, dtype=dtype)
    model = tower.model
    rope = model.rope.get_embed() if getattr(model, "rope", None) is not None else None
    for index, block in enumerate(tower.blocks):
        turned = {} if rope is None else {"rope": rope[index] if model.rope_mixed else rope}
        half = x + block.attention(block.norm_attention(x))
        whole = half + block.mlp(block.norm_mlp(half))
        torch.testing.assert_close(whole, block.module(x, **turned), rtol=0, atol=most)
        torch.testing.assert_close(block.attend(x, queries=1), half[:, :1], rtol=0, atol=0)
        torch.testing.assert_close(block.run(x), whole, rtol=0, atol=most)


@pytest.mark.parametrize("name", ROTARY)
def test_among_frames_of_one_position_the_rotation_cancels(name):
    tower = tower_of(name)
    frames = torch.randn(5, 3, 32, dtype=exactness(name)[0])  # three frames of one token position
    block = tower.blocks[1]
    attention = block.module.attn
    attention.num_prefix_tokens = 0
    turns = block.rotation()[..., 2:3, :]  # sines and cosines, which timm has computed in float32
    assert turns.shape[-1] == 2 * 16
    sine, cosine = turns.chunk(2, -1)
    turns = turns / torch.cat([torch.hypot(sine, cosine)] * 2, -1)
    rotated = attention(frames, rope=turns)
    gamma = block.module.gamma_1
    rotated = rotated if gamma is None else gamma * rotated
    torch.testing.assert_close(block.attention(frames, in_space=False), rotated, rtol=0, atol=exactness(name)[1])


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_clip_224", "eva02_base_patch16_clip_224"])
def test_what_is_added_to_the_embedding_stands_before_its_norm(name):
    tower = tower_of(name)
    patches = tower.patchify(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    added = torch.randn(2, 1, 32, dtype=torch.float64)
    plain, norm = tower.embed(patches), tower.model.norm_pre
    tower.model.norm_pre = nn.Identity()
    wanted = norm(tower.embed(patches) + added)
    tower.model.norm_pre = norm
    torch.testing.assert_close(tower.embed(patches, added), wanted, rtol=0, atol=1e-12)
    assert not torch.equal(wanted, plain)


def test_registers_do_not_count_in_what_is_read():
    tower = tower_of("vit_small_patch14_reg4_dinov2")
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    normed = tower.final_norm(x)
    assert torch.equal(tower.read(x, "class_token"), normed[:, 0])
    torch.testing.assert_close(tower.read(x, "mean_tokens"), normed[:, [0, 5, 6, 7, 8]].mean(1))
    assert torch.equal(tower.without_registers(x), x[:, [0, 5, 6, 7, 8]])
    mean = tower.without_registers(x, "mean_tokens")
    assert torch.equal(mean[:, 1:], x[:, 5:])
    torch.testing.assert_close(mean[:, 0], x[:, 5:].mean(1))
    alone = tower_of("vit_medium_patch16_reg4_gap_256")
    torch.testing.assert_close(
        alone.read(x[:, :8], "mean_tokens"), alone.final_norm(x[:, 4:8]).mean(1), rtol=0, atol=1e-12
    )
    assert torch.equal(alone.without_registers(x[:, :8], "mean_tokens")[:, 1:], x[:, 4:8])


@pytest.mark.parametrize("model_name", TOWER_MODELS)
@pytest.mark.parametrize("arch", KINDS)
def test_every_model_trains_on_every_tower(arch, model_name):
    model = build_model(config(arch, model_name)).train()
    clips = random_clips(arch)
    for parameter in model.parameters():  # nothing that starts at 0 hides what stands behind it
        if parameter.requires_grad and not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)
    logits = model(clips)
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    tuned = {id(p) for part in freeze_all_but_trainable(model).trainable_modules().values() for p in _parameters(part)}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in tuned) == parameter.requires_grad
        assert (parameter.grad is None) == (id(parameter) not in tuned), name
    grouped = [
        id(p) for group in parameter_groups(model, lr=1.0, weight_decay=0.05, layer_decay=0.7) for p in group["params"]
    ]
    assert sorted(grouped) == sorted(tuned)
    if model_name == "full_finetune":
        assert tuned == {id(p) for p in model.parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        low = model.eval()(clips)
    torch.testing.assert_close(low.float(), model(clips).float(), rtol=0.1, atol=0.1)


def _parameters(part):
    return [part] if isinstance(part, nn.Parameter) else part.parameters()


@pytest.mark.parametrize("model_name", ["td4v_finetune", "aim"])
@pytest.mark.parametrize("arch", KINDS)
def test_at_step_0_a_model_in_the_blocks_is_the_tower(arch, model_name):
    dtype, most = exactness(arch)
    model = build_model(config(arch, model_name)).to(dtype).eval()
    clips = random_clips(arch).to(dtype)
    tower = model.tower
    frames = tower.read(tower(clips.flatten(0, 1)), "class_token" if tower.has_class_token else "mean_tokens")
    wanted = model.head(frames.unflatten(0, (2, 2)).mean(1))
    torch.testing.assert_close(model(clips), wanted, rtol=0, atol=most)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "eva02_base_patch16_clip_224"])
def test_frozen_blocks_save_no_input_of_a_linear_layer(name):
    """A norm's result goes only into linear layers, so that a frozen block need not save it for backward."""
    tower = build_timm_tower(name, KINDS[name][2])
    x = torch.randn(4, tower.prefix + 4, 32, requires_grad=True)
    alive, normed, kept = [], set(), set()

    def note(tensor: torch.Tensor, addresses: set[int]) -> torch.Tensor:
        alive.append(tensor)  # no address is used twice
        addresses.add(tensor.untyped_storage().data_ptr())
        return tensor

    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _, __, out: note(out, normed))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: note(tensor, kept), lambda tensor: tensor):
        tower.blocks[0].transform(tower.blocks[0].attend(x))
    assert normed and kept and not normed & kept


def test_a_checkpoint_is_saved_and_loaded(tmp_path):
    arch = "vit_small_patch14_reg4_dinov2"
    model, other = build_model(config(arch, "td4v_side")), build_model(config(arch, "td4v_side"))
    shake(model)
    torch.save(model.state_dict(), tmp_path / "all.pt")
    load_weights(other, torch.load(tmp_path / "all.pt", weights_only=True), "all.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not any(key.startswith(("tower.model.head", "tower.model.attn_pool")) for key in model.state_dict())
    assert frozen_identity(model)["name"] == arch


@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "safetensors"])
@pytest.mark.parametrize("arch", KINDS)
def test_files_of_timm_and_open_clip_load(arch, wrapped, tmp_path, caplog):
    arguments = timm_arguments(arch)
    size = KINDS[arch][2]
    if arguments is None:
        theirs = shake(timm.create_model(arch, num_classes=7, img_size=2 * size))  # a classifier, positions of 4 x 4
        values = theirs.state_dict()
    else:
        theirs = shake(timm.create_model(arguments.pop("model_name"), **arguments, num_classes=0, img_size=2 * size))
        values = {f"visual.trunk.{key}": value for key, value in theirs.state_dict().items()}
        values |= {"logit_scale": torch.ones(()), "text.token_embedding.weight": torch.ones(3, 3)}
    if wrapped == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file({key: value.contiguous() for key, value in values.items()}, path)
    else:
        path = tmp_path / "weights.pt"
        torch.save({"state_dict": values} if wrapped == "state_dict" else values, path)
    with caplog.at_level(logging.WARNING, "td4v"):
        tower = build_model(config(arch, init=True, weights=str(path))).tower
    assert tower.weights == str(path)
    own = tower.model.state_dict()
    assert set(own) <= set(theirs.state_dict())
    same = [key for key in own if own[key].shape == theirs.state_dict()[key].shape]
    assert all(torch.equal(own[key], theirs.state_dict()[key]) for key in same)
    assert set(own) - set(same) <= {"pos_embed"}
    other_pixels = tower.mean != (0.48145466, 0.4578275, 0.40821073)
    warned = [record.getMessage() for record in caplog.records if "data.mean" in record.getMessage()]
    assert len(warned) == other_pixels
    if other_pixels:  # one line, and nothing of the file is claimed
        assert "data.mean is (0.48" in warned[0] and "data.std (0.26" in warned[0]
        sentence = (
            f"timm's default for this name is mean {tower.mean}, std {tower.std}; check what your file was trained"
        )
        assert sentence in warned[0] and ("its tag into network.arch" in warned[0]) == (arguments is None)


@pytest.mark.parametrize("arch", ["vit_base_patch16_224", "vit_medium_patch16_reg4_gap_256", "eva02_base_patch14_224"])
def test_a_norm_that_is_not_the_last_is_left_out(arch, tmp_path):
    """Files of a model whose tokens are averaged before the norm, or after it, may hold the other norm too."""
    path = tmp_path / "weights.pt"
    theirs = shake(timm.create_model(arch, img_size=KINDS[arch][2], num_classes=0))
    last, other = ("norm", "fc_norm") if isinstance(theirs.norm, nn.LayerNorm) else ("fc_norm", "norm")
    torch.save({**theirs.state_dict(), f"{other}.weight": torch.ones(32), f"{other}.bias": torch.ones(32)}, path)
    tower = build_timm_tower(arch, KINDS[arch][2], str(path))
    assert torch.equal(tower.final_norm.weight, getattr(theirs, last).weight)
    assert not list(getattr(tower.model, other).parameters())


def test_layer_scales_under_the_authors_names(tmp_path):
    path = tmp_path / "weights.pt"
    theirs = shake(timm.create_model("deit3_small_patch16_224", img_size=32, num_classes=0)).state_dict()
    values = {re.sub(r"ls([12])\.gamma", r"gamma_\1", key): value for key, value in theirs.items()}
    assert values.keys() != theirs.keys()
    torch.save({"model": values}, path)
    own = build_timm_tower("deit3_small_patch16_224", 32, str(path)).model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in theirs.items())


def test_pixels_are_those_of_open_clips_tag(tmp_path, monkeypatch, caplog):
    """Not those that timm knows of the model."""
    theirs = shake(timm.create_model("eva02_base_patch16_clip_224", num_classes=0, img_size=32)).state_dict()
    path = tmp_path / "weights.pt"
    torch.save({f"visual.trunk.{key}": value for key, value in theirs.items()}, path)
    tag = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    monkeypatch.setattr("open_clip.pretrained.get_pretrained_cfg", lambda _, source: {"odd": tag}.get(source))
    monkeypatch.setattr("open_clip.download_pretrained", lambda asked: str(path) if asked is tag else None)
    with caplog.at_level(logging.WARNING, "td4v"):
        tower = build_model(config("EVA02-B-16", init=True, weights="odd")).tower
    assert (tower.mean, tower.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (warned,) = [record.getMessage() for record in caplog.records]
    assert "EVA02-B-16 was trained on pixels with mean (0.1, 0.2, 0.3), std (0.4, 0.5, 0.6); set them" in warned


def test_pixels_of_a_tag_in_the_name(tmp_path, caplog):
    path = tmp_path / "weights.pt"
    torch.save(timm.create_model("vit_base_patch16_224", img_size=32).state_dict(), path)
    told = {
        "vit_base_patch16_224.dino": "those of timm's vit_base_patch16_224.dino are mean (0.485, ",
        "vit_base_patch16_224": "timm's default for this name is mean (0.5, 0.5, 0.5), std",
    }
    for arch, text in told.items():
        caplog.clear()
        build_model(config(arch, init=True, weights=str(path)))
        (warned,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert text in warned and "check what your file was trained with" in warned


def test_a_name_that_both_libraries_have_takes_timms_tags():
    """open_clip has no weights of that model."""
    arch = "vit_medium_patch16_gap_256"
    asked = []

    def noted(source, changes):
        asked.append(source)
        return timm.create_model(source, **changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip.towers.timm_vit._download", noted)
        for weights in (None, "sw_in12k_ft_in1k"):
            options = {"feature": "mean_tokens"}
            build_model(config(arch, init=True, weights=weights, options=options))
    assert asked == [f"{arch}.sw_in12k_ft_in1k"] * 2


def test_random_weights_are_logged_for_existing_towers(caplog):
    with caplog.at_level(logging.WARNING, "td4v"):
        build_model(config("vit_base_patch16_224"))
        assert "vit_base_patch16_224 starts from RANDOM weights" in caplog.text and "CLIP" not in caplog.text
        caplog.clear()
        with pytest.raises(TowerError):
            build_model(config("vit_base_patch16_2244"))
        assert "RANDOM" not in caplog.text


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "weights.pt"

    def refused(arch, values, match):
        torch.save(values, path)
        with pytest.raises(TowerError, match=match) as caught:
            build_model(config(arch, init=True, weights=str(path)))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    values = timm.create_model("vit_base_patch16_224", img_size=32).state_dict()
    incomplete = {key: value for key, value in values.items() if key != "blocks.1.attn.qkv.bias"}
    refused("vit_base_patch16_224", incomplete, "1 keys differ, first blocks.1.attn.qkv.bias: nothing in the file")
    refused(
        "vit_base_patch16_224", {**values, "odd.weight": torch.ones(2)}, "first odd.weight: .* nothing in the model"
    )
    wide = timm.create_model("vit_base_patch16_224", img_size=32, embed_dim=64).state_dict()
    refused("vit_base_patch16_224", wide, r"first cls_token: \(1, 1, 64\) in the file, \(1, 1, 32\) in the model")
    refused("EVA02-B-16", values, "does not fit EVA02-B-16")
    refused("vit_base_patch16_224", {"x": print}, r"holds pickled code .*print.*, refused")
    refused("vit_base_patch16_224", [1, 2], "not a checkpoint but a list")
    strange = {**values, "patch_embed.proj.weight": torch.ones(32, 100)}  # which timm makes patches of
    refused("vit_base_patch16_224", strange, "does not fit vit_base_patch16_224, for timm cannot bring it into")
    path.write_bytes(b"no weights")
    with pytest.raises(TowerError, match="truncated, damaged or not a file of weights"):
        build_timm_tower("vit_base_patch16_224", 32, str(path))


def test_tags(monkeypatch):
    assert find_timm_weights("vit_small_patch14_dinov2", None) == "vit_small_patch14_dinov2.lvd142m"
    assert find_timm_weights("vit_base_patch16_224.dino", None) == "vit_base_patch16_224.dino"
    assert find_timm_weights("vit_base_patch16_224", "mae") == "vit_base_patch16_224.mae"
    with pytest.raises(TowerError, match=r"network.weights: 'odd' is neither a file nor a tag of .*; its tags are "):
        find_timm_weights("vit_base_patch16_224", "odd")
    with pytest.raises(TowerError, match="network.weights: 'mae' is no file and not the tag"):
        find_timm_weights("vit_base_patch16_224.dino", "mae")
    with pytest.raises(TowerError, match="network.weights: no file gone.pt"):
        build_model(config("vit_base_patch16_224", init=True, weights="gone.pt"))
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, **options):
        if pretrained:
            asked.append(name)
            raise OSError("We couldn't connect\nto anything")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        TowerError, match=r"cannot get vit_base_patch16_224.dino \(OSError: We couldn't connect\): name"
    ):
        build_model(config("vit_base_patch16_224", init=True, weights="dino"))
    assert asked == ["vit_base_patch16_224.dino"]


@pytest.mark.parametrize(
    ("arch", "lack"),
    [
        (
            "vit_base_patch14_dinov9",
            "neither a model of open_clip nor one of timm; did you mean .*vit_base_patch14_dinov2",
        ),
        ("ViT-B-61", "did you mean ViT-B-16"),
        ("RN50", "RN50 is not a plain vision transformer of open_clip .a ResNet"),
        ("convnext_base", "convnext_base is no vision transformer .*timm's family convnext"),
        ("ViTamin-S", r"ViTamin-S \(timm's vitamin_small_224\) is no vision transformer"),
        ("resnet50", "resnet50 is no vision transformer that models here can use"),
        ("swin_tiny_patch4_window7_224", "equal blocks .* on one grid of patches are missing"),
        ("beit_base_patch16_224", "its attention has positions of its own"),
        ("naflexvit_base_patch16_siglip", "its grid of patches follows each image's aspect"),
        ("vit_base_r50_s16_384", "its patches come from a convolutional network"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock: several attentions and MLPs run side by side"),
        ("MobileCLIP-B", "its patches come from a convolutional network"),
        (
            "vit_base_patch16_224_in21k",
            "timm has dropped the name vit_base_patch16_224_in21k for vit_base_patch16_224.augreg_in21k",
        ),
        ("vit_base_patch16_xp_224", "ParallelScalingBlock: attention and MLP run side by side"),
        ("vit_base_patch16_224.odd", "vit_base_patch16_224.odd: .*odd"),
    ],
)
def test_unsuitable_towers_say_why(arch, lack):
    with pytest.raises(TowerError, match=f"^network.arch: .*{lack}") as caught:
        build_model(config(arch))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [("vit_base_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock}),
     ("eva02_base_patch16_clip_224", {"use_post_norm": True})],
)  # fmt: skip
def test_norms_after_attention_and_mlp_are_refused(arch, changes):
    with pytest.raises(TowerError, match="the norms stand behind attention and MLP"):
        build_timm_tower(arch, 32, **changes)


class OwnPatches(PatchEmbed):
    """Patches of another kind."""


def test_other_patches_are_refused():
    with pytest.raises(TowerError, match="takes patches of 16 x 8 pixels in 3 channels"):
        build_timm_tower("vit_base_patch16_224", 32, patch_size=(16, 8))
    with pytest.raises(TowerError, match="no plain patches: they come from OwnPatches"):
        build_timm_tower("vit_base_patch16_224", 32, embed_layer=OwnPatches)


def test_sizes_that_do_not_fit_and_missing_class_tokens_are_refused():
    with pytest.raises(
        TowerError, match="data.input_size: 225 is not divisible by the patch size 14 of vit_small_patch14_dinov2"
    ):
        build_timm_tower("vit_small_patch14_dinov2", 225)
    for model_name in TOWER_MODELS:
        if (key := token_option(model_name)) is None:
            continue
        asked = config("ViT-B-16-SigLIP", model_name, options={key: "class_token"})
        with pytest.raises(
            TowerError, match=f"ViT-B-16-SigLIP has no class token; set network.options.{key} to mean_tokens"
        ):
            build_model(asked)


def test_random_weights_follow_the_seed():
    one, two = (build_model(config("eva02_base_patch14_224")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.origin.weights.startswith("random weights of seed")


def test_open_clips_names_stand_for_timms_models():
    assert timm_arguments("ViT-B-16-SigLIP") == {"model_name": "vit_base_patch16_siglip_224", "global_pool": "map"}
    assert timm_arguments("EVA02-B-16") == {"model_name": "eva02_base_patch16_clip_224", "global_pool": "token"}
    assert timm_arguments("vit_medium_patch16_gap_256") == {"model_name": "vit_medium_patch16_gap_256"}
    assert (
        timm_arguments("ViT-B/16") is None and timm_arguments("ViT-B-16") is None and timm_arguments("nothing") is None
    )
    assert {"vit_base_patch16_224", "deit3_small_patch16_224", "eva02_base_patch14_224"} <= set(timm_names())
