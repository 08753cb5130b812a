"""The recipes of TDN, TAda2D, TAdaFormer and TAdaConvNeXtV2: what they resolve to is what their authors state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.parse import flatten
from configs.schema import load_config
from datasets.registry import dataset_traits
from engine.optim import scaled_lr

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = ("tdn", "tada2d", "tadaformer", "tadaconvnextv2")
FILES = {
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for model in MODELS
    for path in CONFIGS.glob(f"*/{model}*.yaml")
}

# Nobody of them has these; the files that the recipes build on are written for other models.
ALIKE = {
    "data.num_sample": 1, "data.rand_erase": False, "data.random_shift": True, "data.augment": True,
    "data.dense": False, "data.input_size": 224, "data.mean": None, "data.std": None, "data.test_scale": None,
    "data.flip": None, "network.init": True, "network.weights": None, "network.head": "linear",
    "network.sync_bn": False, "network.drop_fc": 0.5, "solver.clip_ratio": 1.0, "solver.grad_accumulation_steps": 1,
    "solver.mixup": False, "solver.ema_decay": None, "solver.precision": "fp32", "logging.skip_epoch": [],
    "pretrain": None,
}  # fmt: skip
TDN = {
    "data.style": "tdn", "data.eval_crop": "tdn", "data.crop": "multi_scale",
    "data.crop_scales": [1.0, 0.875, 0.75, 0.66], "data.rand_aug": False, "data.scale_size": None,
    "solver.type": "step", "solver.gamma": 0.1, "solver.optim": "sgd", "solver.momentum": 0.9, "solver.nesterov": False,
    "solver.lr_warmup_step": 0.0, "solver.decay_norms": True, "solver.clip_grad": 20.0, "solver.smoothing": 0.0,
    "solver.layer_decay": 1.0,
}  # fmt: skip
TADA2D = {
    "data.eval_crop": "tada", "data.crop": "random_short_side", "data.short_side": [224, 339], "data.rand_aug": False,
    "data.scale_size": None, "data.test_size": 256, "solver.type": "cosine", "solver.cosine_after_warmup": False,
    "solver.optim": "sgd", "solver.momentum": 0.9, "solver.nesterov": True, "solver.lr_final": 0.0,
    "solver.weight_decay": 1e-4, "solver.decay_norms": False, "solver.clip_grad": None, "solver.smoothing": 0.0,
    "solver.layer_decay": 1.0,
}  # fmt: skip
RANDOM = {
    "data.eval_crop": "tada", "data.crop": "random_resized", "data.crop_scale": [0.08, 1.0], "data.rand_aug": True,
    "data.rand_aug_policy": "rand-m9-n4-mstd0.5-inc1", "solver.type": "cosine", "solver.optim": "adamw",
    "solver.betas": [0.9, 0.999], "solver.clip_grad": None,
}  # fmt: skip
TADAFORMER = RANDOM | {
    "data.style": "tada_segment", "data.scale_size": 224, "data.test_size": None, "solver.cosine_after_warmup": True,
    "solver.lr_final": 1e-6, "solver.weight_decay": 0.05, "solver.decay_norms": False, "solver.smoothing": 0.1,
}  # fmt: skip
CONVNEXT = RANDOM | {
    "data.scale_size": None, "data.test_size": 256, "solver.cosine_after_warmup": False, "solver.lr_final": 0.0,
    "solver.lr_warmup_start": 1e-6, "solver.weight_decay": 0.02, "solver.decay_norms": True, "solver.smoothing": 0.0,
    "solver.layer_decay": 1.0,
}  # fmt: skip


def tdn(epochs: int, milestones: list[float], decay: float, test_size: int | None) -> dict[str, Any]:
    return TDN | {"solver.epochs": epochs, "solver.milestones": milestones, "solver.weight_decay": decay,
                  "data.test_size": test_size}  # fmt: skip


def warm(model: dict[str, Any], epochs: int, warmup: float, start: float, style: str) -> dict[str, Any]:
    return model | {"solver.epochs": epochs, "solver.lr_warmup_step": float(warmup), "solver.lr_warmup_start": start,
                    "data.style": style}  # fmt: skip


def former(epochs: int, warmup: float, start: float, two: bool) -> dict[str, Any]:
    options = {"network.options.temporal_projection": two, "network.options.two_convolutions": two}
    return warm(TADAFORMER, epochs, warmup, start, "tada_segment") | options


KINETICS = {
    "tdn": tdn(100, [50.0, 75.0, 90.0], 1e-4, 256),
    "tada2d": warm(TADA2D, 100, 8, 0.01, "tada_interval"),
    "tadaformer": former(30, 5, 1e-6, False),
    "tadaconvnextv2": warm(CONVNEXT, 100, 8, 1e-6, "tada_interval"),
}
SOMETHING = {
    "tdn": tdn(60, [30.0, 45.0, 55.0], 5e-4, None),
    "tada2d": warm(TADA2D, 64, 4, 1e-4, "tada_segment"),
    "tadaformer": former(24, 4, 1e-8, True),
    "tadaconvnextv2": warm(CONVNEXT, 64, 2.5, 1e-6, "tada_segment"),
}
SMALL = KINETICS | {model: KINETICS[model] | {"data.style": "tada_segment"} for model in ("tada2d", "tadaconvnextv2")}
DATASETS = {
    "ssv1": (SOMETHING, {"data.dataset": "somethingv1", "data.num_classes": 174}),
    "ssv2": (SOMETHING, {"data.dataset": "somethingv2", "data.num_classes": 174}),
    "k400": (KINETICS, {"data.dataset": "k400", "data.num_classes": 400}),
    "hmdb51": (SMALL, {"data.dataset": "hmdb51", "data.num_classes": 51}),
    "ucf101": (SMALL, {"data.dataset": "ucf101", "data.num_classes": 101}),
}

# File: frames, clips a step, the learning rate for them, and what else it names.
Row = tuple[int, int, float, dict[str, Any]]


def depth(value: int) -> dict[str, Any]:
    return {"network.options.depth": value}


def clip(arch: str, layer_decay: float, drop_path: float, **solver: int) -> dict[str, Any]:
    return {"network.arch": arch, "solver.layer_decay": layer_decay, "network.options.drop_path": drop_path,
            **{f"solver.{key}": value for key, value in solver.items()}}  # fmt: skip


def size(name: str, drop_path: float, **data: int) -> dict[str, Any]:
    return {"network.options.size": name, "network.options.drop_path": drop_path,
            **{f"data.{key}": value for key, value in data.items()}}  # fmt: skip


FORMER_B, FORMER_L = clip("ViT-B/16", 0.7, 0), clip("ViT-L/14", 0.85, 0.2)
KINETICS_L = clip("ViT-L/14", 0.85, 0, epochs=24)
ROWS: dict[str, Row] = {
    "ssv1/tdn": (8, 64, 0.01, depth(50)),
    "ssv1/tdn_16f": (16, 32, 0.005, depth(50)),
    "ssv2/tdn": (8, 64, 0.01, depth(50)),
    "ssv2/tdn_16f": (16, 32, 0.005, depth(50)),
    "ssv2/tdn_r101": (8, 64, 0.01, depth(101)),
    "ssv2/tdn_r101_16f": (16, 32, 0.005, depth(101)),
    "k400/tdn": (8, 128, 0.02, depth(50)),
    "k400/tdn_16f": (16, 64, 0.01, depth(50)),
    "k400/tdn_r101": (8, 128, 0.02, depth(101)),
    "k400/tdn_r101_16f": (16, 64, 0.01, depth(101)),
    "k400/tada2d": (8, 128, 0.24, {"data.interval": 8}),
    "k400/tada2d_16f": (16, 64, 0.12, {"data.interval": 5}),
    "k400/tadaformer": (16, 256, 5e-5, FORMER_B),
    "k400/tadaformer_l14": (16, 64, 2e-5, KINETICS_L),
    "k400/tadaformer_l14_32f": (32, 32, 1e-5, KINETICS_L),
    "k400/tadaformer_l14_64f": (64, 16, 5e-6, KINETICS_L),
    "k400/tadaconvnextv2": (16, 512, 5e-4, size("tiny", 0.2, interval=5)),
    "k400/tadaconvnextv2_32f": (32, 256, 2.5e-4, size("tiny", 0.2, interval=3)),
    "k400/tadaconvnextv2_small": (16, 256, 2.5e-4, size("small", 0.4, interval=5)),
    "k400/tadaconvnextv2_small_32f": (32, 128, 1.25e-4, size("small", 0.4, interval=3)),
    "k400/tadaconvnextv2_base": (16, 256, 2.5e-4, size("base", 0.6, interval=5)),
    "k400/tadaconvnextv2_base_32f": (32, 128, 1.25e-4, size("base", 0.6, interval=3)),
}
for name in ("ssv1", "ssv2"):
    ROWS |= {
        f"{name}/tada2d": (8, 128, 0.48, {}),
        f"{name}/tada2d_16f": (16, 64, 0.24, {}),
        f"{name}/tadaformer": (16, 256, 5e-4, FORMER_B),
        f"{name}/tadaformer_32f": (32, 128, 2.5e-4, FORMER_B),
        f"{name}/tadaformer_l14": (16, 128, 2.5e-4, FORMER_L),
        f"{name}/tadaformer_l14_32f": (32, 64, 1.25e-4, FORMER_L),
        f"{name}/tadaconvnextv2": (16, 512, 5e-4, size("tiny", 0.3)),
        f"{name}/tadaconvnextv2_32f": (32, 256, 2.5e-4, size("tiny", 0.3)),
        f"{name}/tadaconvnextv2_small": (16, 256, 2.5e-4, size("small", 0.5)),
        f"{name}/tadaconvnextv2_small_32f": (32, 128, 1.25e-4, size("small", 0.5)),
        f"{name}/tadaconvnextv2_base": (16, 256, 2.5e-4, size("base", 0.6)),
        f"{name}/tadaconvnextv2_base_32f": (32, 128, 1.25e-4, size("base", 0.6)),
    }
for name in ("hmdb51", "ucf101"):
    ROWS |= {
        f"{name}/tdn": (8, 128, 0.02, depth(50)),
        f"{name}/tada2d": (8, 128, 0.24, {}),
        f"{name}/tadaformer": (16, 256, 5e-5, FORMER_B),
        f"{name}/tadaconvnextv2": (16, 512, 5e-4, size("tiny", 0.2)),
    }


def test_every_file_has_a_row() -> None:
    assert FILES == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_it_is_the_recipe(name: str) -> None:
    frames, clips, lr, own = ROWS[name]
    dataset, _, file = name.partition("/")
    model = file.partition("_")[0]
    recipes, of_dataset = DATASETS[dataset]
    config = load_config(CONFIGS / f"{name}.yaml")
    wanted = {**ALIKE, **recipes[model], **of_dataset, **own, "data.num_segments": frames, "network.model": model}
    found = flatten(config.to_dict())
    assert {key: found[key] for key in wanted} == wanted
    gpus = 32 if model == "tadaconvnextv2" else 8
    assert gpus * config.data.batch_size == clips
    assert scaled_lr(config.solver.lr, config.solver.lr_base_batch, clips) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in ROWS if "_" not in name])
def test_clips_are_mirrored_coloured_and_cut_as_published(name: str) -> None:
    dataset, _, model = name.partition("/")
    data = load_config(CONFIGS / f"{name}.yaml").data
    traits, tested = dataset_traits(data), data.for_testing()
    pairs = ((86, 87), (93, 94), (166, 167)) if dataset.startswith("ssv") else ()
    gray = 0.2 if model in ("tadaformer", "tadaconvnextv2") else 0.0
    assert (traits.flip, traits.flip_pairs, traits.gray_prob) == (True, pairs, gray)
    sides = {"tdn": (224 if dataset.startswith("ssv") else 256, 256), "tadaformer": (224, 224)}
    assert (tested.input_size, tested.short_side_size) == sides.get(model, (256, 256))
    assert traits.scale_size == (224 if model == "tadaformer" else 256)  # not the 256 x 320 of other recipes


@pytest.mark.parametrize("name", ["ssv1/tdn", "ssv2/tada2d", "ssv2/tadaformer", "ssv2/tadaconvnextv2"])
def test_labels_that_stay_when_a_clip_is_mirrored(name: str) -> None:
    """What the authors' code does to some classes, by the option that the files name."""
    config = load_config(CONFIGS / f"{name}.yaml", ["data.flip=True", "data.flip_pairs=[]"])
    traits = dataset_traits(config.data)
    assert traits.flip and traits.flip_pairs == ()
