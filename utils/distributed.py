"""The ranks of a run: what they exchange, what rank 0 shows, and whether one was asked to stop.

Without a process group, every exchange returns its input.
"""

import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
import time
from typing import NamedTuple

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .errors import PASSING, Unavailable, UserError, drop_unwritable_output, one_line

# What asks a run to stop: a scheduler, Ctrl-C, a closed terminal; the last three unless they are ignored, as by nohup.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) + tuple(
    number for number in (signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU) if signal.getsignal(number) != signal.SIG_IGN
)


class DistInfo(NamedTuple):
    """This process among those of the run: `local_` counts within its node; launcher and url say how they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "plain"
    url: str | None = None

    @property
    def nodes(self) -> int:
        """Number of nodes; at least two if they have different numbers of processes."""
        return -(-self.world_size // self.local_world_size)


_info = DistInfo()


def set_dist_info(info: DistInfo):
    """Says which process this is; the launcher calls it before any work."""
    global _info
    _info = info


def get_dist_info() -> DistInfo:
    return _info


def get_rank() -> int:
    """Rank in the process group, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes in the process group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is rank 0, which alone writes and prints."""
    return get_rank() == 0


def print_main(text: str):
    """Prints on rank 0. A terminal that is gone is no error: SIGHUP stops the run, unless the signal is ignored."""
    if not is_main_process():
        return
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        drop_unwritable_output()


class Progress:
    """A bar of at most 80 columns on a terminal, otherwise a line every `every` steps; rank 0 alone shows it.

    The bar closes with the block, or with close_progress().
    """

    bar = None  # the one on the screen

    def __init__(self, title: str, total: int, every: int, initial: int = 0):
        self.title = title
        self.total = total
        self.every = every
        self.done = initial
        if is_main_process() and sys.stderr.isatty():
            columns = min(80, shutil.get_terminal_size().columns)
            form = "{desc} |{bar}| {n_fmt}/{total_fmt} {postfix}"
            Progress.bar = tqdm(total=total, initial=initial, desc=title, leave=False, ncols=columns, bar_format=form)

    def step(self, short=lambda: "", long=lambda: ""):
        """Counts a step, and every `every` steps, and after the last, shows the text of short() (bar) or long() (line).

        They are not called more often, since they may have to wait for the device.
        """
        self.done += 1
        due = self.done % self.every == 0 or self.done == self.total
        if self.bar is not None:
            self.bar.update()
            if due:
                self.bar.postfix = short()
                self.bar.refresh()
        elif due and is_main_process():
            print_main(f"{self.title} [{self.done}/{self.total}] {long()}".rstrip())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        close_progress()


def close_progress():
    """Removes the bar from the screen, before a message."""
    if Progress.bar is not None:
        Progress.bar.close()
        Progress.bar = None


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds: 2h05, 3m20."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}" if hours else f"{minutes}m{seconds:02}"


class StopState:
    """What this process knows of requests to stop, which signals.py notes."""

    def __init__(self, interactive: bool = False):
        self.requested = False
        self.deferred = False
        self.heartbeat = 0.0
        self.ended = threading.Event()
        self.interactive = interactive  # whether stderr is a terminal


stop_state = StopState()


def stop_requested() -> bool:
    return stop_state.requested


def defer_stop():
    """From now on there may be something to save: a signal is noted, not obeyed at once."""
    stop_state.deferred = True


def heartbeat():
    """Says that the run is making progress."""
    stop_state.heartbeat = time.monotonic()


@contextlib.contextmanager
def block_signals():
    """Blocks STOP_SIGNALS in this thread during the block, and permanently in processes that are started within it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_processes(processes):
    """Kills processes that may not end when asked to, such as busy data workers, and waits for them."""
    for process in processes:
        process.kill()
        process.join()


def distribute(model, device):
    """The model in DistributedDataParallel if there are several ranks; it averages gradients and sends no buffers.

    The queue is the same on all ranks by construction, and large; BatchNorm's running statistics, unless they are
    frozen, are only used by evaluation, which takes rank 0's.
    """
    if get_world_size() == 1:
        return model
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def sync_gradients(model, last: bool):
    """The context of a forward pass: ranks average their gradients only in a step's last backward pass."""
    return contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Reduces a tensor over all ranks, in place, and returns it."""
    if get_world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor


def gather_objects(value) -> list:
    """The values of all ranks, in their order; small picklable ones."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def find_difference(own: dict):
    """(name, rank, value on rank 0, value on this rank) of the first entry in which a rank differs from 0, or None."""
    first, *others = gather_objects(own)
    differences = ((n, r, v, other[n]) for r, other in enumerate(others, 1) for n, v in first.items() if v != other[n])
    return next(differences, None)


def num_cores() -> int:
    """The cores of this process; under srun, which gives each task some of them, those of all tasks on this node."""
    cores = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and cores.isdecimal() and int(cores) > 0:
        return int(cores)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def broadcast_buffers(model):
    """Gives all ranks rank 0's BatchNorm statistics, which are also those in checkpoints."""
    if get_world_size() > 1:
        for name, buffer in model.named_buffers():
            if "queue" not in name:  # the same on all ranks by construction, and large
                dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def raise_on_all_ranks():
    """If ranks raise UserError or Unavailable within the block, all ranks raise what the first of them raised.

    An OSError, such as a full disk, becomes a UserError that names the file.
    """
    failure = None
    try:
        yield
    except (UserError, Unavailable) as error:
        failure = type(error), str(error)
    except ConnectionError:  # between the ranks, or to a reader of the output: not about a file
        raise
    except OSError as error:
        kind = Unavailable if error.errno in PASSING else UserError
        failure = kind, f"{error.filename or 'reading or writing'}: {one_line(error)}"
    failures = [one for one in gather_objects(failure) if one is not None]
    if failures:
        kind, message = failures[0]
        raise kind(message, on_all_ranks=True) from None
