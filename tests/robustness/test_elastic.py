"""torchrun --max-restarts with --resume auto: the run goes on from its newest checkpoint, with the same result."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers import LAST, assert_same_run
from tests.helpers_processes import Job, children, wait_until

pytestmark = pytest.mark.full
ELASTIC = (
    sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:4", "--max-restarts", 3, "--nproc-per-node", 2,
    "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-conf", "last_call_timeout=1",
)  # fmt: skip


def ranks_of(torchrun: Job) -> dict[str, int]:
    """torchrun's processes by rank."""
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children(torchrun.pid)}
    found = [(word, pid) for pid, words in environments.items() for word in words if word.startswith(b"RANK=")]
    return {word.decode().removeprefix("RANK="): pid for word, pid in found}


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGTERM, 1)])
def test_torchrun_restarts_a_run_that_lost_a_rank(run_of_two_processes, plain_tree, tmp_path, number, rank):
    """So it does if one rank alone is asked to stop: torchrun does not know of status 75."""
    run = tmp_path / "run"
    flags = ["--cos", "--resume", "auto", "--save-every-steps", 1]
    with Job("i", plain_tree, run, *flags, launcher=ELASTIC, gate=6) as job:
        wait_until((run / LAST).exists, "a checkpoint")
        ranks = ranks_of(job)
        os.kill(ranks[str(rank)], number)
        (tmp_path / "run.gate").touch()  # nobody waits any more
        outcome = job.end()
    assert (outcome.status, outcome.err.count("Traceback")) == (0, 0), outcome.err
    assert outcome.err.count("lost contact") + outcome.err.count("stopped on request") == 1  # one restart, none failed
    assert_same_run(run, run_of_two_processes)
