"""Parameter groups, the learning-rate curve, losses, mixing and number formats."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from configs.schema import SolverConfig, load_config
from engine.optim import (
    ClipMixup,
    OptimError,
    build_criterion,
    build_optimizer,
    build_scheduler,
    check_groups,
    lr_factor,
    resolve_precision,
    scaled_lr,
    set_tf32,
)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(3, 4)
        self.frozen.requires_grad_(False)


def _group(name: str, *modules: nn.Module) -> dict:
    return {"name": name, "lr": 0.1, "params": [p for module in modules for p in module.parameters()]}


def test_groups_that_cover_each_trainable_parameter_once_pass() -> None:
    model = Two()
    check_groups(model, [_group("body", model.body), _group("head", model.head)])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda m: [_group("body", m.body)], "head.weight is trainable, but in no group"),
        (lambda m: [_group("a", m.body), _group("b", m.head, m.body)], "body.weight is in the groups a and b"),
        (lambda m: [_group("a", m.body, m.head, m.frozen)], "frozen.weight is frozen, but in group a"),
        (
            lambda m: [_group("a", m.body, m.head, nn.Linear(7, 1))],
            r"group a .* shape \(1, 7\) that is not the model's",
        ),
    ],
)
def test_wrong_groups_are_refused_by_name(groups, message: str) -> None:
    model = Two()
    with pytest.raises(OptimError, match=message):
        check_groups(model, groups(model))


def test_optimizers_take_their_settings() -> None:
    model = Two()
    groups = [_group("body", model.body), {**_group("head", model.head), "lr": 0.5}, _group("empty")]
    adamw = build_optimizer(groups, "adamw", weight_decay=0.15, betas=(0.8, 0.9), eps=1e-6)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(g["name"], g["lr"], g["weight_decay"], g["betas"], g["eps"]) for g in adamw.param_groups] == [
        ("body", 0.1, 0.15, (0.8, 0.9), 1e-6),
        ("head", 0.5, 0.15, (0.8, 0.9), 1e-6),
    ]
    sgd = build_optimizer(groups, "sgd", weight_decay=0.01, momentum=0.7)
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[1]["momentum"] == 0.7
    nesterov = build_optimizer(groups, "sgd", momentum=0.7, nesterov=True)
    assert nesterov.param_groups[0]["nesterov"] and not sgd.param_groups[0]["nesterov"]
    with pytest.raises(OptimError, match="nothing to train"):
        build_optimizer([_group("empty")])
    with pytest.raises(OptimError, match="not 'adam'"):
        build_optimizer(groups, "adam")


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_a_group_may_bring_its_own_weight_decay(optim: str) -> None:
    model = Two().double()
    groups = [_group("body", model.body), {**_group("head", model.head), "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, optim, weight_decay=0.15)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.15, 0.0]
    assert "weight_decay" not in groups[0], "what was given stays as it was"
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 1 - 0.1 * 0.15 if name.startswith("body") else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor, rtol=1e-14, atol=0, msg=name)


@pytest.mark.parametrize(("optim", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_nothing_but_the_settings_differs_from_torchs_own_optimizer(optim: str, kind: type) -> None:
    """The same weights as torch's fused kernels give, bit for bit, and as its plain ones, but for rounding."""
    results, own = [], {"lr": 0.1, "weight_decay": 0.15, **({"momentum": 0.9} if optim == "sgd" else {})}
    for build in (lambda p: build_optimizer([{"name": "all", "params": p, "lr": 0.1}], optim, 0.15),
                  lambda p: kind(p, fused=True, **own), lambda p: kind(p, foreach=False, fused=False, **own)):  # fmt: skip
        torch.manual_seed(0)
        model = Two()
        optimizer = build([p for p in model.parameters() if p.requires_grad])
        for _ in range(3):
            optimizer.zero_grad()
            model.head(model.body(torch.randn(5, 2))).square().mean().backward()
            optimizer.step()
        settings = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("name", "params")}
        results.append((settings, torch.nn.utils.parameters_to_vector(model.parameters()).detach()))
    (one, weights), (other, expected), (_, plain) = results
    assert one == other and one["fused"] is True
    assert torch.equal(weights, expected)
    torch.testing.assert_close(weights, plain)


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_a_step_that_the_device_skips_leaves_no_trace(optim: str) -> None:
    """The first of all steps and a later one, in weights and in the optimizer's state."""
    results = []
    for bad in ((), (0, 3)):
        torch.manual_seed(0)
        model = Two()
        optimizer = build_optimizer([{"name": "all", "params": list(model.head.parameters()), "lr": 0.1}], optim)
        for number in range(3 + len(bad)):
            optimizer.zero_grad()
            for place, parameter in enumerate(model.head.parameters()):
                parameter.grad = torch.full_like(parameter, math.nan if number in bad else 0.1 * (place + 1))
            optimizer.found_inf = torch.tensor(float(number in bad))
            optimizer.step()
        results.append([*model.head.parameters(), *(v for s in optimizer.state.values() for v in s.values())])
    one, other = results
    assert len(one) == len(other) > 2 and all(map(torch.equal, one, other))


def test_tf32_is_for_gpus(caplog) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with caplog.at_level(logging.INFO, "td4v"):
            set_tf32(True, torch.device("cpu"))
        assert "on a CPU" in caplog.text
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
        set_tf32(True, torch.device("cuda"))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        set_tf32(False, torch.device("cuda"))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_linear_scaling(caplog) -> None:
    with caplog.at_level(logging.INFO, "td4v"):
        assert scaled_lr(1e-3, None, 12) == 1e-3 and not caplog.text
        assert scaled_lr(1e-3, 64, 256) == pytest.approx(4e-3)
    assert "learning rate 0.004 for 256 clips a step: 0.001 for 64" in caplog.text
    for batch in range(1, 200):
        assert scaled_lr(1e-3, batch, batch) == 1e-3
    assert scaled_lr(1e-3, 64, 16) == pytest.approx(2.5e-4)


def _rates(solver: SolverConfig, steps: int) -> list[float]:
    """The learning rate before each step and after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=solver.lr)
    scheduler = build_scheduler(optimizer, solver, steps)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps * solver.epochs):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_warmup_then_cosine() -> None:
    rates = _rates(SolverConfig(lr=2.0, epochs=10, lr_warmup_step=2), steps=5)
    assert rates[0] == 0 and rates[5] == pytest.approx(1.0) and rates[10] == pytest.approx(2.0) == max(rates)
    assert rates[30] == pytest.approx(1.0)  # half way through the cosine
    assert rates[49] == pytest.approx(1 + math.cos(math.pi * (49 / 5 - 2) / 8)) and 0 < rates[49] < 0.01
    assert rates[50] == 0


def test_no_warmup_nothing_but_warmup_and_a_fraction_of_an_epoch() -> None:
    assert _rates(SolverConfig(lr=2.0, epochs=2, lr_warmup_step=0), 4)[0] == 2.0
    only_warmup = _rates(SolverConfig(lr=2.0, epochs=2, lr_warmup_step=2), 4)
    assert only_warmup[7] == pytest.approx(2.0 * 7 / 8) and only_warmup[8] == 0
    assert _rates(SolverConfig(lr=2.0, epochs=2, lr_warmup_step=0.5), 4)[1:3] == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize("epochs", [1, 7, 30])
def test_the_default_schedule_keeps_every_digit(epochs: int) -> None:
    solver = SolverConfig(epochs=epochs, lr_warmup_step=1)
    for step in range(13 * epochs):
        epoch = step / 13
        cosine = 0.5 * (1 + math.cos(math.pi * (epoch - 1) / (epochs - 1))) if epoch >= 1 else None
        assert lr_factor(solver, epoch) == (epoch if cosine is None else cosine)


def test_warmup_start_and_final_learning_rate() -> None:
    solver = SolverConfig(lr=2.0, epochs=10, lr_warmup_step=2, lr_warmup_start=0.5, lr_final=0.2)
    rates = _rates(solver, steps=5)
    assert [rates[step] for step in (0, 5, 10, 30, 50)] == pytest.approx([0.5, 1.25, 2.0, 1.1, 0.2])
    assert rates[49] > 0.2


def test_a_cosine_over_all_epochs() -> None:
    """The warm-up rises to the cosine's value at its end."""
    solver = SolverConfig(lr=2.0, epochs=8, lr_warmup_step=2, lr_warmup_start=0.1, cosine_after_warmup=False)
    rates = _rates(solver, steps=4)
    peak = 1 + math.cos(math.pi / 4)
    assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx((0.1 + peak) / 2)
    assert rates[8] == pytest.approx(peak) == max(rates)
    assert rates[16] == pytest.approx(1.0) and rates[32] == 0


def test_steps_at_milestones() -> None:
    solver = SolverConfig(type="step", lr=2.0, epochs=6, lr_warmup_step=0, milestones=(2, 3.5, 5), gamma=0.1)
    rates = _rates(solver, steps=4)
    assert [rates[step] for step in (0, 7, 8, 13, 14, 19, 20, 24)] == pytest.approx(
        [2, 2, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002]
    )


def test_steps_after_a_warmup_by_iteration() -> None:
    start = {"lr_warmup_step": 1, "lr_warmup_start": 0.02}
    solver = SolverConfig(type="step", lr=2.0, epochs=4, milestones=(2,), gamma=0.5, **start)
    rates = _rates(solver, steps=4)
    assert rates[:5] == pytest.approx([0.02, 0.515, 1.01, 1.505, 2.0]) and rates[8] == rates[16] == 1.0


def test_groups_keep_their_proportion() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (2.0, 0.2)]
    optimizer = torch.optim.SGD(groups)
    solver = SolverConfig(lr=2.0, epochs=2, lr_warmup_step=1, lr_warmup_start=0.5)
    build_scheduler(optimizer, solver, steps_per_epoch=2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])


def test_a_scaled_learning_rate_scales_the_warmups_start_and_the_end() -> None:
    """Else, at a small batch, the warm-up would begin above its end."""
    solver = SolverConfig(lr=1.0, epochs=4, lr_warmup_step=1, lr_warmup_start=0.5, lr_final=0.2, lr_base_batch=64)
    lr = scaled_lr(solver.lr, solver.lr_base_batch, 16)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = build_scheduler(optimizer, solver, steps_per_epoch=2), []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
    assert [rates[step] for step in (0, 1, 2, 8)] == pytest.approx([0.125, 0.1875, 0.25, 0.05])


ROOT = Path(__file__).parents[2]
TADA_RATES = ROOT / "tests/golden/tadn/tables/learning_rates_tada.json"
TADA_RECIPES = {  # the authors' name: our file
    "tada/ssv2/tada2d_8f": "ssv2/tada2d",
    "tada/ssv2/tada2d_16f": "ssv2/tada2d_16f",
    "tada/k400/tada2d_8x8": "k400/tada2d",
    "tada/k400/tada2d_16x5": "k400/tada2d_16f",
    "tadaformer/tadaformer_b16_ssv2_16f": "ssv2/tadaformer",
    "tadaformer/tadaformer_b16_k400_16f": "k400/tadaformer",
    "tadaformer/tadaformer_l14_ssv2_16f": "ssv2/tadaformer_l14",
    "tadaformer/tadaformer_l14_k400_16f": "k400/tadaformer_l14",
    "tadaconvnextv2/tadaconvnextv2_tiny_ssv2_16f": "ssv2/tadaconvnextv2",
    "tadaconvnextv2/tadaconvnextv2_base_k400_16f": "k400/tadaconvnextv2_base",
}


def test_schedules_are_those_of_the_tada_models() -> None:
    rows = json.loads(TADA_RATES.read_text())
    assert {row["recipe"] for row in rows} == TADA_RECIPES.keys()
    for row in rows:
        solver = load_config(ROOT / f"configs/{TADA_RECIPES[row['recipe']]}.yaml").solver
        found = [solver.lr * lr_factor(solver, epoch) for epoch in row["epochs"]]
        assert found == pytest.approx(row["lr"], rel=1e-9, abs=1e-15), row["recipe"]


def test_losses_agree_with_torch() -> None:
    logits, label = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 4])
    plain = nn.functional.cross_entropy(logits, label)
    smooth = nn.functional.cross_entropy(logits, label, label_smoothing=0.1)
    shares = nn.functional.one_hot(label, 5) * 0.9 + 0.02
    torch.testing.assert_close(build_criterion(0.0, mixing=False)(logits, label), plain)
    torch.testing.assert_close(build_criterion(0.1, mixing=False)(logits, label), smooth)
    torch.testing.assert_close(build_criterion(0.1, mixing=True)(logits, shares), smooth)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_treats_all_frames_and_channels_of_a_clip_alike(mixup: float, cutmix: float) -> None:
    numpy.random.seed(0)
    marks = torch.arange(1.0, 5.0)
    for _ in range(8):
        video = marks.view(4, 1, 1, 1, 1).expand(4, 3, 2, 16, 12).clone()
        mixed, target = ClipMixup(mixup, cutmix, smoothing=0.0, num_classes=4)(video, torch.arange(4))
        assert mixed.shape == (4, 3, 2, 16, 12) and target.shape == (4, 4)
        assert torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed))
        # the share of each label is the share of its clip in the pixels
        torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), target @ marks, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(target.sum(1), torch.ones(4))


def test_a_clip_without_partner_is_left_out() -> None:
    mix = ClipMixup(0.8, 1.0, 0.1, 4)
    video, target = mix(torch.zeros(3, 2, 3, 4, 4), torch.arange(3))
    assert len(video) == len(target) == 2
    with pytest.raises(OptimError, match="two clips"):
        mix(torch.zeros(1, 2, 3, 4, 4), torch.arange(1))


def test_precisions() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision("amp", cpu).dtype is None
    assert resolve_precision("amp", gpu) == resolve_precision("fp16", gpu) and resolve_precision("fp16", gpu).scaled
    assert resolve_precision("bf16", cpu) == resolve_precision("bf16", gpu)
    assert not resolve_precision("bf16", gpu).scaled and not resolve_precision("fp32", cpu).scaler(cpu).is_enabled()
    layer = nn.Linear(2, 2)
    with resolve_precision("bf16", cpu).autocast(cpu):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    with resolve_precision("fp32", cpu).autocast(cpu):
        assert layer(torch.ones(1, 2)).dtype == torch.float32
    with pytest.raises(OptimError, match="fp16 needs a GPU"):
        resolve_precision("fp16", cpu)
    with pytest.raises(OptimError, match="not 'half'"):
        resolve_precision("half", cpu)
