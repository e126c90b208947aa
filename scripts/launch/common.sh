# What the launch scripts share; they source it. Sets root, PYTHON, NPROC, OMP_NUM_THREADS and
# torchrun_options. (POSIX names in capitals may come from the caller.)
# shellcheck shell=bash disable=SC2034

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

# Left to itself, torchrun dies of SIGUSR1 and leaves its workers behind; told so, it passes these
# signals on, and the workers save and end. It kills those that are not done after 60 s, or after 30 s
# where torchrun cannot be told (torch 2.11).
torchrun_options=(--signals-to-handle=SIGTERM,SIGINT,SIGUSR1)
if [[ "$("$PYTHON" -m torch.distributed.run --help)" == *--shutdown-timeout* ]]; then
  torchrun_options+=(--shutdown-timeout=60)
fi

# torchrun keeps one key-value store for all attempts of a run. A restarted group would find the
# addresses of the dead one in it and fail to connect (seen with torch 2.13 and gloo; pytorch issue
# 135712). With this, every attempt gets a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
