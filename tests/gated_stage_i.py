"""Stage I as a script whose processes wait at a known point, where what a test does to them finds them.

The environment's GATE says where: "start", in a process of --multiprocessing-distributed before it obeys signals, until
it is asked to stop; a number N, at its Nth heartbeat, until some process of the run is asked to stop (the file
GATE_FILE tells the others); "hang", at its second heartbeat, in the opening of a FIFO that nobody writes to.
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

import ssd_stage_i  # noqa: E402  it takes the heartbeat from there

if __name__ == "__main__":
    sys.exit(ssd_stage_i.main())
