"""What the benchmarks share: flags, timing in alternation, peak memory in fresh processes, the machine, tables."""

import argparse
import contextlib
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


def argument_parser(doc, name: str, repeats: int | None = None) -> ArgumentParser:
    """A benchmark's parser; repeats: the default of --repeats, for a timed one."""
    parser = ArgumentParser(doc, prog=f"python -m benchmarks.{name}")
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--write", metavar="FILE", help="also put the tables into this file, between their marks")
    if repeats:
        # fmt: off
        add("--device", default=device, choices=("cpu", "cuda"), help="(default here: %(default)s)")
        add("--repeats", type=whole_number(1), default=repeats, metavar="N",
            help="how often each version is timed; the tables show medians (default: %(default)s)")
        add("--scaling", action="store_true", help="also show how the cost grows")
        add("--no-memory", action="store_true", help="leave out peak memory, which is measured in fresh processes")
        add("--measure", metavar="NAME", help=argparse.SUPPRESS)  # what a fresh process should measure
        # fmt: on
    return parser


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


def medians(functions: dict, repeats: int, device="cpu", clock=time.perf_counter) -> dict[str, float]:
    """Median seconds of the calls of each function, by name; they take turns, so that other load affects all equally.

    A call lasts until the device has done its work. A first turn, to warm up, is left out; a first call of many seconds
    is reported on stderr: cuDNN's search for fast algorithms and --compile can take longer than all that is timed.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    taken = {name: [] for name in functions}
    for turn in range(1 + repeats):
        for name, function in functions.items():
            wait()
            start = clock()
            function()
            wait()
            duration = clock() - start
            if turn > 0:
                taken[name].append(duration)
            elif duration > LONG:
                note(("warm-up", name, f"{duration:.0f} s"))
    return {name: median(durations) for name, durations in taken.items()}


# ---- memory


def resident_peak() -> int:
    """The most bytes of memory that this process has held; on Linux since its start or since the peak was reset."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts the peak of the parent process
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def report_peak(function, device, above: bool):
    """Calls the function and prints its peak memory in bytes, for in_fresh_process to read.

    On a CPU it is the memory of the process, on a GPU what torch allocated. above: count only what the function adds.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
    peak = torch.cuda.max_memory_allocated if on_gpu else resident_peak
    held = peak()
    function()
    print(peak() - held if above else peak())


def in_fresh_process(module: str, argv, name: str) -> int:
    """The number of bytes that `python -m module ARGV --measure NAME` prints in its last line."""
    command = [sys.executable, "-m", module, *argv, "--measure", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    return int(output.splitlines()[-1])


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


def publish(tables: list[Table], file: str | None):
    """Prints the tables, and puts them into a file if one is named, between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises UserError if these marks are missing there.
    """
    for table in tables:
        print(f"\n{table.markdown()}\n", flush=True)
    if not file:
        return
    text = Path(file).read_text()
    for table in tables:
        before, mark, rest = text.partition(f"<!-- table: {table.name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise UserError(f"--write {file}: no <!-- table: {table.name} --> ... <!-- end --> in it; add these marks")
        text = f"{before}{mark}\n{table.markdown()}\n{end}{after}"
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
