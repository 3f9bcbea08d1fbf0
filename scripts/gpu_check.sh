#!/usr/bin/env bash
# Checks on a GPU what tests on a CPU cannot show, in less than twenty minutes, and writes one Markdown file.
#   bash scripts/gpu_check.sh                          tests, steps, drift, loss, loader and a short training on a GPU
#   bash scripts/gpu_check.sh --data cifar100-lt       trains on CIFAR100-LT (data/README.md), not on generated images
#   bash scripts/gpu_check.sh --device cpu --quick     all parts at tiny sizes, in about a minute
# Further flags: --write FILE (gpu_check.md by default), --only PART, --batch N, --minutes M; see --help. The status is 1
# if a part failed, and 2 without a GPU. Nothing is installed if PYTHON, .venv or python3 has torch and pytest already.
set -euo pipefail
root=$(CDPATH="" cd "$(dirname "$0")/.." && pwd)
. "$root/scripts/venv.sh"

find_here() { find_python "numpy pytest torch torchvision tqdm" ${PYTHON:+"$PYTHON"} "$root/.venv/bin/python" python3; }
if ! find_here; then
  (cd "$root" && need_venv requirements-dev.txt) || true # offline it fails
  if ! find_here; then
    echo "gpu_check.sh: no Python with torch, torchvision, numpy, tqdm and pytest; name one with PYTHON=/path/to/python3" >&2
    exit 2
  fi
fi
PYTHONPATH=$root exec "$python" -m benchmarks.gpu_check "$@"
