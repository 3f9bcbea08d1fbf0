"""Two hosts on one machine: network namespaces that a virtual cable joins, and jobs that run in them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

from tests.helpers_processes import Job

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def why_no_hosts() -> str:
    """Why this machine cannot have the two hosts; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "no ip command; on Debian and Ubuntu: apt-get install iproute2"
    name = f"ssd-lt-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return "" if made.returncode == 0 else f"network namespaces cannot be made here ({made.stderr.strip()})"


class TwoHosts:
    """Two network namespaces, each with an interface `cable` that has one of ADDRESSES; a with block removes them."""

    def __init__(self):
        self.names = [f"ssd-lt-{os.getpid()}-{number}" for number in (0, 1)]

    def __enter__(self):
        try:
            for name in self.names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            first, second = self.names
            ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in map(int, listed.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def cut(self):
        """Takes the cable away: packets are lost, and neither host is told that a connection has ended."""
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def start(self, host: int, data, out, *flags, launcher=(), **options) -> Job:
        """A job of stage I on a host; launcher: arguments of python that come before the script."""
        launcher = ("ip", "netns", "exec", self.names[host], sys.executable, *launcher)
        return Job("i", data, out, "--cos", *flags, launcher=launcher, **options)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def kill_host(job: Job):
    """Kills all processes of a job at the same time, as when its host crashes."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in job.note():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def published(hosts, host, data, out, *flags, nproc=1, **options) -> Job:
    """The published form of a job of two nodes."""
    url = ("--dist-url", f"tcp://{ADDRESSES[0]}:10712")
    nodes = ("--multiprocessing-distributed", "--nproc", nproc, "--world-size", 2, "--rank", host)
    return hosts.start(host, data, out, *nodes, *url, *flags, **options)


def torchrun(hosts, host, data, out, *flags, nodes=2, restarts=0, **options) -> Job:
    """The same with torchrun, one process per node. The hosts have no names, so that each is told its part."""
    words = (
        "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", 1, "--max-restarts", restarts,
        "--rdzv-id", "test", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400",
        "--rdzv-conf", f"is_host={int(host == 0)},last_call_timeout=1", "--local-addr", ADDRESSES[host],
    )  # fmt: skip
    return hosts.start(host, data, out, *flags, launcher=words, **options)
