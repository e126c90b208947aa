#!/usr/bin/env bash
# Train on several machines that may fail, leave and come: start this once on each of them.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: NNODES=MIN:MAX RDZV=HOST:PORT scripts/launch/elastic.sh CONFIG [key=value ...]

Trains CONFIG on MIN to MAX machines with one process per GPU. Run it on every machine, with the
same arguments, code, data path and output folder (a shared file system). They meet at HOST:PORT,
a free port of one of them, which has to live as long as the run. When a process or a machine
fails, or a machine joins, all processes are started again on the machines that are there and go
on from the last checkpoint.

  NNODES=2:4          at least 2 machines, at most 4; or one number
  RDZV=host0:29500    where they meet; the port must be free on host0 and reachable from all
  RUN_ID=name         the same on all machines, another for every run (default: arcshard)
  MAX_RESTARTS=10     restarts after failures, counted by each machine (default 10)
  NPROC=8             processes on this machine, instead of one per GPU
  OMP_NUM_THREADS=2   CPU threads per process (default: cores / NPROC)
  PYTHON=python3      interpreter (default: .venv/bin/python in the repository, else python3)

SIGTERM, SIGUSR1 and Ctrl-C on any machine save the run and end its processes there.

example, on each of two machines:
  NNODES=1:2 RDZV=host0:29500 scripts/launch/elastic.sh configs/ms1mv3_r50 lr_base_batch=2048
USAGE
}

case "${1:-}" in
  "" | -h | --help)
    usage
    [[ $# -gt 0 ]] && exit 0
    exit 2
    ;;
esac

for name in NNODES RDZV; do
  if [[ -z "${!name:-}" ]]; then
    echo "error: $name is not set" >&2
    usage >&2
    exit 2
  fi
done
if [[ ! "$NNODES" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || ((${NNODES%:*} > ${NNODES#*:})); then
  echo "error: NNODES is '$NNODES'; MIN:MAX or one number is needed, as 2:4" >&2
  exit 2
fi
if [[ ! "$RDZV" =~ ^[^:]+:[0-9]+$ ]]; then
  echo "error: RDZV is '$RDZV'; HOST:PORT is needed, as host0:29500" >&2
  exit 2
fi

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec "$PYTHON" -m torch.distributed.run \
  --nnodes="$NNODES" --nproc-per-node="$NPROC" --max-restarts="${MAX_RESTARTS:-10}" \
  --rdzv-backend=c10d --rdzv-endpoint="$RDZV" --rdzv-id="${RUN_ID:-arcshard}" \
  "${torchrun_options[@]}" \
  "$root/train_v2.py" "$@"
