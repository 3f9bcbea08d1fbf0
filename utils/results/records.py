"""Reads and checks the files of finished runs: results.json, args.json and log.txt."""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, one_line, printable
from ..files import walk

ACCURACIES = ("many", "medium", "few", "class_mean", "overall", "top5")
MAX_COUNT = 2**53  # images; a larger number is not a count


class Run(NamedTuple):
    """A run: the shortest name that distinguishes it from the others, its folder, and one record per classifier."""

    name: str
    folder: Path
    records: list[dict]


def read_runs(folders) -> list[Run]:
    """The runs in the given folders, each once; a folder without results.json stands for the runs below it.

    Raises UserError naming the folder or file if there is no run, or one cannot be read.
    """
    found = {}
    for folder in folders:
        for run in run_folders(Path(folder)):
            found.setdefault(os.path.realpath(run), run)
    paths = list(found.values())
    names = distinct_names([Path(os.path.abspath(path)).parts for path in paths])
    return [
        Run(printable(name), path, read_records(path / "results.json")) for name, path in zip(names, paths, strict=True)
    ]


def run_folders(folder: Path) -> list[Path]:
    """The folder itself if it holds results.json, else all folders below it that do, sorted by path."""
    if os.path.lexists(folder / "results.json"):
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run's --output_dir, or a folder of runs")
    runs = sorted(Path(path) for path, files in walk(folder) if "results.json" in files)
    if not runs:
        raise UserError(f"{folder}: neither it nor a folder below it holds results.json; finish the run first")
    return runs


def distinct_names(paths: list[tuple[str, ...]]) -> list[str]:
    """For each path, given as a tuple of parts, its shortest end that no other path has."""
    return [shortest_end(path, paths[:i] + paths[i + 1 :]) for i, path in enumerate(paths)]


def shortest_end(path: tuple[str, ...], others) -> str:
    """The shortest end of a path, given as a tuple of parts like the others, that none of the others has."""
    lengths = (n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others))
    return os.path.join(*path[-next(lengths, len(path)) :])


def read_json(file: Path, hint: str):
    """The content of a JSON file. Raises UserError, ending with the hint, if it cannot be read."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}); {hint}") from None


def read_records(file: Path) -> list[dict]:
    """The records of a results.json, with class_mean and class names filled in. Raises UserError for any other file."""
    records = read_json(file, "finish the run first")
    try:
        if not isinstance(records, list) or not records:
            raise ValueError("it is not a list of records")
        return [checked_record(record) for record in records]
    except ValueError as error:
        raise UserError(f"{file}: is not the results.json of a run: {error}; name another folder") from None


def checked_record(record) -> dict:
    """A record with all its entries: missing ones are computed or None. Raises ValueError saying what is wrong.

    Results of earlier versions have no class_mean, test_counts, classes and confusion.
    """
    if not isinstance(record, dict) or not str(record.get("classifier", "")).isidentifier():
        raise ValueError("a record has no classifier")
    for name in ACCURACIES:
        if name != "class_mean" and name not in record:
            raise ValueError(f"a record has no {name}")
    optional = ("class_mean", "per_class", "train_counts", "test_counts", "classes", "confusion", "confusion_groups")
    record = dict.fromkeys(optional) | record
    per_class = record["per_class"]
    size = len(per_class) if isinstance(per_class, list) else 0
    checks = {
        **dict.fromkeys(ACCURACIES, is_accuracy),
        "per_class": lambda value: is_list(value, is_accuracy),
        "train_counts": lambda value: is_list(value, is_count, size),
        "test_counts": lambda value: is_list(value, is_count, size),
        "classes": lambda value: is_list(value, lambda name: isinstance(name, str), size),
        "confusion": lambda value: is_matrix(value, size),
        "confusion_groups": lambda value: is_matrix(value, 3),
    }
    for name, check in checks.items():
        if record[name] is not None and not check(record[name]):
            raise ValueError(f"{name} does not fit")
    record["class_mean"] = class_mean(record)
    if record["test_counts"] is None and record["confusion"] is not None:
        record["test_counts"] = [sum(row) for row in record["confusion"]]
    names = record["classes"] or [f"class {label}" for label in range(size)]
    return record | {"classes": [printable(name) for name in names]}


def class_mean(record: dict) -> float | None:
    """The mean of the classes' accuracies, as recorded or else computed; None if neither is possible."""
    if record.get("class_mean") is not None:
        return record["class_mean"]
    return mean([value for value in record.get("per_class") or [] if value is not None])


def mean(values: list[float]) -> float | None:
    """The mean, None if there is no value."""
    return math.fsum(values) / len(values) if values else None


def is_accuracy(value) -> bool:
    """Whether a value is a number in [0, 1] or None."""
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def is_count(value) -> bool:
    """Whether a value is a number of images."""
    return type(value) is int and 0 <= value < MAX_COUNT


def is_list(value, check, size=None) -> bool:
    """Whether a value is a list, of the given size, whose items pass the check."""
    return isinstance(value, list) and (size is None or len(value) == size) and all(map(check, value))


def is_matrix(value, size: int) -> bool:
    """Whether a value is a square matrix of counts."""
    return is_list(value, lambda row: is_list(row, is_count, size), size)


def read_args(folder: Path) -> dict:
    """The arguments in args.json, {} without that file. Raises UserError if it cannot be read."""
    file = folder / "args.json"
    if not file.exists():
        return {}
    args = read_json(file, "move it away")
    if not isinstance(args, dict):
        raise UserError(f"{file}: is not the args.json of a run; move it away")
    return args


def saved_checksums(folder: Path) -> dict[str, int]:
    """split -> checksum of the list that a run was trained with; {} if its args.json does not tell, or is damaged."""
    try:
        checksums = read_args(folder).get("list_checksums")
    except UserError:
        return {}
    checksums = checksums if isinstance(checksums, dict) else {}
    return {split: checksums[split] for split in ("train", "val", "test") if is_count(checksums.get(split))}


def read_log(folder: Path) -> list[dict]:
    """The epochs' records in log.txt, sorted by epoch, without incomplete lines; [] without that file."""
    file = folder / "log.txt"
    try:
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from None
    epochs = {}
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and is_count(record.get("epoch")):
            epochs[record["epoch"]] = record
    return [epochs[epoch] for epoch in sorted(epochs)]
