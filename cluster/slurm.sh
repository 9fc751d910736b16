#!/usr/bin/env bash
# A Ray cluster inside a SLURM job, and one run on it:
#   sbatch --nodes=4 --gpus-per-node=8 cluster/slurm.sh storage_path=/scratch/runs name=first engine=zero2
# The words are those of unimrg.train. The run is told to save before the time ends, or when it is preempted, and the job
# is put into the queue again: it goes on from the last checkpoint of its name. So give it a name.
#SBATCH --job-name=unimrg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

PAUSED=75 # what unimrg.train ends with when it has saved and isn't done (cluster/trainer.py)
port=${RAY_PORT:-6379}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}

# Whoever has the token can run code as you: it is made for this job, and srun hands the environment on.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

steps=()
cleanup() {
    if ((${#steps[@]})); then
        kill "${steps[@]}" 2>/dev/null || true
        wait "${steps[@]}" 2>/dev/null || true
    fi
}
trap cleanup EXIT

address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{print $1}'):$port
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --block --node-ip-address="${address%:*}" --port="$port" --dashboard-host=127.0.0.1 &
steps+=($!)
# `ray start` waits for a head that isn't there yet, for a minute.
for node in "${nodes[@]:1}"; do
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" ray start --block --address="$address" &
    steps+=($!)
done

# The driver runs here, on the first node, when all have come.
export RAY_ADDRESS=$address
for _ in $(seq 60); do
    if up=$(ray list nodes --filter state=ALIVE --format json 2>/dev/null | grep -c '"node_id"') &&
        ((up >= ${#nodes[@]})); then
        break
    fi
    sleep "${RAY_POLL_SECONDS:-5}"
done
if ((${up:-0} < ${#nodes[@]})); then
    echo "only ${up:-0} of ${#nodes[@]} nodes have come" >&2
    exit 1
fi

python -m unimrg.train "$@" &
run=$!
trap 'kill -TERM "$run"' TERM
status=0
wait "$run" || status=$?
if ((status > 128)); then # the wait was interrupted by the signal, not the run
    status=0
    wait "$run" || status=$?
fi
if ((status == PAUSED)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
