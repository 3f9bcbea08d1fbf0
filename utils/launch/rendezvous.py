"""How the processes of a run find each other: rank and world size, device, key-value store, process group."""

import contextlib
import functools
import os
import re
import secrets
import socket
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from ..command_line import ALIKE, with_hyphens
from ..distributed import DistInfo, find_difference, num_cores, set_dist_info
from ..errors import UserError, one_line
from . import network

PATIENCE = 5  # seconds until a process says that it waits for others
# How Kubernetes' PyTorchJob, Open MPI, MPICH and Intel MPI, and MVAPICH tell the number of processes.
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def detect_launcher(args) -> DistInfo:
    """Rank and world size, from flags and environment; --multiprocessing-distributed: of this node's first process."""
    url = args.dist_url if "dist_url" in args.given else None
    if "TORCHELASTIC_RUN_ID" in os.environ or (url == "env://" and "RANK" in os.environ):
        return torchrun_info()
    if env_number("SLURM_STEP_NUM_TASKS", 1, default=1) > 1:
        return srun_info(url)
    if url == "env://":
        raise UserError("--dist-url env://: RANK and WORLD_SIZE are not set; start with torchrun")
    names = WORLD_SIZES if "world_size" not in args.given else ()
    for name in names:
        if (size := os.environ.get(name, "1")[:20]) not in ("", "0", "1"):
            raise UserError(
                f"environment: {name} is {size}, but this process would train alone; join the others by "
                "--dist-url env:// (docs/usage.md), or add --world-size 1 --rank 0"
            )
    nodes = max(args.world_size, 1)
    node = 0 if nodes == 1 and args.rank == -1 else args.rank
    if not 0 <= node < nodes:
        raise UserError(f"--rank {node}: with --world-size {nodes} it must be from 0 to {nodes - 1}")
    if nodes > 1 and url is None:
        raise UserError("--dist-url: name tcp://HOST:PORT of node 0 if --world-size is above 1")
    if args.multiprocessing_distributed:
        no_gpu = device_type(args) == "cpu"
        local = args.nproc if no_gpu or "nproc" in args.given else torch.cuda.device_count()
        return DistInfo(node * local, nodes * local, 0, local, "spawn", url)
    return DistInfo(node, nodes, 0, 1, "node", url) if nodes > 1 else DistInfo()


def torchrun_info() -> DistInfo:
    """What torchrun says; without it, as in Kubernetes, each process is a node of its own unless LOCAL_RANK is set."""
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("environment of the launcher: MASTER_ADDR is missing; start with torchrun")
    env_number("MASTER_PORT", 1, 65535)
    world_size = env_number("WORLD_SIZE", 1)
    rank = env_number("RANK", 0, world_size - 1)
    several = "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_RANK" in os.environ
    local_world_size = env_number("LOCAL_WORLD_SIZE", 1, world_size, default=world_size if several else 1)
    local_rank = env_number("LOCAL_RANK", 0, min(rank, local_world_size - 1), default=rank if several else 0)
    return DistInfo(rank, world_size, local_rank, local_world_size, "torchrun", "env://")


def srun_info(url: str | None) -> DistInfo:
    """What srun says; url: --dist-url, or None to meet on the first host of the step."""
    world_size = env_number("SLURM_STEP_NUM_TASKS", 1)
    rank = env_number("SLURM_PROCID", 0, world_size - 1)
    local_rank = env_number("SLURM_LOCALID", 0, rank)
    nodes = env_number("SLURM_STEP_NUM_NODES", 1, world_size, default=1)
    if world_size % nodes:
        raise UserError(f"srun: {world_size} tasks on {nodes} nodes; give every node as many, with --ntasks-per-node")
    nodes_of_step = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    hosts = re.sub(r"\[([^],-]+)[^]]*]", r"\1", nodes_of_step)  # gpu[07-09,12] -> gpu07
    job = env_number("SLURM_JOB_ID", 0)
    step = env_number("SLURM_STEP_ID", 0, 2**32 - 1, 0)  # salloc's is above 2**31
    url = url or f"tcp://{hosts.partition(',')[0]}:{20000 + (job + 1009 * step) % 20000}"
    return DistInfo(rank, world_size, local_rank, world_size // nodes, "srun", url)


def env_number(name: str, least: int, most: int = 2**31 - 1, default: int | str = "") -> int:
    """A number from the launcher's environment. Raises UserError if it is missing or out of bounds."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > 20 or not least <= int(text) <= most:
        what = f"{text[:20]!r}, must be a number from {least} to {most}" if text else "missing"
        raise UserError(f"environment of the launcher: {name} is {what}; start with torchrun or srun")
    return int(text)


def device_type(args) -> str:
    return "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"


def select_device(args, info: DistInfo) -> torch.device:
    """This process's device, made the current one."""
    if args.gpu is not None and info.local_world_size > 1:
        processes = f"all {info.local_world_size} processes of this node"
        raise UserError(f"--gpu {args.gpu}: would put {processes} on one GPU; leave it out", on_all_ranks=True)
    if device_type(args) == "cpu":
        return torch.device("cpu")
    number = args.gpu if args.gpu is not None else info.local_rank
    if number >= torch.cuda.device_count():
        raise UserError(
            f"process {info.local_rank} of this node has no GPU of its own: it sees {torch.cuda.device_count()}; start "
            "one process per GPU (--nproc-per-node, --nproc), each of which sees all GPUs of its node"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@contextlib.contextmanager
def process_group(args, info: DistInfo):
    """Makes this process part of the run, and yields its device. After an exception the group is left as it is."""
    set_dist_info(info)
    device = select_device(args, info)
    if info.local_world_size > 1:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cores() // info.local_world_size)))
    if info.launcher != "plain":
        with say_if_waiting(info):
            init_process_group(args, info, device)
            check_equal_starts(args, info)
    yield device
    if dist.is_initialized():
        dist.destroy_process_group()


def check_equal_starts(args, info: DistInfo):
    """Raises UserError, on all ranks, for the first thing that two ranks do not share.

    That is the script, the number of processes per node, or a flag that the training depends on.
    """
    own = {"script": args.program, "processes per node": info.local_world_size}
    own |= {with_hyphens(f"--{name}"): getattr(args, name) for name in args.marked[ALIKE]}
    own |= {"--resume": bool(args.resume)}
    if difference := find_difference(own):
        name, rank, first, other = difference
        message = f"{name}: {first} on rank 0 and {other} on rank {rank}; start all processes alike"
        raise UserError(message, on_all_ranks=True)


def init_process_group(args, info: DistInfo, device):
    """Meets the other processes at the store, and makes a group that listens on one network interface only."""
    if device.type == "cpu" and args.dist_backend == "nccl":
        args.dist_backend = "gloo"
        if info.rank == 0:
            print("gloo instead of nccl: there is no GPU in use (--dist-backend)", flush=True)
    interface = args.dist_interface
    if interface:
        network.interface_address(interface)  # raises if it is not there
    elif info.nodes == 1:
        interface = "lo0" if sys.platform == "darwin" else "lo"
    else:
        torchrun = info.launcher == "torchrun"
        host = master_address(os.environ["MASTER_ADDR"]) if torchrun else network.resolve(info.url)[0]
        interface = network.interface_towards(host)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface and not os.environ.get(variable):
            os.environ[variable] = interface
    network.check_interfaces(f"{args.dist_backend.upper()}_SOCKET_IFNAME")
    timeout = timedelta(seconds=args.dist_timeout)
    meeting = {"init_method": "env://"}
    store = None if info.launcher == "torchrun" else join_store(args, info)
    try:
        with network.hide_native_messages():
            if info.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store = session_store(info, timeout)
            if store is not None:
                meeting = {"store": store, "rank": info.rank, "world_size": info.world_size}
            dist.init_process_group(args.dist_backend, timeout=timeout, **meeting)
    except RuntimeError as error:
        if "Unable to find address for" in str(error):  # gloo's
            found = os.environ.get("GLOO_SOCKET_IFNAME")
            known = ", ".join(network.interfaces())
            raise UserError(f"GLOO_SOCKET_IFNAME {found}: has no address; unset it, or name one of {known}") from None
        if not isinstance(error, dist.DistError) and "connectFullMesh failed" not in str(error):  # gloo's
            raise
        what = "--dist-url and --world-size" if info.url != "env://" else "WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        raise UserError(
            f"the {info.world_size} processes did not meet within --dist-timeout {args.dist_timeout:g} s "
            f"({type(error).__name__}); start them all, with the same {what}"
        ) from None


def master_address(name: str) -> str:
    """torchrun's MASTER_ADDR as an address. Raises UserError if no other node reaches it."""
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError):
        return name  # IPv6, or unknown: torch says so
    refuse_loopback(name, address, f"MASTER_ADDR {name}")
    return address


def refuse_loopback(name: str, address: str, flag: str):
    """Raises UserError if a node's own name is loopback on it, as in Debian's /etc/hosts: gloo would listen there."""
    if address.startswith("127.") and not name.startswith(("localhost", "127.")):
        raise UserError(
            f"{flag}: is {address} on this node, which no other node reaches; give node 0's address (--dist-url, "
            "torchrun --local-addr), or --dist-interface"
        )


def session_store(info: DistInfo, timeout: timedelta):
    """A part of torchrun's key-value store that belongs to this start of the processes alone.

    torchrun keeps the store when it restarts the processes, and neither its address nor any variable tells one start
    from another: restarted processes would find the addresses of dead ones (pytorch issue 135712). So rank 0 names a
    session, every other rank answers in it with a random key of its own, and rank 0 confirms these keys. A rank that
    has joined an old session does not find its key there, and tries again.
    """
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    own = secrets.token_hex(8)
    end = time.monotonic() + timeout.total_seconds()
    if info.rank == 0:
        store.set("session", own)
        session = dist.PrefixStore(own, store)
        session.set("confirmed", b" ".join(session.get(f"rank {rank}") for rank in range(1, info.world_size)))
        return session
    while time.monotonic() < end:
        session = dist.PrefixStore(store.get("session").decode(), store)
        session.set(f"rank {info.rank}", own)
        if session.check(["confirmed"]) and own in session.get("confirmed").decode():
            return session
        time.sleep(0.05)
    raise dist.DistStoreError("no session")


def open_store(args, info: DistInfo, is_master: bool):
    """The key-value store at which the processes meet; the master holds it.

    It listens on loopback if there is one node, else on --dist-interface or the address of --dist-url:
    torch.distributed has no authentication. Raises UserError if it cannot listen at the port or reach it.
    """
    host, port = network.resolve(info.url) if info.url else ("127.0.0.1", 0)
    if info.nodes == 1:
        network.listen(host, 0, info.url).close()  # raises if it is not an address of this machine
        host = "127.0.0.1"
    elif is_master and args.dist_interface:
        host = network.interface_address(args.dist_interface)
    elif is_master:
        refuse_loopback(info.url.removeprefix("tcp://"), host, f"--dist-url {info.url}")
    timeout = timedelta(seconds=args.dist_timeout)
    own = "a run without srun"
    if info.launcher == "srun":
        own = f"step {os.environ.get('SLURM_STEP_ID', '0')} of SLURM's job {os.environ['SLURM_JOB_ID']}"
    try:
        if is_master:
            listener = network.listen(host, port, info.url)
            host, port = listener.getsockname()
            connect = functools.partial(dist.TCPStore, is_master=True, master_listen_fd=listener.detach())
        else:
            network.wait_for_listener(host, port, args.dist_timeout)
            connect = dist.TCPStore

        def meet():
            store = connect(host, port, timeout=timeout, wait_for_workers=False)
            if is_master:
                store.set("run", own)
            return store, store.get("run").decode()

        with network.hide_native_messages():  # something else may listen there and never answer
            store, run = network.call_within(args.dist_timeout, meet)
    except (OSError, dist.DistError) as error:
        raise UserError(
            f"--dist-url {info.url}: node 0 is not reached within --dist-timeout {args.dist_timeout:g} s "
            f"({one_line(error)}); start node 0, or correct host and port"
        ) from None
    if run != own:
        raise UserError(f"--dist-url {info.url}: {run} meets there, and this is {own}; give each run a port of its own")
    return store


def join_store(args, info: DistInfo):
    """The store that open_store gives to a rank. Raises UserError if that rank has joined there already."""
    store = open_store(args, info, is_master=info.rank == 0 and info.launcher != "spawn")  # else the parent holds it
    if store.add(f"rank {info.rank}", 1) > 1:
        raise UserError(
            f"--dist-url {info.url}: rank {info.rank} of a run has joined there already; give each run a port of its "
            "own, and start all of its ranks again if one has died"
        )
    return store


@contextlib.contextmanager
def say_if_waiting(info: DistInfo):
    """Prints where this process waits, and for whom, if the block takes longer than PATIENCE seconds."""
    where = info.url if info.url != "env://" else f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    started = {"torchrun": "of WORLD_SIZE", "srun": "of the srun step"}.get(info.launcher, "of this command")
    if info.launcher in ("spawn", "node") and info.nodes > 1:
        started += f", given on {info.nodes} nodes with --rank 0 to {info.nodes - 1}"
    text = f"rank {info.rank} waits at {where} for the {info.world_size} processes {started} (--dist-timeout)"
    timer = threading.Timer(PATIENCE, print, [text], {"flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
