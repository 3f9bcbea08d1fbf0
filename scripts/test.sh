#!/usr/bin/env bash
# Checks the project: makes .venv, installs requirements-dev.txt, runs ruff and pytest.
#   bash scripts/test.sh            all tests except those that take minutes each; 8 to 15 minutes on 2 cores
#   bash scripts/test.sh --full     all tests
#   bash scripts/test.sh ARGS       ARGS are passed on to pytest, for example tests/test_losses.py -x
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
. scripts/venv.sh

marks="not full"
if [ "${1:-}" = --full ]; then
  marks="full or not full"
  shift
fi
need_venv requirements-dev.txt
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
exec "$python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m "$marks" "$@"
