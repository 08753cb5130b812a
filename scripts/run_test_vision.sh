#!/usr/bin/env bash
# Tests a run or a checkpoint, or without one CLIP itself, on all GPUs of this machine, or on NPROC CPU processes if
# there is none.
#
#   bash scripts/run_test_vision.sh RUN_OR_FILE [--test_crops 1|3|5|10] [--test_clips N] [--dense] [--set ...]
#   bash scripts/run_test_vision.sh CONFIG.yaml [RUN_OR_FILE] [...]
#
# A run folder stands for its model_best.pt. Without CONFIG the configuration is the one in the checkpoint. Relative
# paths, those in the configuration too, are meant from where you stand.
#
# Environment: NPROC (processes; default all GPUs, else 1), PYTHON (default python); more in launch.sh.
set -euo pipefail
usage="usage: bash scripts/run_test_vision.sh [CONFIG.yaml] [RUN_OR_FILE] [--test_crops 1|3|5|10] [--test_clips N] [--dense]"
if [ $# -lt 1 ] || [ ! -e "$1" ]; then
    echo "$usage: no run, checkpoint or configuration ${1:-given}" >&2
    exit 2
fi
root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)
words=()
case $1 in
    *.yaml | *.yml)
        words=(--config "$1")
        shift
        ;;
esac
if [ $# -gt 0 ] && [ -z "$1" ]; then
    echo "run_test_vision.sh: WEIGHTS is empty: name a run or a checkpoint, or leave it out to test CLIP itself" >&2
    exit 2
fi
case ${1:-} in
    "" | -*) ;;
    *) words+=(--weights "$1") && shift ;;
esac
exec bash "$root/scripts/launch.sh" "$root/test_vision.py" ${words[@]+"${words[@]}"} "$@"
