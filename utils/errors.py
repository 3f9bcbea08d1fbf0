"""Exceptions for users' mistakes and for system errors that may pass, one-line texts, and the stack of an error."""

import contextlib
import errno
import os
import re
import sys
import sysconfig
import time
import traceback
import unicodedata

LIBRARIES = ("<", sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))  # how paths of their code begin
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # what a busy or restarting file server answers
PAUSES = (1, 4, 15)  # seconds before each further attempt to read


class EndOfRun(Exception):
    """Ends a run with one line. on_all_ranks: whether every rank raises the same, so that rank 0 alone prints it."""

    def __init__(self, message: str, on_all_ranks: bool = False):
        super().__init__(message)
        self.on_all_ranks = on_all_ranks

    def __str__(self):
        """On one line, whatever characters a file's name contains."""
        return printable(super().__str__())


class UserError(EndOfRun):
    """A mistake that the user can correct: its one line names the file, line or flag and says how."""


class Unavailable(EndOfRun):
    """The system has failed to read or write in a way that passes: the same command may succeed later."""


def system_error(error: BaseException | None) -> OSError | None:
    """The OSError that an exception is, or that led to it; None if there is none."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error


def retry(read, path, *args):
    """Calls read(path, *args), again after each of PAUSES while the error is in PASSING; then raises Unavailable."""
    for pause in (*PAUSES, None):
        try:
            return read(path, *args)
        except Exception as error:
            cause = system_error(error)
            if cause is None or cause.errno not in PASSING:
                raise
            if pause is None:
                reason = f"{one_line(cause)}, {len(PAUSES) + 1} attempts"
                raise Unavailable(
                    f"{path}: the system cannot read it now ({reason}); start again later with the same command, a "
                    "training with --resume auto"
                ) from cause
        time.sleep(pause)


def printable(text: str) -> str:
    """The text with line breaks, terminal commands and undecodable bytes escaped as in Python."""
    shown = (c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in text)
    return "".join(shown)


def one_line(error: BaseException) -> str:
    """The system's message for an error, else its text on one line of at most 200 characters, else its class name."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__


def format_stack(error: BaseException) -> str:
    """The traceback of an error and of those that it replaced, after the worker's own if it is from a data worker."""
    replaced = error
    while replaced is not None:
        replaced.__suppress_context__ = False
        replaced = replaced.__cause__ or replaced.__context__
    return getattr(error, "worker_stack", "") + "".join(traceback.format_exception(error)).rstrip()


def words_and_place(error: BaseException) -> str:
    """An error's own words on one line, and where it was raised: the innermost line of code that is no library's.

    Both are read from the traceback, since torch keeps nothing else of an error in a data worker.
    """
    stack = format_stack(error)
    words = re.findall(rf"^[\w.]*\b{type(error).__name__}: (.*)", stack, re.M) or [type(error).__name__]
    places = re.findall(r'^ *File "(.+)", line (\d+), in ', stack, re.M)
    own = [(file, line) for file, line in places if not file.startswith(LIBRARIES) and "-packages" not in file]
    place = " (in {}, line {})".format(*own[-1]) if own else ""
    return printable(words[-1][:500] + place)


@contextlib.contextmanager
def optional_package(flag: str, names: str, kinds=BaseException):
    """A block that imports or calls optional packages.

    Raises UserError, naming the flag, for an exception of these kinds: the packages are missing, broken, too old or set
    up wrongly. A broken installation may raise anything, even SystemExit.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except kinds as error:
        reason = f"{names} cannot be used ({one_line(error)})"
        raise UserError(f"{flag}: {reason}; pip install {names} (-U to upgrade), or correct what this says") from None


def drop_unwritable_output():
    """Points an output stream that cannot be written at the null device, or flushing it at exit would fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_stack(error: BaseException):
    """Prints the stack of an error on stderr if the environment has TRACEBACK=1."""
    if os.environ.get("TRACEBACK") == "1":
        print(format_stack(error), file=sys.stderr, flush=True)
