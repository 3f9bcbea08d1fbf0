"""Why a process failed, in one line and a status: the table CAUSES."""

import contextlib
import json
import os
import re
import select
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ..command_line import BROKEN_PIPE, INTERRUPTED, USER_ERROR
from ..distributed import get_dist_info
from ..errors import PASSING, Unavailable, UserError, drop_unwritable_output, format_stack, print_stack, words_and_place
from ..signals import Stopped


def is_broken_output(error) -> bool:
    """Whether the reader of the output, such as head, has closed it, and not the other end of another pipe."""
    if isinstance(error, BrokenPipeError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
        return bool(poll.poll(0))
    return False


OUT_OF_MEMORY = "out of memory: lower --batch-size, --eval-batch-size or -j/--workers, or use --amp bf16"
FEW_PROCESSES = "no new thread: out of memory or a limit (ulimit -u, docker --pids-limit): raise it, or lower --workers"
FEW_FILES = "too many open files: raise the limit (ulimit -n 65536), or lower -j/--workers"
SMALL_SHM = "no room in /dev/shm for the data workers: enlarge it (docker --shm-size 8g), or lower -j/--workers"
LONG_TMPDIR = "TMPDIR is too long a path for the data workers' sockets: set a shorter one, or use -j 0"
WORKER_DIED = "a data loading worker died ({text:.200}); if for lack of memory, give it more, or lower -j/--workers"
NO_COMPILER = "--compile: the C++ compiler fails ({text:.120}); repair it, name another in CXX, or leave --compile out"
NO_ANSWER = (
    "no answer from another process of the run within --dist-timeout {seconds:g} s: its node, the network or the "
    "process itself is stuck or down; continue with --resume auto"
)
LOST_CONTACT = "lost contact with another process of the run; its own message, if it had one, says why"
LOST_IN_GLOO = "gloo.*(Connection (closed by peer|reset by peer|timed out)|Broken pipe|unreachable|No route to host)"
NO_SHM = r"</torch_\w+>|(No space left on device|Read-only file system): data workers|\(pid.*Bus error"
# (error type or predicate, regular expression for its text, exit status, message or function); the first match counts
CAUSES = (
    (UserError, "", USER_ERROR, "{text}"),
    ((Stopped, Unavailable), "", os.EX_TEMPFAIL, "{text}"),
    (KeyboardInterrupt, "", INTERRUPTED, "interrupted; the last checkpoint is intact: continue with --resume auto"),
    (is_broken_output, "", BROKEN_PIPE, "the reader of the output has closed it; continue with --resume auto"),
    (ConnectionError, "", 1, format_stack),
    ((MemoryError, torch.cuda.OutOfMemoryError), "", USER_ERROR, OUT_OF_MEMORY),
    (Exception, "allocate memory|allocate .* for an array", USER_ERROR, OUT_OF_MEMORY),
    (Exception, "start new thread|temporarily unavailable: data workers", USER_ERROR, FEW_PROCESSES),
    (OSError, "AF_UNIX path too long", USER_ERROR, LONG_TMPDIR),
    (Exception, "Too many open files|items of ancdata", USER_ERROR, FEW_FILES),
    (Exception, NO_SHM, USER_ERROR, SMALL_SHM),
    (RuntimeError, "^(InvalidCxxCompiler|CppCompileError): ", USER_ERROR, NO_COMPILER),  # within InductorError
    (OSError, rf"\[Errno ({'|'.join(map(str, PASSING))})\]", os.EX_TEMPFAIL, words_and_place),
    (OSError, "", USER_ERROR, words_and_place),  # a full disk, or a file that a transform does not find
    (Exception, "^Caught .* in DataLoader worker process", 1, format_stack),  # its code failed; the worker lives
    (RuntimeError, r"^DataLoader worker \(pid", 1, WORKER_DIED),
    (RuntimeError, r"Timed out waiting (?P<ms>\d+)ms for (?:recv|send) operation", 1, NO_ANSWER),  # gloo's words
    (dist.DistBackendError, "", 1, LOST_CONTACT + " ({text:.300})"),  # NCCL's; it may be the cause itself
    (dist.DistError, "", 1, LOST_CONTACT),
    (RuntimeError, LOST_IN_GLOO, 1, LOST_CONTACT),
    (BaseException, "", 1, format_stack),
)  # fmt: skip


def describe_failure(error: BaseException) -> tuple[int, str]:
    """Returns (exit status, message) from CAUSES; the message is empty if rank 0 prints the same.

    Also prints the stack if the environment has TRACEBACK=1, unless the message is the stack.
    """
    text = " ".join(str(error).split())
    for kind, words, status, message in CAUSES:  # noqa: B007
        match = re.search(words, text)
        if match and (isinstance(error, kind) if isinstance(kind, type | tuple) else kind(error)):
            break
    if message is not format_stack:
        print_stack(error)
    if getattr(error, "on_all_ranks", False) and get_dist_info().rank > 0:
        return status, ""
    if callable(message):
        return status, message(error)
    return status, message.format(text=text, seconds=int(match.groupdict().get("ms", 0)) / 1000)


def tell_torchrun(message: str):
    """Writes the message where torchrun looks for the cause of a failure, so that its last words name it."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # the message was printed
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))


def exit_now(status: int):
    """Ends the process without the interpreter's cleanup, which would abort on a broken process group."""
    drop_unwritable_output()  # also flushes what can be written
    os._exit(status)
