# Sourced by the batch scripts in this folder; submit.sh says what the variables mean.
: "${DIR:?name the image folder}"
OUT=${OUT:-weights} CONFIG=${CONFIG:-configs/imagenet_lt} PYTHON=${PYTHON:-python} FLAGS=${FLAGS:-}

# run_stage SCRIPT FLAGS: runs a stage in the job's tasks, and ends the batch script with its status. If the stage was
# stopped (status 75), the job is requeued: it waits in the queue under the same number, and continues when it starts.
run_stage() {
  local status=0
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from the job by itself
  # A task that has been stopped must not end the others, of which one may still write. But if a task has failed, the
  # others may wait for it: they are ended after 300 s.
  # shellcheck disable=SC2086  # FLAGS are words
  srun --kill-on-bad-exit=0 --wait=300 "$PYTHON" "$@" --resume auto --save-every-steps 500 "$DIR" $FLAGS || status=$?
  if [ "$status" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status" # never 0 unless the stage has finished, since the next one starts on 0
}
