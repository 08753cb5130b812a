#!/usr/bin/env bash
# Starts a command in several processes; run_train_vision.sh and run_test_vision.sh call it.
#
# Environment:
#   NPROC            processes on this machine (default: all GPUs, else 1)
#   PORT             port for the processes of one machine (default: a free one)
#   MAX_RESTARTS     restarts of all processes after a failure (default: 0)
#   NNODES           machines (default: 1); with more, run the same command on each and set the next two
#   NODE_RANK        0 on the first machine, 1, 2, ... on the others
#   RDZV             host:port of the first machine, where all meet
#   TD4V_GRACE       seconds that a process gets to finish its step and save after a signal (default: 120)
#   OMP_NUM_THREADS  threads a process (default: cores / NPROC)
#   PYTHON           default: python
# After SIGTERM, SIGUSR1 or a closed terminal the run is saved and the status is 75. After Ctrl-C it is saved, status 130;
# a second Ctrl-C kills it.
#
# Paths, also those in the configuration, are relative to the working directory. Only the code is taken from this repository.
root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python}" "$root/scripts/launch/__main__.py" "$@"
