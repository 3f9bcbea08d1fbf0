"""Signals that ask a run to stop, and how a process obeys them.

Until defer_stop() there is nothing to save: the process exits at once with status 75, even if it is waiting for
others. From then on a signal is noted for stop_requested(), so that the run exits after its checkpoint; without a
heartbeat() for STUCK_AFTER seconds it is stuck, for instance in a system call, and the process exits at once. A second
SIGINT raises KeyboardInterrupt.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time

from . import distributed
from .distributed import STOP_SIGNALS
from .errors import EndOfRun

STUCK_AFTER = 120  # seconds
STOPPED_EARLY = "stopped on request before the first step; start again with the same command"
STOPPED_STUCK = (
    "stopped on request, at once, since there was no progress for {:g} s; the last checkpoint is intact: "
    "continue with --resume auto"
)


class Stopped(EndOfRun):
    """The run was asked to stop, and has saved what there was to save."""


@contextlib.contextmanager
def handle_stop_signals(program: str = "", report=None, exits: bool = False):
    """Installs the handlers; does nothing outside the main thread, where Python does not allow it.

    report(message) is called when the process exits at once; without it the message goes to stderr. exits: the process
    ends after the block, and ignores further signals if it was asked to stop: one would take the place of its status.
    """
    distributed.stop_state = state = distributed.StopState(interactive=bool(program) and os.isatty(2))
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receive, send = os.pipe()
    os.set_blocking(send, False)
    stderr = os.dup(2)  # fd 2 may point elsewhere when it is needed
    report = report or (lambda message: os.write(stderr, f"{program}: {message}\n".encode()))
    wakeup = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _note) for number in STOP_SIGNALS}
    thread = threading.Thread(target=_watch, args=(receive, state, report), daemon=True)
    thread.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if exits and state.requested else handler)
        signal.set_wakeup_fd(wakeup)
        state.ended.set()
        os.write(send, b"\0")
        thread.join()
        distributed.stop_state = distributed.StopState()  # the stop of this run is none of the next
        for descriptor in (receive, send, stderr):
            os.close(descriptor)


def _note(number, frame):
    state = distributed.stop_state
    if state.requested and number == signal.SIGINT:
        raise KeyboardInterrupt
    state.requested = True
    if number == signal.SIGINT and state.deferred and state.interactive:
        os.write(2, b"\nstopping after this step; Ctrl-C again exits at once\n")


def _watch(receive: int, state, report):
    """Ends the process at the right time; runs in a thread, since the main thread may be stuck in a system call."""
    while (number := os.read(receive, 1)[0]) not in STOP_SIGNALS:
        if number == 0:
            return
    message = STOPPED_EARLY
    requested_at = time.monotonic()
    if state.deferred:
        message = STOPPED_STUCK.format(STUCK_AFTER)
        while (left := max(requested_at, state.heartbeat) + STUCK_AFTER - time.monotonic()) > 0:
            if state.ended.wait(left):
                return
    try:
        report(message)
        for worker in multiprocessing.active_children():  # a stuck data worker would outlive this process
            worker.kill()
    finally:
        os._exit(os.EX_TEMPFAIL)
