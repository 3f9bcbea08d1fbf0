"""Starts a stage's script, as LAUNCH of scripts/train.sh; its first start in a folder waits in the second epoch.

It makes <output_dir>.waiting, and waits there until it is asked to stop, or killed.
"""

import runpy
import sys
import time
from pathlib import Path

from utils import distributed

BEAT = 12  # heartbeats come with the steps of training and evaluation: an epoch has 9 + 2 here


def heartbeat(real=distributed.heartbeat, calls=[]):  # noqa: B006
    real()
    calls.append(None)
    waiting = Path(sys.argv[sys.argv.index("--output_dir") + 1] + ".waiting")
    if len(calls) == BEAT and not waiting.exists():
        waiting.touch()
        while not distributed.stop_requested():
            time.sleep(0.01)


distributed.heartbeat = heartbeat
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
