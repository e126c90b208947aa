#!/usr/bin/env bash
#SBATCH --job-name=arcshard
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Train under Slurm, as often as it takes: 120 s before the time is up, and on preemption, the run
# saves itself and the job goes back into the queue; the next time it goes on from there.
#
#   cd REPOSITORY && sbatch --nodes=4 scripts/launch/slurm.sh CONFIG [key=value ...]
#
# Options of sbatch win over the lines above. One task per machine: torchrun starts the processes
# of its GPUs. MAX_RESTARTS, NPROC, PYTHON as for elastic.sh.
set -euo pipefail

if [[ $# -eq 0 || -z "${SLURM_JOB_ID:-}" ]]; then
  echo "usage: sbatch scripts/launch/slurm.sh CONFIG [key=value ...]" >&2
  exit 2
fi

step=""
asked_to_stop=0
pass_on() {
  asked_to_stop=1
  [[ -z "$step" ]] || kill -USR1 "$step" 2>/dev/null || true # srun hands it to every machine
}
trap pass_on USR1 TERM # from the beginning, so that no signal ends this script alone

# Slurm runs a copy of this file from a folder of its own.
elastic="${SLURM_SUBMIT_DIR:-.}/scripts/launch/elastic.sh"
if [[ ! -f "$elastic" ]]; then
  echo "error: there is no $elastic; call sbatch from the repository's folder" >&2
  exit 2
fi

NNODES="$SLURM_JOB_NUM_NODES"
RDZV="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))"
# A job that was sent back keeps its number: without the count the machines would meet twice.
RUN_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
export NNODES RDZV RUN_ID

config="$1"
shift
if ((asked_to_stop)); then # nothing has begun, so there is nothing to save
  echo "stopped by a signal before the run began: job $SLURM_JOB_ID goes back into the queue"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
# resume=auto: the first time there is nothing to go on from, and the run begins.
srun bash "$elastic" "$config" resume=auto "$@" &
step=$!

code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait`, not srun
  code=0
  wait "$step" || code=$?
done

# torchrun ends with 1 whatever its workers say, so the signal is the sign, not the exit code.
if ((asked_to_stop && code != 0)); then
  echo "stopped by a signal, with the state saved: job $SLURM_JOB_ID goes back into the queue"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
