"""A job on two hosts: the numbers are those of one, and what the other host does if one dies or the link is cut."""

import contextlib
import re

import pytest
import torch

from tests.helpers import LAST, assert_one_line, assert_same_results, checkpoint, log_of, results_of, train
from tests.helpers_hosts import TwoHosts, kill_host, published, torchrun, why_no_hosts
from tests.helpers_processes import wait_until

reason = why_no_hosts()
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(reason), reason=reason),
    pytest.mark.usefixtures("interface_is_chosen_by_the_run"),
]
EACH_LAUNCHER = pytest.mark.parametrize("start", [published, torchrun])
PER_HOST = ["-b", 8]
ENDLESS = ["--epochs", 1000, *PER_HOST]
FILES = {"args.json", "best_checkpoint.pth.tar", "last_checkpoint.pth.tar", "log.txt", "results.json"}


@pytest.fixture
def hosts():
    with TwoHosts() as hosts:
        yield hosts


@pytest.fixture
def folders(tmp_path):
    """The two hosts' output folders; they share no disk."""
    return tmp_path / "host0" / "run", tmp_path / "host1" / "run"


def files_of(folder):
    """The files that are to stay in a run's folder."""
    return {file.name for file in folder.glob("[!.]*")} - {"previous_checkpoint.pth.tar"}


@contextlib.contextmanager
def on_both(start, hosts, data, folders, *flags, **options):
    """The jobs of both hosts, each with its own folder."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(start(hosts, n, data, folders[n], *flags, **options)) for n in (0, 1)]


@EACH_LAUNCHER
def test_two_hosts_compute_what_one_does_and_rank_0_writes(run_of_two_processes, plain_tree, hosts, folders, start):
    with on_both(start, hosts, plain_tree, folders, *PER_HOST) as jobs:
        assert [job.end().status for job in jobs] == [0, 0]
    assert files_of(folders[0]) == FILES and not folders[1].exists()
    assert_same_results(folders[0], run_of_two_processes)


def test_two_hosts_of_two_processes_compute_what_one_of_four_does(plain_tree, hosts, folders, tmp_path):
    """To rounding, since gloo adds the gradients of four processes in no fixed order."""
    flags = ["--epochs", 1]
    with on_both(published, hosts, plain_tree, folders, *PER_HOST, *flags, nproc=2) as jobs:
        assert [job.end().status for job in jobs] == [0, 0]
    assert files_of(folders[0]) == FILES and not folders[1].exists()
    one = train("i", plain_tree, tmp_path / "one", "--cos", *flags, "--multiprocessing-distributed", "--nproc", 4)
    found, expected = (checkpoint(folder)["state_dict"] for folder in (folders[0], one))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    assert log_of(folders[0])[0]["loss"] == pytest.approx(log_of(one)[0]["loss"], rel=1e-5)


@EACH_LAUNCHER
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_crashes_ends_the_job_on_the_other(plain_tree, hosts, folders, start, victim):
    """It is noticed at once, long before --dist-timeout."""
    with on_both(start, hosts, plain_tree, folders, *ENDLESS) as jobs:
        jobs[0].wait_for(r"epoch 1/1000 \[3/")
        kill_host(jobs[victim])
        outcome = jobs[1 - victim].end()
    said = re.findall(r"^ssd_stage_i\.py: lost contact with another process", outcome.err, re.M)
    assert outcome.status == 1 and len(said) == 1  # torchrun repeats it as the root cause
    if start is published:
        assert_one_line(outcome, 1, "lost contact with another process of the run")


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_cut_link_ends_the_job_on_both_hosts_after_the_timeout(plain_tree, hosts, folders, nproc):
    flags = [*ENDLESS, "--dist-timeout", 20]
    with on_both(published, hosts, plain_tree, folders, *flags, nproc=nproc) as jobs:
        jobs[0].wait_for(r"epoch 1/1000 \[3/")
        hosts.cut()
        for job in jobs:
            assert_one_line(job.end(), 1, "no answer from another process", "--dist-timeout 20 s", "--resume auto")


ELASTIC = [*PER_HOST, "--resume", "auto", "--save-every-steps", 1]


def assert_finished(job, folder, world_size, told):
    """That a job ended well after one restart, of which one of its processes told."""
    outcome = job.end()
    assert (outcome.status, outcome.err.count(told)) == (0, 1), outcome.err
    assert (checkpoint(folder)["epoch"], checkpoint(folder)["run"]["world_size"]) == (2, world_size)
    assert [record["epoch"] for record in log_of(folder)] == [0, 1] and results_of(folder)


def test_a_job_of_one_to_two_hosts_goes_on_without_one_that_crashes(plain_tree, hosts, folders):
    run = folders[0]
    options = {"nodes": "1:2", "restarts": 3, "gate": 6, "gate_file": run.with_name("gate")}
    with on_both(torchrun, hosts, plain_tree, folders, *ELASTIC, **options) as jobs:
        wait_until((run / LAST).exists, "a checkpoint")
        kill_host(jobs[1])
        run.with_name("gate").touch()  # nobody waits any more
        assert_finished(jobs[0], run, 1, "lost contact with another process")


def test_a_job_of_one_to_two_hosts_takes_in_one_that_comes_later(plain_tree, hosts, folders):
    """torchrun stops the first host's processes, which save, and starts both hosts' from there.

    Without the variable, torchrun itself fails as soon as a host joins.
    """
    run = folders[0]
    options = {"nodes": "1:2", "gate": 6, "gate_file": run.with_name("gate")}
    options["env"] = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with torchrun(hosts, 0, plain_tree, run, *ELASTIC, **options) as first:
        wait_until((run / LAST).exists, "a checkpoint")
        shared = ("--output_dir", run)  # as on a shared disk: the new process reads the checkpoint, too
        with torchrun(hosts, 1, plain_tree, folders[1], *ELASTIC, *shared, **options) as second:
            assert_finished(first, run, 2, "stopped on request")
            assert second.end().status == 0
