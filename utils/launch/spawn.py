"""--multiprocessing-distributed: starts the processes of this node, and watches them until all have ended."""

import contextlib
import os
import signal
import sys
import threading
import time
from multiprocessing import connection, resource_tracker

import torch.multiprocessing as mp

from ..command_line import USER_ERROR, prepare_streams
from ..distributed import STOP_SIGNALS, DistInfo, block_signals, defer_stop, end_processes, heartbeat, stop_requested
from ..errors import UserError, one_line
from ..signals import handle_stop_signals
from .failures import LOST_CONTACT, describe_failure, exit_now
from .rendezvous import open_store, process_group, say_if_waiting

GRACE = 5  # seconds for the others to report, after a process has failed
POLL = 0.1  # seconds between two checks of stop_requested()
FAILURE = 1  # the place in ORDER of any other status
LOST = 3  # that of a failure that only follows another process's
ORDER = {USER_ERROR: 0, os.EX_TEMPFAIL: 2, 0: 4}  # status -> place among the outcomes, the most informative first
MAX_MESSAGE = 10_000  # characters, which fit into a pipe that nobody reads yet


def run_processes(main_worker, args, info: DistInfo) -> tuple[int, str]:
    """Runs main_worker in local_world_size processes, of which `info` is the first; returns (exit status, message)."""
    with say_if_waiting(info):
        store = open_store(args, info, is_master=info.rank == 0)
    defer_stop()  # from now on a signal is passed on to the processes, and this one ends after them
    info = info._replace(url=f"tcp://{store.host}:{store.port}")
    try:
        pipes = [mp.Pipe(duplex=False) for _ in range(info.local_world_size)]
        with block_signals():  # until the processes are ready for them
            resource_tracker.ensure_running()  # with signals blocked, since SIGUSR1 would end it
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # again: starting the tracker may unblock some
            arguments = (main_worker, args, info, [send for _, send in pipes])
            context = mp.start_processes(run_rank, arguments, len(pipes), join=False, start_method="spawn")
        killed = watch(context.processes)
    except BaseException as error:  # for instance a second SIGINT, or too many open files
        end_processes(mp.active_children())
        if isinstance(error, OSError):
            raise UserError(
                f"--nproc {info.local_world_size}: cannot be started ({one_line(error)}); lower it"
            ) from None
        raise
    outcomes = []
    for local_rank, process in enumerate(context.processes):
        report = read_report(pipes[local_rank][0])
        if report or process not in killed:
            outcomes.append(report or (1, describe_death(info.rank + local_rank, process.exitcode)))
    return most_informative(outcomes)


def most_informative(outcomes) -> tuple[int, str]:
    """The first of (status, message) by ORDER; of several of a kind, one with a message."""

    def order(outcome):
        status, message = outcome
        return LOST if message.startswith(LOST_CONTACT) else ORDER.get(status, FAILURE), not message

    return min(outcomes, key=order)


def watch(processes) -> set:
    """Waits until all processes have ended. Those left GRACE seconds after a failure are killed, and returned.

    A stop is not a failure: it is passed on, and each process may take as long as it needs to save.
    """
    running = set(processes)
    stopping = False
    deadline = None
    while running and (deadline is None or time.monotonic() < deadline):
        connection.wait([process.sentinel for process in running], timeout=POLL)
        heartbeat()
        running = {process for process in running if process.exitcode is None}
        codes = {process.exitcode for process in processes} - {None, 0}
        if not stopping and (stop_requested() or os.EX_TEMPFAIL in codes):
            stopping = True
            for process in running:
                process.terminate()  # sends SIGTERM
        if deadline is None and codes - {os.EX_TEMPFAIL}:
            deadline = time.monotonic() + GRACE
    end_processes(running)
    return running


def read_report(channel) -> tuple[int, str] | None:
    """What a process has reported; None if it ended before."""
    os.set_blocking(channel.fileno(), False)  # there may be half a report
    with contextlib.suppress(Exception):
        return channel.recv()


def describe_death(rank: int, code: int) -> str:
    cause = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
    cause += "; out of memory?" if code == -signal.SIGKILL else ""
    return f"rank {rank} died ({cause}); continue with --resume auto"


def run_rank(local_rank: int, main_worker, args, info: DistInfo, channels):
    """A started process: runs main_worker, and reports (exit status, message). It ends if its parent ends."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    prepare_streams()
    fork_workers()  # a process that was spawned would spawn its own
    info = info._replace(rank=info.rank + local_rank, local_rank=local_rank)
    report = channels[local_rank].send
    with handle_stop_signals(report=lambda message: report((os.EX_TEMPFAIL, message))):
        try:
            with process_group(args, info) as device:
                main_worker(args, device)
            status = 0
            message = ""
        except (Exception, KeyboardInterrupt) as error:
            status, message = describe_failure(error)
        report((status, message[-MAX_MESSAGE:]))
        exit_now(status)


def fork_workers():
    """Makes data workers start by fork on Linux, whatever Python's default is.

    Under forkserver, the default from 3.14 on, each worker would import torch, and a stop signal would kill a helper
    process of Python's, which then prints tracebacks.
    """
    if sys.platform == "linux":
        mp.set_start_method("fork", force=True)


def exit_with_parent():
    connection.wait([mp.parent_process().sentinel])
    os._exit(1)
