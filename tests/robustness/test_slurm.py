"""scripts/slurm, run through small stand-ins for sbatch, srun and scontrol that a folder in PATH holds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import LAST, QUEUE, ROOT, SMALL, assert_same_run, results_of, train_ranks
from tests.helpers_processes import PATIENCE

SLURM = ROOT / "scripts" / "slurm"
STAND_INS = {
    # Notes the command line, and prints the job's number as --parsable does if there are several clusters.
    "sbatch": """
        echo "$@" >> "$FAKE/jobs"; echo "$(wc -l < "$FAKE/jobs");cluster" """,
    # Starts two tasks on one node; its status is the highest of theirs. As with --signal, they get SIGUSR1 before
    # the time is over: once, as soon as the file $TIME_LIMIT exists.
    "srun": """
        echo "$@" >> "$FAKE/steps"
        [ "$1 $2" = "--kill-on-bad-exit=0 --wait=300" ] || exit 99
        shift 2
        for task in 0 1; do
          SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1 "$@" &
          tasks="${tasks:-} $!"
        done
        trap 'kill -KILL $tasks 2> /dev/null' EXIT
        while [ -n "${TIME_LIMIT:-}" ] && ! [ -e "$FAKE/timed" ] && kill -0 $tasks 2> /dev/null; do
          if [ -e "$TIME_LIMIT" ]; then kill -USR1 $tasks; touch "$FAKE/timed"; fi
          sleep 0.05
        done
        status=0
        for task in $tasks; do wait $task; code=$?; [ $code -le $status ] || status=$code; done
        exit $status""",
    "scontrol": """
        [ "$1" = requeue ] && touch "$FAKE/requeued.$2" """,
    # In place of a stage: each start takes the next status of $FAKE/statuses, once per task.
    "stage": """
        sed -n "$(wc -l < "$FAKE/steps")p" "$FAKE/statuses" > "$FAKE/status.$SLURM_PROCID"
        exit "$(cat "$FAKE/status.$SLURM_PROCID")" """,
    # Python, with a stage I that waits at its fourth step until it is asked to stop.
    "gated": f"""
        [ "$1" = ssd_stage_i.py ] || exec {sys.executable} "$@"
        shift
        GATE=4 GATE_FILE="$FAKE/timed" PYTHONPATH={ROOT} exec {sys.executable} {ROOT}/tests/gated_stage_i.py "$@" """,
}


class Cluster:
    """A queue of jobs, which run one after the other, and the environment of whoever submits them."""

    def __init__(self, folder: Path, **variables):
        self.folder, programs = folder, folder / "bin"
        programs.mkdir()
        for name, text in STAND_INS.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (programs / name).chmod(0o755)
        paths = {"FAKE": folder, "PATH": f"{programs}:{os.environ['PATH']}"}
        self.env = os.environ | {name: str(value) for name, value in (paths | variables).items()}

    def submit(self, *words):
        return subprocess.run(
            ["bash", SLURM / "submit.sh", *words], env=self.env, cwd=self.folder, capture_output=True, text=True
        )

    def run_jobs(self) -> list[tuple[str, int | None]]:
        """(batch script, final status) of every job; None if the one that it depends on has failed."""
        finished, outcomes = {"": True}, []
        for number, line in enumerate((self.folder / "jobs").read_text().splitlines(), 1):
            after = re.search(r"--dependency=afterok:(\d+) ", line)
            script, *arguments = line[line.index("scripts/slurm/") :].split()
            status = self.run_job(number, script, arguments) if finished[after[1] if after else ""] else None
            finished[str(number)] = status == 0
            outcomes.append((Path(script).name, status))
        return outcomes

    def run_job(self, number: int, script: str, arguments: list[str]) -> int:
        """The status of the last start of a job; it is started again each time that it was requeued."""
        env = self.env | {
            "SLURM_JOB_ID": str(number), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "127.0.0.1",
        }  # fmt: skip
        copy = shutil.copy(ROOT / script, self.folder / "slurm_script")  # as SLURM does: its folder is not the script's
        while True:
            status = subprocess.run(["bash", copy, *arguments], env=env, cwd=self.folder, timeout=PATIENCE).returncode
            requeued = self.folder / f"requeued.{number}"
            if not requeued.exists():
                return status
            assert status != 0  # SLURM must not take a stage that was stopped for one that is finished
            requeued.unlink()

    def steps(self) -> list[str]:
        """What srun was asked to start."""
        return [line.split()[3] for line in (self.folder / "steps").read_text().splitlines()]


@pytest.mark.parametrize("script", sorted(SLURM.iterdir()), ids=lambda path: path.name)
def test_the_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    ("statuses", "outcomes", "starts"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 0], "i ii iii ii"),
        ([75, 75, 0, 0, 75, 0, 0], [0, 0, 0, 0], "i i i ii iii iii ii"),  # requeued until each has finished
        ([75, 2], [2, None, None, None], "i i"),  # a failure is not repeated, and nothing starts after it
        ([0, 1], [0, 1, None, None], "i ii"),
    ],
)
def test_a_stage_starts_once_the_one_before_has_finished(tmp_path, statuses, outcomes, starts):
    cluster = Cluster(tmp_path, DIR=tmp_path, PYTHON="stage", FLAGS="--amp bf16 --seed 3")
    (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    names = ("stage_i", "stage_ii", "stage_iii", "stage_iii_tuned")
    printed = "".join(f"{name}: job {number}\n" for number, name in enumerate(names, 1))
    assert cluster.submit("--nodes=2").stdout == printed
    nodes = [re.findall(r"--nodes=(\d)", line)[-1] for line in (tmp_path / "jobs").read_text().splitlines()]
    assert nodes == ["2", "1", "2", "1"]  # the last one counts
    assert [status for _, status in cluster.run_jobs()] == outcomes
    assert cluster.steps() == [f"ssd_stage_{stage}.py" for stage in starts.split()]
    first = (tmp_path / "steps").read_text().splitlines()[0]
    assert first.endswith(f" {tmp_path} --amp bf16 --seed 3") and " --resume auto " in first


def test_a_stage_that_is_done_is_not_submitted_again(tmp_path):
    (tmp_path / "stage_i").mkdir()
    (tmp_path / "stage_i" / "results.json").write_text("[]")
    cluster = Cluster(tmp_path, DIR=tmp_path, OUT=tmp_path, PYTHON="none")
    assert cluster.submit().stdout.startswith(f"stage_i: done, in {tmp_path}/stage_i\nstage_ii: job 1\n")
    first, second, third = (tmp_path / "jobs").read_text().splitlines()
    assert "afterok" not in first and "afterok:1 " in second and "afterok:2 " in third


def test_submitting_without_a_folder_of_images_says_so(tmp_path):
    cluster = Cluster(tmp_path)
    cluster.env.pop("DIR", None)
    outcome = cluster.submit()
    assert outcome.returncode == 2 and outcome.stderr.startswith("submit.sh: DIR: is not set; ")
    cluster.env["DIR"] = str(tmp_path / "none")
    outcome = cluster.submit()
    assert (outcome.returncode, outcome.stderr.count("\n")) == (2, 1) and "none: no such folder" in outcome.stderr
    assert not (tmp_path / "jobs").exists()


def test_nothing_is_submitted_if_a_recipe_is_missing(plain_tree, tmp_path):
    shutil.copytree(ROOT / "configs" / "imagenet_lt", tmp_path / "recipes")
    (tmp_path / "recipes" / "stage_iii_tuned.txt").unlink()
    outcome = Cluster(tmp_path, DIR=plain_tree, CONFIG=tmp_path / "recipes", PYTHON=sys.executable).submit()
    assert outcome.returncode == 2 and "stage_iii_tuned.txt" in outcome.stderr
    assert not (tmp_path / "jobs").exists()


@pytest.mark.full
def test_the_stages_run_to_their_end_with_a_stop_and_a_requeue(run_of_two_processes, plain_tree, tmp_path):
    """Each has the result of the same command without SLURM."""
    recipes, out = tmp_path / "recipes", tmp_path / "out"
    recipes.mkdir()
    for stage in ("i", "ii", "iii", "iii_tuned"):
        (recipes / f"stage_{stage}.txt").write_text(f"{SMALL} --cos {QUEUE if stage == 'i' else ''}\n")
    cluster = Cluster(
        tmp_path, DIR=plain_tree, OUT=out, CONFIG=recipes, PYTHON="gated", FLAGS="--save-every-steps 1",
        TIME_LIMIT=out / "stage_i" / LAST,
    )  # fmt: skip
    assert cluster.submit().returncode == 0
    assert cluster.run_jobs() == [(f"stage_{stage}.sbatch", 0) for stage in ("i", "ii", "iii", "ii")]
    assert cluster.steps()[:2] == ["ssd_stage_i.py"] * 2
    assert_same_run(out / "stage_i", run_of_two_processes)
    ii = train_ranks("ii", plain_tree, tmp_path / "ii", "--cos", "--last_stage_ckpt", run_of_two_processes / LAST)
    iii = train_ranks("iii", plain_tree, tmp_path / "iii", "--cos", "--teacher_ckpt", ii / LAST)
    tuned = train_ranks("ii", plain_tree, tmp_path / "tuned", "--cos", "--last_stage_ckpt", iii / LAST)
    assert results_of(out / "stage_ii") == results_of(ii)
    assert results_of(out / "stage_iii") == results_of(iii)
    assert results_of(out / "stage_iii_tuned") == results_of(tuned)
