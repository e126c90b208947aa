#!/usr/bin/env bash
# Train on one machine: one process per GPU, or NPROC processes.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: scripts/launch/run.sh CONFIG [key=value ...]

Trains CONFIG on this machine with one process per GPU (one process where there is no GPU).

  NPROC=4             processes to start, instead of one per GPU
  OMP_NUM_THREADS=2   CPU threads per process (default: cores / NPROC)
  PYTHON=python3      interpreter (default: .venv/bin/python in the repository, else python3)

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

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON="$root/.venv/bin/python"
  [[ -x "$PYTHON" ]] || PYTHON=python3
fi
if [[ -z "${NPROC:-}" ]]; then
  NPROC="$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')"
fi
cores="$(getconf _NPROCESSORS_ONLN)"
threads=$((cores / NPROC))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

# --standalone finds a free port itself, so two runs on one machine do not collide.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" \
  "$root/train_v2.py" "$@"
