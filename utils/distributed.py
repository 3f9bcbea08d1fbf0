"""Processes: who starts them, how they meet, and how one that fails ends them all.

Four ways lead to the same code path: a plain call (one process, no group), --multiprocessing-distributed (this process
starts one a GPU, or --nproc, and watches them), torchrun and srun (they start the processes).
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing import connection
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .errors import UserError

USER_ERROR, TRY_AGAIN = 2, 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 5  # seconds in which the other ranks may say what they know of a failure


class Stopped(Exception):
    """The run was asked to stop and has written its checkpoint."""


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


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """The sum, or whatever op says, over all ranks; in place."""
    if world() > 1:
        dist.all_reduce(tensor, op)
    return tensor


def gather_objects(value) -> list:
    """The values of all ranks, small picklable ones."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model):
    """Gives all ranks rank 0's BatchNorm statistics, the ones that checkpoints hold."""
    if world() > 1:
        for name, buffer in model.named_buffers():
            if "queue" not in name:  # the same on all ranks by construction, and large
                dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def together():
    """A user's mistake that any rank meets within is raised on all of them, in the words of the first."""
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = str(error)
    first = next((text for text in gather_objects(mistake) if text is not None), None)
    if first is not None:
        error = UserError(first)
        error.everywhere = True
        raise error from None


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
        local = args.nproc if pick_device_type(args) == "cpu" else torch.cuda.device_count()
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


def loopback_interface() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


def open_store(args, place: Place, first: bool):
    """The key-value store at which the processes meet; `first`: this process holds it.

    It listens on loopback where there is one node, else on --dist-interface or the address of --dist-url:
    torch.distributed has no authentication. Raises UserError where the port cannot be had or reached.
    """
    host, port = address_of(place.url) if place.url else ("127.0.0.1", 0)
    timeout = timedelta(seconds=args.dist_timeout)
    listener = None
    if first:
        if place.nodes == 1:
            at = "127.0.0.1"
        elif args.dist_interface:
            at = interface_address(args.dist_interface)
        else:
            at = "" if host.startswith("127.") else host
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if place.nodes == 1:
                is_local(host, place.url)
            listener.bind((at, port))
            listener.listen(2048)
        except OSError as error:
            reason = error.strerror.lower() if error.strerror else error
            raise UserError(f"--dist-url {place.url}: cannot listen there ({reason}); choose another port") from None
        host, port = listener.getsockname()
        host = "127.0.0.1" if host == "0.0.0.0" else host
    try:
        return dist.TCPStore(
            host, port, None, is_master=first, wait_for_workers=False, timeout=timeout,
            master_listen_fd=listener.detach() if listener else None,
        )  # fmt: skip
    except dist.DistError as error:
        raise UserError(
            f"--dist-url {place.url}: node 0 is not reached within --dist-timeout {args.dist_timeout:g} s "
            f"({type(error).__name__}); start node 0, or correct host and port"
        ) from None


def is_local(host: str, url):
    """Raises UserError where an address is none of this machine's, found by binding a socket to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            raise UserError(
                f"--dist-url {url}: {host} is no address of this machine; use tcp://localhost:PORT"
            ) from None


def join_group(args, place: Place, device, store=None):
    """Initialises the process group, where there is more than this process or a launcher asked for one."""
    if place.launcher == "plain":
        return
    backend = "gloo" if device.type == "cpu" else args.dist_backend
    interface = args.dist_interface or (loopback_interface() if place.nodes == 1 else None)
    if interface:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, interface)
    timeout = timedelta(seconds=args.dist_timeout)
    try:
        if place.launcher == "torchrun":
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            store = store or open_store(args, place, first=place.rank == 0)
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout)
    except dist.DistError as error:
        raise UserError(
            f"the {place.world} processes did not meet within --dist-timeout {args.dist_timeout:g} s "
            f"({type(error).__name__}); start them all, with the same --dist-url and --world-size"
        ) from None


def describe_failure(error: BaseException) -> tuple[int, str]:
    """(exit status, text) of an exception: a line where the cause is known, else the traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return USER_ERROR, text
    if isinstance(error, Stopped):
        return TRY_AGAIN, text
    if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in text:
        return USER_ERROR, "out of memory: lower --batch-size or --eval-batch-size, or use --amp bf16"
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return 1, f"a data loading worker died ({text[:200]}); give the run more memory or fewer --workers"
    if isinstance(error, dist.DistError) or "Connection closed by peer" in text or "Connection reset by peer" in text:
        return 1, "lost contact with another process of the run; its own message, if it had one, says why"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def run_rank(work, args, place: Place, store=None) -> tuple[int, str]:
    """One process of the run, from joining the group to leaving it; returns (exit status, message or "")."""
    try:
        device = pick_device(args, place)
        if place.local_world > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // place.local_world))
        join_group(args, place, device, store)
        work(args, place, device)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0, ""
    except Exception as error:
        status, text = describe_failure(error)
        if getattr(error, "everywhere", False) and place.rank > 0:
            text = ""  # rank 0 says it
    return status, text


def launch(work, args) -> int:
    """Runs work(args, place, device) in this process or in those it starts, and returns the exit status.

    0; 2 after a user's mistake; 75 where the run was stopped and can go on; 1 after any other failure. What there is
    to say stands in one line on stderr.
    """
    place = find_place(args)
    if place.launcher == "spawn":
        status, text = Spawned(work, args, place).run()
    else:
        status, text = run_rank(work, args, place)
    if text:
        print(f"{args.program}: {text}", file=sys.stderr, flush=True)
    return status


class Spawned:
    """The processes of this node under --multiprocessing-distributed, and the store that they meet at."""

    def __init__(self, work, args, place: Place):
        self.args, self.place = args, place
        self.store = open_store(args, place, first=place.rank == 0)
        port = self.store.port
        context = mp.get_context("spawn")
        self.processes, self.channels = [], []
        for local in range(place.local_world):
            receive, send = context.Pipe(duplex=False)
            mine = place._replace(rank=place.rank + local, local_rank=local)
            process = context.Process(target=child, args=(work, args, mine, self.store.host, port, send))
            process.start()
            send.close()
            self.processes.append(process)
            self.channels.append(receive)

    def run(self) -> tuple[int, str]:
        """Waits for all to end; where one fails, ends the others. Returns the exit status and what to say."""
        handlers = {number: signal.signal(number, self._pass_on) for number in STOP_SIGNALS if in_main_thread()}
        try:
            running, failed_at = set(self.processes), None
            while running:
                patience = None if failed_at is None else max(0, failed_at + GRACE - time.monotonic())
                connection.wait([process.sentinel for process in running], timeout=patience)
                running = {process for process in running if process.exitcode is None}
                if failed_at is None and any(process.exitcode for process in self.processes):
                    failed_at = time.monotonic()
                if failed_at is not None and time.monotonic() - failed_at >= GRACE:
                    break
            self._kill(running)
            return self._verdict(running)
        except BaseException:
            self._kill(self.processes)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @staticmethod
    def _kill(processes):
        for process in processes:
            process.kill()
            process.join()

    def _pass_on(self, number, frame):
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    def _verdict(self, killed) -> tuple[int, str]:
        """The most telling outcome: a user's mistake, then a process that died, then any other failure, then a stop."""
        outcomes = []
        for local, (process, channel) in enumerate(zip(self.processes, self.channels, strict=True)):
            said = None
            with contextlib.suppress(EOFError, OSError):
                said = channel.recv() if channel.poll() else None
            if said is not None:
                outcomes.append(said)
            elif process not in killed and process.exitcode:
                number = self.place.rank + local
                cause = f"exit status {process.exitcode}"
                if process.exitcode < 0:
                    cause = signal.Signals(-process.exitcode).name + (
                        "; out of memory?" if process.exitcode == -9 else ""
                    )
                outcomes.append((1, f"rank {number} died ({cause}); continue with --resume auto"))
        lost = "lost contact"
        outcomes.sort(key=lambda o: (o[0] == 0, o[0] == TRY_AGAIN, o[0] != USER_ERROR, lost in o[1], not o[1]))
        return outcomes[0] if outcomes else (1, "the processes ended without a word")


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def child(work, args, place: Place, host: str, port: int, channel):
    """A started process: meets the others, works, reports through the channel, and dies with its parent."""

    def die_with_parent():
        connection.wait([mp.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    try:
        store = dist.TCPStore(host, port, None, False, timedelta(seconds=args.dist_timeout), wait_for_workers=False)
        status, text = run_rank(work, args, place, store)
    except Exception as error:
        status, text = describe_failure(error)
    channel.send((status, text))
    sys.exit(status)


class StopRequest:
    """Notes the signals that ask for a stop. A second SIGINT, from an impatient Ctrl-C, ends the process at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS if in_main_thread()}
        return self

    def _note(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)
