"""Runs in separate processes: starts and watches them, sends them signals, finds the processes they leave behind."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers import ROOT, Outcome, stage_flags

PATIENCE = 300  # seconds until a test gives up; far more than needed, since the machine may be busy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, what, patience=PATIENCE):
    """The first true value of condition(); fails if there is none within `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited {patience} s for {what}"
        time.sleep(0.02)


def children(pid) -> list[int]:
    """The child processes of a process, of all its threads."""
    found = []
    with contextlib.suppress(OSError):  # it ends meanwhile
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def descendants(pid) -> list[int]:
    """A process and all processes below it."""
    return [pid, *(below for child in children(pid) for below in descendants(child))]


def alive(pid) -> bool:
    """Whether a process still runs, with any of its threads; a zombie does not.

    The main thread may be a zombie while another one still ends, and keeps files locked and open until then.
    """
    with contextlib.suppress(OSError):  # it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # this thread ended meanwhile
                if Path(f"/proc/{pid}/task/{thread}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX":
                    return True
    return False


class Job:
    """A small run of a stage in a separate process; its output goes to files.

    gate: where its processes wait, see tests/gated_stage.py; gate_file: shared by the jobs of a run.
    """

    def __init__(self, stage, data, out, *flags, gate=None, gate_file=None, launcher=(sys.executable,), env=None):
        self.out = Path(out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.files = [self.out.with_name(f"{self.out.name}.{name}") for name in ("stdout", "stderr")]
        scripts = [ROOT / f"ssd_stage_{stage}.py"]
        environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(PATIENCE)}  # of torchrun; 30 s otherwise
        if gate:
            scripts.insert(0, ROOT / "tests" / "gated_stage.py")
            environment |= {"GATE": str(gate), "GATE_FILE": str(gate_file or f"{out}.gate"), "PYTHONPATH": str(ROOT)}
        environment |= env or {}
        command = list(map(str, [*launcher, *scripts, *stage_flags(stage, data, out, ("-p", 1, *flags))]))
        with open(self.files[0], "w") as stdout, open(self.files[1], "w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
            )
        self.pid = self.process.pid
        self.seen = set()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for pid in filter(alive, self.note()):
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not any(map(alive, self.seen)), "its processes to end")

    @property
    def stdout(self):
        return self.files[0].read_text()

    @property
    def stderr(self):
        return self.files[1].read_text()

    def note(self) -> set[int]:
        """All processes that have been seen as part of the job."""
        self.seen.update(descendants(self.pid))
        return self.seen

    def wait_for(self, pattern):
        """Returns once a line of stdout begins with the pattern."""
        there = functools.partial(re.search, f"^{pattern}", flags=re.M)
        wait_until(lambda: there(self.stdout) or self.process.poll() is not None, repr(pattern))
        self.note()
        assert there(self.stdout), (self.stdout[-500:], self.stderr)
        return self

    def ranks(self) -> list[int]:
        """The processes of --multiprocessing-distributed."""
        return [pid for pid in children(self.pid) if "spawn_main" in command_of(pid)]

    def workers(self) -> list[int]:
        """Data workers."""
        below = [pid for rank in self.ranks() or [self.pid] for pid in children(rank)]
        return [pid for pid in below if "resource_tracker" not in command_of(pid)]

    def send(self, number, pid=None):
        os.kill(pid or self.pid, number)
        return self

    def end(self, patience=PATIENCE) -> Outcome:
        """Its outcome, once it has ended and no process of it is left; data workers take 5 s to notice."""
        self.note()
        self.process.wait(timeout=patience)
        wait_until(lambda: not any(map(alive, self.seen)), "its processes to end", patience)
        return Outcome(self.process.returncode, self.stdout, self.stderr)


def listening(pids) -> set[str]:
    """Addresses at which these processes listen, over IPv4 and IPv6, in hexadecimal as the kernel lists them."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):  # closed meanwhile
                    sockets.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    tables = [file for file in map(Path, ("/proc/net/tcp", "/proc/net/tcp6")) if file.exists()]  # IPv6 may be off
    lines = [line for table in tables for line in table.read_text().splitlines()[1:]]
    rows = map(str.split, lines)
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def command_of(pid) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
