#!/usr/bin/env bash
# Starts a command of ours under torchrun; run_train_vision.sh and run_test_vision.sh call it.
set -euo pipefail
python=${PYTHON:-python}
processes=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores / processes > 0 ? cores / processes : 1 ))}
if [ -n "${PORT:-}" ]; then
    rendezvous=(--master_port "$PORT")
else
    rendezvous=(--rdzv_backend c10d --rdzv_endpoint localhost:0)
fi
exec "$python" -m scripts.launch --nnodes 1 --nproc_per_node "$processes" "${rendezvous[@]}" "$@"
