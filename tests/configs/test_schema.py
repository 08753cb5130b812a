"""Configuration: the published files load, everything mistyped stops with the dotted key and the nearest valid one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from dotmap import DotMap

from configs.parse import PathText, all_fields, all_keys, flatten, inner_kind
from configs.schema import (
    Config,
    ConfigError,
    DataConfig,
    LoggingConfig,
    NetworkConfig,
    load_config,
    parse_ratio,
    require_data_paths,
)
from configs.synonyms import SYNONYMS
from scripts.config_schema import field_comments

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


@pytest.mark.parametrize("stem", ["hmdb51", "ssv2"])
def test_shipped_files_are_the_published_recipe(write, stem):
    with pytest.warns(UserWarning, match="no effect"):
        published = load_config(write({"hmdb51": HMDB51, "ssv2": SSV2}[stem]), ["logging.print_freq=10"])
    given = ["logging.print_freq=10", "data.seg_length=1", "network.model=null"]
    shipped = load_config(ROOT / f"configs/{stem}.yaml", given)
    assert shipped == published
    assert load_config(ROOT / f"configs/{stem}.yaml").network.model_name == published.network.model_name


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
    with pytest.raises(ConfigError, match="network.fine_tuning: true means td4v_finetune, but network.model is td4v_s"):
        load_config(write(SMALL), ["network.model=td4v_side", "network.fine_tuning=true"])


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
        ("solver:\n  lr: [1\n", "line 4: not valid YAML (expected ',' or ']', but got '<stream end>', begun in line 3)"),
        ("seed: 3000000000\n", "line 2: seed: must be below 2,147,483,648"),
        ("network:\n  drop_fc: 1\n", "network.drop_fc: must lie in [0, 1), not 1"),
        ("logging:\n  skip_epoch: [-1]\n", "logging.skip_epoch: counts epochs from 0"),
        ("solver:\n  lr: -1\n", "solver.lr: must be above 0, not -1"),
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
        ("data.test_scale=100", "data.test_scale: 100 is smaller than data.input_size 224"),
        ("data.test_size=0", "data.test_size: must be above 0, not 0"),
        ("data.interval=5", "data.interval: is for data.style: tada_interval, but data.style is None"),
        ("data.fps=25", "data.fps: is for data.style: tada_interval"),
        ("data.style=tada_interval", "data.fps: is needed with data.style: tada_interval, as frame folders do not"),
        ("data.flip_pairs=[[1,9]]", "data.flip_pairs: names a label outside 0..4"),
        ("network.metod=x", "did you mean network.model?"),
        ("solver.lr", "--set solver.lr: write it as section.key=value"),
        ("seed.x=1", "seed: must be a whole number"),
        ("data.mean=123,117,104", "data.mean: must hold three numbers from 0 to 1, for pixels in 0..1"),
        ("data.std=0,1,1", "data.std: must hold three positive numbers up to 1"),
        ("solver.lr=", "solver.lr: has no value: write one, or leave the override out"),
        ("network.options.feature= ", "network.options.feature: has no value"),
        ("network=", "network: has no value"),
        ("data.num_classes=051", "--set 'data.num_classes=051': YAML reads 051 as the octal number 41; write 51"),
        ("resume=!!python/object:os.x {}", "the tag !!python/object:os.x is not read"),
        ("data.dataset=no", "data.dataset: must be a text, not False; put it in quotes (YAML reads yes, no, on and off"),
        ("logging.skip_epoch=010,2", "logging.skip_epoch: YAML reads 010 as the octal number 8"),
    ],
)  # fmt: skip
def test_bad_overrides(write, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(SMALL), [override])
    assert message in str(caught.value)


def test_sampling_of_the_families(write):
    with pytest.raises(ConfigError, match="data.dense: true is another sampling than data.style: tdn; set one of"):
        load_config(write(SMALL), ["data.style=tdn", "data.dense=true"])
    with pytest.raises(ConfigError, match="data.fps: is for frame folders, but data.modality is video"):
        load_config(write(SMALL), ["data.style=tada_interval", "data.fps=25", "data.modality=video"])
    for modality in ("data.fps=25", "data.modality=video"):
        data = load_config(write(SMALL), ["data.style=tada_interval", "data.interval=5", modality]).data
        assert (data.sampling_style, data.interval) == ("tada_interval", 5)


def test_sizes_of_testing(write):
    def sizes(*overrides):
        data = load_config(write(SMALL), overrides).data.for_testing()
        return data.input_size, data.scale_size, data.test_size, data.test_scale

    assert sizes() == (224, 256, None, None) and sizes("data.scale_size=300") == (224, 300, None, None)
    assert sizes("data.test_size=256") == (256, 256, None, None)
    assert sizes("data.test_size=288") == (288, 288, None, None)
    assert sizes("data.test_size=256", "data.test_scale=320") == (256, 320, None, None)
    assert sizes("data.test_scale=224") == (224, 224, None, None)
    with pytest.raises(ConfigError, match="data.test_scale: 250 is smaller than data.test_size 256"):
        sizes("data.test_size=256", "data.test_scale=250")


def test_a_number_sign_in_an_override_is_no_comment(write):
    assert load_config(write(SMALL), ["data.train_root=/videos #1/x"]).data.train_root == "/videos #1/x"


def test_empty_overrides_mean_none_where_there_may_be_none(write):
    config = load_config(write(SMALL + "logging: {skip_epoch: [1]}\n"), ["data.train_list=", "logging.skip_epoch="])
    assert config.data.train_list is None and config.logging.skip_epoch == ()


def test_a_config_is_a_source_and_other_objects_are_refused(write):
    config = load_config(write(SMALL))
    assert load_config(config, ["seed=3"]) == dataclasses.replace(config, seed=3)
    for source in (5, None, [], b"x"):
        with pytest.raises(ConfigError, match="is read from a path, a mapping or a Config, not from"):
            load_config(source)


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


def test_config_is_frozen():
    config = load_config({"data": {"dataset": "hmdb51", "num_classes": 5}})
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
    assert load_config(config.to_dict()) == config


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


def test_a_mapping_or_a_dotmap_is_a_source(write):
    config = load_config(write(SMALL), ["solver.lr=5e-4"])
    values = config.to_dict()
    assert load_config(values) == load_config(DotMap(values)) == config
    assert load_config(values, ["seed=3"]).seed == 3 and values["seed"] == 1024
    with pytest.raises(ConfigError, match=r"^solver.lrr: unknown key; did you mean solver.lr\?"):
        load_config({"data": values["data"], "solver": DotMap(lrr=1)})
    with pytest.raises(ConfigError, match="^base: only a file can build on another"):
        load_config({"base": "other.yaml", **values})


def test_a_dotmap_of_it_is_frozen_against_typos(write):
    config = load_config(write(SMALL), ["network.options={feature: mean_tokens}"])
    dotted = config.to_dotmap()
    assert dotted.data.num_segments == 8 and dotted.network.options.feature == "mean_tokens"
    assert dotted.toDict() == config.to_dict() and load_config(dotted) == config
    for section in (dotted, dotted.data, dotted.network.text):
        with pytest.raises(AttributeError):
            _ = section.num_segmets


@pytest.mark.parametrize(
    ("override", "read", "wanted"),
    [
        ("logging.skip_epoch=1,3,4", lambda config: config.logging.skip_epoch, (1, 3, 4)),
        ("logging.skip_epoch=5", lambda config: config.logging.skip_epoch, (5,)),
        ("logging.skip_epoch=", lambda config: config.logging.skip_epoch, ()),
        ("solver.betas=0.9, 0.95", lambda config: config.solver.betas, (0.9, 0.95)),
        ("data.mean=.5,.5,1e-1", lambda config: config.data.mean, (0.5, 0.5, 0.1)),
        ("network.text.templates={}, in a gym", lambda config: config.network.text.templates, ("{}, in a gym",)),
    ],
)
def test_lists_without_brackets(write, override, read, wanted):
    assert read(load_config(write(SMALL), ["network.head=text", override])) == wanted


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("solver.betas=0.9", "solver.betas: must hold 2 values, not 1"),
        ("logging.skip_epoch=1,x", r"logging.skip_epoch\[1\]: must be a whole number, not 'x'"),
        ("logging.skip_epoch={a: 1}", "logging.skip_epoch: must be a list of whole numbers, not"),
        ("solver.betas=[0.9, 0.95", r"solver.betas: '\[0.9, 0.95' is not a list; write it as 1,2 or \[1, 2\]"),
    ],
)
def test_lists_that_do_not_fit(write, override, message):
    with pytest.raises(ConfigError, match=f"config.yaml with --set {re.escape(override)}: {message}"):
        load_config(write(SMALL), [override])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("solver.learning_rate", "solver.lr"),
        ("solver.base_lr", "solver.lr"),
        ("data.learning_rate", "solver.lr"),
        ("solver.wd", "solver.weight_decay"),
        ("weight_decay", "solver.weight_decay"),
        ("data.batch", "data.batch_size"),
        ("solver.batchsize", "data.batch_size"),
        ("data.n_classes", "data.num_classes"),
        ("network.classes", "data.num_classes"),
        ("data.num_frames", "data.num_segments"),
        ("data.frames", "data.num_segments"),
        ("solver.lr_scheduler", "solver.type"),
        ("solver.scheduler", "solver.type"),
        ("solver.warmup", "solver.lr_warmup_step"),
        ("solver.warmup_epochs", "solver.lr_warmup_step"),
        ("solver.optimizer", "solver.optim"),
        ("optimizer", "solver.optim"),
        ("solver.min_lr", "solver.lr_final"),
        ("solver.label-smoothing", "solver.smoothing"),
        ("network.dropout", "network.drop_fc"),
        ("model_name", "network.model"),
        ("network.vision.head", "network.vision.heads"),
        ("data.epoch", "solver.epochs"),
        ("network.lr", "solver.lr"),
    ],
)
def test_hints_know_the_names_of_other_projects(write, given, meant):
    with pytest.raises(ConfigError, match=rf"{given}: unknown key; did you mean {meant}\?"):
        load_config(write(SMALL), [f"{given}=1"])


def test_no_hint_where_nothing_is_like_it(write):
    with pytest.raises(ConfigError, match=r"network\.x: unknown key$"):
        load_config(write(SMALL), ["network.x=1"])


def test_every_synonym_names_a_key_and_is_none():
    known = set(all_keys(Config))
    assert set(SYNONYMS.values()) <= known
    leaves = {key.rpartition(".")[2] for key in known if not key.startswith("network.vision.")}
    assert not leaves & (SYNONYMS.keys() - {"scale"})


def test_network_method_is_an_alias(write, tmp_path):
    path = write(SMALL + "network:\n  method: aim\n")
    assert load_config(path).network.model == "aim"
    assert load_config(path, ["network.method=linear_probe"]).network.model == "linear_probe"
    assert load_config(path, ["network.model=linear_probe"]).network.model == "linear_probe"
    child = tmp_path / "child.yaml"
    child.write_text("base: config.yaml\nnetwork: {model: td4v_side}\n")
    assert load_config(child).network.model == "td4v_side"
    with pytest.raises(ConfigError, match=r"config.yaml, line 3: network.model: must be a text, not 3"):
        load_config(write(SMALL + "network:\n  method: 3\n"))
    both = "network:\n  model: aim\n  method: aim\n"
    with pytest.raises(ConfigError, match=r"config.yaml, line 4: network.method: is another name of network.model"):
        load_config(write(SMALL + both))


class TestBase:
    """Files that build on others."""

    @pytest.fixture
    def files(self, tmp_path):
        """Write files by name; the last one is returned."""

        def files(**texts: str) -> Path:
            for name, text in texts.items():
                path = tmp_path / f"{name.replace('__', '/')}.yaml"
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
            return path

        return files

    def test_sections_merge_and_lists_replace(self, files):
        root = SMALL + "solver:\n  lr: 5e-4\n  epochs: 9\nlogging: {skip_epoch: [1, 2]}\nseed: 3\n"
        middle = "base: ../root.yaml\nsolver: {epochs: 7}\nnetwork: {options: {feature: class_token, a: 1}}\n"
        child = "base: middle.yaml\nnetwork:\n  options: {feature: mean_tokens}\nlogging:\n  skip_epoch: [4]\nseed:\n"
        config = load_config(files(root=root, sub__middle=middle, sub__child=child), ["solver.lr=1e-4"])
        assert (config.solver.lr, config.solver.epochs, config.logging.skip_epoch) == (1e-4, 7, (4,))
        assert config.network.options == {"feature": "mean_tokens", "a": 1}
        assert config.seed == 1024  # null means the default
        assert "base" not in config.to_dict()

    def test_null_means_what_it_means_in_one_file(self, files):
        root = SMALL + "checkpoint: {every_minutes: 5}\nnetwork: {drop_fc: 0.5, text: }\n"
        config = load_config(files(root=root, child="base: root.yaml\ncheckpoint: {every_minutes: }\nnetwork:\n"))
        assert config.checkpoint.every_minutes is None and config.network.drop_fc == 0

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (
                {"root": SMALL + "solver:\n  lrr: 1\n", "child": "base: root.yaml\n"},
                r"root\.yaml \(base of .*child\.yaml\), line 3: solver.lrr: unknown key; did you mean solver.lr\?",
            ),
            (
                {"root": SMALL, "child": "base: root.yaml\nsolver:\n  epochs: x\n"},
                r"^[^()]*child\.yaml, line 3: solver.epochs: must be a whole number",
            ),
            ({"child": "seed: 1\nbase: no.yaml\n"}, r"child\.yaml, line 2: base: there is no file .*no\.yaml"),
            ({"child": "base: [a.yaml]\n"}, r"child\.yaml, line 1: base: must be the path of another configuration"),
            ({"child": "base: child.yaml\n"}, r"line 1: base: the base files form a circle: .*child\.yaml -> .*child"),
            (
                {
                    "a": "base: b.yaml\n",
                    "b": "base: sub/c.yaml\n",
                    "sub__c": "base: ../a.yaml\n",
                    "child": "base: a.yaml",
                },
                r"c\.yaml \(base of .*b\.yaml\), line 1: base: .*child\.yaml -> .*a\.yaml -> .*b\.yaml -> .*c\.yaml -> .*a",
            ),
            (
                {"root": "solver: [1\n", "child": "base: root.yaml\n"},
                r"root\.yaml \(base of .*, line 2: not valid YAML",
            ),
            ({"root": "", "child": "base: root.yaml\n"}, r"root\.yaml \(base of .*\): must hold sections of keys"),
            ({"child": "base: root.yaml\nbase: x\n"}, "line 2: base is given twice"),
            (
                {"root": SMALL, "child": "base: root.yaml\ndata: {dataset: }\n"},
                r"child\.yaml, line 2: data.dataset: is required",
            ),
        ],
    )
    def test_errors_name_the_file_and_line(self, files, texts, message):
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(files(**texts))
        assert "\n" not in str(caught.value)

    def test_it_is_for_files(self, write):
        with pytest.raises(ConfigError, match="base: only a file can build on another|base: unknown key"):
            load_config(write(SMALL), ["base=other.yaml"])


def test_what_is_not_set_is_named_together(write):
    config = load_config(write(SMALL), ["data.val_list=v.txt"])
    with pytest.raises(ConfigError) as caught:
        require_data_paths(config, ("train", "val"), "a.yaml")
    message = "a.yaml: data.train_list, data.train_root, data.val_root are not set; write them into the file"
    assert str(caught.value).startswith(message)
    with pytest.raises(ConfigError, match=r"a\.yaml: data\.val_root is not set; write it into the file"):
        require_data_paths(config, ("test",), "a.yaml")
    with pytest.raises(ConfigError, match=r"a\.pt: data\.val_root is not set; set it by --set data.val_root=PATH"):
        require_data_paths(config, ("test",), "a.pt")  # a checkpoint's configuration, which nobody can write into
    require_data_paths(load_config(write(SMALL), ["data.val_list=v", "data.test_root=r"]), ("test",), "a.yaml")


def _path_keys() -> list[str]:
    return [key for key, kind in all_fields(Config) if inner_kind(kind) is PathText]


def test_every_key_that_names_a_file_or_folder_is_a_path():
    """A field of plain text must not be one by its comment or its name."""
    comments = {
        key: comment
        for prefix, cls in (("data", DataConfig), ("network", NetworkConfig), ("logging", LoggingConfig), ("", Config))
        for key, comment in ((f"{prefix}.{name}".strip("."), text) for name, text in field_comments(cls).items())
    }
    for key, kind in all_fields(Config):
        if inner_kind(kind) is str:
            assert not re.search(r"(root|list|dir|file|path|folder|resume|pretrain|weights)$", key), key
            assert not re.search(r"^(a )?(folder|file|csv|checkpoint|path)\b", comments.get(key, "")), key
    assert {"data.train_root", "data.label_list", "network.weights", "logging.output_dir", "resume"} < {*_path_keys()}


def test_paths_are_expanded_in_every_path_key(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    for key in _path_keys():
        for given, path in (("~/x", "/home/me/x"), ("$DATA/x", "/data/x"), ("'${DATA}/x y'", "/data/x y"), ("x", "x")):
            config = load_config(write(SMALL), [f"{key}={given}"])
            assert flatten(config.to_dict())[key] == path
            assert load_config(config.to_dict()) == config
        with pytest.raises(ConfigError, match=rf"{key}: \$NOWHERE/x: the variable \$NOWHERE is not set"):
            load_config(write(SMALL), [f"{key}=$NOWHERE/x"])
        with pytest.raises(ConfigError, match=f"{key}: the path is empty"):
            load_config(write(SMALL), [f"{key}=''"])
    text = write(SMALL + "logging: {output_dir: ~no_such_user/x}\n")
    with pytest.raises(
        ConfigError, match=r"config.yaml, line 2: logging.output_dir: .*there is no user 'no_such_user'"
    ):
        load_config(text)


def test_a_base_is_expanded(write, tmp_path, monkeypatch):
    monkeypatch.setenv("BASES", str(tmp_path))
    (tmp_path / "small.yaml").write_text(SMALL)
    assert load_config(write("base: $BASES/small.yaml\n")).data.num_classes == 5
    with pytest.raises(ConfigError, match=r"config.yaml, line 1: base: \$NOWHERE/x: the variable"):
        load_config(write("base: $NOWHERE/x\n"))
