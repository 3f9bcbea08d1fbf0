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


EVENTS = [  # event, flags, signal, which process or (below 0) group gets it
    ("SIGTERM to a plain run", WORKERS, signal.SIGTERM, lambda job: job.pid),
    ("SIGTERM to the parent of two processes", TWO + WORKERS, signal.SIGTERM, lambda job: job.pid),
    ("SIGTERM to one of two processes", TWO + WORKERS, signal.SIGTERM, lambda job: job.ranks()[1]),
    ("SIGUSR1 to all processes and data workers of two processes", TWO + WORKERS, signal.SIGUSR1, lambda job: -job.pid),
    ("kill -9 of one of two processes", TWO + WORKERS, signal.SIGKILL, lambda job: job.ranks()[1]),
    ("kill -9 of a data worker of two processes", TWO + WORKERS, signal.SIGKILL, lambda job: job.workers()[0]),
    ("kill -9 of a plain run", WORKERS, signal.SIGKILL, lambda job: job.pid),
    ("kill -9 of the parent of two processes", TWO + WORKERS, signal.SIGKILL, lambda job: job.pid),
]


def main():
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as root:
        tree = write_tree(Path(root) / "tree")
        print("| event | exit status | seconds until no process is left: median | largest |")
        print("|:--|--:|--:|--:|")
        for number, (event, flags, sent, victim) in enumerate(EVENTS):
            seconds, statuses = [], set()
            for repeat in range(REPEATS):
                run = Path(root) / f"{number}.{repeat}"
                with Job("i", tree, run, "--cos", "--epochs", 1000, *flags) as job:
                    job.wait_for(r"epoch 1/1000 \[3/")
                    job.note()
                    started = time.monotonic()
                    job.send(sent, victim(job))
                    statuses.add(job.end().status)
                    seconds.append(time.monotonic() - started)
            status = ", ".join(map(str, sorted(statuses)))
            print(f"| {event} | {status} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
