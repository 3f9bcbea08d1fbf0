#!/usr/bin/env bash
# Submits the three stages to SLURM; each starts once the one before has finished.
#   DIR=/data/imagenet bash scripts/slurm/submit.sh
#   DIR=/data/imagenet OUT=runs/two_nodes bash scripts/slurm/submit.sh --partition gpu --nodes 2 --time 12:00:00
# Arguments go to sbatch, for all three stages. Variables:
#   DIR     image folder
#   OUT     output folders: OUT/stage_i, OUT/stage_ii, OUT/stage_iii (default: weights)
#   CONFIG  recipes: CONFIG/stage_i.txt, CONFIG/stage_ii.txt, CONFIG/stage_iii.txt (default: configs/imagenet_lt)
#   FLAGS   further flags of all stages, for example "--amp bf16 --channels-last"
#   PYTHON  interpreter on the nodes (default: python)
# DIR is relative to the current folder, CONFIG and OUT are relative to the repository. A job that was stopped before its
# end, for instance by its time limit, requeues itself and continues. If a stage fails, those after it are cancelled; the
# same command then continues.
set -euo pipefail
DIR=$(realpath -e "${DIR:?name the image folder}")
export DIR
cd "$(dirname "$0")/../.."
. scripts/slurm/common.sh

if "$PYTHON" -c 'import torch' 2>/dev/null; then # the login node may not have it
  # shellcheck disable=SC2086  # FLAGS are words
  "$PYTHON" scripts/check_recipes.py "$CONFIG" "$DIR" "$OUT" $FLAGS
fi
after=(--kill-on-invalid-dep=yes)
for stage in stage_i stage_ii stage_iii; do
  job=$(sbatch --parsable "${after[@]}" "$@" "scripts/slurm/$stage.sbatch")
  job=${job%%;*} # NUMBER;CLUSTER if there are several clusters
  after=(--kill-on-invalid-dep=yes --dependency="afterok:$job")
  echo "$stage: job $job"
done
