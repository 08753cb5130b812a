"""What a run survives: real training processes are killed and stopped at random moments, alone, as ranks and under the
launcher; rerunning the command must finish the run as if nothing had happened.

Each test's docstring is its row in the table that `python -m tests.helpers.fault_runs` prints. "Ends equal" means that
the checkpoints, bit for bit, and metrics.jsonl and TensorBoard's records, except timings, are those of a run that was
not disturbed.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.fault_harness import (
    KINDS,
    RICH,
    SHARED,
    SHARED_RICH,
    WORKERS,
    ChildProcess,
    FaultHarness,
    content,
    differences,
    each_round,
    finish,
    free_port,
    seeded_random,
    step_of,
    wait_for,
    wait_until,
    workers_of,
)


def test_differences_are_seen(harness: FaultHarness, reference):
    """(The comparison itself: another seed, a step twice, a lost step are found)"""
    one, other = reference(), harness.path()
    assert differences(one, one) == []
    shutil.copytree(reference("seed=6"), other)
    found = " ".join(differences(one, other))
    assert all(
        name in found for name in ("model_state_dict", "rng/0/torch", "optimizer", "metrics", "curve train/loss")
    )
    twice, lost = harness.path(), harness.path()
    shutil.copytree(one, twice)
    shutil.copytree(one, lost)
    (events,) = one.glob("events*")
    shutil.copy(events, twice / f"{events.name}.1")
    (path,) = lost.glob("events*")
    path.write_bytes(events.read_bytes()[:-30])
    assert any("twice" in name for name in differences(one, twice))
    assert differences(one, lost) and all(name.startswith("curve epoch/") for name in differences(one, lost))


@each_round
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_steps(harness: FaultHarness, reference, kind: str, seed: int):
    """kill -9 of a one-process run at random steps, in evaluations, up to three times a run: ends equal"""
    overrides, rng, folder = KINDS[kind], seeded_random(seed, kind), harness.path()
    undisturbed = reference(*overrides)
    for _ in range(rng.randint(1, 3)):
        run, since = harness.train(folder, *overrides), step_of(folder)
        wait_for(folder, rng.randint(1, step_of(undisturbed)), run, since=since)
        time.sleep(rng.random() * 0.02)
        run.kill()
        assert run.wait() in (-signal.SIGKILL, 0)
    finish(harness, folder, undisturbed, *overrides)


@each_round
def test_killed_at_times(harness: FaultHarness, reference, seed: int, record_property):
    """kill -9 of a one-process run at random times, from its start on, six times a run: ends equal"""
    rng, folder = seeded_random(seed, "times"), harness.path()
    record_property("tried", 6)
    for _ in range(6):
        run = harness.train(folder, *RICH)
        time.sleep(rng.random() * 0.6)
        run.kill()
        assert run.wait() in (-signal.SIGKILL, 0), run.printed
    finish(harness, folder, reference(*RICH), *RICH)


@each_round
def test_killed_without_a_named_folder(harness: FaultHarness, reference, seed: int):
    """kill -9 of a run whose command names no folder: rerunning it resumes the run, ends equal"""
    rng, home = seeded_random(seed, "home"), harness.path("exp")
    here = f"logging.output_dir={home}"
    run = harness.train(None, here)
    wait_until(lambda: list(home.rglob("last_model.pt")))
    time.sleep(rng.random() * 0.2)
    run.kill()
    run.wait()
    again = harness.train(None, here)
    assert again.wait() == 0, again.printed
    (folder,) = (path.parent for path in home.rglob("run.json"))
    left = [name for name in differences(reference(), folder) if not name.endswith("output_dir")]
    assert not left, left


@pytest.fixture(scope="module")
def operations(harness: FaultHarness) -> int:
    """How often a plain run opens, renames, links or removes a file in its folder."""
    folder = harness.path() / "run"
    folder.parent.mkdir()
    counted = harness.train(folder, first={"kill_at_file_operation": {"number": 0, "folder": str(folder)}})
    assert counted.wait() == 0, counted.printed
    return len((folder.parent / "operations").read_text().splitlines())


def _killed_at(harness: FaultHarness, undisturbed: Path, *numbers: int) -> None:
    folder = harness.path()
    for number in numbers:
        run = harness.train(folder, first={"kill_at_file_operation": {"number": number, "folder": str(folder)}})
        assert run.wait() in (-signal.SIGKILL, 0), f"operations {numbers}: {run.printed}"
    run = harness.train(folder)
    assert run.wait() == 0, f"operations {numbers}: {run.printed}"
    assert not (found := differences(undisturbed, folder)), (numbers, found)


@each_round
def test_killed_at_file_operations(harness: FaultHarness, reference, operations: int, seed: int, record_property):
    """kill -9 just before a file is opened, renamed, linked or removed, and again in the next start: ends equal"""
    rng = seeded_random(seed, "operations")
    record_property("tried", 3)
    for _ in range(3):
        _killed_at(harness, reference(), rng.randint(1, operations), rng.randint(1, operations))


@pytest.mark.slow
def test_killed_at_each_file_operation(harness: FaultHarness, reference, operations: int, record_property):
    """kill -9 just before each single time that a run opens, renames, links or removes a file: ends equal"""
    failed = []
    for number in range(1, operations + 1):
        try:
            _killed_at(harness, reference(), number)
        except AssertionError as error:
            failed.append(f"{number}: {error}")
    record_property("tried", operations)
    record_property("survived", operations - len(failed))
    assert not failed, "\n".join(failed)


@each_round
@pytest.mark.parametrize(
    ("processes", "killed"),
    [(2, (0,)), (2, (1,)), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((2, (0, 1)), (3, (2,)))),
     (3, (0, 1, 2))],
)  # fmt: skip
def test_ranks_are_killed(harness: FaultHarness, reference, processes: int, killed: tuple[int, ...], seed: int):
    """kill -9 of one or all of two or three ranks at a random step: the others end by themselves, ends equal"""
    chosen = SHARED_RICH if len(killed) == processes else SHARED
    undisturbed, rng, folder = (
        reference(*chosen, processes=processes),
        seeded_random(seed, f"{processes}{killed}"),
        harness.path(),
    )
    ranks = harness.ranks(processes, folder, *chosen)
    wait_for(folder, rng.randint(1, step_of(undisturbed) - 1), *ranks)
    time.sleep(rng.random() * 0.02)
    for rank in killed:
        ranks[rank].kill()
    assert all(rank.wait() in (0, 1, -signal.SIGKILL) for rank in ranks)
    ranks = harness.ranks(processes, folder, *chosen)
    assert [rank.wait() for rank in ranks] == [0] * processes, [rank.printed for rank in ranks]
    assert not (found := differences(undisturbed, folder)), found


STATUS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
# SIGUSR1 goes the way of SIGTERM
SIGNALS = [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow), signal.SIGINT]


@each_round
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_stop_requested(harness: FaultHarness, reference, number: signal.Signals, seed: int):
    """SIGTERM, SIGUSR1 or Ctrl-C at a random step, without checkpoints in between: saved, status 75 or 130, ends equal"""
    overrides = (*WORKERS, "checkpoint.every_steps=")
    undisturbed, rng, folder = reference(*overrides), seeded_random(seed, number.name), harness.path()
    while True:
        run, since = harness.train(folder, *overrides), step_of(folder)
        wait_for(folder, rng.randint(3, 12), run, since=since)
        run.kill(number, group=number == signal.SIGINT)
        status = run.wait()
        assert "Traceback" not in run.printed and not run.errors, run.printed
        if status == 0:
            break
        assert status == STATUS[number] and "rerun the same command to resume" in run.printed, run.printed
        assert content(folder / "last_model.pt")["step"] > 0
    assert not (found := differences(undisturbed, folder)), found


@each_round
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_stop_requested_at_any_time(harness: FaultHarness, reference, number: signal.Signals, seed: int):
    """SIGTERM, SIGUSR1 or Ctrl-C at a random time from the start on: status 75 or 130, one sentence, ends equal"""
    rng, folder = seeded_random(seed, f"any {number.name}"), harness.path()
    for _ in range(3):
        run = harness.train(folder)
        time.sleep(0.02 + rng.random() * 0.4)
        run.kill(number)
        assert run.wait() in (STATUS[number], 0) and "Traceback" not in run.printed, (run.poll(), run.printed)
    finish(harness, folder, reference())


@each_round
@pytest.mark.parametrize(
    ("stopped", "number"),
    [
        pytest.param((0,), signal.SIGTERM, marks=pytest.mark.slow),
        ((1,), signal.SIGUSR1),
        ((0, 1), signal.SIGTERM),
        ((0, 1), signal.SIGINT),
    ],
    ids=["rank 0", "rank 1", "both", "both, Ctrl-C"],
)
def test_stop_requested_of_ranks(
    harness: FaultHarness, reference, number: signal.Signals, stopped: tuple[int, ...], seed: int
):
    """SIGTERM, SIGUSR1 or Ctrl-C to one or both of two ranks at a random step, to both in evaluations too: both save and
    stop, 75 or 130, ends equal"""
    overrides = (*SHARED, "checkpoint.every_steps=")
    undisturbed, rng, folder = (
        reference(*overrides, processes=2),
        seeded_random(seed, f"{number.name} {stopped}"),
        harness.path(),
    )
    ranks = harness.ranks(2, folder, *overrides)
    # of eight steps an epoch, each of which is logged when the next one is issued; one rank alone is stopped only in these
    wait_for(folder, rng.randint(1, 6 if len(stopped) == 1 else 16), *ranks)
    for rank in stopped:
        ranks[rank].kill(number)
    assert [rank.wait() for rank in ranks] == [STATUS[number]] * 2, [rank.printed for rank in ranks]
    ranks = harness.ranks(2, folder, *overrides)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.printed for rank in ranks]
    assert not (found := differences(undisturbed, folder)), found


@each_round
def test_two_runs_at_once(harness: FaultHarness, reference, seed: int, record_property):
    """Two starts into one folder within a second: one is refused in one sentence, the other is not disturbed"""
    first = {"slow_steps": {"seconds": 0.08}, "patience": {"seconds": 0.5}}
    record_property("tried", 2)
    for delay in (0, seeded_random(seed, "two").random()):
        folder = harness.path()
        runs = [harness.train(folder, first=first)]
        time.sleep(delay)
        runs.append(harness.train(folder, first=first))
        assert sorted(run.wait() for run in runs) == [0, 1], [run.printed for run in runs]
        sentence = next(run for run in runs if run.poll() == 1).refusal()
        assert str(folder) in sentence and ("another process is using" in sentence or "already holds" in sentence)
        assert not (found := differences(reference(), folder)), found


@each_round
def test_the_next_start_waits(harness: FaultHarness, reference, seed: int):
    """Restarted while the previous process still saves on request: waits for it, ends equal"""
    folder = harness.path()
    first = harness.train(folder, first={"slow_steps": {"seconds": 0.1}})
    wait_for(folder, seeded_random(seed, "waits").randint(1, 2), first)
    for number in (signal.SIGTERM, signal.SIGSTOP):  # however slow this machine is, it saves when the next has come
        first.kill(number)
    again = harness.train(folder)
    wait_until(lambda: f"{folder} is used by process {first.pid}" in again.printed or again.poll() is not None)
    first.kill(signal.SIGCONT)
    assert (first.wait(), again.wait()) == (75, 0), again.printed
    assert not (found := differences(reference(), folder)), found


def _launched(
    harness: FaultHarness, folder: Path, undisturbed: Path, processes: int = 2, **variables: str
) -> ChildProcess:
    """Rerun the command under the launcher: it must finish the run, equal to the reference."""
    run = harness.launch(processes, folder, *SHARED, **variables)
    assert run.wait() == 0, run.printed
    assert not (found := differences(undisturbed, folder)), found
    return run


@pytest.mark.slow
@each_round
@pytest.mark.parametrize("killed", ["rank 0", "rank 1", "all ranks", "the launcher", "everything"])
def test_killed_under_the_launcher(harness: FaultHarness, reference, killed: str, seed: int):
    """kill -9 of a rank, of all ranks, of the launcher, of everything under the launcher: ends equal"""
    undisturbed, rng, folder = reference(*SHARED, processes=2), seeded_random(seed, killed), harness.path()
    launcher = harness.launch(2, folder, *SHARED)
    workers = workers_of(launcher)
    wait_for(folder, rng.randint(1, step_of(undisturbed) - 1), launcher)
    chosen = {"rank": workers[-1:], "all": workers, "the": [], "everything": workers}[killed.split()[0]]
    for pid in workers[:1] if killed == "rank 0" else chosen:
        os.kill(pid, signal.SIGKILL)
    if killed in ("the launcher", "everything"):
        launcher.kill()
    assert launcher.wait() in (1, -signal.SIGKILL, 0), launcher.printed
    _launched(harness, folder, undisturbed)


@pytest.mark.slow
@each_round
@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_stop_requested_of_the_launcher(harness: FaultHarness, reference, number: signal.Signals, seed: int):
    """SIGTERM, SIGUSR1 or Ctrl-C to the launcher: saved by the ranks, status 75 or 130, ends equal"""
    overrides = (*SHARED, "checkpoint.every_steps=")
    undisturbed, rng, folder = (
        reference(*overrides, processes=2),
        seeded_random(seed, f"launcher {number.name}"),
        harness.path(),
    )
    launcher = harness.launch(2, folder, *overrides)
    wait_for(folder, rng.randint(1, 10), launcher)
    launcher.kill(number, group=number == signal.SIGINT)
    assert launcher.wait() == STATUS[number] and "rerun the same command to resume" in launcher.printed, (
        launcher.printed
    )
    assert "Traceback" not in launcher.printed, launcher.printed
    again = harness.launch(2, folder, *overrides)
    assert again.wait() == 0 and not (found := differences(undisturbed, folder)), (again.printed, found)


@pytest.mark.slow
@each_round
def test_restarted_by_itself(harness: FaultHarness, reference, seed: int):
    """MAX_RESTARTS=3, a rank killed -9 two times: started again by itself, ends equal"""
    undisturbed, rng, folder = reference(*SHARED, processes=2), seeded_random(seed, "restarts"), harness.path()
    launcher = harness.launch(2, folder, *SHARED, MAX_RESTARTS="3")
    killed: set[int] = set()
    for _ in range(2):
        since = step_of(folder)
        assert wait_for(folder, rng.randint(1, 6), launcher, since=since), launcher.printed
        workers = workers_of(launcher)
        assert not killed & set(workers)
        killed |= set(workers)
        os.kill(rng.choice(workers), signal.SIGKILL)
    assert launcher.wait() == 0, launcher.printed
    assert not (found := differences(undisturbed, folder)), found


@pytest.mark.slow
@each_round
def test_two_nodes(harness: FaultHarness, reference, seed: int):
    """Two agents on one machine as two nodes, one killed with its rank: the other ends, both started again: ends equal"""
    undisturbed, rng, folder = reference(*SHARED, processes=2), seeded_random(seed, "nodes"), harness.path()

    def start() -> list[ChildProcess]:
        meet = {"NNODES": "2", "RDZV": f"127.0.0.1:{free_port()}"}
        return [harness.launch(1, folder, *SHARED, NODE_RANK=str(node), **meet) for node in (0, 1)]

    nodes = start()
    wait_for(folder, rng.randint(1, step_of(undisturbed) - 1), *nodes)
    lost = rng.randrange(2)
    nodes[lost].kill(group=True)
    assert nodes[lost].wait() in (-signal.SIGKILL, 0)
    assert nodes[1 - lost].wait() in (1, 75, 0), nodes[1 - lost].printed
    nodes = start()
    assert [node.wait() for node in nodes] == [0, 0], [node.printed for node in nodes]
    assert not (found := differences(undisturbed, folder)), found
