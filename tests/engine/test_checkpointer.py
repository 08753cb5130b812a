"""A run into a checkpoint and back: all of it, exactly, or a sentence why not."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from configs.schema import SolverConfig
from engine import checkpoint_file, checkpointer, rng
from engine.checkpoint_file import RUN_KEYS, Checkpoint, CheckpointError
from engine.checkpointer import Progress
from engine.distributed import Process
from engine.ema import ModelEma
from engine.meter import LossMonitor
from engine.optim import build_scheduler
from engine.train_step import TrainingState
from models.loading import WeightsError, load_run_weights
from models.parameters import Origin, frozen_identity

A = Path("a.pt")
TRAINED = Progress(
    epoch=1, step_in_epoch=1, step=5, best=12.5, evaluations_since_best=1, unevaluated_epoch={"epoch": 1, "top1": None}, history=[{"epoch": 0}],
    loss_monitor=LossMonitor(skipped_steps=3, skipped_in_a_row=1, spikes=2, mean=1.5, variance=0.25, seen=6),
)  # fmt: skip
METER = {"clips": 24, "epoch": {"loss": 3.0}}


class PartlyFrozen(nn.Module):
    """A frozen layer, an untrained buffer, and a trainable rest with BatchNorm's buffers."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.origin = Origin("ViT-B/16", "openai")
        self.tower = nn.Linear(2, 4).requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.body = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.tower(x) * self.scale))


def parts(width: int = 3, ema: float | None = None, scaled: bool = False, seed: int = 0) -> TrainingState:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PartlyFrozen(width)
        torch.manual_seed(seed)
        for module in (model.body[0], model.head):
            module.reset_parameters()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"name": "all", "params": trainable, "lr": 0.1}])
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0)
    average = ModelEma(model, ema) if ema is not None else None
    return TrainingState(
        model,
        optimizer,
        build_scheduler(optimizer, SolverConfig(epochs=2, lr_warmup_step=1), 4),
        scaler,
        average,
        frozen_identity(model),
    )


def step(trained: TrainingState) -> None:
    """One step with noise from every generator of this process."""
    noise = random.gauss(0, 1) + float(numpy.random.randn()) + torch.randn(4, 2)
    trained.optimizer.zero_grad()
    trained.scaler.scale(trained.model(noise).square().sum()).backward()
    trained.scaler.step(trained.optimizer)
    trained.scaler.update()
    trained.scheduler.step()
    if trained.ema is not None:
        trained.ema.update()


def collected(trained: TrainingState, full: bool = False, process: Process = Process()) -> dict:  # noqa: B008, frozen
    return checkpointer.run_content(trained, TRAINED, METER, process, full) | {"config": {}, "meta": {}}


def leaves(value: object, name: str = "") -> dict[str, object]:
    """Every leaf of nested dicts and lists by its path, tensors as lists of their exact values."""
    if isinstance(value, torch.Tensor):
        return {name: (str(value.dtype), value.tolist())}
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, inner in pairs for path, leaf in leaves(inner, f"{name}/{key}").items()}
    return {name: value}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_restored_run_continues_as_if_nothing_had_happened(
    tmp_path: Path, full: bool, ema: float | None, scaled: bool
):
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    trained, path = parts(ema=ema, scaled=scaled), tmp_path / "last_model.pt"
    for _ in range(TRAINED.step):  # an odd number of Gaussians leaves half a pair in Python's and NumPy's generators
        step(trained)
    checkpoint_file.save(path, collected(trained, full))
    for _ in range(2):
        step(trained)
    wanted = leaves(collected(trained, full))

    random.seed(2), numpy.random.seed(2), torch.manual_seed(2)
    resumed = parts(ema=ema, scaled=scaled, seed=7)
    found, meter = checkpointer.restore_run(checkpoint_file.load(path), load_run_weights, resumed, Process())
    assert asdict(found) == asdict(TRAINED) and meter == METER
    for _ in range(2):
        step(resumed)
    assert leaves(collected(resumed, full)) == wanted


def test_a_run_is_what_it_saves():
    assert RUN_KEYS.keys() | {"ema_state_dict", "backbone", "full"} == collected(parts()).keys()
    for key in RUN_KEYS:
        content = collected(parts())
        del content[key]
        assert Checkpoint(A, content).missing_run_keys == [key]


@pytest.mark.parametrize("ahead", [-2, 1])
def test_the_learning_rate_goes_by_the_position_in_the_run(tmp_path: Path, ahead: int):
    """Whatever the scheduler in the file counted: without the skipped steps, or one too many."""
    trained = parts()
    for _ in range(TRAINED.step):
        step(trained)
    rate, content = trained.optimizer.param_groups[0]["lr"], collected(trained)
    content["scheduler"]["last_epoch"] += ahead
    content["optimizer_state_dict"]["param_groups"][0]["lr"] = 7.0
    resumed = parts()
    checkpointer.restore_run(Checkpoint(tmp_path / "last_model.pt", content), load_run_weights, resumed, Process())
    assert resumed.scheduler.last_epoch == TRAINED.step and resumed.optimizer.param_groups[0]["lr"] == rate
    step(trained), step(resumed)
    assert resumed.optimizer.param_groups[0]["lr"] == trained.optimizer.param_groups[0]["lr"]


def test_every_generator_comes_back():
    random.seed(3), numpy.random.seed(3), torch.manual_seed(3)
    random.gauss(0, 1), numpy.random.randn()
    kept = rng.rng_state(torch.device("cpu"))
    draws = [[random.gauss(0, 1), random.random(), numpy.random.randn(), torch.rand(2).tolist()]]
    for seed in (4, 5):
        random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)
        rng.set_rng_state(kept, torch.device("cpu"))
        draws.append([random.gauss(0, 1), random.random(), numpy.random.randn(), torch.rand(2).tolist()])
    assert draws[0] == draws[1] == draws[2]


def test_each_process_gets_its_own_generators_back(monkeypatch: pytest.MonkeyPatch):
    trained = parts()
    monkeypatch.setattr(
        checkpointer, "gather", lambda value: [value, (value[0] | {"torch": torch.full((3,), 7)}, {"clips": 1})]
    )
    content = collected(trained, process=Process(world_size=2))
    given = []
    monkeypatch.setattr(checkpointer, "set_rng_state", lambda rng, device: given.append(rng["torch"]))
    found = [
        checkpointer.restore_run(Checkpoint(A, content), load_run_weights, trained, Process(rank, 2))[1]
        for rank in (0, 1)
    ]
    assert found == [METER, {"clips": 1}] and given[1].tolist() == [7, 7, 7] and len(given[0]) > 3


def test_lean_and_full():
    model = parts().model
    lean, full = checkpointer.weights_to_save(model, full=False), checkpointer.weights_to_save(model, full=True)
    assert full.keys() == model.state_dict().keys() and full.keys() - lean.keys() == {"tower.weight", "tower.bias"}
    assert {"scale", "body.1.running_mean", "body.1.num_batches_tracked"} <= lean.keys()
    content = collected(parts(ema=0.5))
    assert content["backbone"] == frozen_identity(parts().model) and content["full"] is False
    assert not Checkpoint(A, content).has_backbone
    assert Checkpoint(A, collected(parts(), full=True)).has_backbone


def test_the_weights_alone_are_the_averaged_ones():
    trained = parts(ema=0.5)
    step(trained), step(trained)  # the first has a learning rate of 0
    content = checkpointer.weights_content(trained, full=True)
    averages = trained.ema.state_dict()
    assert all(torch.equal(content["model_state_dict"][name], value) for name, value in averages.items())
    assert not torch.equal(averages["head.weight"], trained.model.head.weight)
    assert content["model_state_dict"].keys() == trained.model.state_dict().keys()
    assert not Checkpoint(A, content).is_run and Checkpoint(A, collected(trained)).is_run


def refused(content: dict, target: TrainingState, process: Process = Process()) -> str:  # noqa: B008, frozen
    """Why `content` cannot be restored; `target`'s weights must be as before."""
    before = leaves(target.model.state_dict())
    with pytest.raises((CheckpointError, WeightsError)) as caught:
        checkpointer.restore_run(Checkpoint(Path("run/last_model.pt"), content), load_run_weights, target, process)
    assert leaves(target.model.state_dict()) == before
    message = str(caught.value)
    assert message.startswith("run/last_model.pt: ") and "\n" not in message
    return message


def test_another_frozen_backbone_is_refused_with_both_names():
    content, other = collected(parts()), parts(seed=1)
    with torch.no_grad():
        other.model.tower.weight.add_(1)
    other.model.origin = Origin("ViT-L/14", "clip_pretrain/mine.pt")
    message = refused(content, other)
    for part in (
        f"ViT-B/16, openai (sha256 {content['backbone']['sha256'][:12]})",
        f"ViT-L/14, clip_pretrain/mine.pt ({frozen_identity(other.model)['sha256'][:12]})",
    ):
        assert part in message
    thawed = parts(seed=1)
    thawed.model.tower.requires_grad_(True)
    full = collected(parts(), full=True)
    assert "nothing is frozen in this model" in refused(full | {"full": False}, thawed)
    moved = parts()  # the same frozen weights from another place
    moved.model.origin = Origin("ViT-B/16", "elsewhere/ViT-B-16.pt")
    checkpointer.restore_run(Checkpoint(A, content), load_run_weights, moved, Process())
    checkpointer.restore_run(Checkpoint(A, full), load_run_weights, other, Process())


def test_another_model_is_refused():
    content = collected(parts())
    assert "(first body.0.weight, body.0.bias, body.1.weight): (3, 4) in the file, (5, 4) in the model" in refused(
        content, parts(width=5)
    )
    values = content["model_state_dict"]
    without = {name: value for name, value in values.items() if name != "head.bias"} | {"extra": torch.ones(1)}
    message = refused(content | {"model_state_dict": without}, parts(seed=1))
    assert "1 keys missing (first head.bias), 1 unexpected (first extra)" in message
    # Only frozen weights may be missing, and only in a file that says so.
    assert "lacks the frozen backbone (first tower.weight, tower.bias)" in refused(
        content | {"full": True}, parts(seed=1)
    )


def test_what_cannot_be_resumed_exactly_is_refused():
    content = collected(parts())
    assert "written by 1 process and cannot be resumed with 2" in refused(content, parts(), Process(world_size=2))
    assert "another precision" in refused(content, parts(scaled=True))
    assert "another precision" in refused(collected(parts(scaled=True)), parts())
    assert "another solver.ema_decay" in refused(content, parts(ema=0.5))
    assert "another solver.ema_decay" in refused(collected(parts(ema=0.5)), parts())
    bare = checkpointer.weights_content(parts(), full=False)
    assert "holds no run to resume: epoch, step_in_epoch, step" in refused(bare, parts())


def test_another_optimizer_is_refused():
    target = parts()
    split = torch.optim.AdamW([{"params": [p]} for p in target.model.parameters() if p.requires_grad])
    with pytest.raises(CheckpointError, match="does not fit this optimizer"):
        checkpointer.restore_run(
            Checkpoint(A, collected(parts())), load_run_weights, replace(target, optimizer=split), Process()
        )


def test_a_run_of_other_kernels_continues_with_those_of_this_one():
    """Checkpoints keep which of torch's kernels an optimizer took; a fused one must stay fused, whoever wrote them."""
    trained, target = parts(), parts(seed=1)
    step(trained)
    groups = [{"name": "all", "params": target.optimizer.param_groups[0]["params"]}]
    fused = torch.optim.AdamW(groups, fused=True)
    assert not trained.optimizer.param_groups[0]["fused"]
    content = collected(trained)
    checkpointer.restore_run(Checkpoint(A, content), load_run_weights, replace(target, optimizer=fused), Process())
    assert fused.param_groups[0]["fused"] is True and not content["optimizer_state_dict"]["param_groups"][0]["fused"]
    for one, other in zip(fused.state.values(), trained.optimizer.state.values(), strict=True):
        assert leaves(one) == leaves(other) and int(one["step"]) == 1


def test_averages_of_another_model_are_refused():
    content = collected(parts(ema=0.5))
    del content["ema_state_dict"]["head.bias"]
    with pytest.raises(CheckpointError, match=r"a\.pt: the averaged weights do not fit this model: head\.bias"):
        checkpointer.restore_run(Checkpoint(A, content), load_run_weights, parts(ema=0.5), Process())


def test_loss_spikes_stand_out_of_the_usual():
    monitor, generator = LossMonitor(), random.Random(0)
    assert not any(monitor.add(2 + 0.1 * generator.gauss(0, 1)) for _ in range(200))
    assert monitor.mean == pytest.approx(2, abs=0.1) and monitor.variance**0.5 == pytest.approx(0.1, rel=0.5)
    assert monitor.add(4.0) and monitor.spikes == 1
    assert not LossMonitor().add(1e6)  # nothing is usual yet
