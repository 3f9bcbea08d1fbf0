"""Why a process failed, in one line and a status."""

import contextlib
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from ..command_line import BROKEN_PIPE, INTERRUPTED, USER_ERROR, drop_unwritable_output, output_is_closed
from ..distributed import get_dist_info
from ..errors import UserError, one_line
from ..signals import Stopped

LOST_CONTACT = "lost contact with another process of the run; its own message, if it had one, says why"
NO_ANSWER = (
    "no answer from another process of the run within --dist-timeout {:g} s: its node, the network or the process "
    "itself is stuck or down; continue with --resume auto"
)
CONNECTION_BROKEN = (  # how gloo and the system say it
    "Connection closed by peer", "Connection reset by peer", "Connection timed out", "Broken pipe",
    "Network is unreachable", "No route to host",
)  # fmt: skip


def describe_failure(error: BaseException) -> tuple[int, str]:
    """(exit status, message): one line if the cause is known, else the traceback; empty if rank 0 prints the same."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | Stopped):
        status = USER_ERROR if isinstance(error, UserError) else os.EX_TEMPFAIL
        return status, "" if error.on_all_ranks and get_dist_info().rank > 0 else text
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; the last checkpoint is intact: continue with --resume auto"
    if isinstance(error, BrokenPipeError) and output_is_closed():
        return BROKEN_PIPE, "the reader of the output has closed it; continue with --resume auto"
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):  # a full disk, for instance
        drop_unwritable_output()
        return USER_ERROR, f"{error.filename or 'reading or writing'}: {one_line(error)}"
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return USER_ERROR, "out of memory: lower --batch-size or --eval-batch-size, or use --amp bf16"
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return 1, f"a data loading worker died ({text[:200]}); give the run more memory or fewer --workers"
    if timed_out := re.search(r"Timed out waiting (\d+)ms for (?:recv|send) operation", text):  # gloo's words
        return 1, NO_ANSWER.format(int(timed_out[1]) / 1000)
    if isinstance(error, dist.DistBackendError):  # NCCL's; every rank has one, and it may be the cause itself
        return 1, f"{LOST_CONTACT} ({text[:300]})"
    if isinstance(error, dist.DistError) or ("gloo" in text and any(words in text for words in CONNECTION_BROKEN)):
        return 1, LOST_CONTACT
    return 1, "".join(traceback.format_exception(error)).rstrip()


def tell_torchrun(message: str):
    """Writes the message where torchrun looks for the cause of a failure, so that its last words name it."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # the message was printed
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))


def exit_now(status: int):
    """Ends the process without the interpreter's cleanup, which would abort on a broken process group."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
