"""Configuration: the published files load, everything mistyped stops with the dotted key and the nearest valid one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from configs.schema import (
    CLIP_STD,
    Config,
    ConfigError,
    check_same_run,
    config_from_dict,
    difference,
    load_config,
    parse_ratio,
)

ROOT = Path(__file__).parents[2]

# The keys and value types of the published configs/hmdb51.yaml and configs/ssv2.yaml, dead ones included.
PUBLISHED = """
resume:
pretrain:
seed: 1024
data: {dataset: %s, modality: RGB, num_segments: 8, seg_length: 1, batch_size: 16, workers: 4, num_classes: %d,
  image_tmpl: '{:06d}.jpg', train_root: , val_root: , train_list: , val_list: , label_list: , input_size: 224,
  random_shift: True, num_sample: %d, rand_aug: %s, rand_erase: False}
network: {arch: ViT-B/16, init: True, tm: False, drop_out: 0.0, emb_dropout: 0.0, type: clip_sth, sim_header: %s,
  joint_st: False, drop_fc: 0, n_emb: 320, side_dim: 320, fix_clip: False, my_fix_clip: True, %s fine_tuning: false,
  DA_ratio: 1/6, t_ratio: 1, sample_mode: "CNN",
  pyramid: {n_embs: [ 96, 96, 192, 192, 384, 384, 384, 384, 384, 384, 768, 768 ], mlp_ratio: %s}}
solver: {type: cosine, epochs: 30, start_epoch: 0, epoch_offset: 0, optim: adamw, lr: 1.e-3, lr_warmup_step: 4,
  weight_decay: 0.15, betas: [0.9, 0.999], loss_type: CE, evaluate: False, clip_ratio: 1, grad_accumulation_steps: 1,
  smoothing: 0.1, layer_decay: 1.0}
logging: {print_freq: 20, eval_freq: 1, skip_epoch: [1,3,4,5,7,9]}
"""
SSV2 = PUBLISHED % ("somethingv2", 174, 2, "True", "Transf", "", "1.0")
HMDB51 = PUBLISHED % ("hmdb51", 51, 1, "False", "None", "sync_bn: False,", "1")
SMALL = "data: {dataset: hmdb51, num_classes: 5}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("text", [SSV2, HMDB51], ids=["ssv2", "hmdb51"])
def test_published_files_load(write, text):
    with pytest.warns(UserWarning, match="no effect.*network.tm") as caught:
        config = load_config(write(text))
    assert len(caught) == 1
    assert config.network.model_name == "td4v_side"
    assert config.network.DA_ratio == pytest.approx(1 / 6)
    assert (config.solver.lr, config.solver.betas, config.data.num_segments) == (1e-3, (0.9, 0.999), 8)
    assert config.logging.skip_epoch == (1, 3, 4, 5, 7, 9)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_load(path):
    config = load_config(path)
    assert config_from_dict(config.to_dict()) == config
    if path.stem.removesuffix("_finetune") in ("hmdb51", "ucf101", "ssv2"):
        assert (config.solver.lr, config.solver.weight_decay, config.solver.epochs) == (1e-3, 0.15, 30)
    named = next((method for method in ("linear_probe", "full_finetune", "aim") if path.stem.endswith(method)), None)
    if path.stem.endswith("zero_shot"):
        named = "linear_probe"
    assert config.network.head == ("text" if path.stem.endswith("zero_shot") else "linear")
    tuned = "td4v_finetune" if path.stem.endswith("_finetune") else "td4v_side"
    assert config.network.model_name == (named or tuned)


@pytest.mark.parametrize("stem", ["hmdb51", "ssv2"])
def test_shipped_files_are_the_published_recipe(write, stem):
    with pytest.warns(UserWarning, match="no effect"):
        published = load_config(write({"hmdb51": HMDB51, "ssv2": SSV2}[stem]), ["logging.print_freq=10"])
    assert load_config(ROOT / f"configs/{stem}.yaml", ["logging.print_freq=10", "data.seg_length=1"]) == published


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.augment=false", "data.num_sample=2"],
            "data.num_sample: 2 draws .* all the same with data.augment: false",
        ),
        (["data.augment=false", "data.rand_aug=true"], "data.rand_aug: has no effect with data.augment: false"),
        (["data.augment=false", "data.flip=true"], "data.flip: has no effect with data.augment: false"),
        (
            ["data.augment=false", "data.flip=false", "data.crop_scale=[0.5, 1]"],
            "data.crop_scale: has no effect with data.augment",
        ),
        (["network.cache_features=all"], "network.cache_features: all keeps one clip a video, but data.augment: true"),
        (
            ["network.cache_features=all", "data.augment=false", "solver.mixup=true"],
            "network.cache_features: all trains on features, and solver.mixup mixes pixels",
        ),
        (["network.cache_features=train"], "network.cache_features: must be one of off, val, all"),
    ],
)
def test_what_does_not_go_with_unchanging_clips(write, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(SMALL), overrides)


def test_unchanging_clips(write):
    config = load_config(write(SMALL), ["data.augment=false", "data.flip=false", "network.cache_features=all"])
    assert not config.data.augment and config.network.cache_features == "all"
    load_config(write(SMALL), ["data.augment=false", "data.flip=false", "data.crop_scale=[0.08, 1.0]"])
    assert load_config(write(SMALL), ["network.cache_features=val"]).data.augment
    assert load_config(write(SMALL), ["network.cache_features=off"]).network.cache_features == "off"  # YAML's false


def test_overrides(write):
    overrides = [
        "solver.lr=5e-4",
        "network.init=false",
        "network.pyramid.n_embs=[8,16]",
        "network.DA_ratio=1/12",
        "solver.lr=1e-4",
    ]
    config = load_config(write(SMALL), overrides)
    assert config.solver.lr == 1e-4 and config.network.init is False
    assert config.network.pyramid.n_embs == (8, 16) and config.network.DA_ratio == pytest.approx(1 / 12)


def test_fine_tuning_switch(write):
    assert load_config(write(SMALL), ["network.fine_tuning=true"]).network.model_name == "td4v_finetune"
    assert load_config(write(SMALL), ["network.model=td4v_side"]).network.model_name == "td4v_side"


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("solver:\n  lrr: 1\n", "line 3: solver.lrr: unknown key; did you mean solver.lr?"),
        ("lr: 1\n", "line 2: lr: unknown key; did you mean solver.lr?"),
        ("solver:\n  batch_size: 1\n", "did you mean data.batch_size?"),
        ("solver:\n  lr: 1\n  lr: 2\n", "line 4: solver.lr is given twice"),
        ("solver:\n  epochs: 1.5\n", "solver.epochs: must be a whole number, not 1.5"),
        ("solver:\n  epochs: true\n", "solver.epochs: must be a whole number"),
        ("solver:\n  lr: .nan\n", "solver.lr: must be a finite number"),
        ("solver:\n  betas: [0.9]\n", "solver.betas: must hold 2 values, not 1"),
        ("solver:\n  optim: adam\n", "solver.optim: must be one of adamw, sgd, not 'adam'; did you mean adamw?"),
        ("solver:\n  epochs: 3\n", "solver.lr_warmup_step: 4 epochs of warm-up do not fit"),
        ("solver:\n  evaluate: true\n", "solver.evaluate: needs pretrain or resume"),
        ("solver:\n  mixup: true\ndata:\n", "data is given twice"),
        ("solver: 3\n", "solver: must be a section of keys, not 3"),
        ("network:\n  DA_ratio: 1/0\n", "network.DA_ratio: '1/0' is neither a number nor a fraction"),
        ("network:\n  sample_mode: cnn\n", "network.sample_mode: must be one of FC, CNN"),
        ("network:\n  arch: custom\n", "network.vision: goes with network.arch: custom"),
        ("network:\n  weights: x.pt\n  init: false\n", "network.weights: is given, but network.init is false"),
        ("resume: a.pt\npretrain: b.pt\n", "pretrain: and resume are both given"),
        ("solver:\n  lr: [1\n", "not valid YAML"),
    ],
)  # fmt: skip
def test_errors_name_the_key(write, addition, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(SMALL + addition))
    text = str(caught.value)
    assert message in text and "config.yaml" in text and "\n" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.dataset=mine", "set data.style to kinetics or something"),
        ("data.num_segments=1", "data.num_segments: must be at least 2"),
        ("data.image_tmpl=frame.jpg", "no place for the frame number"),
        ("data.scale_size=100", "data.scale_size: 100 is smaller than data.input_size 224"),
        ("data.flip_pairs=[[1,9]]", "data.flip_pairs: names a label outside 0..4"),
        ("network.metod=x", "did you mean network.model?"),
        ("solver.lr", "--set solver.lr: write it as section.key=value"),
        ("seed.x=1", "seed: must be a whole number"),
    ],
)  # fmt: skip
def test_bad_overrides(write, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(SMALL), [override])
    assert message in str(caught.value)


def test_missing_and_empty_files(tmp_path, write):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="must hold sections of keys"):
        load_config(write(""))
    with pytest.raises(ConfigError, match="data: is required"):
        load_config(write("seed: 1\n"))


def test_ratio():
    assert parse_ratio("1/6") == 1 / 6 and parse_ratio(0.25) == 0.25 and parse_ratio(" 1 / 12 ") == 1 / 12
    for bad in ("x", "0", -1, "1/0", "", None):
        with pytest.raises(ValueError):
            parse_ratio(bad)


def test_a_resumed_run_is_the_same_run(write):
    former = load_config(write(SMALL)).to_dict()
    check_same_run(
        former, load_config(write(SMALL), ["data.workers=0", "logging.print_freq=3", "data.val_root=x"]), "a.pt"
    )
    with pytest.raises(ConfigError, match=r"a\.pt: solver\.lr was 0\.001 in this run and is now 0\.007; .* pretrain"):
        check_same_run(former, load_config(write(SMALL), ["solver.lr=7e-3"]), "a.pt")
    with pytest.warns(UserWarning, match="solver.epochs was 30 and is now 40"):
        check_same_run(former, load_config(write(SMALL), ["solver.epochs=40"]), "a.pt")


def test_config_is_frozen():
    config = config_from_dict({"data": {"dataset": "hmdb51", "num_classes": 5}})
    assert isinstance(config, Config)
    with pytest.raises(AttributeError):
        config.seed = 3


SGD = ["solver.optim=sgd"]
STEP = ["solver.type=step", "solver.milestones=[10, 20.5]"]


@pytest.mark.parametrize(
    "overrides",
    [
        [*STEP, "solver.gamma=0.5", "solver.lr_warmup_start=1e-5"],
        ["solver.lr_final=1e-6", "solver.cosine_after_warmup=false"],
        [*SGD, "solver.nesterov=true"],
        ["data.rand_aug=true", "data.rand_aug_policy=rand-m9-n3-mstd0.5-inc1"],
        ["data.crop=multi_scale", "data.crop_scales=[1, 0.8]"],
        ["data.crop=random_short_side", "data.short_side=[224, 224]"],
        ["data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]", "data.seg_length=5"],
    ],
)
def test_recipes_of_other_models(write, overrides):
    config = load_config(write(SMALL), overrides)
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["solver.type=step"], "solver.milestones: is needed by solver.type: step"),
        (["solver.milestones=[3]"], "solver.milestones: is for solver.type: step, but solver.type is cosine"),
        (["solver.gamma=0.5"], "solver.gamma: is for solver.type: step"),
        ([*STEP, "solver.lr_final=1e-6"], "solver.lr_final: is for solver.type: cosine"),
        ([*STEP, "solver.cosine_after_warmup=false"], "solver.cosine_after_warmup: is for solver.type: cosine"),
        ([*STEP, "solver.milestones=[20, 10]"], "solver.milestones: must ascend above 0 and below solver.epochs 30"),
        ([*STEP, "solver.milestones=[10, 30]"], "solver.milestones: must ascend above 0 and below solver.epochs 30"),
        ([*STEP, "solver.milestones=[0, 10]"], "solver.milestones: must ascend above 0"),
        ([*STEP, "solver.gamma=1.5"], "solver.gamma: must lie above 0 and up to 1, not 1.5"),
        (["solver.lr_final=0.1"], "solver.lr_final: 0.1 is above solver.lr 0.001"),
        (["solver.lr_warmup_start=0.1"], "solver.lr_warmup_start: 0.1 is above solver.lr 0.001"),
        (["solver.lr_warmup_start=-1"], "solver.lr_warmup_start: must not be negative"),
        (["solver.nesterov=true"], "solver.nesterov: needs solver.optim: sgd and solver.momentum above 0"),
        ([*SGD, "solver.nesterov=true", "solver.momentum=0"], "solver.nesterov: needs solver.optim: sgd"),
        (["data.rand_aug_policy=rand-m9-n2"], "data.rand_aug_policy: is given, but data.rand_aug is false"),
        (["data.rand_aug=true", "data.rand_aug_policy=m9"], "data.rand_aug_policy: 'm9' is not a RandAugment policy"),
        (["data.crop=multiscale"], "data.crop: must be one of .*; did you mean multi_scale?"),
        (["data.crop=multi_scale", "data.crop_scale=[0.5, 1]"], "data.crop_scale: is for data.crop: random_resized"),
        (["data.crop_scales=[1]"], "data.crop_scales: is for data.crop: multi_scale, but data.crop is random_resized"),
        (["data.short_side=[224, 300]"], "data.short_side: is for data.crop: random_short_side"),
        (["data.crop=multi_scale", "data.crop_scales=[0.8, 1]"], "data.crop_scales: must descend from at most 1"),
        (["data.crop=multi_scale", "data.crop_scales=[]"], "data.crop_scales: must descend from at most 1"),
        (["data.crop=random_short_side", "data.short_side=[300, 256]"], "data.short_side: must be .low, high."),
        (["data.crop=random_short_side", "data.short_side=[200, 256]"], "data.short_side: 200 is smaller than data.in"),
        (["data.crop=multi_scale", "data.augment=false", "data.flip=false"], "data.crop: has no effect with"),
        (["data.seg_length=0"], "data.seg_length: must be above 0, not 0"),
        (["data.std=[0, 1, 1]"], "data.std: must hold three positive numbers"),
    ],
)
def test_what_other_recipes_refuse(write, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(SMALL), overrides)


def test_values_that_the_model_fills_in_make_no_other_run(write):
    config = load_config(write(SMALL))
    filled = dataclasses.replace(config, data=config.data.with_pixel_statistics((0.5, 0.5, 0.5)))
    assert (filled.data.mean, filled.data.std) == ((0.5, 0.5, 0.5), CLIP_STD)
    assert filled.data.with_pixel_statistics() == filled.data
    check_same_run(filled.to_dict(), config, "a.pt")
    check_same_run(config.to_dict(), filled, "a.pt")
    assert difference(filled.to_dict(), config, more_epochs=False, same_start=True) is None
    other = load_config(write(SMALL), ["data.mean=[0.4, 0.4, 0.4]"])
    with pytest.raises(ConfigError, match=r"data\.mean was \[0\.5, 0\.5, 0\.5\] in this run and is now \[0\.4"):
        check_same_run(filled.to_dict(), other, "a.pt")
    assert "data.mean was" in difference(filled.to_dict(), other, more_epochs=False, same_start=True)
