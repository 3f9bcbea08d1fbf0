"""A training that is killed repeatedly, at random moments, ends like one that was not killed."""

import random
import shutil
import signal
import time

import pytest

from tests.helpers import TWO, assert_same_run, checkpoint, log_of, train
from tests.helpers_processes import PATIENCE, Job, alive, wait_until

STEPS = 9  # per epoch
FLAGS = ["--cos", "--save-every-steps", 1]  # every step saves, so that kills hit saves, too


def kill_and_resume(plain_tree, run, whole, kills, *flags, seed=0):
    """Starts a run with --resume auto and kills all its processes, `kills` times; then lets it finish.

    Each comes after a random number of steps and a random part of one; the first and every second kill then wait for a
    save. The steps are at most half of the run's. Returns how many kills hit a running process, and how many left a
    half-written file.
    """
    moments, hits, halves = random.Random(seed), 0, 0
    most, seconds = checkpoint(whole)["epoch"] * STEPS // (2 * kills), log_of(whole)[-1]["seconds"] / STEPS
    for number in range(kills):
        with Job("i", plain_tree, run, *FLAGS, *flags, "--resume", "auto") as job:
            job.wait_for(r"(epoch|test|val)")
            writer = (job.ranks() or [job.pid])[0]
            steps = moments.randint(0, most)
            wait_until(lambda: job.stdout.count(" [") >= steps or not alive(writer), f"{steps} steps")  # noqa: B023
            time.sleep(moments.uniform(0, seconds))
            while number % 2 == 0 and alive(writer) and not half_written(run):
                pass
            if alive(writer):
                hits += 1
                job.send(signal.SIGKILL, writer)
            job.note()
        halves += bool(half_written(run))
        for text in (job.stderr, job.stdout):
            assert "Traceback" not in text and "skipped" not in text
    with Job("i", plain_tree, run, *FLAGS, *flags, "--resume", "auto") as job:
        outcome = job.end(10 * PATIENCE)
    assert (outcome.status, outcome.err) == (0, "")
    return hits, halves


def half_written(run) -> list:
    return list(run.glob(".*.tar.*"))


def assert_as_if_never_killed(run, whole):
    """Checks the results, and that the killed runs left no temporary file."""
    assert_same_run(run, whole)
    assert {file.name for file in run.iterdir()} == {file.name for file in whole.iterdir()}


def test_a_run_that_was_killed_ends_like_one_that_was_not(trained, plain_tree, tmp_path):
    hits, _ = kill_and_resume(plain_tree, tmp_path / "run", trained["i"], 1, "-j", 1)
    assert hits == 1
    assert_as_if_never_killed(tmp_path / "run", trained["i"])


@pytest.mark.full
def test_two_processes_killed_twenty_times_end_like_those_that_were_not(plain_tree, tmp_path):
    more = ["--epochs", 40]  # enough for twenty kills
    whole = train("i", plain_tree, tmp_path / "whole", *FLAGS, *TWO, *more)
    hits, halves = kill_and_resume(plain_tree, tmp_path / "run", whole, 20, *TWO, "-j", 2, *more, seed=1)
    print(f"{hits} kills, {halves} of them left a half-written file")
    assert hits == 20 and halves > 0
    assert_as_if_never_killed(tmp_path / "run", whole)
    shutil.rmtree(tmp_path)
