"""Runs python -m datasets.prepare in this process, and reads what it wrote."""

import os
from pathlib import Path

import numpy as np

from datasets.lists import ImageList
from datasets.prepare.cli import main
from datasets.prepare.list_writer import read_entries
from datasets.splits import SPLITS
from tests.helpers import outcome_of


def succeeds(capsys, *argv) -> str:
    """Runs a command that must succeed; returns its output."""
    outcome = outcome_of(main, capsys, *argv)
    assert outcome.status == 0 and outcome.err == "", outcome.err
    return outcome.out


def fails(capsys, *argv) -> str:
    """Runs a command that must fail with status 2; returns its one line on stderr."""
    status, _, error = outcome_of(main, capsys, *argv)
    assert status == 2
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error


def read_lists(folder) -> dict[str, list]:
    """{split: [(path, label)]} of a folder's lists."""
    return {split: read_entries(ImageList.from_file(Path(folder) / f"{split}.txt")) for split in SPLITS}


def class_counts(entries, num_classes=0) -> list[int]:
    return np.bincount([label for _, label in entries], minlength=num_classes).tolist()


def everything(folder) -> dict:
    """{relative path: content or link target} of everything in a folder."""
    files = [file for file in sorted(Path(folder).rglob("*")) if file.is_symlink() or file.is_file()]
    read = {file: os.readlink(file) if file.is_symlink() else file.read_bytes() for file in files}
    return {file.relative_to(folder).as_posix(): content for file, content in read.items()}


def stamps(folder) -> dict:
    """When everything in a folder was written."""
    return {file: file.lstat().st_mtime_ns for file in Path(folder).rglob("*")}
