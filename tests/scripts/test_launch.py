"""Launchers and signals, for real: who hears of what, who is started again, and with which status it ends."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.launch.__main__ import LaunchError, torchrun_arguments

ROOT = Path(__file__).parents[2]
WORKER = '''
"""Writes what happens to it into a file a process; commands: what to do at first, and when it is asked to stop."""
import os, signal, sys, time
place, first, asked_to, seconds = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
rank, start = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
def say(*words):
    with open(f"{place}/{rank}.txt", "a") as file:
        print(*words, file=file)
local, size, place_to_meet = (os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"))
say("up", "local", local, "of", size, "at", place_to_meet, "pid", os.getpid())
if first != "work" and rank == "1" and not os.path.exists(f"{place}/done"):
    open(f"{place}/done", "w").close()
    time.sleep(0.5)
    os._exit(int(first))
end = time.monotonic() + seconds
while time.monotonic() < end and not (asked and asked_to != "ignore"):
    time.sleep(0.02)
if asked:
    time.sleep(0.3)
    say("saved", asked[0])
    os._exit(130 if asked[0] == "SIGINT" and asked_to == "75" else int(asked_to))
say("finished")
'''
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals between processes as Linux has them")


class Launcher:
    """scripts/launch.sh, given from `place`, with two workers, which write there."""

    def __init__(self, place: Path, first="work", asked_to="75", seconds=30, **environment):
        self.place = place
        (place / "worker.py").write_text(WORKER)
        command = ["bash", ROOT / "scripts/launch.sh", "worker.py", ".", first, asked_to, str(seconds)]
        settings = {"PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **settings},
            cwd=place,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's process group
        )

    def said(self, rank: int) -> list[list[str]]:
        file = self.place / f"{rank}.txt"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for(self, word: str, times: int = 1) -> None:
        """Until each worker has said it so often."""
        end = time.monotonic() + 60
        while any(sum(line[0] == word for line in self.said(rank)) < times for rank in (0, 1)):
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.mark.parametrize(
    ("number", "status"), [("SIGTERM", 75), pytest.param("SIGUSR1", 75, marks=pytest.mark.slow), ("SIGINT", 130)]
)
def test_a_signal_reaches_the_workers_which_save_and_are_not_started_again(tmp_path, number, status):
    launcher = Launcher(tmp_path, MAX_RESTARTS="2")
    launcher.wait_for("up")
    whole_group = number == "SIGINT"  # as a terminal sends it
    (os.killpg if whole_group else os.kill)(launcher.process.pid, signal.Signals[number])
    found, errors = launcher.end()
    assert found == status and errors == ""
    for rank in (0, 1):
        assert [line[0] for line in launcher.said(rank)] == ["up", "saved"] and launcher.said(rank)[1][1] == number


@pytest.mark.parametrize(
    "number", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGUSR1", "SIGINT"))]
)
def test_a_signal_while_the_workers_finish_does_not_begin_another_run(tmp_path, number):
    """They have nothing left to save, and end as they would have."""
    launcher = Launcher(tmp_path, asked_to="0")
    launcher.wait_for("up")
    launcher.process.send_signal(signal.Signals[number])
    assert launcher.end() == (0, "")
    assert [line[0] for line in launcher.said(0)] == ["up", "saved"]


def test_a_signal_before_there_are_workers():
    """While torch is imported: nothing was begun, so it may be started again."""
    process = subprocess.Popen(
        ["bash", "scripts/launch.sh", "worker.py"],
        env={**os.environ, "PYTHON": sys.executable, "NPROC": "1"},
        cwd=ROOT,
        start_new_session=True,
    )
    end, proc = time.monotonic() + 30, Path(f"/proc/{process.pid}")
    while True:  # until it listens
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
        if "python" in status["Name"] and int(status["SigCgt"], 16) >> (signal.SIGUSR1 - 1) & 1:
            break
        assert time.monotonic() < end
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75


def test_a_crash_is_followed_by_a_new_start_as_often_as_allowed(tmp_path):
    launcher = Launcher(tmp_path, first="3", seconds=1, MAX_RESTARTS="1")
    status, errors = launcher.end()
    assert status == 0 and "a process ended with status 3: all are restarted (1 of 1 restarts left)" in errors
    assert [line[0] for line in launcher.said(0)] == ["up", "saved", "up", "finished"]
    assert [line[0] for line in launcher.said(1)] == ["up", "up", "finished"]


def test_without_restarts_the_status_is_that_of_the_crash(tmp_path):
    launcher = Launcher(tmp_path, first="3", seconds=20, PORT=str(random.randrange(20000, 30000)))
    assert launcher.end() == (3, "a process ended with status 3\n")
    assert [line[0] for line in launcher.said(0)] == ["up", "saved"]


def test_a_killed_worker_is_told_of_without_a_guess_too_much(tmp_path):
    launcher = Launcher(tmp_path)
    launcher.wait_for("up")
    os.kill(int(launcher.said(1)[0][-1]), signal.SIGKILL)
    assert launcher.end() == (1, "a process was killed by SIGKILL (by hand, or out of memory: see dmesg)\n")


def test_paths_are_meant_from_where_the_user_stands(tmp_path):
    """Also where what stands there has the names of our packages."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/__init__.py").write_text("raise SystemExit('another one')")
    assert Launcher(tmp_path, seconds=0).end() == (0, "")
    interpreter = tmp_path / "interpreter"
    interpreter.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$PWD" "$PYTHONPATH" "$@" > said\n')
    interpreter.chmod(0o755)
    (tmp_path / "a b.yaml").touch()
    environment = {**os.environ, "PYTHON": str(interpreter), "PYTHONPATH": "theirs", "CDPATH": str(tmp_path)}
    for kind, words in (("train", ["--output", "a run"]), ("test", ["x.pt", "--json", "a result"])):
        script = os.path.relpath(ROOT / f"scripts/run_{kind}_vision.sh", tmp_path)
        subprocess.run(["bash", script, "a b.yaml", *words], cwd=tmp_path, env=environment, check=True)
        expected = [ROOT / "scripts/launch/__main__.py", ROOT / f"{kind}_vision.py", "--config", "a b.yaml"]
        expected += words if kind == "train" else ["--weights", *words]
        place, modules, *command = (tmp_path / "said").read_text().splitlines()
        assert (place, modules, command) == (str(tmp_path), f"{ROOT}:theirs", list(map(str, expected)))


def test_a_worker_that_stops_by_itself_is_not_started_again(tmp_path):
    """A scheduler may ask the workers alone, as srun does."""
    launcher = Launcher(tmp_path, first="75", seconds=20, MAX_RESTARTS="3")
    assert launcher.end() == (75, "")
    assert [line[0] for line in launcher.said(0)] == ["up", "saved"] and len(launcher.said(1)) == 1


@pytest.mark.parametrize(
    ("asked_to", "status", "message"),
    [
        ("ignore", 75, r"had not saved within 1 seconds \(TD4V_GRACE\)"),
        ("1", 1, "ended with status 1 when it was requested"),
    ],
)
def test_workers_that_cannot_save(tmp_path, asked_to, status, message):
    launcher = Launcher(tmp_path, asked_to=asked_to, TD4V_GRACE="1", MAX_RESTARTS="1")
    launcher.wait_for("up")
    launcher.process.terminate()
    found, errors = launcher.end()
    assert found == status
    assert re.search(message, errors)


def test_workers_stop_where_their_launcher_is_killed(tmp_path):
    launcher = Launcher(tmp_path)
    launcher.wait_for("up")
    launcher.process.kill()
    launcher.end()
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{launcher.said(rank)[0][-1]}") for rank in (0, 1)):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert launcher.said(0)[1] == launcher.said(1)[1] == ["saved", "SIGTERM"]


def two_machines(place: Path, **settings) -> list[Launcher]:
    meeting = f"localhost:{random.randrange(20000, 30000)}"
    both = {"NPROC": "1", "NNODES": "2", "RDZV": meeting, **settings.pop("environment", {})}
    return [Launcher(place, NODE_RANK=str(node), **both, **settings) for node in (1, 0)][::-1]


def test_two_launchers_as_two_machines_start_again_together(tmp_path):
    machines = two_machines(tmp_path, first="3", seconds=3, environment={"MAX_RESTARTS": "1"})
    assert [machine.end()[0] for machine in machines] == [0, 0]
    said = [machines[0].said(rank) for rank in (0, 1)]
    assert [line[0] for line in said[0]] == ["up", "saved", "up", "finished"]
    assert [line[0] for line in said[1]] == ["up", "up", "finished"]
    there = ["local", "0", "of", "2", "at", "localhost"]  # machine 0, though the other's 127.0.0.1 comes before it
    assert all(line[1:7] == there for rank in (0, 1) for line in said[rank] if line[0] == "up")
    pids = [line[-1] for line in said[0] if line[0] == "up"]
    assert len(set(pids)) == 2


def test_two_machines_are_both_asked_to_stop(tmp_path):
    machines = two_machines(tmp_path)
    machines[0].wait_for("up")
    for machine in machines:
        machine.process.send_signal(signal.SIGUSR1)
    assert [machine.end() for machine in machines] == [(75, "")] * 2


MEETING = {"NNODES": "2", "NODE_RANK": "1", "RDZV": "localhost:29500"}


def test_arguments_of_torchrun():
    alone = ["--nnodes", "1", "--nproc_per_node", "3", "--max_restarts"]
    assert torchrun_arguments({}, 3) == [*alone, "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    assert torchrun_arguments({"PORT": "5", "MAX_RESTARTS": "2"}, 3) == [*alone, "2", "--master_port", "5"]
    first, second = (torchrun_arguments({**MEETING, "NODE_RANK": node}, 3)[6:] for node in "01")
    common = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:29500", "--rdzv_id", "td4v", "--local_addr"]
    assert first == [*common, "localhost", "--rdzv_conf", "is_host=1"]
    assert second[:7] == common and second[7] in ("127.0.0.1", "::1") and second[8:] == ["--rdzv_conf", "is_host=0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NODE_RANK": ""}, "NNODES=2 needs NODE_RANK=0 to 1, and RDZV=HOST:PORT"),
        ({"RDZV": "localhost"}, "NNODES=2 needs NODE_RANK=0 to 1, and RDZV=HOST:PORT"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2 is too large"),
        ({"RDZV": "no.such.machine.invalid:1"}, "the machine no.such.machine.invalid cannot be reached"),
        ({"NNODES": "two"}, "NNODES must be a whole number of at least 1, not 'two'"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS must be a whole number of at least 0, not '-1'"),
    ],
)
def test_wrong_variables_are_one_sentence(changes, message):
    with pytest.raises(LaunchError) as caught:
        torchrun_arguments({**MEETING, **changes}, 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_variable_ends_the_launcher(tmp_path):
    assert Launcher(tmp_path, TD4V_GRACE="long").end() == (
        1,
        "TD4V_GRACE must be a whole number of at least 0, not 'long'\n",
    )


FAKES = {
    # hands USR1 to its task, as srun does
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n'
    "trap 'kill -USR1 $task' USR1\n"
    'SLURM_NODEID=0 "$@" & task=$!\n'
    "while wait $task; status=$?; [ $status -gt 128 ]; do :; done; exit $status",
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> $CALLS; fi',
    # in the place of python, which runs the launcher
    "interpreter": "trap 'exit 75' USR1\n"
    'echo "$NNODES $NODE_RANK $RDZV $@" >> $CALLS; [ -z "$STATUS" ] || exit $STATUS\n'
    "for i in $(seq 300); do sleep 0.1; done",
}


@pytest.fixture
def slurm(tmp_path):
    """Starts slurm.sh among fakes; returns its process and the file with the calls."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script, calls = shutil.copy(ROOT / "scripts/slurm.sh", tmp_path / "slurm_script"), tmp_path / "calls"
    (tmp_path / "c.yaml").touch()

    def start(**settings) -> tuple[subprocess.Popen, Path]:
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "interpreter"),
            "CALLS": str(calls),
            "STATUS": "",
            "NPROC": "2",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
            **settings,
        }
        command = ["bash", script, str(tmp_path / "c.yaml"), "--output", "a run"]
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
        while not calls.exists():
            assert process.poll() is None
            time.sleep(0.02)
        return process, calls

    return start


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_requeues_what_was_saved_unless_it_was_cancelled(slurm, number, requeued):
    process, calls = slurm()
    process.send_signal(number)
    assert process.wait(20) == 75
    launched, *rest = calls.read_text().splitlines()
    assert rest == (["requeue 123456"] if requeued else [])
    command = f"{ROOT}/scripts/launch/__main__.py {ROOT}/train_vision.py --config /"
    assert launched.startswith(f"2 0 node7:{20000 + 123456 % 20000} {command}")
    assert launched.endswith("/c.yaml --output a run")


@pytest.mark.parametrize(("ending", "requeued"), [("0", []), ("1", []), ("75", ["requeue 123456"])])
def test_slurm_leaves_a_finished_or_failed_run_alone(slurm, ending, requeued):
    process, calls = slurm(STATUS=ending)
    assert process.wait(20) == int(ending)
    assert calls.read_text().splitlines()[1:] == requeued
