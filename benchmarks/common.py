"""What the benchmarks share: flags, timing in alternation, peak memory in fresh processes, the machine, tables."""

import argparse
import contextlib
import io
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from utils.command_line import ArgumentParser, run_command, whole_number
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
LONG = 5  # seconds of a first call that are worth a line


def argument_parser(doc, name: str, repeats: int | None) -> ArgumentParser:
    """A parser with the flags that all timed benchmarks have; repeats: the default of --repeats."""
    parser = ArgumentParser(doc, prog=f"python -m benchmarks.{name}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    # fmt: off
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"), help="(default here: %(default)s)")
    parser.add_argument("--repeats", type=whole_number(1), default=repeats, metavar="N",
        help=f"how often each version is timed; the tables show medians (default: {repeats or 'set by each'})")
    parser.add_argument("--scaling", action="store_true", help="also show how the cost grows")
    parser.add_argument("--no-memory", action="store_true",
        help="leave out peak memory, which is measured in fresh processes")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)  # what a fresh process should measure
    # fmt: on
    add_write_flag(parser)
    return parser


def add_write_flag(parser):
    """Adds --write, for publish."""
    parser.add_argument("--write", metavar="FILE", help="also put the tables into this file, between their marks")


def run(parser, argv, tables, measure=None) -> int:
    """The main of a benchmark: publishes tables(args, argv), or calls measure(name, args) in a fresh process."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def work(args):
        if measure is not None and args.measure:
            measure(args.measure, args)
        else:
            publish(tables(args, argv), args.write)

    return run_command(work, parser, argv)


# ---- time


def synchronize(device):
    """Waits until the device has done all its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device="cpu", clock=time.perf_counter) -> float:
    """Time of one call, until the device has done the work that the call started."""
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def alternate(functions: dict, repeats: int, device="cpu", clock=time.perf_counter) -> dict[str, list[float]]:
    """Seconds of the calls of each function, by name; the functions take turns, so that other load affects all equally.

    A first turn, to warm up, is left out. A first call of many seconds is reported on stderr: cuDNN's search for fast
    algorithms and --compile can take longer than all that is timed.
    """
    taken = {name: [] for name in functions}
    for turn in range(1 + repeats):
        for name, function in functions.items():
            duration = seconds(function, device, clock)
            if turn > 0:
                taken[name].append(duration)
            elif duration > LONG:
                note(("warm-up", *(name if isinstance(name, tuple) else (name,)), f"{duration:.0f} s"))
    return taken


def medians(functions: dict, repeats: int, device="cpu", clock=time.perf_counter) -> dict[str, float]:
    """The medians of what alternate returns."""
    return {name: median(taken) for name, taken in alternate(functions, repeats, device, clock).items()}


@contextlib.contextmanager
def quiet():
    """Hides what is printed; since no terminal is left, no progress bar is drawn either."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- memory


def resident_peak() -> int:
    """The most bytes of memory that this process has held; on Linux since its start or the last forget_peak."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts the peak of the parent process
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak():
    """Lets the peak start again from what is held now, if the system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def report_peak(function, device, above: bool):
    """Calls the function and prints its peak memory in bytes, for in_fresh_process to read.

    On a CPU it is the memory of the process, on a GPU what torch allocated. above: count only what the function
    adds.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        forget_peak()
        held = resident_peak()
        function()
        peak = resident_peak()
    print(json.dumps(peak - held if above else peak))


def in_fresh_process(module: str, argv, name: str) -> int:
    """The number of bytes that `python -m module ARGV --measure NAME` prints in its last line."""
    command = [sys.executable, "-m", module, *argv, "--measure", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    return json.loads(output.splitlines()[-1])


# ---- tables


class Table(NamedTuple):
    """A table of text; name: in its mark in docs/benchmarks.md; title: what was measured, by which command."""

    name: str
    title: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """Title and table."""
        rows = [self.headers, ("---",) + ("---:",) * (len(self.headers) - 1), *self.rows]
        return "\n".join([self.title, "", *("| " + " | ".join(row) + " |" for row in rows)])


def note(row: tuple[str, ...]) -> tuple[str, ...]:
    """Prints a row on stderr as soon as it is known, so that a long run that is stopped early does not lose it."""
    print(" | ".join(row), file=sys.stderr, flush=True)
    return row


def insert(text: str, table: Table) -> str:
    """The text with the table put between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises UserError if these marks are missing.
    """
    mark = f"<!-- table: {table.name} -->"
    pattern = re.compile(re.escape(mark) + r".*?<!-- end -->", re.DOTALL)
    if not pattern.search(text):
        raise UserError(f"no mark {mark} ... <!-- end --> for the table; add it to the file of --write")
    return pattern.sub(lambda _: f"{mark}\n{table.markdown()}\n<!-- end -->", text, count=1)


def publish(tables: list[Table], file: str | None):
    """Prints the tables, and puts them into a file if one is named."""
    for table in tables:
        print(f"\n{table.markdown()}\n", flush=True)
    if file:
        text = Path(file).read_text()
        for table in tables:
            text = insert(text, table)
        Path(file).write_text(text)


def command(module: str, argv) -> str:
    """The command that repeats a measurement, for a table's title; without --write."""
    words = list(argv)
    if "--write" in words:
        at = words.index("--write")
        del words[at : at + 2]
    threads = os.environ.get("OMP_NUM_THREADS")
    start = f"OMP_NUM_THREADS={threads} python -m" if threads else "python -m"
    return f"`{start} {shlex.join([module, *words])}`"


def mib(size: float | None) -> str:
    """A number of bytes in MiB; empty if it was not measured."""
    return "" if size is None else f"{size / MIB:.0f} MiB"


def machine(device) -> str:
    """The processor, its cores, the threads in use, the GPU and the version of torch, in one line."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.device(device).type == "cuda" else ""
    capability = torch.backends.cpu.get_cpu_capability()
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return f"{name}, {os.cpu_count()} cores, {capability}, {threads}{gpu}, torch {torch.__version__}"
