#!/usr/bin/env bash
# A Ray cluster in a Slurm allocation, one run on it, and its end:
#   sbatch cluster/slurm.sh CONFIG [key.path=value ...]
# The environment (requirements/install.sh), the config, models and run directories lie on a file system that all nodes
# mount. RLHF_VENV names the environment, .venv of the submitting folder by default. Before the time limit the run saves
# and the job queues again; it goes on where it was.
#SBATCH --job-name=rlhf
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@1800
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
umask 077

config=${1:?usage: sbatch cluster/slurm.sh CONFIG [key.path=value ...]}
shift
cd "${SLURM_SUBMIT_DIR:-$PWD}"
# shellcheck disable=SC1091
. "${RLHF_VENV:-.venv}/bin/activate"

# Ports that follow the job's number, so that two jobs on one node do not meet: above the 10002 to 19999 that Ray gives
# to workers, below those that the system hands out. Ray's folder (below) is short because it holds sockets, whose paths
# have 107 bytes at most.
base=$((20000 + SLURM_JOB_ID % 2500 * 5))
gcs=$base dashboard=$((base + 1)) client=$((base + 2)) agent=$((base + 3)) metrics=$((base + 4))

# The token reaches the nodes in the environment that srun hands on, and never stands on a command line.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_worker_niceness=0

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }')
steps=()
# shellcheck disable=SC2329 # the trap calls it
end_steps() {
    ((${#steps[@]} == 0)) || kill "${steps[@]}" 2>/dev/null || true
    wait || true
    rm -rf "/tmp/rlhf-$SLURM_JOB_ID"
}
trap end_steps EXIT

# A step on a node; --block keeps it there. The node itself says how many CPUs of this job it has.
# shellcheck disable=SC2016 # expanded on the node
on_node='exec ray start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_ON_NODE" \
    --min-worker-port=0 --max-worker-port=0 "$@"'
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" bash -c "$on_node" ray \
    --head --node-ip-address="$address" --port="$gcs" --temp-dir="/tmp/rlhf-$SLURM_JOB_ID" \
    --dashboard-host="$address" --dashboard-port="$dashboard" --ray-client-server-port="$client" \
    --dashboard-agent-listen-port="$agent" --metrics-export-port="$metrics" &
steps+=($!)
until (exec 3<>"/dev/tcp/$address/$dashboard") 2>/dev/null; do
    kill -0 "${steps[0]}" 2>/dev/null || { echo "rlhf: the head on $head ended while it started" >&2; exit 1; }
    ((SECONDS < 300)) || { echo "rlhf: the head on $head did not start in 300 s" >&2; exit 1; }
    sleep 1
done
if ((SLURM_JOB_NUM_NODES > 1)); then
    srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$head" bash -c "$on_node" ray \
        --address="$address:$gcs" --dashboard-agent-listen-port="$agent" --metrics-export-port="$metrics" &
    steps+=($!)
fi

# A run that asks for more than the nodes that are there is refused: wait until all are.
python - "$address:$gcs" "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import sys
import time

import ray

address, nodes = sys.argv[1], int(sys.argv[2])
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
until = time.monotonic() + 300
while (there := sum(node["Alive"] for node in ray.nodes())) < nodes:
    if time.monotonic() > until:
        sys.exit(f"rlhf: {there} of {nodes} nodes joined {address} in 300 s")
    time.sleep(1)
PYTHON

export RAY_API_SERVER_ADDRESS="http://$address:$dashboard"
# All paths are on the shared file system. --installed: every node uses the same environment.
job=$(rlhf submit "$config" "$@" 'cluster.shared=[/]' --installed)
stopped=
# shellcheck disable=SC2329 # the trap calls it
stop() {
    stopped=yes
    rlhf submit --stop "$job"
}
trap stop TERM
rlhf submit --logs "$job" --follow &
follower=$!
# wait returns early when the trap runs, while the run is still saving.
code=0
while kill -0 "$follower" 2>/dev/null; do
    code=0
    wait "$follower" || code=$?
done
if [ -n "$stopped" ] && ((code != 0)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
