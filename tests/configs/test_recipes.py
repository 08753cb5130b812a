"""The shipped configurations: each loads, and what it resolves to is the recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.parse import flatten
from configs.schema import load_config
from models.registry import MODELS

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "studies")
NAMES = [path.relative_to(CONFIGS).with_suffix("").as_posix() for path in FILES]

PAPER = {
    "seed": 1024, "data.modality": "RGB", "data.num_segments": 8, "data.batch_size": 16, "data.num_sample": 1,
    "data.image_tmpl": "{:06d}.jpg", "data.input_size": 224, "data.rand_aug": False, "data.rand_erase": False,
    "data.augment": True, "data.flip": None, "data.gray_prob": None, "data.dense": False, "data.mean": None,
    "data.crop": "random_resized", "data.crop_scale": [0.08, 1.0], "data.random_shift": True,
    "network.arch": "ViT-B/16", "network.init": True, "network.drop_fc": 0.0, "network.head": "linear",
    "network.DA_ratio": 1 / 6, "network.sample_mode": "CNN", "network.cache_features": "off",
    "network.pyramid.n_embs": [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2, "network.pyramid.mlp_ratio": 1.0,
    "solver.type": "cosine", "solver.epochs": 30, "solver.optim": "adamw", "solver.lr": 1e-3,
    "solver.lr_base_batch": None, "solver.lr_warmup_step": 4.0, "solver.weight_decay": 0.15, "solver.betas": [0.9, 0.999],
    "solver.decay_norms": True, "solver.clip_ratio": 1.0, "solver.layer_decay": 1.0, "solver.smoothing": 0.1,
    "solver.mixup": False, "solver.precision": "amp", "solver.lr_warmup_start": 0.0, "solver.lr_final": 0.0,
    "logging.eval_freq": 1, "logging.skip_epoch": [1, 3, 4, 5, 7, 9], "logging.output_dir": "exp",
    "checkpoint.every_minutes": 10.0, "checkpoint.keep": 2,
}  # fmt: skip
DATASETS = {
    "k400": {"data.dataset": "k400", "data.num_classes": 400, "logging.print_freq": 20},  # these two by analogy
    "ssv1": {
        "data.dataset": "somethingv1", "data.num_classes": 174, "logging.print_freq": 20, "data.num_sample": 2,
        "data.rand_aug": True, "data.flip_pairs": [[86, 87], [93, 94], [166, 167]],
    },
    "hmdb51": {"data.dataset": "hmdb51", "data.num_classes": 51, "logging.print_freq": 10},
    "ucf101": {"data.dataset": "ucf101", "data.num_classes": 101, "logging.print_freq": 10},
    "ssv2": {
        "data.dataset": "somethingv2", "data.num_classes": 174, "logging.print_freq": 20, "data.num_sample": 2,
        "data.rand_aug": True,
    },
}  # fmt: skip
MODEL = {
    "td4v_side": {"network.options": {}},
    "td4v_finetune": {
        "network.options.placement": "before_attention", "network.options.mode": "FC", "network.options.ratio": "1/12",
        "network.options.feature": "class_token",
    },
    "linear_probe": {
        "data.augment": False, "network.cache_features": "all", "network.options.feature": "class_token",
        "solver.weight_decay": 0.0, "logging.skip_epoch": [],
    },
    "attentive_probe": {"data.augment": True, "network.cache_features": "off", "solver.weight_decay": 0.15},
    "full_finetune": {
        "solver.lr": 1e-4, "solver.clip_ratio": 0.1, "solver.layer_decay": 0.75, "solver.decay_norms": False,
        "network.options.feature": "class_token", "logging.skip_epoch": [],
    },
    "zero_shot": {
        "network.head": "text", "network.text.tuned": "none", "logging.skip_epoch": [], "logging.print_freq": 20,
        "network.text.templates": ["a video of a person {}.", "a person doing {}.", "a video of {}."],
    },
}  # fmt: skip
GYM = {
    "seed": 0, "data.dataset": "gym10", "data.style": "kinetics", "data.num_segments": 8, "data.batch_size": 8,
    "data.num_classes": 10, "data.input_size": 96, "data.scale_size": 112, "data.crop_scale": [0.4, 1.0],
    "network.init": False, "network.vision.width": 192, "network.vision.layers": 6, "network.vision.patch_size": 16,
    "network.pyramid.n_embs": [64, 64, 96, 96, 192, 192], "solver.epochs": 16, "solver.lr": 1e-3,
    "solver.lr_warmup_step": 2.0, "solver.weight_decay": 0.15, "solver.smoothing": 0.1, "logging.print_freq": 10,
}  # fmt: skip
OWN = {
    "gym10": {**GYM, "data.modality": "video", "data.workers": 1, "logging.eval_freq": 4,
              "data.train_root": "gym10/UCF-101", "data.val_list": "gym10/videos/val.txt"},
    "compare_gym10": {**GYM, "data.modality": "RGB", "data.workers": 0, "logging.eval_freq": 16,
                      "data.train_root": "gym10/frames/frames", "data.val_list": "gym10/frames/val.txt"},
    "quickstart": {
        "seed": 0, "data.num_segments": 8, "data.batch_size": 16, "data.input_size": 64, "data.random_shift": False,
        "data.crop_scale": [0.6, 1.0], "data.flip": False, "data.gray_prob": 0.2, "network.vision.width": 96,
        "network.vision.layers": 4, "network.pyramid.n_embs": [32, 32, 64, 64], "solver.epochs": 8, "solver.lr": 1e-3,
        "solver.lr_warmup_step": 1.0, "solver.weight_decay": 0.05, "logging.print_freq": 8,
    },
}  # fmt: skip
ELSEWHERE = ("aim", "tdn", "tada2d", "tadaformer", "tadaconvnextv2")  # test_aim_published.py, test_family_recipes.py


def model_of(name: str) -> str:
    """The model of a file: MODEL.yaml, or MODEL_VARIANT.yaml."""
    file = Path(name).name if "/" in name else "td4v_side"
    known = [model for model in MODELS if file == model or file.startswith(f"{model}_")]
    return "linear_probe" if file == "zero_shot" else max(known, key=len)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_survives_a_round_trip(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert load_config(config.to_dict()) == config
    assert config.network.model_name == model_of(name)


@pytest.mark.parametrize("name", [name for name in NAMES if model_of(name) not in ELSEWHERE])
def test_it_is_the_recipe(name):
    dataset, _, model = name.partition("/")
    config = load_config(CONFIGS / f"{name}.yaml").to_dict()
    values = flatten(config) | {"network.options": config["network"]["options"]}
    wanted = OWN.get(name) or PAPER | DATASETS[dataset] | MODEL[model or "td4v_side"]
    assert {key: values[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", [name for name in NAMES if "/" in name])
def test_the_recipes_of_a_dataset_inherit_its_paths(name):
    """A variant builds on a recipe, and a recipe on its dataset's file."""
    dataset, _, file = name.partition("/")
    if not (CONFIGS / f"{dataset}.yaml").exists():
        return
    (base,) = re.findall(r"^base: (.*)\.yaml$", (CONFIGS / f"{name}.yaml").read_text(), re.MULTILINE)
    assert base == f"../{dataset}" or (f"{dataset}/{base}" in NAMES and file.startswith(f"{base}_"))
