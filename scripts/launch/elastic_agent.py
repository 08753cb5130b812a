"""torchrun's agent, which starts the workers of one machine, taught how runs of ours end.

Lives here: what torchrun does otherwise by default. A signal to the launcher is passed on to the workers, which get
TD4V_GRACE seconds instead of 30 to finish their step and save. Workers that stopped so, whoever asked them, are never
started again. What the launcher exits with says what to do next. Workers end with their launcher even where that one is
killed. And what happened is said in a sentence each.
Does not live here: torchrun's arguments (launch.py).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store
from torch.distributed.elastic.agent.server import RunResult, Worker, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.run import config_from_args, parse_args

START_AGAIN = 75  # a worker's status: stopped on request and saved, the same command goes on
logger = logging.getLogger("td4v")


class Agent(LocalElasticAgent):
    """Starts the workers of this machine and watches over them.

    Args:
        grace: seconds that workers get to end by themselves.
        stop: the signals that ask for it. While the workers end, those but Ctrl-C are ignored; Ctrl-C kills them.
        node: the place of this machine among all; None lets the rendezvous number them, by their addresses.
    """

    def __init__(self, *args: Any, grace: int, stop: Iterable[signal.Signals], node: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.grace, self.stop, self.node = grace, tuple(stop), node

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        if self.node is not None:  # workers meet at the first of them, wherever the rendezvous thought that it is
            store = PrefixStore("workers", worker_group.store)
            meeting = RendezvousStoreInfo.build(self.node, store, worker_group.spec.local_addr)
            worker_group.master_addr, worker_group.master_port = meeting.master_addr, meeting.master_port

    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        node = group_rank if self.node is None else self.node
        return super()._assign_worker_ranks(store, node, group_world_size, spec)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None) -> None:
        """Ask the workers to end, and wait. `timeout` is a newer torch's, which passes its own 30 seconds."""
        if self._pcontext is not None:
            patient = [number for number in self.stop if number != signal.SIGINT]
            former = {number: signal.signal(number, signal.SIG_IGN) for number in patient}
            try:
                self._pcontext.close(signal.SIGTERM if death_sig == signal.SIGHUP else death_sig, self.grace)
            except SignalException:
                logger.warning("interrupted again: the processes are killed, what they had not saved is lost")
                self._pcontext.close(signal.SIGKILL)
            finally:
                for number, handler in former.items():
                    signal.signal(number, handler)
        super()._shutdown(death_sig)  # finds nobody alive

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            failure = _first(result.failures)
            if failure.exitcode == START_AGAIN:
                self._remaining_restarts = 0
            else:
                left = self._remaining_restarts
                then = f"all are started again ({left} of {worker_group.spec.max_restarts} restarts left)"
                logger.error("a process %s%s", _ending(failure), f": {then}" if left else "")
        return result

    def failures(self) -> Mapping[int, ProcessFailure] | None:
        """Of workers that ended otherwise than with status 0, after all have ended; None where there were no workers."""
        result = self._pcontext.wait(0) if self._pcontext is not None else None
        return None if result is None else result.failures


def launch(arguments: list[str], stop: Mapping[signal.Signals, int], grace: int, node: int | None = None) -> int:
    """Run a script in processes of this machine, as torchrun does.

    Args:
        arguments: torchrun's.
        stop: signals that end the run, with the status for each.
        grace: seconds that workers have to end by themselves after a signal.
        node: the place of this machine among several.
    Returns:
        The status to exit with: 0 if all workers ended so, even where a signal came while they did; that of `stop` after
        a signal (75: the same command goes on), unless the first worker failed to stop; 75 where workers stopped without
        the launcher being asked; else the status of the first worker that failed, or 1.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    agent = _agent(arguments, stop, grace, node)
    try:
        result = agent.run()
    except SignalException as stopped:
        return _stopped(agent.failures(), stop.get(stopped.sigval, 128 + stopped.sigval), grace)
    except RendezvousError as error:
        logger.error(
            "the machines lost or did not find each other: is RDZV right, did all start and none end? (%s)", error
        )
        return 1
    finally:
        for number in stop:
            signal.signal(number, signal.SIG_IGN)  # nobody is left to be asked
    if result is None or not result.is_failed():
        return 0
    failure = _first(result.failures)
    return failure.exitcode if failure.exitcode > 0 else 1


def _agent(arguments: list[str], stop: Mapping[signal.Signals, int], grace: int, node: int | None) -> Agent:
    """What torch.distributed.launcher.launch_agent makes of torchrun's arguments."""
    config, command, command_arguments = config_from_args(parse_args(arguments))
    names = [number.name for number in stop]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join([*names, "SIGQUIT"])  # read where workers are started
    static = config.rdzv_backend == "static"
    host, _, port = config.rdzv_endpoint.rpartition(":")
    rendezvous = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=sys.executable,
        args=(str(Path(__file__).with_name("die_with_parent.py")), command, *command_arguments),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=host if static else None,
        master_port=int(port) if static else None,
        local_addr=config.local_addr,
    )
    return Agent(spec, config.logs_specs, config.start_method, grace=grace, stop=stop, node=node)


def _first(failures: Mapping[int, ProcessFailure]) -> ProcessFailure:
    """The failure that was seen first; the others may be its consequences."""
    return min(failures.values(), key=lambda failure: failure.timestamp)


def _ending(failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"ended with status {failure.exitcode}"
    name = signal.Signals(-failure.exitcode).name
    guesses = {
        "SIGKILL": " (by hand, or no memory left: see dmesg)",
        "SIGABRT": " (NCCL gave up waiting for another one?)",
    }
    return f"was killed by {name}{guesses.get(name, '')}"


def _stopped(failures: Mapping[int, ProcessFailure] | None, status: int, grace: int) -> int:
    """The launcher's status after a signal, from how its workers took it: `failures` of Agent."""
    if failures is None:
        return status
    if not failures:  # they had finished, and to begin the command again would begin another run
        return 0
    first = failures.get(0)  # it saves for all; that others lost it while it ended is no failure
    if first is not None and first.exitcode > 0 and first.exitcode != status:
        logger.error("a process %s when it was asked to stop", _ending(first))
        return first.exitcode
    if any(failure.exitcode == -signal.SIGKILL for failure in failures.values()):
        logger.warning(
            "a process had not saved within %d seconds (TD4V_GRACE) and was killed: the same command goes on from the "
            "last checkpoint",
            grace,
        )
    return status
