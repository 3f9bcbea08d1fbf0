#!/usr/bin/env bash
# The whole method on a CPU: makes .venv, gets Fashion-MNIST and selects a long-tailed subset, then trains the recipes of
# configs/fashion_mnist_lt: stages I, II and III, and stage II once more; prints one table of all four.
#   bash scripts/demo.sh            four to eight minutes on 2 cores, after the installation
#   bash scripts/demo.sh --smoke    one epoch per stage, in one or two minutes
# If the demo was stopped, the same command continues it. runs/ holds everything that it makes, and can be deleted.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
. scripts/venv.sh

out=runs/demo flags=(--seed 0 --print-freq 1000)
case "${1:-}" in
  "") ;;
  --smoke)
    out=runs/demo-smoke flags+=(--epochs 1 --warmup-epochs 0)
    echo "demo.sh --smoke: one epoch per stage shows that everything runs; its losses and accuracies mean nothing" ;;
  *) echo "demo.sh: $1: unknown; --smoke is the only option" >&2; exit 2 ;;
esac

need_venv requirements.txt
data=runs/fashion-mnist-lt
prepare() { "$python" -m datasets.prepare fashion-mnist-lt --out "$data" --imbalance 100 --max-per-class 500; }
prepare || { [ $? = 2 ] && as_root_install dataset-fashion-mnist && prepare; }
PATH=$(dirname "$python"):$PATH LAUNCH=python exec bash scripts/train.sh configs/fashion_mnist_lt "$data" $out "${flags[@]}"
