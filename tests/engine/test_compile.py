"""torch.compile as an option: the same module, names and results, in training, in evaluation and on two processes.

The suite lets torch trace and derive (aot_eager); what a C++ compiler makes of it is slow, and a test apart.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from configs.schema import load_config
from engine.distributed import Process, move_to_device, start, unwrap, wrap
from engine.ema import ModelEma
from models.registry import MODELS, build_model
from tests.helpers.processes import run_in_two
from tests.helpers.tiny_models import adapted, random_clips


class Doubled(torch.autograd.Function):
    """Stands for the layers with their own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 4 * ctx.saved_tensors[0] * gradient


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Doubled.apply(self.norm(self.first(x))).relu())


def make() -> Net:
    torch.manual_seed(0)
    return Net().double()


def inputs(rows: int = 6) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of a pass in training, with the buffers after it."""
    model.train().zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None] + [b.clone() for b in model.buffers()]


def close(one: list[Tensor], other: list[Tensor], **bounds: float) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **bounds)


def compile_with(backend: Any) -> Callable[..., None]:
    compile = nn.Module.compile
    return lambda module: compile(module, backend=backend)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Compiles without a compiler; collects the graphs that were found."""
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        found.append(graph)
        return aot_eager(graph, example)

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", compile_with(backend))
    return found


def test_it_stays_the_same_module_and_gives_the_same(graphs: list[Any]) -> None:
    plain, model = make(), make()
    wrapped = wrap(model, Process(), compile=True)
    assert wrapped is model and unwrap(wrapped) is model
    assert model.state_dict().keys() == plain.state_dict().keys() and not graphs
    close(gradients(model, inputs()), gradients(plain, inputs()))
    trained = len(graphs)
    assert trained > 0, "nothing was compiled"
    with torch.inference_mode():
        assert torch.allclose(model.eval()(inputs()), plain.eval()(inputs()))
    assert len(graphs) > trained
    assert torch.equal(copy.deepcopy(model)(inputs()), plain(inputs())), "a copy is a plain module"


def test_averaged_weights_visit_a_compiled_model(graphs: list[Any]) -> None:
    model = move_to_device(make(), Process(), compile=True).eval()
    ema = ModelEma(model, 0.5)
    with torch.no_grad():
        before = model(inputs())
        for parameter in model.parameters():
            parameter.add_(0.1)
        assert not torch.allclose(model(inputs()), before)
        with ema.applied(model):
            assert torch.equal(model(inputs()), before)
    assert graphs


def _two_processes(rank: int, folder: str) -> None:
    process = start("cpu")
    nn.Module.compile = compile_with("aot_eager")
    ours = slice(3 * rank, 3 * rank + 3)
    for sync_bn in (False, True):
        plain, model = (wrap(make(), process, sync_bn, compile) for compile in (False, True))
        for _ in range(2):
            close(gradients(model, inputs()[ours]), gradients(plain, inputs()[ours]))


def test_two_processes(tmp_path: Path) -> None:
    run_in_two(_two_processes, str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ here")
def test_compiled_by_a_compiler() -> None:
    torch._dynamo.reset()
    plain, model = make(), wrap(make(), Process(), compile=True)
    close(gradients(model, inputs()), gradients(plain, inputs()))
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(inputs()), plain.eval()(inputs()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_name", "recompute"),
    [
        (model_name, again)
        for model_name in MODELS
        for again in (False, True)
        if not again or model_name.startswith("td4v")
    ],
)
def test_every_model_can_be_compiled(graphs: list[Any], model_name: str, recompute: bool) -> None:
    vision = {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 16}
    options = {"td4v_finetune": {"zero_init": False, "ratio": "1/4"}, "aim": {"drop_path": 0}}.get(model_name, {})
    network = {"arch": "custom", "vision": vision, "pyramid": {"n_embs": [16, 32]}, "init": False}
    network |= {"options": options, "recompute": recompute}
    data = {"dataset": "hmdb51", "num_classes": 3, "num_segments": 4, "input_size": 16}
    config = load_config(adapted(model_name, data, network))
    torch.manual_seed(0)
    plain = build_model(config)
    model = move_to_device(copy.deepcopy(plain), Process(), compile=True)
    video = random_clips(model, config, 2)
    close(gradients(model, video), gradients(plain, video), rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(video), plain.eval()(video), rtol=1e-4, atol=1e-6)
    assert graphs
