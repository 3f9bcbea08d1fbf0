#!/usr/bin/env bash
# The whole method in one command: stages I, II and III, stage II once more on stage III's checkpoint, and the report.
#   bash scripts/train.sh CONFIG DIR OUT [flags]      for example: configs/cifar100_lt cifar100-lt runs/cifar
# CONFIG is a folder of recipes, such as those in configs/; DIR holds the images and lists; OUT gets stage_i, stage_ii,
# stage_iii and stage_iii_tuned. A flag goes to every stage that has it, after those of its recipe. A stage that has
# results in OUT is not trained again, and one that was stopped (status 75) or killed goes on: the same command
# continues; with other flags or lists both are refused.
# LAUNCH is what starts a stage, python by default; scripts/train.sbatch starts it in SLURM:
#   LAUNCH="torchrun --nproc-per-node 8" bash scripts/train.sh configs/imagenet_lt imagenet-lt runs/imagenet --amp bf16
set -euo pipefail
[ -e /dev/fd/1 ] || exec >/dev/null # closed: echo would fail
[ -e /dev/fd/2 ] || exec 2>/dev/null

if [ $# -lt 3 ] || [[ $1 == -* || $2 == -* || $3 == -* ]]; then
  echo "usage: bash scripts/train.sh CONFIG DIR OUT [flags of the stages]; the flags come last" >&2
  exit 2
fi
root=$(CDPATH="" cd "$(dirname "$0")/.." && pwd)
config=${1%/} data=$2 out=${3%/}
shift 3
. "$root/scripts/venv.sh"
find_python "torch torchvision tqdm" python "$root/.venv/bin/python" || {
  echo "train.sh: no Python with torch, torchvision and tqdm; pip install -r requirements.txt, or activate their environment" >&2
  exit 2
}
[ "$python" = python ] || PATH=$root/.venv/bin:$PATH # python and torchrun in LAUNCH are then those of .venv
assignments=$("$python" "$root/scripts/check_recipes.py" "$config" "$data" "$out" "$@")
eval "$assignments" # plan, and flags_NAME and later_NAME of each stage
echo "${plan:?}"
launch=("$python")
[ -z "${LAUNCH:-}" ] || read -ra launch <<<"$LAUNCH"

# What asks a run to stop is passed on to the stage, which saves and ends with status 75; Ctrl-C reaches it by itself.
# If it comes too late for the stage, at least no other starts. bash keeps what is ignored at the start, as by nohup.
child='' signaled='' stop='' times='' folders=()
trap 'signaled=1 stop=75; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM USR1 USR2 HUP XCPU
trap 'signaled=1 stop=130' INT

# stage TITLE NAME SCRIPT [flags]: trains one stage, unless it has results already.
stage() {
  local title=$1 folder=$out/$2 recipe=$config/$2.txt script=$3 status=0 started=$SECONDS flags=flags_$2 later=later_$2
  shift 3
  eval "set -- \"\$@\" ${!flags}"
  folders+=("$folder")
  [ -z "$stop" ] || exit "$stop"
  if [ -f "$folder/results.json" ]; then
    echo "== $title: done, in $folder"
    times+=", $title was done"
    return
  fi
  local words=("${launch[@]}" "$root/$script" "@$recipe" "$@" --output_dir "$folder" --resume auto "$data")
  printf '== %s:' "$title"
  printf ' %q' "${words[@]}"
  echo
  (
    export SSD_LT_LATER_IMAGES="${!later}" # for the bar's time left
    trap - INT # bash lets processes in the background ignore it
    exec "${words[@]}"
  ) &
  child=$!
  [ -z "$stop" ] || kill -TERM "$child" 2>/dev/null || true # the signal came before there was a child
  wait "$child" || status=$?
  while [ -n "$signaled" ]; do # wait was interrupted: the stage is still saving
    signaled=
    wait "$child" && status=0 || status=$?
  done
  [ "$status" != -1 ] || status=$stop # bash 5.2 loses the status of a child that ends just as wait is interrupted
  child=
  if [ "$status" != 0 ]; then
    local hint="the same command continues"
    case $status in 1 | 2) hint="correct the cause, and $hint" ;; esac # torchrun has 1 for a mistake
    echo "== $title: ended with status $status after $((SECONDS - started)) s; $hint" >&2 || true # a terminal that was closed
    exit "$status"
  fi
  echo "== $title: $((SECONDS - started)) s"
  times+=", $title $((SECONDS - started)) s"
}

last=last_checkpoint.pth.tar
stage "stage I" stage_i ssd_stage_i.py
stage "stage II" stage_ii ssd_stage_ii.py --last_stage_ckpt "$out/stage_i/$last"
stage "stage III" stage_iii ssd_stage_iii.py --teacher_ckpt "$out/stage_ii/$last"
stage "stage II on stage III" stage_iii_tuned ssd_stage_ii.py --last_stage_ckpt "$out/stage_iii/$last"
echo
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m utils.report "${folders[@]}"
echo "time: ${times#, }"
