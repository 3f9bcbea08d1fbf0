"""Requests to stop: the signals that make them, and how a process heeds them."""

import contextlib
import os
import signal
import threading

TRY_AGAIN = 75  # exit status: continue later
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
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


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


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
