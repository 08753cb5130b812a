"""Models on a tower: exact counts and trainable sets, what stays frozen, what is refused, weights in and out."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from configs.schema import ConfigError, load_config
from engine.profiling import saved_for_backward
from models.loading import WeightsError, load_weights
from models.parameters import parameter_groups, parameter_report
from models.registry import MODELS, build_model, run_home
from tests.helpers.tiny_models import WHOLLY_TRAINED, adapted, random_clips

FROZEN = [model_name for model_name in MODELS if model_name not in WHOLLY_TRAINED]
SMALL = {"width": 64, "layers": 3, "heads": 2, "patch_size": 8, "image_size": 32}


def config(model_name="td4v_side", classes=5, frames=4, **network):
    small = {"arch": "custom", "vision": SMALL, "pyramid": {"n_embs": [16, 16, 64]}}
    network = {**({} if "arch" in network else small), "init": False, **network}
    size = 224 if "arch" in network and network["arch"] != "custom" else 32
    data = {"dataset": "hmdb51", "num_classes": classes, "num_segments": frames, "input_size": size}
    return load_config(adapted(model_name, data, network))


def b16(model_name, classes, frames=8, **network):
    return parameter_report(build_model(config(model_name, classes, frames, arch="ViT-B/16", **network)))


@pytest.mark.parametrize(("classes", "trainable"), [(174, 20_406_138), (51, 20_311_551), (101, 20_350_001)])
def test_side_counts(classes, trainable):
    report = b16("td4v_side", classes)
    assert report.trainable == trainable and report.by_module["side"] == 20_272_332


def test_side_counts_of_the_papers_figure():
    assert b16("td4v_side", 174, frames=32).trainable == 20_440_698
    commented = {"n_embs": [96, 96, 96, 96, 192, 192, 192, 384, 384, 384, 768, 768], "mlp_ratio": 2}
    assert b16("td4v_side", 174, pyramid=commented).trainable == 20_444_730


def test_finetune_counts():
    report = b16("td4v_finetune", 51)
    assert report.trainable == 2_139_711
    assert report.by_module == {"td4v": 2_094_348, "temporal_embedding": 6_144, "head": 39_219}
    assert b16("td4v_finetune", 51, options={"placement": "both"}).by_module["td4v"] == 2 * 2_094_348


@pytest.mark.parametrize("model_name", FROZEN)
def test_exactly_the_named_parts_are_trainable(model_name):
    model = build_model(config(model_name))
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    named = [
        [part] if isinstance(part, torch.nn.Parameter) else part.parameters()
        for part in model.trainable_modules().values()
    ]
    assert trainable == {parameter for parameters in named for parameter in parameters}
    last_norm = set(model.tower.final_norm.parameters()) if model_name == "aim" else set()
    assert trainable & set(model.tower.parameters()) == last_norm
    assert trainable | set(model.tower.parameters()) == set(model.parameters())
    grouped = [id(p) for group in parameter_groups(model, lr=1.0, weight_decay=0.05) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("model_name", FROZEN)
def test_one_step_changes_the_trainable_and_nothing_else(model_name):
    torch.manual_seed(0)
    model = build_model(config(model_name)).train()
    assert not any(module.training for module in model.tower.modules())
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):  # the second step reaches what stands behind a zero-initialised layer
        optimizer.zero_grad()
        model(torch.randn(2, 4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert still == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_side_tuning_has_no_graph_in_the_tower(monkeypatch):
    model = build_model(config()).train()
    seen = []
    for block, part in itertools.product(model.tower.blocks, ("attend", "transform")):
        run = getattr(block, part)

        def watched(*arguments, run=run):
            seen.append(run(*arguments))
            return seen[-1]

        monkeypatch.setattr(block, part, watched)
    video = torch.randn(2, 4, 3, 32, 32)
    model(video).sum().backward()
    assert len(seen) == 2 * len(model.tower.blocks) and not any(output.requires_grad for output in seen)


def test_finetune_starts_as_frozen_clip():
    torch.manual_seed(0)
    model = build_model(config("td4v_finetune")).eval()
    video = torch.randn(2, 4, 3, 32, 32)
    tokens = model.tower.visual.ln_post(model.tower(video.flatten(0, 1)))[:, 0]
    torch.testing.assert_close(model.features(video), tokens.unflatten(0, (2, 4)).mean(1))


@pytest.mark.parametrize(
    "options",
    [{"placement": "before_mlp"}, {"placement": "both", "mode": "CNN"}, {"feature": "mean_tokens"},
     {"zero_init": False}, {"temporal_embedding": False}, {"ratio": "1/4"}],
)  # fmt: skip
def test_finetune_options(options):
    model = build_model(config("td4v_finetune", options=options)).train()
    model(torch.randn(2, 4, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_finetune_says_what_it_does_not_read(caplog):
    build_model(config("td4v_finetune", DA_ratio="1/4", sample_mode="FC"))
    assert "fine-tuning reads network.options.ratio" in caplog.text and "network.options.mode" in caplog.text


def test_side_network_without_temporal_parts_is_blind_to_order():
    torch.manual_seed(0)
    off = {"td4v": False, "stem_kernel": 1, "token_shift": False, "temporal_embedding": False}
    video = torch.randn(2, 4, 3, 32, 32)
    for name in (None, *off):
        options = {key: value for key, value in off.items() if key != name}
        model = build_model(config(options=options)).double().eval()
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.shape[0] == 4:
                parameter.data.normal_()  # a temporal embedding of 0.01 would hide
        shuffled = model(video.double()[:, [2, 0, 3, 1]])
        same = torch.allclose(model(video.double()), shuffled, rtol=1e-9, atol=1e-9)
        assert same == (name is None), name


def test_ssv2_pyramid_rule_for_temporal_embeddings():
    def embedded(widths):
        vision = {**SMALL, "layers": len(widths)}
        model = build_model(config(vision=vision, arch="custom", pyramid={"n_embs": widths}))
        return [i for i, layer in enumerate(model.side.layers) if layer.temporal_embedding is not None]

    assert embedded([32, 32, 64, 64]) == [0, 2]
    assert embedded([32, 32, 32]) == []
    assert embedded([32, 32, 64, 32]) == [2, 3]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"model": "td4v_sid"}, "did you mean td4v_side"),
        ({"options": {"stem_kernal": 1}}, "network.options.stem_kernal: unknown key; did you mean network.options.stem_kernel"),
        ({"options": {"stem_kernel": 2}}, "network.options.stem_kernel: must be one of 1, 3"),
        ({"model": "td4v_finetune", "options": {"ratio": "1/100"}}, "no channels left"),
        ({"pyramid": {"n_embs": [16, 16]}}, "network.pyramid.n_embs: 2 side widths for 3 blocks"),
        ({"pyramid": {"n_embs": [16, 16, 200]}}, "side width 200 at level 2 is not divisible by its 3 heads"),
        ({"pyramid": {"n_embs": [2, 16, 64]}}, "side width 2 at level 0 is below the 4 frames"),
    ],
)  # fmt: skip
def test_refusals(network, message):
    model_name = network.pop("model", "td4v_side")
    with pytest.raises((ConfigError, ValueError)) as caught:
        build_model(config(model_name, **network))
    assert message in str(caught.value)


def test_one_training_clip_is_refused():
    model = build_model(config()).train()
    with pytest.raises(ValueError, match="at least two clips"):
        model(torch.randn(1, 4, 3, 32, 32))
    assert model.eval()(torch.randn(1, 4, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model."])
def test_weights_in_and_out(prefix):
    source, target = build_model(config()), build_model(config())
    state = {prefix + key: value for key, value in source.state_dict().items()}
    load_weights(target, state, "a.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 7}, "classifier has 5 classes, data.num_classes is 7; .* pretrain_head: drop"),
        ({"frames": 8}, "made for T = 4 frames, data.num_segments is 8"),
        ({"pyramid": {"n_embs": [32, 32, 64]}}, "its network is 16 wide at side.*temporal_embedding, .* make it 32 wide"),
        ({"model_name": "td4v_finetune"}, "holds the weights of another model"),
        ({"prefix": "net."}, "all keys begin with net., which is no part of this network"),
        ({"head.weight": lambda value: value.int()}, "its head.weight holds int32, and the model's is float32"),
        ({"head.weight": lambda value: value / 0}, "its head.weight holds NaN or infinite values"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(change, message):
    prefix, spoil = change.pop("prefix", ""), change.pop("head.weight", lambda value: value)
    state = {prefix + key: value for key, value in build_model(config()).state_dict().items()}
    state[f"{prefix}head.weight"] = spoil(state[f"{prefix}head.weight"])
    model = build_model(config(**change))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"a\.pt: .*{message}"):
        load_weights(model, state, "a.pt")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("model_name", MODELS)
def test_recompute_saves_less_or_is_refused(model_name):
    saved = []
    for recompute in (False, True):
        try:
            chosen = config(model_name, recompute=recompute)
            model = build_model(chosen).train()
        except ConfigError as error:
            assert recompute and str(error).startswith(f"network.recompute: {model_name} ")
            return
        video = random_clips(model, chosen, 2)
        saved.append(sum(entry.bytes for entry in saved_for_backward(model, video)))
    assert saved[1] < 0.7 * saved[0]


@pytest.mark.parametrize("model_name", MODELS)
def test_drop_fc_is_dropout_before_the_head(model_name):
    seen = []
    for rate in (0.4, 0):  # of the same weights
        chosen = config(model_name, drop_fc=rate)
        model = build_model(chosen)
        model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        torch.manual_seed(0)
        video = random_clips(model, chosen, 16)
        for mode in (True, False):
            model.train(mode)(video)
    dropped, evaluated, complete, other = seen
    assert torch.equal(evaluated, other)
    assert (dropped[complete != 0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.06)


def test_random_weights_are_announced(caplog):
    with caplog.at_level(logging.WARNING, "td4v"):
        build_model(config(), pretrained=False)
        assert not caplog.text
        build_model(config())
    assert "RANDOM weights" in caplog.text


@pytest.mark.parametrize(
    ("file", "folder"), [("ssv2/aim", "ViT-B-16"), ("ssv2/tadaformer_l14", "ViT-L-14"), ("ssv2/tdn", "tdn")]
)
def test_runs_are_kept_by_tower_or_else_by_model(file, folder):
    """Of a model without a tower network.arch says nothing."""
    assert run_home(load_config(f"configs/{file}.yaml")).as_posix() == f"exp/somethingv2/{folder}"


def test_drop_head():
    source, target = build_model(config()), build_model(config(classes=7))
    load_weights(target, source.state_dict(), "a.pt", drop_head=True)
    assert torch.equal(source.side.norm.weight, target.side.norm.weight) and target.head.out_features == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side.norm.weight": None}, r"does not fit this network: 1 keys missing \(first side.norm.weight\), 0 unexpected"),
        ({"side.a": 1}, r"does not fit this network: 0 keys missing, 1 unexpected \(first side.a\)"),
        ({"extra.a": 1}, "holds the weights of another model .* it has the parts extra, side, tower, .* builds side, tower"),
        ({"side.norm.weight": 1}, r"1 shapes differ \(first side.norm.weight\)"),
        ({"frames": 8}, "set data.num_segments to 4"),
    ],
)  # fmt: skip
def test_all_but_the_head_is_strict_where_that_is_dropped(change, message):
    target = build_model(config(classes=7, frames=change.pop("frames", 4)))
    state = {**build_model(config()).state_dict(), **{name: value and torch.ones(3) for name, value in change.items()}}
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"^a\.pt: .*{message}"):
        load_weights(
            target, {name: value for name, value in state.items() if value is not None}, "a.pt", drop_head=True
        )
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


@pytest.mark.parametrize("model_name", MODELS)
def test_files_without_a_classifier(model_name):
    model = build_model(config(model_name))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    with pytest.raises(
        WeightsError, match="^a.pt: holds no classifier: name it in pretrain and set pretrain_head: drop$"
    ):
        load_weights(model, state, "a.pt")
    load_weights(model, state, "a.pt", drop_head=True)
    with pytest.raises(WeightsError, match=r"classifier is incomplete: 1 keys missing \(first head.bias\)"):
        load_weights(model, {**state, "head.weight": model.head.weight}, "a.pt")
