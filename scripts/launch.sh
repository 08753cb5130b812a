#!/usr/bin/env bash
# Starts a command of ours under torchrun; run_train_vision.sh and run_test_vision.sh call it.
#
# Environment:
#   NPROC         processes on this machine; default all GPUs, else 1
#   PORT          on which processes of one machine meet; default a free one
#   MAX_RESTARTS  how often all processes are started again when one fails; default 0
#   NNODES        machines, default 1; with more, the same command runs on each, with the two that follow
#   NODE_RANK     0 on the first machine, 1, 2, ... on the others
#   RDZV          host:port of the first machine, where all meet
#   TD4V_GRACE    seconds that a process has to finish its step and save when asked to stop; default 120
#   OMP_NUM_THREADS  threads a process; default cores / NPROC
#   PYTHON        default python
# SIGTERM, SIGUSR1, a closed terminal: the run is saved, status 75. Ctrl-C: the same, status 130; a second one kills.
set -euo pipefail
trap 'exit 75' TERM USR1 HUP
python=${PYTHON:-python}
nodes=${NNODES:-1}
processes=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores / processes > 0 ? cores / processes : 1 ))}
# A store that outlives a restart has the dead processes' addresses, which the new ones take for each other's.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ "$nodes" != 1 ]; then
    RDZV=${RDZV:-}
    if [ -z "${NODE_RANK:-}" ] || [ "$RDZV" = "${RDZV%:*}" ]; then
        echo "NNODES=$nodes needs NODE_RANK=0 to $((nodes - 1)), and RDZV=HOST:PORT of machine 0, the same on all" >&2
        exit 2
    fi
    host=${RDZV%:*}
    address=$host  # of this machine for the others: no name, which they may not know
    if [ "$NODE_RANK" != 0 ]; then
        towards='import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM); s.connect((sys.argv[1], 9)); print(s.getsockname()[0])'
        address=$("$python" -c "$towards" "$host" 2> /dev/null) || { echo "RDZV=$RDZV: there is no way to $host" >&2; exit 2; }
    fi
    rendezvous=(--rdzv_backend c10d --rdzv_endpoint "$RDZV" --rdzv_id td4v --local_addr "$address")
    rendezvous+=(--rdzv_conf "is_host=$(( NODE_RANK == 0 ))")
elif [ -n "${PORT:-}" ]; then
    rendezvous=(--master_port "$PORT")
else
    rendezvous=(--rdzv_backend c10d --rdzv_endpoint localhost:0)
fi
exec "$python" -m scripts.launch --nnodes "$nodes" --nproc_per_node "$processes" --max_restarts "${MAX_RESTARTS:-0}" \
    "${rendezvous[@]}" "$@"
