"""What a run writes for people: progress on screen, and log.txt, args.json and TensorBoard's files in its folder."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
import torchvision
from tqdm import tqdm

from .distributed import is_main_process
from .errors import UserError, one_line
from .files import atomic_write


class Progress:
    """A bar on a terminal, otherwise a line every `every` steps; nothing on ranks other than 0.

    The bar fits into 80 columns. It closes with the block, or with close_progress().
    """

    open_bar = None  # the one on the screen

    def __init__(self, title: str, total: int, every: int, initial: int = 0):
        self.title, self.total, self.every, self.done = title, total, every, initial
        self.bar = None
        if is_main_process() and sys.stderr.isatty():
            columns = min(80, shutil.get_terminal_size().columns)
            form = "{desc} |{bar}| {n_fmt}/{total_fmt} {postfix}"
            self.bar = tqdm(total=total, initial=initial, desc=title, leave=False, ncols=columns, bar_format=form)
            Progress.open_bar = self.bar

    def step(self, short=lambda: "", long=lambda: ""):
        """Counts a step; short() for the bar or long() for the line is called every `every` steps, and after the last.

        They return text, and may have to wait for the device.
        """
        self.done += 1
        due = self.done % self.every == 0 or self.done == self.total
        if self.bar is not None:
            self.bar.update()
            if due:
                self.bar.postfix = short()
                self.bar.refresh()
        elif due and is_main_process():
            print(f"{self.title} [{self.done}/{self.total}] {long()}".rstrip(), flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()
            Progress.open_bar = None


def close_progress():
    """Removes the bar from the screen, before a message."""
    if Progress.open_bar is not None:
        Progress.open_bar.close()
        Progress.open_bar = None


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds: 2h05, 3m20."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}" if hours else f"{minutes}m{seconds:02}"


def write_json(path, value):
    """Writes value as JSON, atomically. Raises UserError naming the file."""
    try:
        with atomic_write(path) as file:
            file.write((to_json(value) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({one_line(error)}); the earlier file is kept") from None


def to_json(value, margin: str = "\n") -> str:
    """JSON with one line per entry, and lists of plain values on one line: a confusion matrix has one line per row."""
    inner = f"{margin} "
    if isinstance(value, dict) and value:
        entries = [f"{json.dumps(key)}: {to_json(entry, inner)}" for key, entry in value.items()]
        return f"{{{inner}{f',{inner}'.join(entries)}{margin}}}"
    if isinstance(value, list | tuple) and any(isinstance(entry, dict | list | tuple) for entry in value):
        return f"[{inner}{f',{inner}'.join(to_json(entry, inner) for entry in value)}{margin}]"
    return json.dumps(value)


def append_epoch(folder, record: dict):
    """Adds a line to log.txt. Raises UserError naming the file."""
    path = Path(folder) / "log.txt"
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({one_line(error)}); the checkpoints are kept") from None


def truncate_log(folder, epochs: int):
    """Removes the lines of log.txt after the given number of epochs, and a line that a crash cut short."""
    path, kept = Path(folder) / "log.txt", []
    try:
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["epoch"] < epochs:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        with atomic_write(path) as file:
            file.write("".join(kept).encode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be rewritten ({one_line(error)}); move it away") from None


def require_tensorboard():
    """TensorBoard's SummaryWriter class. Raises UserError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: the package tensorboard is missing; pip install tensorboard") from None
    return SummaryWriter


def create_summary_writer(folder, first_epoch: int):
    """TensorBoard's writer; what an earlier run wrote from first_epoch on is dropped."""
    return require_tensorboard()(str(folder), purge_step=first_epoch)


def add_scalars(writer, record: dict):
    """Gives an epoch's record to TensorBoard, nested names joined by a slash."""

    def flat(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}/")
            elif value is not None and name != "epoch":
                yield prefix + name, value

    for name, value in flat(record):
        writer.add_scalar(name, value, record["epoch"])
    writer.flush()


def environment() -> dict:
    """Versions, device and git commit, for args.json."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    if (root / ".git").exists() and shutil.which("git"):
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
