#!/usr/bin/env bash
# Train on several machines: start this once on each of them, with its own NODE_RANK.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: NNODES=N NODE_RANK=K MASTER_ADDR=HOST scripts/launch/dist.sh CONFIG [key=value ...]

Trains CONFIG on N machines with one process per GPU. Run it on every machine, with the same
arguments, code and data path; only NODE_RANK differs.

  NNODES=4            machines in all
  NODE_RANK=0         this machine's number, 0 .. NNODES-1
  MASTER_ADDR=host0   name or address of machine 0, reachable from all
  MASTER_PORT=29500   a free TCP port there (default 29500)
  NPROC=8             processes on this machine, instead of one per GPU
  OMP_NUM_THREADS=2   CPU threads per process (default: cores / NPROC)
  PYTHON=python3      interpreter (default: .venv/bin/python in the repository, else python3)

A fixed set of machines; if one is lost the run ends, with its checkpoints. elastic.sh goes on with
those that are left. SIGTERM, SIGUSR1 and Ctrl-C on any machine save the run and end it.

example, on the second of four machines:
  NNODES=4 NODE_RANK=1 MASTER_ADDR=host0 scripts/launch/dist.sh configs/wf42m_pfc03_32gpu_r100
USAGE
}

case "${1:-}" in
  "" | -h | --help)
    usage
    [[ $# -gt 0 ]] && exit 0
    exit 2
    ;;
esac

for name in NNODES NODE_RANK MASTER_ADDR; do
  if [[ -z "${!name:-}" ]]; then
    echo "error: $name is not set" >&2
    usage >&2
    exit 2
  fi
done
for name in NNODES NODE_RANK; do
  if [[ ! "${!name}" =~ ^[0-9]+$ ]]; then
    echo "error: $name is '${!name}'; a whole number is needed" >&2
    exit 2
  fi
done
if ((10#$NODE_RANK >= 10#$NNODES)); then
  echo "error: NODE_RANK is $NODE_RANK; with NNODES=$NNODES it is 0 .. $((10#$NNODES - 1))" >&2
  exit 2
fi

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec "$PYTHON" -m torch.distributed.run \
  --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="$NPROC" \
  --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
  --max-restarts=0 "${torchrun_options[@]}" \
  "$root/train_v2.py" "$@"
