"""Starts the processes of a run, watches them, and says in one line how it ended.

Four ways lead to the same code path: a plain call (one process, no group), --multiprocessing-distributed (this process
starts one a GPU, or --nproc, and watches them), torchrun and srun (they start the processes).
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing import connection, resource_tracker

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .errors import UserError
from .rendezvous import Place, find_place, join_group, open_store, pick_device
from .signals import STOP_SIGNALS, STOPPED_EARLY, TRY_AGAIN, Stopped, StopRequest, held_signals, in_main_thread

USER_ERROR, INTERRUPTED = 2, 130  # exit statuses; TRY_AGAIN is the third
GRACE = 5  # seconds in which the other ranks may say what they know of a failure
LOST_CONTACT = "lost contact with another process of the run"


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
