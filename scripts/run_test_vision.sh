#!/usr/bin/env bash
# Tests a checkpoint on all GPUs of this machine, or on NPROC CPU processes where there is none.
#
#   bash scripts/run_test_vision.sh CONFIG WEIGHTS [--test_crops 1|3|5|10] [--test_clips N] [--dense] [--set ...]
#
# Environment: NPROC (processes; default all GPUs, else 1), PYTHON (default python); more in launch.sh.
set -euo pipefail
if [ $# -lt 2 ] || [ ! -f "$1" ]; then
    echo "usage: bash scripts/run_test_vision.sh CONFIG WEIGHTS [--test_crops 1|3|5|10] [--test_clips N] [--dense]: no configuration file ${1:-given}, or no weights" >&2
    exit 2
fi
# the paths are meant from where the user stands
case $1 in /*) config=$1 ;; *) config=$PWD/$1 ;; esac
case $2 in /*) weights=$2 ;; *) weights=$PWD/$2 ;; esac
shift 2
cd "$(dirname "$0")/.."
exec bash scripts/launch.sh test_vision.py --config "$config" --weights "$weights" "$@"
