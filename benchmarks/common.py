"""What the benchmarks share: timing in alternation, peak memory in fresh processes, the machine, tables."""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def argument_parser(doc, name: str, repeats: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"), help="(default here: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=repeats, metavar="N", help="timings a median is of (%(default)s)"
    )
    parser.add_argument("--scaling", action="store_true", help="how the cost grows, too")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory: no fresh processes")
    parser.add_argument("--write", metavar="FILE", help="put the tables into this file too, at their marks")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)  # a fresh process's part
    return parser


def run(parser, argv, tables, measure=None) -> int:
    """A benchmark's main: publishes tables(args, argv), or in a fresh process of its own calls measure(name, args)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    if measure is not None and args.measure:
        measure(args.measure, args)
    else:
        publish(tables(args, argv), args)
    return 0


# ---- time


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device="cpu") -> float:
    """Of one call, to the end of what it started on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def alternate(functions: dict, repeats: int, device="cpu", warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each function by name. They take turns, so that what else the machine does hits all alike."""
    taken = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            duration = seconds(function, device)
            if turn >= warm_up:
                taken[name].append(duration)
    return {name: median(durations) for name, durations in taken.items()}


def product_rate(device, dtype=torch.float32, size: int | None = None, repeats: int = 5) -> float:
    """Floating point operations a second of a square matrix product: what the processor can be brought to."""
    size = size or (2048 if torch.device(device).type == "cpu" else 8192)
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
    return 2 * size**3 / alternate({"product": lambda: left @ right}, repeats, device, warm_up=2)["product"]


# ---- memory


def resident_peak() -> int:
    """The most bytes of memory this process has held; on Linux since its start or the last forget_peak."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins with that of the parent process
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak():
    """Lets the peak start again from what is held now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def report_peak(function, device, above: bool):
    """Calls the function and prints, for in_fresh_process, its peak memory in bytes.

    CPU: of the process; CUDA: allocated by torch. above: count only what comes on top of what is held already.
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
    """What `python -m module ARGV --measure NAME` prints last, a number of bytes."""
    command = [sys.executable, "-m", module, *argv, "--measure", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    return json.loads(output.splitlines()[-1])


# ---- tables


class Table(NamedTuple):
    """name: that of its mark in docs/benchmarks.md; title: what was measured, and with which command; rows: of text."""

    name: str
    title: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [self.headers, ("---",) + ("---:",) * (len(self.headers) - 1), *self.rows]
        return "\n".join([self.title, "", *("| " + " | ".join(line) + " |" for line in lines)])


def note(line: tuple[str, ...]) -> tuple[str, ...]:
    """Shows a line of a table on stderr as soon as it is known; a long run's results are not lost if it is ended."""
    print(" | ".join(line), file=sys.stderr, flush=True)
    return line


def insert(text: str, table: Table) -> str:
    """The text with the table between `<!-- table: NAME -->` and `<!-- end -->`; ValueError where there is no mark."""
    mark = f"<!-- table: {table.name} -->"
    pattern = re.compile(re.escape(mark) + r".*?<!-- end -->", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no mark {mark} ... <!-- end --> to put the table at")
    return pattern.sub(lambda _: f"{mark}\n{table.markdown()}\n<!-- end -->", text, count=1)


def publish(tables: list[Table], args):
    """Prints the tables, and puts them into --write's file."""
    for table in tables:
        print(f"\n{table.markdown()}\n", flush=True)
    if args.write:
        file = Path(args.write)
        text = file.read_text()
        for table in tables:
            text = insert(text, table)
        file.write_text(text)


def command(module: str, argv) -> str:
    """The command line that repeats a measurement, as a table's title names it."""
    words = [word for word in argv if word]
    if "--write" in words:
        at = words.index("--write")
        words[at : at + 2] = []
    return "`" + " ".join(["python -m", module, *words]) + "`"


def mib(size: float | None) -> str:
    return "" if size is None else f"{size / MIB:.0f} MiB"


def machine(device) -> str:
    """One line: processor, cores and threads in use, GPU, version of torch."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.device(device).type == "cuda" else ""
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{name}, {os.cpu_count()} cores, {capability}, {threads} threads{gpu}, torch {torch.__version__}"
