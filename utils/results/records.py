"""Reads and checks the files of finished runs: results.json, args.json and log.txt."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoint import settle_unless_in_use
from ..errors import UserError, one_line, printable, retry
from ..files import check_folder, lexists, walk
from ..groups import tell_names_apart

ACCURACIES = ("many", "medium", "few", "class_mean", "overall", "top5")
OPTIONAL = ("confusion", "test_checksum", "test_trained_on")


class Run(NamedTuple):
    """A run: the shortest name that distinguishes it from the others, its folder, and one record per classifier."""

    name: str
    folder: Path
    records: list[dict]


class Group(NamedTuple):
    """Runs that differ only in their seed, under one name."""

    name: str
    runs: list[Run]


def read_runs(folders) -> list[Run]:
    """The runs in the given folders, each once; a folder without results.json stands for the runs below it.

    Raises UserError naming the folder or file if there is no run, or one cannot be read.
    """
    found = {}
    for folder in folders:
        for path in run_folders(Path(folder)):
            found.setdefault(os.path.realpath(path), path)
    names = distinct_names([Path(os.path.abspath(path)).parts for path in found.values()])
    return [Run(printable(name), path, read_records(path)) for name, path in zip(names, found.values(), strict=True)]


def run_folders(folder: Path) -> list[Path]:
    """The folder itself if it holds results.json, else all folders below it that do, sorted by path."""
    settle_unless_in_use(folder)  # a run that a kill left set aside comes back, here and below
    if lexists(folder / "results.json"):
        return [folder]
    check_folder(folder, "name a run's --output_dir, or a folder of runs")
    for path, _ in walk(folder)[0]:
        settle_unless_in_use(Path(path))
    runs = sorted(Path(path) for path, files in walk(folder)[0] if "results.json" in files)
    if not runs:
        raise UserError(f"{folder}: neither it nor a folder below it holds results.json; finish the run first")
    return runs


def distinct_names(paths: list[tuple[str, ...]]) -> list[str]:
    """For each path, given as a tuple of parts, its shortest end that no other path has."""
    names = []
    for i, path in enumerate(paths):
        others = paths[:i] + paths[i + 1 :]
        lengths = (n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others))
        names.append(os.path.join(*path[-next(lengths, len(path)) :]))
    return names


def read_json(file: Path, kind: type):
    """The list or the dict in a JSON file. Raises UserError if it cannot be read, or holds anything else."""
    try:
        content = json.loads(retry(Path.read_bytes, file))
        if not isinstance(content, kind) or not content:
            raise ValueError(f"it is not a {kind.__name__} with entries")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}); finish the run, or move it away") from None


def read_records(folder: Path) -> list[dict]:
    """The records of a run's results.json, see check_record. Raises UserError if it is not valid."""
    file = folder / "results.json"
    try:
        records = [check_record(record) for record in read_json(file, list)]
    except ValueError as error:
        raise UserError(f"{file}: is not valid: {error}; evaluate the run again") from None
    earlier = saved_checksums(folder).get("test")  # what records of earlier versions do not have
    for record in records:
        record["test_checksum"] = earlier if record["test_checksum"] is None else record["test_checksum"]
    return records


def check_record(record) -> dict:
    """A classifier's record with names for its classes; what earlier or large ones do not have (OPTIONAL) is None.

    Raises ValueError saying which entry is missing or wrong.
    """
    if not isinstance(record, dict):
        raise ValueError("a record is not a dict")
    size = len(record["per_class"]) if isinstance(record.get("per_class"), list) else 0
    checks = {
        "classifier": lambda name: isinstance(name, str) and name.isidentifier(),
        **dict.fromkeys(ACCURACIES, is_accuracy),
        "per_class": lambda values: size > 0 and all(map(is_accuracy, values)),
        "train_counts": lambda counts: is_counts(counts, size),
        "test_counts": lambda counts: is_counts(counts, size),
        "classes": lambda names: names is None or (isinstance(names, list) and [*map(type, names)] == [str] * size),
        "count": is_counts,
        "confusion_groups": lambda counts: is_counts(counts, 3, 3),
        "confusion": lambda counts: counts is None or is_counts(counts, size, size),
        **dict.fromkeys(OPTIONAL[1:], lambda number: number is None or is_counts(number)),
    }
    record = dict.fromkeys(OPTIONAL) | record
    for name, is_valid in checks.items():
        if name not in record:
            raise ValueError(f"a record has no {name}")
        if not is_valid(record[name]):
            raise ValueError(f"{name} does not fit")
    names = record["classes"] or [f"class {label}" for label in range(size)]
    return record | {"classes": tell_names_apart([printable(name) for name in names])}


def is_accuracy(value) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def is_counts(value, *shape: int) -> bool:
    """Whether a value is a number of images, or lists of them of the given shape."""
    array = np.array(value, dtype=object)
    return array.shape == shape and all(type(count) is int and 0 <= count < 2**53 for count in array.flat)


def read_args(folder: Path) -> dict:
    """The arguments in args.json, {} without that file. Raises UserError if it cannot be read."""
    file = folder / "args.json"
    return read_json(file, dict) if lexists(file) else {}


def saved_checksums(folder: Path) -> dict[str, int]:
    """split -> checksum of the list that a run was trained with; {} if its args.json does not tell, or is damaged."""
    try:
        return dict(read_args(folder).get("list_checksums", {}))
    except (UserError, TypeError, ValueError):
        return {}


def read_log(folder: Path) -> list[dict]:
    """The records in log.txt, their epochs counted from 1; [] without that file. Lines that a crash cut are skipped."""
    file = folder / "log.txt"
    records = []
    for line in retry(Path.read_bytes, file).decode(errors="replace").splitlines() if lexists(file) else []:
        try:
            record = json.loads(line)
            records.append(record | {"epoch": record["epoch"] + 1})
        except (ValueError, TypeError, KeyError):
            continue
    return records
