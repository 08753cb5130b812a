#!/usr/bin/env bash
# Trains a configuration on all GPUs of this machine, or on NPROC CPU processes if there are none.
#
#   bash scripts/run_train_vision.sh configs/ssv2.yaml [--set solver.lr=5e-4 ...] [--log_time NAME] [--output DIR]
#
# Rerunning the command resumes its unfinished run. Exit status: 0 finished, 75 saved after SIGTERM or SIGUSR1 (rerun the command),
# 130 saved after Ctrl-C, else an error. On several machines, run it on each with NNODES, NODE_RANK and RDZV. Under Slurm,
# use slurm.sh. Paths, also those in the configuration, are relative to the working directory.
#
# Environment: NPROC, MAX_RESTARTS, NNODES, NODE_RANK, RDZV, PORT, TD4V_GRACE, PYTHON; see launch.sh.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    echo "usage: bash scripts/run_train_vision.sh CONFIG [--set section.key=value ...]: no configuration file ${1:-given}" >&2
    exit 2
fi
root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)
config=$1
shift
exec bash "$root/scripts/launch.sh" "$root/train_vision.py" --config "$config" "$@"
