#!/usr/bin/env bash
# A job on a Slurm cluster: one Ray node per allocated node, one replica per GPU, the driver on the first node.
#
#   sbatch --nodes=4 --gpus-per-node=1 deploy/slurm.sh \
#       python -m jobs.build_dataset --config configs/digits.yaml --out /shared/runs/digits \
#       compute.device=cuda compute.min_replicas=1 compute.max_replicas=4
#   tail -f slurm-dual-rs-JOBID.out
#   scancel --batch --signal=TERM JOBID     # stop and wait in the queue for the next turn
#   scancel JOBID                           # end for good
#
# Submit it in the checkout, with its .venv on a file system that all nodes share; --out too (or s3://, gs://).
# In a container instead of .venv (made from deploy/Dockerfile): DUALRS_IMAGE=/shared/dual-rs.sif sbatch ... with
# Apptainer, DUALRS_IMAGE=REGISTRY/dual-rs:0.1.0 or /shared/dual-rs.sqsh with pyxis and enroot. What else the job reads or
# writes is named in DUALRS_MOUNTS=/shared,/data.
# Two minutes before the time limit, or when preempted, the driver is stopped cleanly and the job queued again: it goes
# on where it stopped. A driver that fails by itself is not queued again: its exit code is the job's.
#
#SBATCH --job-name=dual-rs
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120

set -euo pipefail
umask 077

if (($# == 0)); then
    echo "usage: sbatch [options] deploy/slurm.sh python -m jobs.build_dataset --config ... --out ..." >&2
    exit 2
fi

cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
image=${DUALRS_IMAGE:-}
inside=()    # before every command: Apptainer
container=() # srun's options: pyxis
mounts="$PWD,/tmp${DUALRS_MOUNTS:+,$DUALRS_MOUNTS}"
if [[ $image == *.sif ]]; then
    inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$image")
elif [[ -n $image ]]; then
    pairs=
    for each in ${mounts//,/ }; do pairs+="${pairs:+,}$each:$each"; done
    container=(--container-image="$image" --container-mounts="$pairs" --container-workdir="$PWD")
else
    export PATH="$PWD/.venv/bin:$PATH"
fi
head=$(hostname -s)                         # the batch script runs on the first node
here=(${inside[@]+"${inside[@]}"})          # before commands that run on it
if ((${#container[@]})); then
    here=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" "${container[@]}")
fi

# Ray's ports are open to everybody on the network, and nodes are shared: a token for this job alone. It is handed on in
# the environment, which only the owner of a process can read: never a file, never a command line.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE RAY_AUTH_TOKEN
export PYTHONUNBUFFERED=1

# Ports that the kernel says are free: Ray's defaults collide with another job's Ray on the same node.
read -r port dashboard_port < <(${here[@]+"${here[@]}"} python -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("", 0))
print(*(s.getsockname()[1] for s in sockets))')

# Local and short: Ray puts sockets there, and their paths may have 107 characters. The job's own, because Ray's default
# /tmp/ray belongs to whoever came first.
temp="/tmp/dual-rs-$SLURM_JOB_ID"
head_ip=$(hostname -I | cut -d ' ' -f 1)
address="$head_ip:$port"

steps=()
driver=
interrupted=

end_steps() {
    # Only what this script started: `ray stop` would end every Ray on the node, another job's too.
    local pid
    for pid in ${steps[@]+"${steps[@]}"}; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in ${steps[@]+"${steps[@]}"}; do wait "$pid" 2>/dev/null || true; done
    srun --overlap --ntasks-per-node=1 rm -rf -- "$temp" || true
}
# shellcheck disable=SC2329 # the trap calls it
on_signal() {
    interrupted=yes
    if [[ -n $driver ]]; then kill -TERM "$driver" 2>/dev/null || true; fi
}
trap end_steps EXIT
trap on_signal TERM USR1

step() { # nodes, nodelist or exclude, command: one task per node, in the background
    srun --overlap --nodes="$1" --ntasks="$1" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
        ${container[@]+"${container[@]}"} "$2" ${inside[@]+"${inside[@]}"} "${@:3}" &
    steps+=("$!")
}

step 1 --nodelist="$head" \
    ray start --head --block --node-ip-address="$head_ip" --port="$port" --temp-dir="$temp" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" --dashboard-agent-listen-port=0 --disable-usage-stats
for ((tries = 0; ; tries++)); do
    if [[ -n $interrupted ]]; then break; fi
    if ${here[@]+"${here[@]}"} ray health-check --address "$address" >/dev/null 2>&1; then break; fi
    if ((tries == 60)); then
        echo "error: Ray's head did not start on $head ($address); its logs were in $temp" >&2
        exit 1
    fi
    sleep "${DUALRS_POLL_S:-2}"
done
if ((SLURM_JOB_NUM_NODES > 1)) && [[ -z $interrupted ]]; then
    step "$((SLURM_JOB_NUM_NODES - 1))" --exclude="$head" \
        ray start --block --address="$address" --temp-dir="$temp" --dashboard-agent-listen-port=0
fi

status=130
if [[ -z $interrupted ]]; then
    # The jobs join the cluster that RAY_ADDRESS names. Workers that are still starting join it later.
    RAY_ADDRESS="$address" ${here[@]+"${here[@]}"} "$@" &
    driver=$!
    # A signal ends `wait` and not the driver, which is ending: wait again until it is gone.
    while true; do
        status=0
        wait "$driver" || status=$?
        kill -0 "$driver" 2>/dev/null || break
    done
fi

if [[ -n $interrupted ]] && ((status != 0)); then
    # Before the requeue, which ends this script wherever it is.
    trap - EXIT
    end_steps
    echo "interrupted: queued again, goes on from what is committed"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
