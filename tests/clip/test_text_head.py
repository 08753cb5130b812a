"""The text head against open_clip's own CLIP, from files in every layout: what of it is trainable, cached, or loaded
from a checkpoint, and its learning rates."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor, nn

from clip.text_head import CHUNK, TextSizes, build_text_head, prompts, tokenize, words
from clip.towers.base import TowerError
from clip.towers.openclip_vit import build_custom_tower
from configs.schema import Config, ConfigError, load_config
from engine.checkpointer import weights_to_save
from engine.ema import ModelEma
from engine.optim import check_groups
from models.loading import WeightsError, check_untrained, load_run_weights, load_weights
from models.parameters import check_trainable, frozen_identity, parameter_groups, parameter_report
from models.registry import build_model
from tests.clip.towers.test_openclip_vit import transformers_layout, write

VISION = {"width": 64, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32}
NAMES = ("ApplyEyeMakeup", "brush_hair", "Moving [something] up")
TEXTS = ("a video of a person apply eye makeup.", "a video of a person brush hair.",
         "a video of a person Moving something up.")  # fmt: skip
SPATIAL = ("linear_probe", "full_finetune", "td4v_finetune", "aim")
TUNED = ("none", "classifier", "tower")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """Hide the warnings that small files do not say their activation."""
    logging.getLogger("td4v").setLevel(logging.ERROR)
    yield
    logging.getLogger("td4v").setLevel(logging.NOTSET)


def random_clip(embed: int, vision: dict, text: dict, quick_gelu: bool = True) -> open_clip.CLIP:
    """A complete CLIP; no two of its norms or biases are alike."""
    torch.manual_seed(0)
    model = open_clip.CLIP(embed, vision, text, quick_gelu).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    return random_clip(48, vision, {"width": 128, "heads": 2, "layers": 3})


@pytest.fixture(scope="module")
def file(clip: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("clip"), "bare", clip.state_dict()))


def config(
    file: str | None, model_name: str = "linear_probe", tuned: str = "none", text: dict | None = None, classes: int = 3,
    **more,
) -> Config:  # fmt: skip
    network = {"arch": "custom", "vision": VISION, "weights": file, "init": file is not None, "model": model_name}
    network |= {"head": "text", "text": {"tuned": tuned, **(text or {})}, **more}
    data = {"dataset": "hmdb51", "num_classes": classes, "num_segments": 4, "input_size": 32}
    return load_config({"data": data, "network": network})


def build(file: str, *arguments, names: Sequence[str] | None = NAMES, **more) -> nn.Module:
    return build_model(config(file, *arguments, classes=len(names or NAMES), **more), class_names=names).eval()


def still(count: int = 2) -> Tensor:
    """Clips whose frames are all the same, so that their mean is each of them."""
    images = torch.randn(count, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return images.expand(-1, 4, -1, -1, -1)


def of_open_clip(clip: open_clip.CLIP, video: Tensor, texts: Sequence[str] = TEXTS) -> Tensor:
    """Its logits for the mean of the frames' embeddings: (B, T, 3, H, W) -> (B, K)."""
    image = clip.encode_image(video.flatten(0, 1)).unflatten(0, video.shape[:2]).mean(1)
    text = clip.encode_text(open_clip.tokenize(list(texts)), normalize=True)
    return clip.logit_scale.exp() * nn.functional.normalize(image, dim=-1) @ text.T


def in_text_module(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """As open_clip's CustomTextCLIP names them."""
    return {key if key.startswith(("visual.", "logit")) else f"text.{key}": value for key, value in values.items()}


def of_transformers(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Hugging Face's CLIPModel names them, projections transposed."""
    projections = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
    named = {projections[key]: values[key].T for key in projections} | {"logit_scale": values["logit_scale"]}
    rest = {key: value for key, value in values.items() if key not in projections and key != "logit_scale"}
    named |= transformers_layout({key: value for key, value in rest.items() if key.startswith("visual.")})
    del named["text_model.x"]
    for key, value in transformers_layout({k: v for k, v in rest.items() if not k.startswith("visual.")}).items():
        for ours, theirs in (("ln_final", "final_layer_norm"), ("token_embedding", "embeddings.token_embedding")):
            key = key.replace(ours, theirs)
        if key != "text_model.x":
            named[key.replace("vision_model.", "text_model.")] = value
    return named


@pytest.mark.parametrize("kind", ["safetensors", "wrapped", "torchscript", "text module", "transformers"])
def test_zero_shot_is_open_clips_from_every_layout(clip: open_clip.CLIP, tmp_path: Path, kind: str) -> None:
    values, reference = clip.state_dict(), clip
    if kind == "torchscript":  # OpenAI's own, in half precision, with numbers beside the weights
        reference = copy.deepcopy(clip).half().float()
        values = {**values, "context_length": torch.tensor(77.0), "input_resolution": torch.tensor(32.0)}
    layout = {"text module": in_text_module, "transformers": of_transformers}.get(kind, dict)
    path = write(tmp_path, "safetensors" if kind == "transformers" else kind, layout(values))
    with torch.no_grad():
        torch.testing.assert_close(
            build(str(path))(still()), of_open_clip(reference, still()), rtol=1e-5, atol=1e-5
        )  # fmt: skip


@pytest.mark.parametrize("tuned", TUNED)
@pytest.mark.parametrize("model_name", SPATIAL)
def test_every_model_in_clips_space_starts_at_zero_shot(
    clip: open_clip.CLIP, file: str, model_name: str, tuned: str
) -> None:
    model = build(file, model_name, tuned)
    with torch.no_grad():
        torch.testing.assert_close(model(still()), of_open_clip(clip, still()), rtol=1e-5, atol=1e-5)


def test_more_texts_than_go_through_the_tower_at_a_time(clip: open_clip.CLIP, file: str) -> None:
    templates = [f"{{}} number {number}" for number in range(CHUNK // 3 + 4)]
    model = build(file, text={"templates": templates})
    with torch.no_grad():
        text = clip.encode_text(open_clip.tokenize(prompts(NAMES, templates)), normalize=True)
        assert len(text) > CHUNK
        torch.testing.assert_close(model.head.classes, text.unflatten(0, (-1, 3)).mean(0), rtol=1e-5, atol=1e-6)


def test_a_clip_with_plain_gelu(tmp_path: Path) -> None:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    plain = random_clip(48, vision, {"width": 128, "heads": 2, "layers": 3}, quick_gelu=False)
    model = build(str(write(tmp_path, "bare", plain.state_dict())), vision={**VISION, "quick_gelu": False})
    with torch.no_grad():
        torch.testing.assert_close(model(still()), of_open_clip(plain, still()), rtol=1e-5, atol=1e-5)


def test_heads_of_a_custom_text_tower(tmp_path: Path, file: str) -> None:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    clip = random_clip(48, vision, {"width": 96, "heads": 6, "layers": 2})
    path = str(write(tmp_path, "bare", clip.state_dict()))
    with torch.no_grad():
        logits, wanted = build(path, text={"heads": 6})(still()), of_open_clip(clip, still())
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(build(path)(still()), wanted, rtol=1e-3)  # 96 // 64 = 1
    with pytest.raises(ConfigError, match="network.text.heads: 5 do not divide the width 96 of the text tower"):
        build(path, text={"heads": 5})
    with pytest.raises(ConfigError, match="network.text.heads: must be above 0, not 0"):
        config(file, text={"heads": 0})
    with pytest.raises(ConfigError, match="network.text.heads: is only for network.arch: custom"):
        config(file, text={"heads": 8}, arch="ViT-B/16", vision=None)


def test_several_templates_are_averaged_after_they_are_normalised(clip: open_clip.CLIP, file: str) -> None:
    model = build(file, text={"templates": ["a {}.", "{} at home"]})
    names = [text.removeprefix("a video of a person ").removesuffix(".") for text in TEXTS]
    text = [f"a {name}." for name in names] + [f"{name} at home" for name in names]
    with torch.no_grad():
        mean = clip.encode_text(open_clip.tokenize(text), normalize=True).unflatten(0, (2, 3)).mean(0)
        image = clip.encode_image(still()[:, 0], normalize=True)
        wanted = clip.logit_scale.exp() * image @ nn.functional.normalize(mean, dim=-1).T
        torch.testing.assert_close(model(still()), wanted, rtol=1e-5, atol=1e-5)
    for templates in ([], ["a video"], ["{} and {}"]):
        with pytest.raises(ConfigError, match="network.text.templates"):
            config(file, text={"templates": templates})


@pytest.mark.parametrize(("name", "text"), [
    ("brush_hair", "brush hair"), ("ApplyEyeMakeup", "apply eye makeup"), ("YoYo", "yo yo"), ("climb", "climb"),
    ("Pushing [something] from left to right", "Pushing something from left to right"), ("TVShow", "tv show"),
    ("playing  McDonald's_song", "playing McDonald's song"), ("HandstandPushups", "handstand pushups"),
])  # fmt: skip
def test_names_become_words(name: str, text: str) -> None:
    assert words(name) == text
    assert prompts([name], ["to {}", "{}!"]) == [f"to {text}", f"{text}!"]


def test_texts_that_do_not_fit_are_refused(file: str, tmp_path: Path, clip: open_clip.CLIP) -> None:
    long = r"data.label_list: class 1 has 108 tokens with its template, and CLIP's text tower reads 77: '.{60}\.\.\.'$"
    with pytest.raises(ConfigError, match=long):
        build_model(config(file), class_names=("a", "a b c d e " * 20, "c"))
    with pytest.raises(ConfigError, match="vocabulary of 49408 tokens, and this text tower has 100"):
        tokenize(["a"], ["{}"], TextSizes(vocab_size=100))
    assert TextSizes.of_model("ViT-B-16-quickgelu") == TextSizes()
    assert TextSizes.of_model("ViT-L-14") == TextSizes(width=768, heads=12, embed=768)
    with pytest.raises(TowerError, match="those of xlm-roberta-base-ViT-B-32 are others .hf_model_name"):
        TextSizes.of_model("xlm-roberta-base-ViT-B-32")
    values = clip.state_dict()
    for part in ("logit_scale", "visual.proj", "token_embedding.weight"):
        path = write(tmp_path, "bare", {key: value for key, value in values.items() if key != part})
        with pytest.raises(TowerError, match=f"needs a complete CLIP, and this file has no {part}"):
            build(str(path))
    path = write(tmp_path, "bare", {**values, "visual.proj": torch.ones(32, 48)})
    with pytest.raises(TowerError, match=r"first proj: \(32, 48\) in the file, \(64, 48\) in the model"):
        build(str(path))
    path = write(tmp_path, "bare", {**values, "cls_emb": torch.ones(3)})
    with pytest.raises(TowerError, match="does not fit the text tower of custom: 1 keys differ, first cls_emb"):
        build(str(path))


@pytest.mark.parametrize(("names", "message"), [
    (("climb", "Brush_hair", "brush hair"), "classes 1 and 2, 'Brush_hair' and 'brush hair', are the same text"),
    (("swing", "Swing", "climb"), "classes 0 and 1, 'swing' and 'Swing', are the same text"),
    (("climb", "swing", "_[]"), "the name of class 2, '_[]', has no words"),
])  # fmt: skip
def test_names_that_no_text_tells_apart_are_refused(file: str, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(file, names=names, text={"templates": ["a {}", "b {}"]})
    assert str(caught.value).startswith("data.label_list: ") and message in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"model": "td4v_side", "pyramid": {"n_embs": [16, 32]}}, "space, which network.model td4v_side does not give"),
    ({"options": {"feature": "mean_tokens"}}, "linear_probe and network.options.feature mean_tokens does not give"),
    ({"file": None}, "needs a pretrained CLIP, but network.init is false"),
    ({"file": None, "arch": "EVA02-B-16", "vision": None}, "not supported for towers that timm wrote, and EVA02-B-16"),
])  # fmt: skip
def test_models_and_towers_without_a_text_head_say_so(file: str, change: dict, message: str) -> None:
    with pytest.raises((ConfigError, TowerError), match=message):
        build_model(config(**{"file": file, **change}), class_names=NAMES)


def test_a_tower_whose_tokens_are_averaged_has_no_text_head() -> None:
    tower = build_custom_tower(**VISION)
    tower.visual.pool_type = "avg"
    with pytest.raises(TowerError, match="projects its class token .*, and custom projects the mean of its tokens"):
        build_text_head(config(None), tower, pretrained=False)


@pytest.mark.parametrize("tuned", TUNED)
def test_a_file_is_read_once_for_tower_and_text(file: str, monkeypatch: pytest.MonkeyPatch, tuned: str) -> None:
    load, reads = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: reads.append(1) or load(*arguments, **options))
    model = build(file, tuned=tuned)
    assert len(reads) == 1 and model.tower.clip_weights is None  # what is not needed any more is not held


def test_settings_without_effect_are_refused(file: str) -> None:
    with pytest.raises(ConfigError, match="network.text: is given, but network.head is linear"):
        config(file, "linear_probe", "tower", head="linear")


def test_without_names_a_head_waits_for_a_checkpoint(file: str) -> None:
    for check in (check_trainable, check_untrained):
        with pytest.raises(ConfigError, match="has no classes: .* data.label_list"):
            check(build_model(config(file, tuned="classifier")))
    with pytest.raises(ConfigError, match="leaves nothing to train in this model: test it with test_vision.py"):
        check_trainable(build(file))
    with pytest.raises(ConfigError, match="--weights.* parts that CLIP does not have: td4v, temporal_embedding"):
        check_untrained(build(file, "td4v_finetune"))
    for model_name in ("linear_probe", "full_finetune"):
        check_untrained(build(file, model_name))
    check_trainable(build(file, "full_finetune"))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("model_name", ["linear_probe", "full_finetune"])
@pytest.mark.parametrize("tuned", TUNED)
def test_a_checkpoint_needs_neither_names_nor_the_text_tower(
    file: str, model_name: str, tuned: str, full: bool
) -> None:
    source = build(file, model_name, tuned)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    saved = weights_to_save(source, full)
    assert any(name.startswith("tower.") for name in saved) == (full or model_name == "full_finetune")
    identity = None if full or model_name == "full_finetune" else frozen_identity(source)
    target = build_model(config(file, model_name, tuned), pretrained=identity is not None).eval()
    load_weights(target, saved, "a.pt", backbone=identity)
    with torch.no_grad():
        assert torch.equal(target(still()), source(still()))
    check_untrained(target)  # its classes are there


def test_a_head_is_filled_once_a_checkpoint_brought_all_of_it(file: str) -> None:
    for tuned in TUNED:
        values = build(file, tuned=tuned).state_dict()
        target = build(file, tuned=tuned, names=None)
        for part in ("tower.", "head.projection", "head.classes", "head.logit_scale"):
            target.load_state_dict({key: value for key, value in values.items() if key.startswith(part)}, strict=False)
            assert not target.head.filled
        target.load_state_dict(values)
        assert target.head.filled


def test_pretraining_takes_no_names_from_the_checkpoint(file: str, clip: open_clip.CLIP) -> None:
    """Given names and templates are the model's, and may be more than the checkpoint's."""
    others = ("climb", "cartwheel", "sword_exercise", "a very long name of a class")
    two = {"templates": ["{}", "a {}."]}
    source = build(file, tuned="tower")
    with torch.no_grad():
        for parameter in source.head.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        mixed = copy.deepcopy(clip)
        mixed.load_state_dict({**clip.state_dict(), **source.head.classes.tower.state_dict()})
        mixed.logit_scale.copy_(source.head.logit_scale)
        for pretrained in (True, False):
            model = build_model(config(file, tuned="tower", text=two, classes=4), pretrained, class_names=others)
            load_weights(model.eval(), source.state_dict(), "a.pt")
            texts = mixed.encode_text(open_clip.tokenize(prompts(others, two["templates"])), normalize=True)
            texts = nn.functional.normalize(texts.unflatten(0, (2, 4)).mean(0), dim=-1)
            wanted = mixed.logit_scale.exp() * mixed.encode_image(still()[:, 0], normalize=True) @ texts.T
            torch.testing.assert_close(model(still()), wanted, rtol=1e-4, atol=1e-4)


def test_classes_that_are_not_trainable_stay_those_of_the_names(file: str) -> None:
    others = ("climb", "cartwheel", "sword_exercise", "kick")
    source, fresh = build(file, "full_finetune"), build(file, "full_finetune", names=others)
    with torch.no_grad():
        source.tower.visual.conv1.weight.mul_(1.5)
    for pretrained in (True, False):  # False: a checkpoint with all weights brings no class of these
        model = build_model(config(file, "full_finetune", classes=4), pretrained, class_names=others)
        load_weights(model, source.state_dict(), "a.pt")
        check_trainable(model)
        assert torch.equal(model.head.classes, fresh.head.classes)
        assert torch.equal(model.tower.visual.conv1.weight, source.tower.visual.conv1.weight)
    source.head.projection += 1
    with pytest.raises(WeightsError, match="its text head is of another CLIP than custom by network.weights"):
        load_weights(model, source.state_dict(), "a.pt")


@pytest.mark.parametrize("tuned", TUNED)
def test_a_resumed_run_has_the_checkpoints_head(file: str, tuned: str) -> None:
    """With names or without. Names are the same in the same run, but another machine may round their classes differently."""
    source = build(file, "full_finetune", tuned)
    with torch.no_grad():
        for value in source.head.state_dict().values():
            value.add_(1)
    saved = weights_to_save(source, full=False)
    for names in (NAMES, None):
        target = build(file, "full_finetune", tuned, names=names)
        load_run_weights(target, saved, "a.pt")
        own = target.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in source.state_dict().items())


def test_a_head_without_names_says_what_does_not_fit(file: str) -> None:
    target = build(file, tuned="tower", names=None)
    for source in (build(file, tuned="tower", names=("a", "b", "c", "d")),
                   build(file, tuned="tower", text={"templates": ["{}", "a {}", "b {}", "c {}"]})):  # fmt: skip
        texts = len(source.head.classes.tokens)
        said = (
            f"a.pt: its text head reads {texts} texts, and data.num_classes times network.text.templates are 3: .*drop"
        )
        with pytest.raises(WeightsError, match=said):
            load_weights(target, source.state_dict(), "a.pt")


def test_a_checkpoint_with_another_classifier_is_refused(file: str) -> None:
    text, linear = build(file, "full_finetune"), build_model(config(file, "full_finetune", head="linear"))
    kinds = {"linear": linear, "text with network.text.tuned none or classifier": text,
             "text with network.text.tuned tower": build(file, "full_finetune", "tower")}  # fmt: skip
    for (here, one), (there, other) in itertools.permutations(kinds.items(), 2):
        said = f"its classifier is network.head {there}, and the configuration asks for network.head {here}; .*drop"
        with pytest.raises(WeightsError, match=said) as caught:
            load_weights(one, other.state_dict(), "a.pt")
        assert "parts" not in str(caught.value)
        before = {key: value.clone() for key, value in one.head.state_dict().items()}
        load_weights(one, other.state_dict(), "a.pt", drop_head=True)
        assert all(torch.equal(value, before[key]) for key, value in one.head.state_dict().items())
    for names, tuned in ((NAMES, "classifier"), (None, "none")):
        model = build(file, "full_finetune", tuned, names=names)
        with pytest.raises(WeightsError, match="its classifier has 5 classes, data.num_classes is 3"):
            load_weights(model, {**model.state_dict(), "head.classes": torch.ones(5, 48)}, "a.pt")


@pytest.mark.parametrize("model_name", SPATIAL)
def test_learning_rates_of_the_trainable_parts(file: str, model_name: str) -> None:
    linear = parameter_report(build_model(config(file, model_name, head="linear")))
    for tuned in TUNED:
        model = build(file, model_name, tuned)
        report = parameter_report(model)
        texts = sum(p.numel() for p in model.head.classes.parameters()) if tuned == "tower" else 0
        head = {"none": 0, "classifier": 3 * 48 + 1, "tower": 1}[tuned]
        assert report.trainable == linear.trainable - linear.by_module["head"] + texts + head
        assert list(report.by_module)[-1] == "head" and report.by_module["head"] == head
        for decay in (1.0, 0.5):
            groups = parameter_groups(model, lr=0.1, weight_decay=0.05, clip_ratio=0.5, layer_decay=decay)
            check_groups(model, groups)
            rates = {name: group["lr"] for group in groups for name in [group["name"].split("_0")[0]]}
            assert all(rate <= (0.1 if name == "head" else 0.05) for name, rate in rates.items())
            assert ("text" in rates) == (tuned == "tower") and rates.get("head", 0.1) == 0.1


def test_the_text_towers_layers_end_with_the_models(file: str) -> None:
    rates = {
        group["name"]: group["lr"]
        for group in parameter_groups(build(file, "full_finetune", "tower"), lr=1, weight_decay=0.05, layer_decay=0.5)
    }
    # embedding, two blocks, norm, head; beside them embedding, three blocks, norm and projection, head
    assert {name: rate for name, rate in rates.items() if not name.startswith(("ln_pre", "class", "pos"))} == {
        "conv1_01": 0.5**4, "blocks_02": 0.5**3, "blocks_03": 0.5**2, "final_norm_04": 0.5, "text_00": 0.5**5,
        "text_01": 0.5**4, "text_02": 0.5**3, "text_03": 0.5**2, "text_04": 0.5, "head_05": 1.0,
    }  # fmt: skip


def test_gradients_reach_all_trainable_parameters_and_nothing_else(file: str) -> None:
    for model_name in ("linear_probe", "full_finetune"):
        for tuned in TUNED[1:]:
            model = build(file, model_name, tuned).train()
            nn.functional.cross_entropy(model(still(3)), torch.arange(3)).backward()
            for name, parameter in model.named_parameters():
                assert (parameter.grad is not None) == parameter.requires_grad, name
                assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_classes_are_cached_while_the_text_tower_stays(file: str, clip: open_clip.CLIP) -> None:
    model = build(file, "linear_probe", "tower")
    classes, tower = model.head.classes, model.head.classes.tower
    passes = []
    tower.register_forward_hook(lambda *_: passes.append(1))
    ema = ModelEma(model, 0.5)
    with torch.inference_mode():
        first = model(still())
        assert torch.equal(model(still()), first) and len(passes) == 1
        with torch.autocast("cpu", torch.bfloat16):
            low = model(still())
        assert low.dtype == torch.float32 and not torch.equal(low, first) and len(passes) == 2
        torch.testing.assert_close(low, first, rtol=0.1, atol=0.3)
        model(still())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    nn.functional.cross_entropy(model.train()(still()), torch.arange(2)).backward()
    optimizer.step()
    ema.update()
    model.eval()
    with torch.no_grad():
        ours = model(still())
        with ema.applied(model):
            averaged = model(still())
        assert torch.equal(model(still()), ours)
        states = [classes().clone()]
        load_weights(model, {**model.state_dict(), **ema.state_dict()}, "a.pt")
        states.append(classes())
        assert torch.equal(model(still()), averaged)
    assert not torch.equal(first, ours) and not torch.equal(averaged, ours) and not torch.equal(*states)


def test_texts_are_cut_to_the_longest_after_loading_too(file: str) -> None:
    longer = ("climbing up a very long and very steep ladder", *NAMES[1:])
    source = build_model(config(file, tuned="tower"), class_names=longer).eval()
    target = build(file, tuned="tower", names=None)
    load_weights(target, source.state_dict(), "a.pt")
    with torch.no_grad():
        assert torch.equal(source(still()), target(still()))


@pytest.mark.parametrize("model_name", ["linear_probe", "full_finetune"])
def test_recompute_reaches_the_text_tower(file: str, model_name: str) -> None:
    """The same gradients, and a fraction of what is saved. A frozen text tower leaves nothing to compute again."""
    found = []
    for recompute in (False, True):
        model = build(file, model_name, "tower", recompute=recompute).train()
        own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(value: Tensor, own: set[int] = own, kept: dict[int, Tensor] = kept) -> Tensor:
            if value.untyped_storage().data_ptr() not in own:
                kept[value.untyped_storage().data_ptr()] = value
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            texts = model.head.classes()
        size = sum(value.untyped_storage().nbytes() for value in kept.values())
        nn.functional.cross_entropy(model(still(3)), torch.arange(3)).backward()
        found.append((size, texts.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    (more, texts, gradients), (less, again, others) = found
    assert less < more / 5 and torch.equal(texts, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    for tuned in TUNED[:2]:
        with pytest.raises(ConfigError, match="network.recompute: linear_probe saves no .*network.text.tuned: tower"):
            build(file, "linear_probe", tuned, recompute=True)


@pytest.mark.parametrize("tuned", TUNED)
def test_frozen_features_and_what_is_computed_of_them(file: str, tuned: str) -> None:
    """What network.cache_features relies on; and the hash of the frozen weights is the same as with a linear head."""
    model = build(file, tuned=tuned)
    with torch.no_grad():
        assert torch.equal(model(model.frozen_features(still())), model(still()))
    linear = build_model(config(file, head="linear"))
    assert frozen_identity(model)["sha256"] == frozen_identity(linear)["sha256"]


@pytest.mark.parametrize("tuned", TUNED)
def test_random_values_are_enough_to_measure(tuned: str) -> None:
    """scripts/profile builds like this: nothing is read."""
    model = build_model(config(None, "full_finetune", tuned), pretrained=False)
    model.train()(still()).sum().backward()
    arch = {"arch": "ViT-B/32", "vision": None, "options": {}}
    if tuned == "classifier":
        head = build_model(config(None, "linear_probe", tuned, **arch), pretrained=False).head
        assert head.projection.shape == (768, 512) and head.classes.shape == (3, 512)
