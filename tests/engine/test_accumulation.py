"""Small batches in turn, or on several processes, against the large batch: TD4V itself, and what its BatchNorm sees.

The loop's own accumulation is tested in test_trainer.py, on a network without BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clip.adapter import TD4V
from configs.schema import Config, load_config
from engine.distributed import gradient_sync, start, sync_buffers, unwrap, wrap
from engine.optim import build_criterion
from models.registry import MODELS, build_model
from tests.helpers.processes import run_in_two
from tests.helpers.tiny_models import adapted, random_clips

FRAMES, PATCHES = 4, 4
WITH_BATCHNORM = ("td4v_side", "td4v_finetune")


def config_of(model_name: str) -> Config:
    """Two blocks and four patches a frame where the model stands on a tower."""
    vision = {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 16}
    options = {"td4v_finetune": {"zero_init": False, "ratio": "1/4"}, "aim": {"drop_path": 0.0}}.get(model_name, {})
    network = {"arch": "custom", "vision": vision, "pyramid": {"n_embs": [16, 32]}, "init": False}
    data = {"dataset": "hmdb51", "num_classes": 3, "num_segments": FRAMES, "input_size": 16}
    return load_config(adapted(model_name, data, network | {"options": options}))


def make(model_name: str) -> nn.Module:
    """In float64, with every trainable parameter away from 0."""
    torch.manual_seed(0)
    model = build_model(config_of(model_name)).double().train()
    for module in norms(model):
        torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.abs().max() < 1e-3:
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def seen_first(model: nn.Module) -> list[nn.Module]:
    """Modules whose input goes into a BatchNorm as it is, the first of the model's first."""
    return [module for module in model.modules() if isinstance(module, TD4V) or type(module) is nn.BatchNorm1d][:1]


def clips(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(count, FRAMES, 3, 16, 16, generator=generator, dtype=torch.float64)
    return video, torch.arange(count) % 3


def accumulate(model: nn.Module, video: Tensor, label: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Gradients as the loop takes them: each batch's mean loss, weighted by its share of the clips."""
    criterion = build_criterion(0.1, mixing=False)
    model.zero_grad()
    parts = list(zip(video.split(sizes), label.split(sizes), strict=True))
    for place, (part, target) in enumerate(parts, start=1):
        with gradient_sync(model, enabled=place == len(parts)):
            (criterion(model(part), target) * (len(part) / len(video))).backward()
    return {name: p.grad.clone() for name, p in unwrap(model).named_parameters() if p.requires_grad}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=1e-9, atol=1e-12) for name in one)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (2, 2, 2)])
def test_with_running_statistics_accumulation_is_the_large_batch(model_name: str, sizes: tuple[int, ...]) -> None:
    model = make(model_name)
    for module in norms(model):
        module.eval()
    torch.manual_seed(1)
    video = random_clips(model, config_of(model_name), sum(sizes), torch.float64)
    label = torch.arange(len(video)) % 3
    large = accumulate(model, video, label, [len(video)])
    assert close(accumulate(model, video, label, sizes), large)
    assert all(gradient.abs().max() > 1e-9 for gradient in large.values()), "a gradient of 0 would prove nothing"


@pytest.mark.parametrize("model_name", WITH_BATCHNORM)
def test_batchnorm_sees_one_forward_pass_and_so_half_of_the_accumulated_batch(model_name: str) -> None:
    video, label = clips(4)
    model, large = make(model_name), make(model_name)
    before = norms(model)[0].running_mean.clone()
    rows: list[int] = []
    for module in seen_first(model):
        module.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0][..., 0].numel()))
    first: list[Tensor] = []
    seen_first(large)[0].register_forward_pre_hook(lambda module, inputs: first.append(inputs[0].detach()))

    halves = accumulate(model, video, label, (2, 2))
    assert not close(halves, accumulate(large, video, label, (4,)))
    assert set(rows) == {2 * FRAMES * PATCHES} and first[0][..., 0].numel() == 4 * FRAMES * PATCHES
    assert {int(module.num_batches_tracked) for module in norms(model)} == {2}
    # what reaches the first norm depends on no other, so its statistics are known: each half in turn, momentum 0.1
    one, other = (half.flatten(0, -2).mean(0) for half in first[0].chunk(2))
    torch.testing.assert_close(norms(model)[0].running_mean, 0.81 * before + 0.09 * one + 0.1 * other)


def _two_processes(rank: int, folder: str) -> None:
    process = start("cpu")
    video, label = clips(8)
    ours = slice(4 * rank, 4 * rank + 4)
    for model_name in WITH_BATCHNORM:
        for sync_bn in (True, False):
            for sizes in ((4,), (2, 2)):
                model = wrap(make(model_name), process, sync_bn)
                gradients = accumulate(model, video[ours], label[ours], sizes)
                sync_buffers(model)
                state = {f"{i}.{k}": v for i, m in enumerate(norms(unwrap(model))) for k, v in m.state_dict().items()}
                if process.is_main:
                    torch.save((gradients, state), Path(folder) / f"{model_name}-{sync_bn}-{len(sizes)}.pt")


def test_two_processes_are_the_large_batch_with_synchronised_batchnorm_only(tmp_path: Path) -> None:
    run_in_two(_two_processes, str(tmp_path))
    video, label = clips(8)
    mixed = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # the clips of one forward pass of both processes side by side
    for model_name in WITH_BATCHNORM:
        for steps, order in ((1, slice(None)), (2, mixed)):
            model = make(model_name)
            expected = accumulate(model, video[order], label[order], [8 // steps] * steps)
            gradients, state = torch.load(tmp_path / f"{model_name}-True-{steps}.pt")
            assert close(gradients, expected), (model_name, steps)
            assert close(
                state, {f"{i}.{k}": v for i, m in enumerate(norms(model)) for k, v in m.state_dict().items()}
            ), (model_name, steps)
            gradients, _ = torch.load(tmp_path / f"{model_name}-False-{steps}.pt")
            assert not close(gradients, expected), (model_name, steps)
