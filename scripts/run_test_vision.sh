#!/usr/bin/env bash
# Tests a checkpoint, or without one CLIP itself, on all GPUs of this machine, or on NPROC CPU processes where there is
# none.
#
#   bash scripts/run_test_vision.sh CONFIG [WEIGHTS] [--test_crops 1|3|5|10] [--test_clips N] [--dense] [--set ...]
#
# Relative paths, those in the configuration too, are meant from where you stand.
#
# Environment: NPROC (processes; default all GPUs, else 1), PYTHON (default python); more in launch.sh.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    usage="usage: bash scripts/run_test_vision.sh CONFIG [WEIGHTS] [--test_crops 1|3|5|10] [--test_clips N] [--dense]"
    echo "$usage: no configuration file ${1:-given}" >&2
    exit 2
fi
root=$(CDPATH="" cd -- "$(dirname -- "$0")/.." && pwd)
config=$1
shift
if [ $# -gt 0 ] && [ -z "$1" ]; then
    echo "run_test_vision.sh: WEIGHTS is empty: name a checkpoint, or leave it out to test CLIP itself" >&2
    exit 2
fi
case ${1:-} in
    "" | -*) ;;
    *) set -- --weights "$@" ;;
esac
exec bash "$root/scripts/launch.sh" "$root/test_vision.py" --config "$config" "$@"
