"""Who a process is among the run's, and how they meet: places, devices, rendezvous, process group."""

import contextlib
import errno
import functools
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from .errors import UserError


class Place(NamedTuple):
    """Where a process stands: rank of world processes in all, local_rank of local_world on this node, nodes in all."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = "plain"
    url: str | None = None

    @property
    def nodes(self):
        return self.world // self.local_world


def find_place(args) -> Place:
    """Who this process is, by flags and environment; for --multiprocessing-distributed, who the node is."""
    env = os.environ
    try:
        if "TORCHELASTIC_RUN_ID" in env or (args.dist_url == "env://" and "RANK" in env):
            ranks, every = int(env["RANK"]), int(env["WORLD_SIZE"])
            return Place(ranks, every, int(env.get("LOCAL_RANK", ranks)), int(env.get("LOCAL_WORLD_SIZE", every)),
                         "torchrun", "env://")  # fmt: skip
        if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            every = int(env["SLURM_STEP_NUM_TASKS"])
            local = every // int(env.get("SLURM_STEP_NUM_NODES", 1))
            url = args.dist_url if "dist_url" in args.given else f"tcp://{slurm_host()}:{slurm_port()}"
            return Place(int(env["SLURM_PROCID"]), every, int(env["SLURM_LOCALID"]), local, "srun", url)
    except (KeyError, ValueError) as error:
        raise UserError(f"environment of the launcher: {error} is missing or no number; start through it") from None
    if args.dist_url == "env://":
        raise UserError("--dist-url env://: RANK and WORLD_SIZE are not set; start with torchrun")
    url = args.dist_url if "dist_url" in args.given else None
    nodes = max(args.world_size, 1)
    if not args.multiprocessing_distributed and nodes == 1:
        return Place()
    if nodes > 1 and not 0 <= args.rank < nodes:
        raise UserError(f"--rank {args.rank}: with --world-size {nodes} it must be from 0 to {nodes - 1}")
    if nodes > 1 and url is None:
        raise UserError("--dist-url: name tcp://HOST:PORT of node 0 where --world-size is above 1")
    node = max(args.rank, 0) if nodes > 1 else 0
    local = 1
    if args.multiprocessing_distributed:
        chosen = pick_device_type(args) == "cpu" or "nproc" in args.given
        local = args.nproc if chosen else torch.cuda.device_count()
        return Place(node * local, nodes * local, 0, local, "spawn", url)
    return Place(node, nodes, 0, 1, "node", url)


def slurm_host() -> str:
    """The first host of this SLURM job."""
    nodes = os.environ["SLURM_JOB_NODELIST"]
    if not set("[,") & set(nodes):
        return nodes
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            "SLURM_JOB_NODELIST cannot be read; give --dist-url tcp://HOST:PORT of the first node"
        ) from None


def slurm_port() -> int:
    return 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000


def pick_device_type(args) -> str:
    return "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"


def pick_device(args, place: Place) -> torch.device:
    """This process's device, made the current one."""
    if pick_device_type(args) == "cpu":
        return torch.device("cpu")
    number = args.gpu if args.gpu is not None else place.local_rank
    if number >= torch.cuda.device_count():
        raise UserError(f"process {place.local_rank} of this node has no GPU of its own; start one process a GPU")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def join_group(args, place: Place, device, store=None):
    """Initialises the process group, where there is more than this process or a launcher asked for one."""
    if place.launcher == "plain":
        return
    backend = "gloo" if device.type == "cpu" else args.dist_backend
    if args.dist_interface:
        interface_address(args.dist_interface)
        interface = args.dist_interface
    elif place.nodes == 1:
        interface = loopback_interface()
    else:
        known = place.url == "env://"
        interface = interface_towards(os.environ.get("MASTER_ADDR", "") if known else address_of(place.url)[0])
    if interface:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, interface)
    timeout = timedelta(seconds=args.dist_timeout)
    if place.launcher == "torchrun":
        where = {"init_method": "env://"}
    else:
        store = store or open_store(args, place, first=place.rank == 0)
        where = {"store": store, "rank": place.rank, "world_size": place.world}
    try:
        with native_messages_hidden():
            dist.init_process_group(backend, timeout=timeout, **where)
    except dist.DistError as error:
        raise UserError(
            f"the {place.world} processes did not meet within --dist-timeout {args.dist_timeout:g} s "
            f"({type(error).__name__}); start them all, with the same --dist-url and --world-size"
        ) from None


def open_store(args, place: Place, first: bool):
    """The key-value store at which the processes meet; `first`: this process holds it.

    It listens on loopback where there is one node, else on --dist-interface or the address of --dist-url:
    torch.distributed has no authentication. Raises UserError where the port cannot be had or reached.
    """
    host, port = address_of(place.url) if place.url else ("127.0.0.1", 0)
    timeout = timedelta(seconds=args.dist_timeout)
    listener = None
    if place.nodes == 1:
        is_local(host, place.url)
        host = "127.0.0.1"
    if first:
        at = interface_address(args.dist_interface) if args.dist_interface and place.nodes > 1 else host
        if place.nodes > 1 and at.startswith("127.") and not is_loopback_name(place.url) and not args.dist_interface:
            raise UserError(
                f"--dist-url {place.url}: its name is {at} on node 0, which no other node reaches; "
                "give node 0's address, or --dist-interface"
            )
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((at, port))
            listener.listen(2048)
        except OSError as error:
            reason = error.strerror.lower() if error.strerror else error
            raise UserError(f"--dist-url {place.url}: cannot listen there ({reason}); choose another port") from None
        host, port = listener.getsockname()
    try:
        if not first:
            wait_for_listener(host, port, args.dist_timeout)
        make = functools.partial(
            dist.TCPStore, host, port, None, is_master=first, wait_for_workers=False, timeout=timeout,
            master_listen_fd=listener.detach() if listener else None,
        )  # fmt: skip
        with native_messages_hidden():
            return in_time(make, args.dist_timeout)
    except (OSError, dist.DistError) as error:
        raise UserError(
            f"--dist-url {place.url}: node 0 is not reached within --dist-timeout {args.dist_timeout:g} s "
            f"({one_line(error)}); start node 0, or correct host and port"
        ) from None


def address_of(url: str) -> tuple[str, int]:
    """Host and port of tcp://HOST:PORT. Raises UserError for anything else."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.scheme != "tcp":
        raise UserError(f"--dist-url {url}: must be tcp://HOST:PORT, or env:// under torchrun")
    try:
        return socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0], port
    except OSError:
        raise UserError(f"--dist-url {url}: the host {host} is not known; correct the name") from None


def is_local(host: str, url):
    """Raises UserError where an address is none of this machine's, found by binding a socket to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            raise UserError(
                f"--dist-url {url}: {host} is no address of this machine; use tcp://localhost:PORT"
            ) from None


def is_loopback_name(url: str) -> bool:
    """Whether a URL names this machine's loopback outright, as a run of several nodes on one machine does."""
    name = urlsplit(url).hostname
    return name == "localhost" or name.startswith("127.")


def loopback_interface() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


def interface_address(name: str) -> str:
    """IPv4 address of a network interface. Raises UserError where it has none."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            known = ", ".join(interface for _, interface in socket.if_nameindex())
            raise UserError(f"--dist-interface {name}: no address; this machine has {known}") from None
    return socket.inet_ntoa(packed[20:24])


def interface_towards(host: str) -> str | None:
    """The network interface whose address this machine uses towards host; None where that cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # of a datagram socket: sends nothing, picks the route
            address = probe.getsockname()[0]
        except OSError:
            return None
    for _, name in socket.if_nameindex():
        with contextlib.suppress(UserError):
            if interface_address(name) == address:
                return name
    return None


def wait_for_listener(host: str, port: int, timeout: float):
    """Returns when something listens at host and port. Raises OSError, the last attempt's, after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.2)


def in_time(make, timeout: float):
    """make(), in a thread that is given up after `timeout` seconds: a TCPStore waits for ever for a peer that is mute.

    Raises what make raises, or TimeoutError.
    """
    results = queue.SimpleQueue()

    def attempt():
        try:
            results.put((make(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=attempt, daemon=True).start()
    try:
        value, error = results.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(errno.ETIMEDOUT, "it does not answer as node 0 would") from None
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def native_messages_hidden():
    """Keeps torch.distributed's C++ parts from writing their traces to stderr; what they raise says enough."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def one_line(error) -> str:
    """The system's word for an error, or the name of its class: torch.distributed's texts run over many lines."""
    return (getattr(error, "strerror", None) or str(error).partition("\n")[0][:100] or type(error).__name__).lower()
