#!/usr/bin/env bash
# Trains a configuration on all GPUs of this machine, or on NPROC CPU processes where there is none.
#
#   bash scripts/run_train_vision.sh configs/ssv2.yaml [--set solver.lr=5e-4 ...] [--log_time NAME] [--output DIR]
#
# Environment: NPROC (processes; default all GPUs, else 1), PORT (default: a free one), PYTHON (default python).
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    echo "usage: bash scripts/run_train_vision.sh CONFIG [--set section.key=value ...]: no configuration file ${1:-given}" >&2
    exit 2
fi
# the path is meant from where the user stands
case $1 in /*) config=$1 ;; *) config=$PWD/$1 ;; esac
shift
cd "$(dirname "$0")/.."
exec bash scripts/launch.sh train_vision.py --config "$config" "$@"
