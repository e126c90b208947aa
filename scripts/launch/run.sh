#!/usr/bin/env bash
# Train on one machine: one process per GPU, or NPROC processes.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: scripts/launch/run.sh CONFIG [key=value ...]

Trains CONFIG on this machine with one process per GPU (one process where there is no GPU).

  NPROC=4             processes to start, instead of one per GPU
  MAX_RESTARTS=3      how often the processes are started again when one of them fails (default
                      0); they go on from the last checkpoint
  OMP_NUM_THREADS=2   CPU threads per process (default: cores / NPROC)
  PYTHON=python3      interpreter (default: .venv/bin/python in the repository, else python3)

Ctrl-C, SIGTERM and SIGUSR1 save the run and end it; resume=auto goes on.

example: NPROC=8 scripts/launch/run.sh configs/ms1mv3_r50 rec=DATA/ms1m-retinaface-t1
USAGE
}

case "${1:-}" in
  "" | -h | --help)
    usage
    [[ $# -gt 0 ]] && exit 0
    exit 2
    ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# --standalone finds a free port itself, so two runs on one machine do not collide.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$NPROC" \
  --max-restarts="${MAX_RESTARTS:-0}" "${torchrun_options[@]}" \
  "$root/train_v2.py" "$@"
