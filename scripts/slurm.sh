#!/usr/bin/env bash
# Trains under Slurm until the run is finished, across time limits and preemption. Copy it, set the lines below, and
# submit it from the root of this repository with the arguments of run_train_vision.sh:
#
#   sbatch scripts/slurm.sh configs/ssv2.yaml --output exp/ssv2/run1
#
# Three minutes before the time limit (and on `scancel --batch --signal=USR1 JOB`) the run is saved and the job is
# requeued; it then resumes. Preemption with PreemptMode=REQUEUE does the same. `scancel JOB` saves the run and ends the
# job. After an error the job ends with the error's status.
#
#SBATCH --job-name=td4v
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1  # Slurm runs a copy of this file from elsewhere

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES=$SLURM_JOB_NUM_NODES RDZV=$first:$((20000 + SLURM_JOB_ID % 20000))
export TD4V_GRACE=${TD4V_GRACE:-120}  # less than the 180 above
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit it

job="" interrupted=0 cancelled=0
request_stop() {  # by USR1, which srun passes on to the launchers; SIGTERM would end srun itself
    interrupted=1
    [ -z "$job" ] || kill -USR1 "$job" 2> /dev/null
}
trap request_stop USR1
trap 'cancelled=1; request_stop' TERM

# --wait=0: a machine that has saved must not end the others
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash scripts/run_train_vision.sh "$@"' train "$@" &
job=$!
while interrupted=0; wait "$job"; status=$?; [ "$interrupted" = 1 ]; do :; done  # a signal interrupts `wait`, not the job

if [ "$status" = 75 ] && [ "$cancelled" = 0 ]; then
    echo "saved: the job is requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
