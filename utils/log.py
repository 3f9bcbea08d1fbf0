"""What a run leaves to read: progress on screen, log.txt and args.json in its folder."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
import torchvision
from tqdm import tqdm

from .checkpoint import write_atomically
from .errors import UserError


class Progress:
    """One bar on a terminal, a line every `every` steps elsewhere; nothing where it is quiet (ranks other than 0)."""

    def __init__(self, title: str, total: int, every: int, initial: int = 0, quiet: bool = False):
        self.title, self.total, self.every, self.done, self.quiet = title, total, every, initial, quiet
        self.bar = None
        if not quiet and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=initial, desc=title, leave=False, dynamic_ncols=True)

    def step(self, describe):
        """Counts a step; describe() -> str is called every `every` steps only: it may have to wait for the device."""
        self.done += 1
        due = self.done % self.every == 0 or self.done == self.total
        if self.bar is not None:
            self.bar.update()
            if due:
                self.bar.set_postfix_str(describe())
        elif due and not self.quiet:
            print(f"{self.title} [{self.done}/{self.total}] {describe()}".rstrip(), flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def write_json(path, value):
    """Writes value as JSON, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def append_epoch(folder, record: dict):
    """Adds a line to log.txt."""
    path = Path(folder) / "log.txt"
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the checkpoints are kept") from None


def open_board(folder, first_epoch: int):
    """TensorBoard's writer; what a former run wrote from first_epoch on is purged. UserError without tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: the package tensorboard is missing; pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=first_epoch)


def add_scalars(board, record: dict):
    """Gives an epoch's record to TensorBoard, nested names joined by a slash."""

    def flat(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}/")
            elif value is not None and name != "epoch":
                yield prefix + name, value

    for name, value in flat(record):
        board.add_scalar(name, value, record["epoch"])
    board.flush()


def keep_epochs(folder, before: int):
    """Drops the lines of log.txt from epoch `before` on, and a line that a crash cut short."""
    file = Path(folder) / "log.txt"
    kept = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            if json.loads(line)["epoch"] < before:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(file, lambda out: out.write("".join(kept).encode()))


def environment() -> dict:
    """Versions, device and git commit, for args.json."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(
        ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True, text=True, check=False,
    ) if (root / ".git").exists() else None  # fmt: skip
    return {
        "commit": git.stdout.strip() or None if git else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
