#!/usr/bin/env bash
# Starts a command of ours in several processes; run_train_vision.sh and run_test_vision.sh call it.
#
# Environment:
#   NPROC            processes on this machine; default all GPUs, else 1
#   PORT             on which processes of one machine meet; default a free one
#   MAX_RESTARTS     how often all processes are started again when one fails; default 0
#   NNODES           machines, default 1; with more, the same command runs on each, with the two that follow
#   NODE_RANK        0 on the first machine, 1, 2, ... on the others
#   RDZV             host:port of the first machine, where all meet
#   TD4V_GRACE       seconds that a process has to finish its step and save when asked to stop; default 120
#   OMP_NUM_THREADS  threads a process; default cores / NPROC
#   PYTHON           default python
# SIGTERM, SIGUSR1, a closed terminal: the run is saved, status 75. Ctrl-C: the same, status 130; a second one kills.
#
# Paths are meant from where the user stands; only our own code is found from here, whatever is called `scripts` there.
root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python}" "$root/scripts/launch/__main__.py" "$@"
