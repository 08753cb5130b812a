"""torchrun's agent, which starts the workers of one machine, with other rules for how a run ends.

A signal to the launcher is passed on to the workers, which get TD4V_GRACE seconds instead of 30 to finish their step and
save. Workers that stopped on request are never restarted. The launcher's exit status says what to do next. Workers end
with their launcher, even if it is killed. Each event is logged in one sentence.
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

RESUMABLE = 75  # a worker's exit status: stopped on request and saved; rerunning the command resumes it
logger = logging.getLogger("td4v")


class Agent(LocalElasticAgent):
    """Starts the workers of this machine and watches over them.

    Args:
        grace: seconds that workers get to end by themselves.
        stop: the signals that request it. While the workers end, all but Ctrl-C are ignored; Ctrl-C kills them.
        node: the rank of this machine; None lets the rendezvous number the machines by their addresses.
    """

    def __init__(self, *args: Any, grace: int, stop: Iterable[signal.Signals], node: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.grace, self.stop, self.node = grace, tuple(stop), node

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        if self.node is not None:  # workers meet on machine 0, whatever the rendezvous chose
            store = PrefixStore("workers", worker_group.store)
            meeting = RendezvousStoreInfo.build(self.node, store, worker_group.spec.local_addr)
            worker_group.master_addr, worker_group.master_port = meeting.master_addr, meeting.master_port

    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        node = group_rank if self.node is None else self.node
        return super()._assign_worker_ranks(store, node, group_world_size, spec)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None) -> None:
        """Ask the workers to end, and wait. Newer versions of torch pass a `timeout` of 30 seconds, which is ignored."""
        if self._pcontext is not None:
            ignored = [number for number in self.stop if number != signal.SIGINT]
            before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
            try:
                self._pcontext.close(signal.SIGTERM if death_sig == signal.SIGHUP else death_sig, self.grace)
            except SignalException:
                logger.warning("interrupted again: the processes are killed and lose what they had not saved")
                self._pcontext.close(signal.SIGKILL)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        super()._shutdown(death_sig)  # no worker is alive any more

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            failure = _first(result.failures)
            if failure.exitcode == RESUMABLE:
                self._remaining_restarts = 0
            else:
                left = self._remaining_restarts
                then = f"all are restarted ({left} of {worker_group.spec.max_restarts} restarts left)"
                logger.error("a process %s%s", _ending(failure), f": {then}" if left else "")
        return result

    def failures(self) -> Mapping[int, ProcessFailure] | None:
        """Those of workers with an exit status other than 0, after all have ended; None if there were no workers."""
        result = self._pcontext.wait(0) if self._pcontext is not None else None
        return None if result is None else result.failures


def launch(arguments: list[str], stop: Mapping[signal.Signals, int], grace: int, node: int | None = None) -> int:
    """Run a script in processes of this machine, as torchrun does.

    Args:
        arguments: torchrun's.
        stop: signals that end the run, with the status for each.
        grace: seconds that workers have to end by themselves after a signal.
        node: the rank of this machine among several.
    Returns:
        the exit status: 0 if all workers ended with 0, even if a signal came meanwhile; that of `stop` after a signal
        (75: rerunning the command resumes the run), unless the first worker failed to stop; 75 if workers stopped
        without a signal to the launcher; else the status of the first worker that failed, or 1.
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
            "the machines did not find or lost each other: check RDZV, and that all were started and none has ended (%s)",
            error,
        )
        return 1
    finally:
        for number in stop:
            signal.signal(number, signal.SIG_IGN)  # there are no workers left to stop
    if result is None or not result.is_failed():
        return 0
    failure = _first(result.failures)
    return failure.exitcode if failure.exitcode > 0 else 1


def _agent(arguments: list[str], stop: Mapping[signal.Signals, int], grace: int, node: int | None) -> Agent:
    """The agent that torch.distributed.launcher.launch_agent would make of torchrun's arguments."""
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
        args=(str(Path(__file__).with_name("die_with_parent.py")), str(os.getpid()), command, *command_arguments),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=host if static else None,
        master_port=int(port) if static else None,
        local_addr=config.local_addr,
    )
    return Agent(spec, config.logs_specs, config.start_method, grace=grace, stop=stop, node=node)


def _first(failures: Mapping[int, ProcessFailure]) -> ProcessFailure:
    """The failure that came first; the others may be its consequences."""
    return min(failures.values(), key=lambda failure: failure.timestamp)


def _ending(failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"ended with status {failure.exitcode}"
    name = signal.Signals(-failure.exitcode).name
    guesses = {
        "SIGKILL": " (by hand, or out of memory: see dmesg)",
        "SIGABRT": " (perhaps by NCCL, after waiting for another process)",
    }
    return f"was killed by {name}{guesses.get(name, '')}"


def _stopped(failures: Mapping[int, ProcessFailure] | None, status: int, grace: int) -> int:
    """The launcher's exit status after a signal, from the Agent's `failures`."""
    if failures is None:
        return status
    if not failures:  # they had finished; rerunning the command would begin another run
        return 0
    first = failures.get(0)  # rank 0 saves for all; that others lost their connection to it is no failure
    if first is not None and first.exitcode > 0 and first.exitcode != status:
        logger.error("a process %s when it was requested to stop", _ending(first))
        return first.exitcode
    if any(failure.exitcode == -signal.SIGKILL for failure in failures.values()):
        logger.warning(
            "a process had not saved within %d seconds (TD4V_GRACE) and was killed: rerunning the command resumes from the "
            "last checkpoint",
            grace,
        )
    return status
