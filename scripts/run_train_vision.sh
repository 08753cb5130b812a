#!/usr/bin/env bash
# Trains a configuration on all GPUs of this machine, or on NPROC CPU processes where there is none.
#
#   bash scripts/run_train_vision.sh configs/ssv2.yaml [--set solver.lr=5e-4 ...] [--log_time NAME] [--output DIR]
#
# The same command goes on with a run that was stopped; the status says why it ended: 0 finished, 75 saved on SIGTERM or
# SIGUSR1 (start it again), 130 saved on Ctrl-C, else an error. On several machines give it on each, with NNODES,
# NODE_RANK and RDZV. Under Slurm: slurm.sh.
#
# Relative paths, those in the configuration too, are meant from where you stand.
#
# Environment, explained in launch.sh: NPROC (processes; default all GPUs, else 1), MAX_RESTARTS (after a failure; default
# 0), NNODES, NODE_RANK, RDZV (machines, this one's place, host:port of the first), PORT (default: a free one),
# TD4V_GRACE (seconds to save; default 120), PYTHON (default python).
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    echo "usage: bash scripts/run_train_vision.sh CONFIG [--set section.key=value ...]: no configuration file ${1:-given}" >&2
    exit 2
fi
root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)
config=$1
shift
exec bash "$root/scripts/launch.sh" "$root/train_vision.py" --config "$config" "$@"
