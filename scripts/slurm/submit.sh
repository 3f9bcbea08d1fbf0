#!/usr/bin/env bash
# Submits stages I, II and III, and stage II once more on stage III's checkpoint; each starts once the one before has
# finished. Stage II, which trains one number per class, runs on one node.
#   DIR=/data/imagenet bash scripts/slurm/submit.sh
#   DIR=/data/imagenet OUT=runs/two_nodes bash scripts/slurm/submit.sh --partition gpu --nodes 2 --time 12:00:00
# Arguments go to sbatch, for all stages. Variables:
#   DIR     image folder
#   OUT     output folders: OUT/stage_i, stage_ii, stage_iii, stage_iii_tuned (default: weights)
#   CONFIG  recipes: CONFIG/stage_i.txt, stage_ii.txt, stage_iii.txt, stage_iii_tuned.txt (default: configs/imagenet_lt)
#   FLAGS   further flags of all stages, for example "--amp bf16 --channels-last"
#   PYTHON  interpreter on the nodes (default: python)
# DIR is relative to the current folder, CONFIG and OUT are relative to the repository. A job that was stopped before its
# end, for instance by its time limit, requeues itself and continues. If a stage fails, those after it are cancelled; the
# same command then continues. A stage that has results in OUT is not submitted again.
set -euo pipefail
refuse() {
  echo "submit.sh: $1" >&2
  exit 2
}
[ -n "${DIR:-}" ] || refuse "DIR: is not set; DIR=/data/imagenet bash scripts/slurm/submit.sh"
[ -d "$DIR" ] || refuse "DIR $DIR: no such folder; name the image folder"
command -v sbatch >/dev/null || refuse "sbatch: not found; run this where SLURM is installed, or use scripts/train.sh"
DIR=$(realpath "$DIR")
export DIR
cd "$(dirname "$0")/../.."
. scripts/slurm/common.sh

if "$PYTHON" -c 'import torch' 2>/dev/null; then # the login node may not have it
  # shellcheck disable=SC2086  # FLAGS are words
  "$PYTHON" scripts/check_recipes.py "$CONFIG" "$DIR" "$OUT" $FLAGS
fi
after=(--kill-on-invalid-dep=yes)
# submit NAME WORDS: submits a batch script, after the job before; the last of WORDS are the script and its arguments.
submit() {
  local name=$1 job
  shift
  if [ -f "$OUT/$name/results.json" ]; then
    echo "$name: done, in $OUT/$name"
    return
  fi
  job=$(sbatch --parsable "${after[@]}" "$@")
  job=${job%%;*} # NUMBER;CLUSTER if there are several clusters
  after=(--kill-on-invalid-dep=yes --dependency="afterok:$job")
  echo "$name: job $job"
}
submit stage_i "$@" scripts/slurm/stage_i.sbatch
submit stage_ii "$@" --nodes=1 scripts/slurm/stage_ii.sbatch stage_i stage_ii
submit stage_iii "$@" scripts/slurm/stage_iii.sbatch
submit stage_iii_tuned "$@" --nodes=1 --job-name=ssd-lt-tuned scripts/slurm/stage_ii.sbatch stage_iii stage_iii_tuned
