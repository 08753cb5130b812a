"""What a model costs: sizes and FLOPs counted by hand, and the command with its files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine import profiling
from engine.profiling import SavedBytes, count_flops, held_bytes, matrix_rate, peak_bytes, saved_for_backward, seconds
from scripts.profile import cases, measure
from scripts.profile.command import main
from scripts.profile.report import Row, locate, saved_table, scaling

pytestmark = pytest.mark.usefixtures("quick_collection")
CPU = torch.device("cpu")
ROWS, IN, HIDDEN, OUT = 64, 32, 48, 16
CONFIG = {
    "data": {"dataset": "hmdb51", "num_classes": 5, "num_segments": 4, "input_size": 32, "batch_size": 2},
    "network": {
        "arch": "custom",
        "init": False,
        "vision": {"width": 32, "layers": 2, "heads": 2, "patch_size": 16, "image_size": 32},
        "pyramid": {"n_embs": [16, 32]},
    },
}


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT))


def by_name(entries: list[SavedBytes]) -> dict[str, int]:
    return {entry.module: entry.bytes for entry in entries}


def test_saved_bytes_of_two_layers_by_hand() -> None:
    """The first layer keeps its input; the ReLU its result, which is the second layer's input and counts once."""
    model, x = two_layers(), torch.randn(ROWS, IN)
    assert by_name(saved_for_backward(model, x)) == {"0": 4 * ROWS * IN, "1": 4 * ROWS * HIDDEN}
    model[0].requires_grad_(False)  # its input is of no use then; the ReLU is not reached by gradients either
    assert by_name(saved_for_backward(model, x)) == {"2": 4 * ROWS * HIDDEN}


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.register_buffer("scale", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight * self.scale  # keeps x and the weight and the buffer
        return (y.view(-1)[:4] * y[0, :4]).sum() + (y.t() * y.t()).sum()  # keeps y, in four views


def test_views_of_one_storage_count_once_and_whole_and_parameters_and_buffers_do_not() -> None:
    assert by_name(saved_for_backward(Views(), torch.randn(10, 8))) == {"": 4 * 80 + 4 * 80}


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(IN, IN), two_layers(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_keeps_its_input_alone(reentrant: bool) -> None:
    found = saved_for_backward(Recomputed(reentrant), torch.randn(ROWS, IN))
    assert sum(by_name(found).values()) == 2 * 4 * ROWS * IN


class CastOnce(nn.Module):
    """Keeps a copy of its weight from call to call, as neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.copy = nn.Parameter(torch.randn(IN, IN), requires_grad=False), {}

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.copy.setdefault("bf16", (2 * self.weight.detach()).bfloat16())


def test_copies_of_weights_are_told_apart() -> None:
    x = torch.randn(ROWS, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = saved_for_backward(two_layers(), x)
    assert {(entry.module, entry.bytes) for entry in found if entry.copied_weights} == {("2", 2 * HIDDEN * OUT)}
    assert by_name([e for e in found if not e.copied_weights]) == {"0": 2 * ROWS * IN, "1": 2 * ROWS * HIDDEN}
    kept = saved_for_backward(CastOnce(), x.bfloat16().requires_grad_())
    assert kept == [SavedBytes("", 2 * IN * IN, copied_weights=True)]


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.tower.blocks
        return second.attend(first.attend(x))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(IN, IN) for _ in range(2))
        self.blocks = tuple(Block(part) for part in self.parts)


class Block:
    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def attend(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight)


def test_calls_count_as_modules_where_asked_and_are_left_as_they_were() -> None:
    model, x = Halves(), torch.randn(ROWS, IN)
    size = 4 * ROWS * IN
    assert by_name(saved_for_backward(model, x)) == {"": 2 * size}
    calls = {f"tower.{i}.attend": (block, "attend") for i, block in enumerate(model.tower.blocks)}
    assert by_name(saved_for_backward(model, x, calls=calls)) == {"tower.0.attend": size, "tower.1.attend": size}
    assert not any("attend" in vars(block) for block in model.tower.blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_flops_of_linear_layers_and_convolutions() -> None:
    model, x = two_layers(), torch.randn(ROWS, IN)
    forward = 2 * ROWS * (IN * HIDDEN + HIDDEN * OUT)
    with torch.no_grad():
        assert count_flops(lambda: model(x)) == forward
    # backward: both weights' gradients, and the second layer's input's
    assert count_flops(lambda: model(x).sum().backward()) == 2 * forward + 2 * ROWS * HIDDEN * OUT
    conv = nn.Conv2d(3, 5, 3, padding=1)
    assert count_flops(lambda: conv(torch.randn(2, 3, 8, 8))) == 2 * (2 * 5 * 8 * 8) * 3 * 9


def test_flops_of_attention_are_those_of_its_products_with_any_kernel() -> None:
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (10, 12, 12))
    product = 2 * 2 * 3 * 10 * 12 * 8

    def plain() -> Tensor:
        return ((q @ k.mT) / 8**0.5).softmax(-1) @ v

    for attention in (lambda: F.scaled_dot_product_attention(q, k, v), plain):
        assert count_flops(attention) == 2 * product
        assert count_flops(lambda attention=attention: attention().sum().backward()) == 6 * product


def test_flops_of_multi_head_attention_where_torch_would_fuse_it() -> None:
    layer, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(3, 7, 16)
    with torch.no_grad():
        flops = count_flops(lambda: layer(x, x, x, need_weights=False))
    assert flops == 2 * 3 * 7 * 16 * 64 + 2 * (2 * 3 * 7 * 7 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_peak_of_a_step_by_hand() -> None:
    """Three tensors of one size: a, b of it, c of both; a goes when c is there."""
    size = 1000

    def work() -> None:
        a = torch.ones(size)
        b = a + 1
        c = a + b
        del a
        c.add_(b)

    assert peak_bytes(work, CPU) == 3 * 4 * size
    assert held_bytes([x := torch.zeros(10), x[2:], torch.zeros(3)]) == 4 * 13


def test_peak_of_a_backward_pass_by_hand() -> None:
    """y = relu(x) and its gradient, the result of the square beside them; x lived before and does not count."""
    x = torch.randn(1000, requires_grad=True)
    peak = peak_bytes(lambda: x.relu().square().sum().backward(), CPU)
    assert 3 * 4000 <= peak <= 4 * 4000 + 64  # torch's own choice when it lets a gradient go


def test_times_and_the_matrix_rate() -> None:
    calls = []
    found = seconds(lambda: calls.append(None), CPU, repeats=4, least=0)
    assert len(found) == 4 and min(found) > 0 and len(calls) == 2 + 4
    assert matrix_rate(CPU, torch.float32, size=64) > 1e6


def test_out_of_memory_is_known_and_the_limit_is_lifted_again() -> None:
    import resource

    former = resource.getrlimit(resource.RLIMIT_DATA)
    with profiling.memory_limited(CPU), pytest.raises(RuntimeError) as caught:
        torch.empty(10**13)
    assert profiling.is_out_of_memory(caught.value) and not profiling.is_out_of_memory(RuntimeError("shapes differ"))
    assert resource.getrlimit(resource.RLIMIT_DATA) == former


def test_layers_of_modules() -> None:
    assert locate("side.layers.4.block.attn.qkv") == (4, "side.layers.*.block.attn")
    assert locate("tower.visual.transformer.resblocks.11.mlp.c_fc") == (11, "tower…resblocks.*.mlp.c_fc")
    assert locate("side.stem.conv") == (None, "side.stem") and locate("") == (None, "the model itself")


def row(frames: int, time: float, **values: object) -> Row:
    counts = {"total": 10, "trainable": 5, "forward_flops": 1e9 * frames, "training_flops": 3e9 * frames}
    return Row("m", "m", frames, 2, "fp32", False, **counts, training=[time, 2 * time, 3 * time], **values)


def test_figures_of_a_row() -> None:
    first = row(
        8, 0.5, rates=[1e11, 2e11], saved=[SavedBytes("a.0.b", 6), SavedBytes("a.0.b.c.d.e", 2), SavedBytes("x", 2)]
    )
    assert first.clips_per_s("training") == (2.0, 2 / 1.5, 4.0) and first.clips_per_s("inference") is None
    assert first.mfu("training") == pytest.approx(24e9 * 2 / 2e11) and first.mfu("inference") is None
    assert first.saved_a_clip == 5 and first.peak is None
    lines = scaling([first, row(16, 1.0)]).splitlines()
    assert lines[3].split("|")[-2].strip() == "1.00"  # twice the frames, twice the time
    assert "a.*.b " in saved_table(first)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setattr(profiling, "matrix_rate", partial(matrix_rate, size=64))
    monkeypatch.setattr(profiling, "seconds", partial(seconds, least=0))
    fixed = ["--device", "cpu", "--repeats", "2", "--output", str(tmp_path / "out")]
    return lambda *arguments: main([str(tmp_path / "tiny.yaml"), *fixed, *arguments])


def test_the_command_and_its_files(command, tmp_path: Path, capsys) -> None:
    finetune = "+network.model=td4v_finetune+solver.precision=bf16"
    assert (
        command("--frames", "4", "8", "--batches", "1", "2", "--compare", finetune, "+network.model=linear_probe") == 0
    )
    printed, out = capsys.readouterr().out, tmp_path / "out"
    assert printed.startswith("| configuration") and "side-tuning needs at least two clips" in printed
    content = json.loads((out / "profile.json").read_text())
    rows = {(row["model"], row["frames"], row["batch"]): row for row in content["rows"]}
    assert len(rows) == 12 and content["meta"]["command"][:3] == ["python", "-m", "scripts.profile"]
    side, probe = rows["td4v_side", 4, 2], rows["linear_probe", 4, 2]
    assert side["training_flops"] > side["forward_flops"] > probe["forward_flops"] > 0
    assert side["saved_bytes_a_clip"] > 100 * probe["saved_bytes_a_clip"] > 0
    assert side["peak_bytes"] > side["standing"] > 4 * side["total"] and len(side["training"]) == 2
    assert side["beyond"] > 2 * side["saved_bytes_a_clip"] * 0.9  # what is kept is there at the peak
    assert rows["td4v_side", 4, 1]["training"] == [] and len(rows["td4v_side", 4, 1]["inference"]) == 2
    assert rows["td4v_side", 8, 2]["forward_flops"] == pytest.approx(2 * side["forward_flops"], rel=0.05)
    assert {row["precision"] for row in content["rows"] if row["model"] == "td4v_finetune"} == {"bf16"}
    assert all(0 < row["inference_mfu"] for row in content["rows"])
    text = (out / "profile.md").read_text()
    assert "side.layers.*.block.attn" in text and "network.init false" in text and printed.splitlines()[2] in text
    for name in ("saved_bytes.png", "scaling.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 400 and len(picture.convert("RGB").getcolors(10**6)) > 50


def test_model_flops_leave_recomputation_out(command, tmp_path: Path) -> None:
    method = "network.model=full_finetune"
    assert command("--set", method, "--compare", "+network.recompute=true") == 0
    plain, again = json.loads((tmp_path / "out" / "profile.json").read_text())["rows"]
    assert plain["training_flops"] == again["training_flops"] and again["recompute"]
    assert again["saved_bytes_a_clip"] < 0.7 * plain["saved_bytes_a_clip"]


@pytest.mark.slow
def test_two_processes(command, tmp_path: Path) -> None:
    assert command("--set", "network.model=linear_probe", "--processes", "2") == 0
    alone, both = json.loads((tmp_path / "out" / "profile.json").read_text())["rows"]
    assert (alone["processes"], both["processes"]) == (1, 2) and len(both["training"]) == 2


def test_the_rate_of_several_processes_is_that_of_their_threads(command, tmp_path: Path, monkeypatch, capsys) -> None:
    """However few threads one process has, each of several has one; the share is of what all of them could do."""
    used, threads = [], torch.get_num_threads()
    monkeypatch.setattr(profiling, "matrix_rate", lambda *_: used.append(torch.get_num_threads()) or 1e9 * used[-1])
    monkeypatch.setattr(measure, "seconds_of_processes", lambda *_: [0.5])
    assert command("--set", "network.model=linear_probe", "--processes", str(4 * threads)) == 0
    alone, several = json.loads((tmp_path / "out" / "profile.json").read_text())["rows"]
    assert used == [threads, 4 * threads, 4 * threads, threads] and torch.get_num_threads() == threads
    assert (alone["threads"], several["threads"]) == (threads, 4 * threads)
    assert max(alone["rates"]) == 1e9 * threads and several["rates"] == [4e9 * threads] * 2
    assert "threads" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (OSError("no room"), 1)])
def test_what_was_measured_stays_whatever_ends_the_run(command, tmp_path: Path, monkeypatch, error, status) -> None:
    out, inference = tmp_path / "out", measure._inference
    out.mkdir()
    for name in ("profile.md", "saved_bytes.png", "scaling.png"):
        (out / name).write_text("of another run")
    calls = []

    def ending(*arguments: object) -> None:
        calls.append(None)
        if len(calls) > 1:
            raise error
        inference(*arguments)

    monkeypatch.setattr(measure, "_inference", ending)
    assert command("--set", "network.model=full_finetune", "--batches", "1", "2") == status
    (row,) = json.loads((out / "profile.json").read_text())["rows"]
    assert row["batch"] == 1 and row["inference"] and "full_finetune" in (out / "profile.md").read_text()
    for name in ("saved_bytes.png", "scaling.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100


def test_pictures_of_another_run_go(command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scaling.png").write_text("of another run")
    assert command("--set", "network.model=linear_probe") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"profile.md", "profile.json", "saved_bytes.png"}


def test_no_two_labels_are_alike() -> None:
    specs = [("a/x.yaml", []), ("b/x.yaml", []), ("c/x.yaml", ["solver.lr=1"]), ("d/x.yaml", []), ("a/x.yaml", []),
             ("a/x.yaml", ["network.model=m"]), ("a/x.yaml", ["data.flip=false"])]  # fmt: skip
    assert cases.labels_of(specs, ["m"] * 7, "a/x.yaml") == [
        "m", "m, b/x", "m, x, lr=1", "m, d/x", "m #2", "m #3", "m, flip=false",
    ]  # fmt: skip


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5"])
def test_numbers_that_are_none(command, number: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command(f"--batch={number}")
    assert f"--batch/--batches: must be a whole number above 0, not {number}" in capsys.readouterr().err


def test_a_precision_is_said_once(command, caplog) -> None:
    cases._precision_name.cache_clear()
    with caplog.at_level("INFO", "td4v"):
        assert command("--set", "network.model=linear_probe", "--compare", "+data.num_segments=3", "--batch", "1") == 0
    messages = [record.getMessage() for record in caplog.records]
    assert len([line for line in messages if "precision amp" in line]) == 1 and not [
        line for line in messages if "1 clips" in line
    ]


def test_too_large_a_batch_is_said_in_the_table(command, monkeypatch, tmp_path: Path, capsys) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(profiling, "peak_bytes", fail)
    assert command() == 0
    assert "(1) out of memory" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "out" / "profile.json").read_text())["rows"]
    assert found["notes"] == {"training": "out of memory"} and found["inference"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "network.metod=x"], "network.metod"),
        (["--compare", "no/such.yaml"], "no/such.yaml: cannot read"),
        (["--compare", "+network.model=nothing"], "'nothing' is unknown"),
        (["--compare", "network.model=linear_probe"], "write +network.model=linear_probe"),
        (["--precision", "fp16"], "precision fp16 needs a GPU"),
    ],
)
def test_errors_are_one_sentence(command, caplog, arguments: list[str], sentence: str) -> None:
    assert command(*arguments) == 1
    assert sentence in caplog.records[-1].message and "\n" not in caplog.records[-1].message
