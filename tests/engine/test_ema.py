"""The average of the trainable weights: its arithmetic, what it does not touch, and that applying it copies nothing."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import checkpoint_file
from engine.distributed import Process, gather, start, unwrap, wrap
from engine.ema import EmaError, ModelEma
from engine.optim import build_optimizer
from tests.helpers.processes import run_in_two


class Tower(nn.Linear):
    """Frozen, large, and not to be copied."""

    def __deepcopy__(self, memo: dict) -> None:
        raise AssertionError("the frozen tower was copied")


class Net(nn.Module):
    """Two names for one trainable layer, a BatchNorm (two float buffers and a counter), and a frozen tower."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower(6, 500).requires_grad_(False)
        self.first = nn.Linear(500, 5)
        self.norm = nn.BatchNorm1d(5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5)] * 2)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.tower(x)))
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("tower.")}


def train(model: nn.Module, steps: int, ema: ModelEma | None = None, rank: int = 0):
    """SGD on noise; yields the trainable weights after each step."""
    generator = torch.Generator().manual_seed(7 + rank)
    groups = [{"name": "all", "params": [p for p in model.parameters() if p.requires_grad], "lr": 0.1}]
    optimizer = build_optimizer(groups, "sgd", weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        if ema is not None:
            ema.update()
        yield trainable(unwrap(model))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_average_by_hand() -> None:
    model = make()
    expected = {name: value.double() for name, value in trainable(model).items()}
    ema = ModelEma(model, decay=0.8)
    assert equal(ema.state_dict(), trainable(model)), "averages start as the weights"
    for number, now in enumerate(train(model, 6, ema), start=1):
        for name, value in now.items():
            counts = name.endswith("num_batches_tracked")
            expected[name] = value if counts else 0.8 * expected[name] + 0.2 * value.double()
        averages = ema.state_dict()
        assert averages.keys() == expected.keys() and averages["norm.num_batches_tracked"] == number
        for name, value in averages.items():
            assert value.dtype == now[name].dtype and not value.requires_grad
            torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-7, msg=name)
    assert not torch.equal(averages["head.weight"], model.head.weight)
    assert averages["blocks.0.weight"] is averages["blocks.1.weight"], "a shared layer has one average, taken once"


def test_the_frozen_tower_is_neither_copied_nor_held() -> None:
    model = make()
    kept = {value.data_ptr() for value in model.state_dict().values()}
    ema = ModelEma(model, 0.9)
    gc.collect()
    own = {value.data_ptr(): value for value in ema.state_dict().values()}
    assert not kept & own.keys()
    parameters = {p for p in model.parameters() if p.requires_grad}
    expected = sum(v.nbytes for v in parameters) + sum(v.nbytes for v in model.buffers())
    assert sum(value.nbytes for value in own.values()) == expected
    assert sum(p.nbytes for p in model.tower.parameters()) == 4 * (6 * 500 + 500)
    assert not [name for name in ema.state_dict() if name.startswith("tower.")]


def test_updating_never_waits_for_the_device() -> None:
    class NoValues(TorchDispatchMode):
        """Refuses to tell the value of a tensor to Python, which on a GPU would be a synchronisation."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func) and "_to_copy" not in str(func), func
            return func(*args, **(kwargs or {}))

    model = make()
    ema = ModelEma(model, 0.9)
    with NoValues():
        ema.update()


def test_applied_and_taken_out_again_exactly() -> None:
    model = make()
    ema = ModelEma(model, 0.5)
    list(train(model, 3, ema))
    before, averages, video = trainable(model), {k: v.clone() for k, v in ema.state_dict().items()}, torch.randn(4, 6)
    places = [value.data_ptr() for value in model.state_dict().values()]
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.eval()
    own = model(video)
    with ema.applied(model):
        assert equal(trainable(model), averages) and equal(ema.state_dict(), averages)
        with torch.inference_mode():
            averaged = model(video)
    assert equal(trainable(model), before) and places == [value.data_ptr() for value in model.state_dict().values()]
    assert all(parameter.grad is grads[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(video), own) and not torch.equal(averaged, own)
    other = make(seed=1).eval()
    other.tower.load_state_dict(model.tower.state_dict())
    other.load_state_dict(averages, strict=False)
    assert torch.equal(other(video), averaged)


def test_taken_out_again_after_an_exception() -> None:
    model = make()
    ema = ModelEma(model, 0.5)
    list(train(model, 2, ema))
    before = trainable(model)
    with pytest.raises(KeyboardInterrupt), ema.applied(model):
        raise KeyboardInterrupt
    assert equal(trainable(model), before)


def test_a_visit_changes_nothing_of_what_follows() -> None:
    plain, visited = make(), make()
    one, two = ModelEma(plain, 0.9), ModelEma(visited, 0.9)
    for here, there in zip(train(plain, 4, one), train(visited, 4, two), strict=True):
        with two.applied(visited):
            pass
        assert equal(here, there) and equal(one.state_dict(), two.state_dict())


def test_saved_and_continued_bit_for_bit(tmp_path: Path) -> None:
    straight = make()
    ema = ModelEma(straight, 0.9)
    list(train(straight, 3, ema))
    checkpoint_file.save(tmp_path / "a.pt", {"model": straight.state_dict(), "ema_state_dict": ema.state_dict()})
    list(train(straight, 3, ema, rank=1))

    resumed = make(seed=5)
    content = checkpoint_file.load(tmp_path / "a.pt").content
    resumed.load_state_dict(content["model"])
    again = ModelEma(resumed, 0.9)
    again.load_state_dict(content["ema_state_dict"])
    assert equal(again.state_dict(), content["ema_state_dict"])
    list(train(resumed, 3, again, rank=1))
    assert equal(trainable(resumed), trainable(straight)) and equal(again.state_dict(), ema.state_dict())


def test_averages_of_something_else_are_refused_and_nothing_is_taken() -> None:
    model = make()
    ema = ModelEma(model, 0.9)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    values = {name: value + 1 for name, value in before.items()}
    with pytest.raises(EmaError, match=r"head\.bias is in only one of them"):
        ema.load_state_dict({name: value for name, value in values.items() if name != "head.bias"})
    with pytest.raises(EmaError, match=r"head\.bias has shape \(4,\) instead of \(3,\)"):
        ema.load_state_dict({**values, "head.bias": torch.zeros(4)})
    other = make()
    other.head = nn.Linear(5, 4)
    kept = trainable(other)
    with pytest.raises(EmaError, match=r"head\..* has shape"), ema.applied(other):
        raise AssertionError("applied to another model")
    assert equal(trainable(other), kept) and equal(ema.state_dict(), before)
    with pytest.raises(EmaError, match="nothing to average"):
        ModelEma(model.requires_grad_(False), 0.9)


def _two_processes(rank: int, folder: str) -> None:
    process = start("cpu")
    for sync_bn in (False, True):
        model = wrap(make(), process, sync_bn)
        ema = ModelEma(model, 0.7)
        list(train(model, 3, ema, rank))
        assert ema.state_dict().keys() == trainable(unwrap(model)).keys()
        before = {name: value.clone() for name, value in ema.state_dict().items()}
        one, other = gather(before)
        drifted = {name for name in one if not torch.equal(one[name], other[name])}
        assert drifted == (set() if sync_bn else {"norm.running_mean", "norm.running_var"})
        ema.broadcast()
        assert all(equal(values, one) for values in gather(ema.state_dict()))
        own = trainable(unwrap(model))
        with ema.applied(model):
            assert equal(trainable(unwrap(model)), one)
        assert equal(trainable(unwrap(model)), own)
        for values in train(model, 1, ema, rank):  # DistributedDataParallel still works with it
            assert not equal(values, own)
    if process.is_main:
        torch.save(one, Path(folder) / "averages.pt")


def test_two_processes_agree_with_and_without_synchronised_batchnorm(tmp_path: Path) -> None:
    run_in_two(_two_processes, str(tmp_path))
    ema = ModelEma(wrap(make(), Process()), 0.7)
    assert torch.load(tmp_path / "averages.pt").keys() == ema.state_dict().keys()
    ema.broadcast()  # one process: nothing to do
