"""scripts/train.sbatch, run through small stand-ins for srun and scontrol that a folder in PATH holds."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import LAST, QUEUE, ROOT, SMALL, assert_same_run, train_all, train_ranks
from tests.helpers_processes import PATIENCE

RECORD = dict.fromkeys(("many", "medium", "few", "class_mean", "overall", "top5"), 1.0) | {
    "classifier": "lws", "per_class": [1.0], "train_counts": [1], "test_counts": [1], "classes": None, "count": 1,
    "confusion_groups": [[0] * 3] * 3,
}  # fmt: skip
NAMES = ("stage_i", "stage_ii", "stage_iii", "stage_iii_tuned")
STAND_INS = {
    # Starts two tasks on one node; its status is the highest of theirs. As with --signal, they get SIGUSR1 before
    # the time is over: once, as soon as the file $TIME_LIMIT exists.
    "srun": f"""
        [ "$1 $2 $3" = "--kill-on-bad-exit=0 --wait=300 python" ] || exit 99
        shift 3
        echo "$@" >> "$FAKE/steps"
        for task in 0 1; do
          SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1 \\
            SLURM_JOB_NODELIST=127.0.0.1 "${{TASK:-{sys.executable}}}" "$@" &
          tasks="${{tasks:-}} $!"
        done
        trap 'kill -KILL $tasks 2> /dev/null' EXIT
        while [ -n "${{TIME_LIMIT:-}}" ] && ! [ -e "$FAKE/timed" ] && kill -0 $tasks 2> /dev/null; do
          if [ -e "$TIME_LIMIT" ]; then kill -USR1 $tasks; touch "$FAKE/timed"; fi
          sleep 0.05
        done
        status=0
        for task in $tasks; do wait $task; code=$?; [ $code -le $status ] || status=$code; done
        exit $status""",
    "scontrol": """
        [ "$1" = requeue ] && touch "$FAKE/requeued.$2" """,
    # In place of a stage: each start takes the next status of $FAKE/statuses; a stage that ends with 0 has results.
    "stage": """
        status=$(sed -n "$(wc -l < "$FAKE/steps")p" "$FAKE/statuses")
        while [ "$1" != --output_dir ]; do shift; done
        [ "$status" != 0 ] || { mkdir -p "$2"; cp "$FAKE/record" "$2/results.json"; }
        exit "$status" """,
    # Python, with a stage I that waits at its fourth step until it is asked to stop.
    "gated": f"""
        [ "$1" = {ROOT}/ssd_stage_i.py ] || exec {sys.executable} "$@"
        GATE=4 GATE_FILE="$FAKE/timed" PYTHONPATH={ROOT} exec {sys.executable} {ROOT}/tests/gated_stage.py "$@" """,
}


def run_job(folder, data, *flags, **variables) -> int:
    """The status of the job's last start, as SLURM runs it: it is started again each time that it was requeued.

    The recipes are those of folder/recipes, the results go to folder/out; steps has the command of every srun.
    """
    programs = folder / "bin"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    paths = {"FAKE": folder, "PATH": f"{programs}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    env = os.environ | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    env |= {name: str(value) for name, value in (paths | variables).items()}
    script = shutil.copy(ROOT / "scripts" / "train.sbatch", folder / "slurm_script")  # as SLURM does
    words = ["bash", script, folder / "recipes", data, folder / "out", *flags]
    while True:
        status = subprocess.run(words, env=env, cwd=folder, timeout=PATIENCE).returncode
        if not (folder / "requeued.7").exists():
            return status
        assert status != 0  # SLURM must not take a job that was stopped for one that is finished
        (folder / "requeued.7").unlink()


def started(folder) -> list[str]:
    """The script of every srun."""
    return [line.partition(" ")[0].removeprefix(f"{ROOT}/") for line in (folder / "steps").read_text().splitlines()]


def test_a_job_that_was_stopped_is_requeued_and_goes_on_one_that_failed_is_not(tmp_path, plain_tree):
    """A stage that has finished is not repeated, and nothing starts after a failure."""
    (tmp_path / "statuses").write_text("0\n75\n0\n138\n2\n")
    (tmp_path / "record").write_text(json.dumps([RECORD]))
    shutil.copytree(ROOT / "configs" / "imagenet_lt", tmp_path / "recipes")
    assert run_job(tmp_path, plain_tree, "--amp", "bf16", TASK="stage") == 2
    assert started(tmp_path) == [f"ssd_stage_{stage}.py" for stage in ("i", "ii", "ii", "iii", "iii")]
    first = (tmp_path / "steps").read_text().partition("\n")[0]
    assert " --save-every-steps 500 --amp bf16 " in first and " --resume auto " in first


@pytest.mark.full
def test_the_stages_run_to_their_end_with_a_stop_and_a_requeue(plain_tree, tmp_path):
    """Each has the result of the same command without SLURM."""
    (tmp_path / "recipes").mkdir()
    for name in NAMES:
        (tmp_path / "recipes" / f"{name}.txt").write_text(f"{SMALL} --cos {QUEUE if name == 'stage_i' else ''}\n")
    time_limit = tmp_path / "out" / "stage_i" / LAST
    assert run_job(tmp_path, plain_tree, "--save-every-steps", "1", TASK="gated", TIME_LIMIT=time_limit) == 0
    assert started(tmp_path) == [f"ssd_stage_{stage}.py" for stage in ("i", "i", "ii", "iii", "ii")]
    references = train_all(plain_tree, tmp_path / "whole", "--cos", run=train_ranks)
    for name, reference in zip(NAMES, references.values(), strict=True):
        assert_same_run(tmp_path / "out" / name, reference)
