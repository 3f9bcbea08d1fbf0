"""Processes: who starts them, how they meet, and how one that fails ends them all.

Four ways lead to the same code path: a plain call (one process, no group), --multiprocessing-distributed (this process
starts one a GPU, or --nproc, and watches them), torchrun and srun (they start the processes).
"""

import contextlib
import errno
import functools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .errors import UserError

USER_ERROR, TRY_AGAIN, INTERRUPTED = 2, 75, 130
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 5  # seconds in which the other ranks may say what they know of a failure
LOST_CONTACT = "lost contact with another process of the run"
STOPPED_EARLY = "stopped on request before the first step; start again with the same command"


class Stopped(Exception):
    """The run was asked to stop; what there was to save is written."""


@contextlib.contextmanager
def held_signals():
    """Keeps the signals that ask for a stop from this thread and, for good, from the processes started within.

    What is held reaches this thread at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


def is_loopback_name(url: str) -> bool:
    """Whether a URL names this machine's loopback outright, as a run of several nodes on one machine does."""
    name = urlsplit(url).hostname
    return name == "localhost" or name.startswith("127.")


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


def describe_failure(error: BaseException) -> tuple[int, str]:
    """(exit status, text) of an exception: a line where the cause is known, else the traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return USER_ERROR, text
    if isinstance(error, Stopped):
        return TRY_AGAIN, text
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; what was saved before is whole: continue with --resume auto"
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return USER_ERROR, "out of memory: lower --batch-size or --eval-batch-size, or use --amp bf16"
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return 1, f"a data loading worker died ({text[:200]}); give the run more memory or fewer --workers"
    if isinstance(error, dist.DistError) or "Connection closed by peer" in text or "Connection reset by peer" in text:
        return 1, f"{LOST_CONTACT}; its own message, if it had one, says why"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def run_rank(work, args, place: Place, stop: "StopRequest", store=None) -> tuple[int, str]:
    """One process of the run, from joining the group to leaving it; returns (exit status, message or "")."""
    try:
        device = pick_device(args, place)
        if place.local_world > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // place.local_world))
        join_group(args, place, device, store)
        work(args, place, device, stop)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0, ""
    except (Exception, KeyboardInterrupt) as error:
        status, text = describe_failure(error)
        if getattr(error, "everywhere", False) and place.rank > 0:
            text = ""  # rank 0 says it
    return status, text


def launch(work, args) -> int:
    """Runs work(args, place, device, stop) in this process or in those it starts, and returns the exit status.

    0; 2 after a user's mistake; 75 where the run was stopped and can go on; 1 after any other failure. What there is
    to say stands in one line on stderr.
    """
    place = find_place(args)
    if place.launcher == "spawn":
        status, text = Spawned(work, args, place).run()
    else:
        with StopRequest(args.program) as stop:
            status, text = run_rank(work, args, place, stop)
    if text:
        print(f"{args.program}: {text}", file=sys.stderr, flush=True)
    if dist.is_initialized():  # only after a failure
        leave(status)
    return status


class Spawned:
    """The processes of this node under --multiprocessing-distributed, and the store that they meet at."""

    def __init__(self, work, args, place: Place):
        self.work, self.args, self.place = work, args, place
        self.processes, self.channels, self.asked = [], [], False

    def run(self) -> tuple[int, str]:
        """Starts all, waits for all to end; where one fails, ends the others. Returns exit status and what to say."""
        handlers = {number: signal.signal(number, self._pass_on) for number in STOP_SIGNALS if in_main_thread()}
        try:
            self._start()
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
        except KeyboardInterrupt as error:
            self._kill(self.processes)
            return describe_failure(error)
        except BaseException:
            self._kill(self.processes)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _start(self):
        with StopRequest(self.args.program):
            store = self.store = open_store(self.args, self.place, first=self.place.rank == 0)
        context = mp.get_context("spawn")
        with held_signals():  # until they are ready to heed them; the tracker would die of some
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # which it may have undone
            for local in range(self.place.local_world):
                receive, send = context.Pipe(duplex=False)
                mine = self.place._replace(rank=self.place.rank + local, local_rank=local)
                arguments = (self.work, self.args, mine, store.host, store.port, send)
                process = context.Process(target=child, args=arguments)
                process.start()
                send.close()
                self.processes.append(process)
                self.channels.append(receive)
        if self.asked:  # before they were there
            self._pass_on(signal.SIGTERM, None)

    @staticmethod
    def _kill(processes):
        for process in processes:
            process.kill()
            process.join()

    def _pass_on(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    def _verdict(self, killed) -> tuple[int, str]:
        """The most telling outcome: a user's mistake, another failure, a stop, and last a lost contact."""
        outcomes = []
        for local, (process, channel) in enumerate(zip(self.processes, self.channels, strict=True)):
            said = None
            with contextlib.suppress(EOFError, OSError):
                said = channel.recv() if channel.poll() else None
            if said is not None:
                outcomes.append(said)
            elif process.exitcode == TRY_AGAIN:
                outcomes.append((TRY_AGAIN, STOPPED_EARLY))
            elif process not in killed and process.exitcode:
                number = self.place.rank + local
                cause = f"exit status {process.exitcode}"
                if process.exitcode < 0:
                    cause = signal.Signals(-process.exitcode).name + (
                        "; out of memory?" if process.exitcode == -9 else ""
                    )
                outcomes.append((1, f"rank {number} died ({cause}); continue with --resume auto"))
        outcomes.sort(
            key=lambda o: (o[0] == 0, o[1].startswith(LOST_CONTACT), o[0] == TRY_AGAIN, o[0] != USER_ERROR, not o[1])
        )
        return outcomes[0] if outcomes else (1, "the processes ended without a word")


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def child(work, args, place: Place, host: str, port: int, channel):
    """A started process: meets the others, works, reports through the channel, and dies with its parent."""
    # Its data workers start as those of a plain run do: spawned as it was itself, each would import everything anew.
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)

    def die_with_parent():
        connection.wait([mp.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    with StopRequest() as stop:
        try:
            timeout = timedelta(seconds=args.dist_timeout)
            store = dist.TCPStore(host, port, None, False, timeout, wait_for_workers=False)
            status, text = run_rank(work, args, place, stop, store)
        except (Exception, KeyboardInterrupt) as error:
            status, text = describe_failure(error)
        channel.send((status, text))
        leave(status)


def leave(status: int):
    """Ends the process without the interpreter's clearing up, in which a group that broke would abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopRequest:
    """Heeds the signals that ask for a stop.

    At first there is nothing to save, and the process leaves at once with status 75, even from a wait for others.
    From defer() on, a signal is noted in `asked`, for the run to leave after its checkpoint; a second SIGINT, from an
    impatient Ctrl-C, raises KeyboardInterrupt. program: who says so on stderr when it leaves at once; None: nobody.
    """

    def __init__(self, program: str | None = None):
        self.program, self.asked, self.deferred, self.before = program, False, False, {}
        self.stderr = os.dup(2)  # whatever fd 2 may be when it is needed

    def __enter__(self):
        if in_main_thread():
            self.receive, self.send = os.pipe()
            os.set_blocking(self.send, False)
            self.wakeup = signal.set_wakeup_fd(self.send, warn_on_full_buffer=False)
            self.before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
            threading.Thread(target=self._leave_at_once, daemon=True).start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def defer(self):
        """From now on there may be something to save first."""
        self.deferred = True

    def _note(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def _leave_at_once(self):
        """Runs in a thread: a handler would wait for the main thread, which may wait for other processes for long."""
        while number := os.read(self.receive, 1)[0]:
            if number in STOP_SIGNALS and not self.deferred:
                if self.program:
                    os.write(self.stderr, f"{self.program}: {STOPPED_EARLY}\n".encode())
                os._exit(TRY_AGAIN)
        os.close(self.receive)

    def __exit__(self, *exception):
        os.close(self.stderr)
        if self.before:
            for number, handler in self.before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self.wakeup)
            os.write(self.send, b"\0")
            os.close(self.send)
