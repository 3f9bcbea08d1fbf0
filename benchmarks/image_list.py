"""Load time and memory of an image list, compared with a plain list of tuples; Linux only.

    python -m benchmarks.image_list [--entries 10000000]

Writes a list into a temporary folder and loads it in both ways, each in a fresh process, which then starts two data
loader workers that read entries from the whole list. Memory is private memory (/proc/<pid>/smaps_rollup), which is
freed when the process ends, so that a copy in each worker is counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from datasets.lists import ImageList
from utils.command_line import ArgumentParser, run_command, whole_number

STRIDE = 16  # entries apart: closer than a page of either kind
WORKERS = 2


def memory(pid="self") -> dict[str, int]:
    """Memory of a process in bytes: what is private to it, and its proportional share."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    size = {name: int(value.split()[0]) * 1024 for name, value in fields.items()}
    return {"private": size["Private_Clean"] + size["Private_Dirty"], "share": size["Pss"]}


def load_tuples(file) -> list[tuple[str, int]]:
    """The list as a plain reader of list files returns it."""
    entries = []
    with open(file) as lines:
        for line in lines:
            path, label = line.rsplit(None, 1)
            entries.append((path, int(label)))
    return entries


class Reader(torch.utils.data.Dataset):
    """Item i reads every STRIDE-th entry of the i-th half and returns the private memory before and after."""

    def __init__(self, entries):
        self.entries = entries

    def __len__(self):
        return WORKERS

    def __getitem__(self, i):
        before = memory()["private"]
        length = len(self.entries)
        for j in range(i * length // WORKERS, (i + 1) * length // WORKERS, STRIDE):
            if isinstance(self.entries, ImageList):
                self.entries.path(j), int(self.entries.labels[j])
            else:
                _path, _label = self.entries[j]
        return torch.tensor([before, memory()["private"]])


def measure(kind: str, file: str) -> dict:
    """Loads the list and reads it in workers; runs in a separate process."""
    before, start = memory()["private"], time.perf_counter()
    entries = ImageList.from_file(file) if kind == "arrays" else load_tuples(file)
    seconds = time.perf_counter() - start
    resident = memory()["private"] - before
    loader = torch.utils.data.DataLoader(
        Reader(entries), batch_size=1, num_workers=WORKERS, multiprocessing_context="fork"
    )
    grown = max(int(after - before) for batch in loader for before, after in batch)
    return {"seconds": seconds, "resident": resident, "worker": grown}


def write_list(file: Path, entries: int, classes: int = 1000):
    """Writes a balanced list of paths like ImageNet's."""
    with file.open("w") as lines:
        for start in range(0, entries, 100_000):
            numbers = range(start, min(start + 100_000, entries))
            lines.write(
                "".join(f"train/n{i % classes:08}/n{i % classes:08}_{i:09}.JPEG {i % classes}\n" for i in numbers)
            )


def work(args):
    """Measures both lists and prints their figures."""
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "list.txt"
        write_list(file, args.entries)
        size = os.path.getsize(file)
        print(f"{args.entries} entries, {size / 1e6:.0f} MB, {size / args.entries:.0f} bytes per line")
        for kind, title in (("arrays", "image list"), ("tuples", "list of tuples")):
            command = [sys.executable, "-m", "benchmarks.image_list", "--measure", kind, str(file)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(output.splitlines()[-1])
            print(
                f"{title:>14}: loads in {result['seconds']:5.1f} s; memory, in list sizes: resident "
                f"{result['resident'] / size:.2f}, and each of {WORKERS} workers adds {result['worker'] / size:.2f}"
            )


def main(argv=None) -> int:
    parser = ArgumentParser(__doc__, prog="python -m benchmarks.image_list")
    parser.add_argument("--entries", type=whole_number(WORKERS), default=10_000_000, metavar="N")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return run_command(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
