"""Stage I as a script whose processes wait at a known point, so that a test can signal or kill them there.

The environment variable GATE sets the point. "start": a process of --multiprocessing-distributed waits before it
handles signals, until it is asked to stop. A number N: a process waits at its Nth heartbeat until any process of the
run is asked to stop (the file GATE_FILE informs the others). "hang": a process opens, at its second heartbeat, a FIFO
that nobody writes to.
"""

import os
import signal
import sys
import time
from pathlib import Path

from utils.launch import signals

GATE, FILE = os.environ["GATE"], Path(os.environ["GATE_FILE"])


def heartbeat(real=signals.heartbeat, calls=[]):  # noqa: B006
    real()
    calls.append(None)
    if GATE == "hang" and len(calls) == 2:
        fifo = f"{FILE}.{os.getpid()}"
        os.mkfifo(fifo)
        open(fifo)
    elif str(len(calls)) == GATE:
        while not FILE.exists():
            if signals.stop_requested():
                FILE.touch()
            time.sleep(0.01)


signals.heartbeat = heartbeat
if GATE == "hang":
    signals.STUCK_AFTER = 1
while GATE == "start" and __name__ == "__mp_main__" and not signal.sigpending():
    time.sleep(0.01)

import ssd_stage_i  # noqa: E402  it imports the heartbeat set above

if __name__ == "__main__":
    sys.exit(ssd_stage_i.main())
