"""Starts a stage's script whose processes wait at a known point, so that a test can signal or kill them there.

The environment variable GATE sets the point. "start": a process of --multiprocessing-distributed waits before it
handles signals, until it is asked to stop. A number N: a process makes GATE_FILE.<pid> at its Nth heartbeat, and waits
until any process of the run is asked to stop (the file GATE_FILE informs the others). "hang": a process opens, at its
second heartbeat, a FIFO that nobody writes to, GATE_FILE.<pid>. "twice": a process waits at its sixth heartbeat for
good; it makes GATE_FILE.<pid>, and removes it when it is asked to stop. The process of --multiprocessing-distributed
that only watches the others never waits.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

from utils import distributed, signals

GATE, FILE = os.environ["GATE"], Path(os.environ["GATE_FILE"])
OWN_FILE = Path(f"{FILE}.{os.getpid()}")
WATCHES = __name__ == "__main__" and "--multiprocessing-distributed" in sys.argv


def heartbeat(real=distributed.heartbeat, calls=[]):  # noqa: B006
    real()
    calls.append(None)
    if WATCHES:
        return
    if GATE == "hang" and len(calls) == 2:
        os.mkfifo(OWN_FILE)
        OWN_FILE.open()
    elif GATE == "twice" and len(calls) == 6:
        OWN_FILE.touch()
        while True:
            if distributed.stop_requested():
                OWN_FILE.unlink(missing_ok=True)
            time.sleep(0.01)
    elif str(len(calls)) == GATE:
        OWN_FILE.touch()
        while not FILE.exists():
            if distributed.stop_requested():
                FILE.touch()
            time.sleep(0.01)


distributed.heartbeat = heartbeat
if GATE == "hang":
    signals.STUCK_AFTER = 1
while GATE == "start" and __name__ == "__mp_main__" and not signal.sigpending():
    time.sleep(0.01)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    stage = importlib.import_module(Path(sys.argv[0]).stem)  # it imports the heartbeat set above
    sys.exit(stage.main())
