"""Measures how long a run takes to end when it is stopped or loses a process: the table of docs/reliability.md.

python -m tests.measure_stops
"""

import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

from tests.helpers import TWO, write_tree
from tests.helpers_processes import Job

REPEATS = 5
WORKERS = ["-j", 2]


def signal_run(job):
    job.send(signal.SIGTERM)


def signal_group(job):
    os.killpg(job.pid, signal.SIGUSR1)


def signal_rank(job):
    job.send(signal.SIGTERM, job.ranks()[1])


def kill_run(job):
    job.send(signal.SIGKILL)


def kill_rank(job):
    job.send(signal.SIGKILL, job.ranks()[1])


def kill_worker(job):
    job.send(signal.SIGKILL, job.workers()[0])


EVENTS = [
    ("SIGTERM to a plain run", WORKERS, signal_run),
    ("SIGTERM to the parent of two processes", TWO + WORKERS, signal_run),
    ("SIGTERM to one of two processes", TWO + WORKERS, signal_rank),
    ("SIGUSR1 to all processes and data workers of two processes", TWO + WORKERS, signal_group),
    ("kill -9 of one of two processes", TWO + WORKERS, kill_rank),
    ("kill -9 of a data worker of two processes", TWO + WORKERS, kill_worker),
    ("kill -9 of a plain run", WORKERS, kill_run),
    ("kill -9 of the parent of two processes", TWO + WORKERS, kill_run),
]


def main():
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as root:
        tree = write_tree(Path(root) / "tree")
        print("| event | exit status | seconds until no process is left: median | largest |")
        print("|:--|--:|--:|--:|")
        for number, (event, flags, cause) in enumerate(EVENTS):
            seconds, statuses = [], set()
            for repeat in range(REPEATS):
                run = Path(root) / f"{number}.{repeat}"
                with Job("i", tree, run, "--cos", "--epochs", 1000, *flags) as job:
                    job.wait_for(r"epoch 1/1000 \[3/")
                    job.note()
                    started = time.monotonic()
                    cause(job)
                    statuses.add(job.end().status)
                    seconds.append(time.monotonic() - started)
            status = ", ".join(map(str, sorted(statuses)))
            print(f"| {event} | {status} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
