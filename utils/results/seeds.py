"""Groups of runs that differ only in their seed, with mean and standard deviation of their accuracies."""

import functools
import itertools
import os
import statistics
from pathlib import Path
from typing import NamedTuple

from ..arguments import training_parser
from ..errors import printable
from .records import ACCURACIES, Run, distinct_names, mean, read_args, shortest_end

# Arguments that do not change the method: paths, printing, the device, and how processes meet.
IGNORED = {
    *("data", "train_list", "val_list", "test_list", "output_dir", "overwrite", "resume", "evaluate", "plots"),
    *("workers", "eval_batch_size", "print_freq", "save_every_steps", "tensorboard", "deterministic", "device", "gpu"),
    *("rank", "dist_url", "dist_backend", "dist_timeout", "dist_interface", "memory_check", "list_checksums"),
    "environment",
}
CHECKPOINTS = ("last_stage_ckpt", "teacher_ckpt")  # that a run starts from: compared by the run that wrote them


class Settings(NamedTuple):
    """What determines a run's numbers: name -> value, and the seeds of the run and of those that it started from."""

    values: dict
    seeds: tuple


class Group(NamedTuple):
    """Runs that differ only in their seed, under one name."""

    name: str
    runs: list[Run]


def read_settings(run: Run) -> Settings | None:
    """The settings of a run and of those that it started from; None if it has no args.json."""
    values, seeds = {}, {}
    if not _collect(run.folder, "", values, seeds, set()):
        return None
    for record in run.records:
        for name in ("train_counts", "count"):  # the data, wherever they are
            values[f"{record['classifier']} {name}"] = record.get(name)
    return Settings(values, tuple(sorted(seeds.items())))


def _collect(folder: Path, prefix: str, values: dict, seeds: dict, seen: set) -> bool:
    """Adds a run's settings, their names after the prefix, and those of the runs before it; False without args.json."""
    args = read_args(folder)
    if not args or os.path.realpath(folder) in seen:
        return False
    seen.add(os.path.realpath(folder))
    seeds[f"{prefix}seed"] = str(args.get("seed"))
    for name, value in args.items():
        if name in CHECKPOINTS and value and isinstance(value, str):
            values[prefix + name] = os.path.basename(value)
            before = checkpoint_folder(folder, args.get("output_dir"), value)
            _collect(before, f"{prefix}{name}: ", values, seeds, seen)
        elif name != "seed" and name not in IGNORED:
            values[prefix + name] = value
    for name, value in flag_defaults().items():  # an earlier version did not have all flags
        if name not in args and name not in IGNORED:
            values[prefix + name] = value
    return True


@functools.cache
def flag_defaults() -> dict:
    """name -> default of the flags that all stages have, except those that each stage has its own for."""
    parser = training_parser("", epochs=None, batch_size=None, lr=None, workers=None, output_dir=None)
    return {name: parser.get_default(name) for name in parser.saved_actions() if parser.get_default(name) is not None}


def checkpoint_folder(folder: Path, output_dir, checkpoint: str) -> Path:
    """The folder of the checkpoint that a run started from, even if both folders were moved together."""
    if isinstance(output_dir, str):
        moved = folder / os.path.relpath(os.path.dirname(checkpoint) or ".", output_dir)
        if moved.is_dir():
            return moved
    return Path(checkpoint).parent


def group_by_seed(runs: list[Run]) -> tuple[list[Group], list[str]]:
    """Groups of runs that differ only in their seed, in the given order, and notes on what was not averaged."""
    settings = [read_settings(run) for run in runs]
    groups, notes = [], []
    for i, run in enumerate(runs):
        same = [
            group
            for group in groups
            if settings[i] and settings[group[0]] and settings[i].values == settings[group[0]].values
        ]
        if not same:
            groups.append([i])
        elif any(settings[i].seeds == settings[j].seeds for j in same[0]):
            notes.append(f"{run.name}: has the arguments and the seed of another run; not averaged")
            groups.append([i])
        else:
            same[0].append(i)
    notes += [
        f"{run.name}: has no args.json; not averaged" for run, found in zip(runs, settings, strict=True) if not found
    ]
    if len(runs) > 1 and len(groups) == len(runs) and not notes:
        notes.append("no two runs differ only in their seed; " + difference(runs, settings))
    folders = [[runs[i].folder for i in group] for group in groups]
    ends = [[pattern(group), *(Path(os.path.abspath(folder)).parts for folder in group)] for group in folders]
    names = [shortest_end(own[0], [end for other in ends if other is not own for end in other]) for own in ends]
    return [Group(printable(name), [runs[i] for i in group]) for name, group in zip(names, groups, strict=True)], notes


def difference(runs: list[Run], settings: list[Settings]) -> str:
    """Names the settings that differ between the two most similar runs."""

    def names(i, j):
        one, other = settings[i].values, settings[j].values
        return [name for name in [*one, *(other.keys() - one.keys())] if one.get(name) != other.get(name)]

    pairs = [(names(i, j), i, j) for i in range(len(runs)) for j in range(i)]
    found, i, j = min(pairs, key=lambda pair: len(pair[0]))
    return f"{runs[j].name} and {runs[i].name} differ in {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}"


def pattern(folders: list[Path]) -> tuple[str, ...]:
    """The parts of one path for several folders: what they share, and {0,1} where they differ."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    if len(set(map(len, paths))) > 1:
        return (" + ".join(distinct_names(paths)),)
    return tuple(_braces(list(dict.fromkeys(parts))) for parts in zip(*paths, strict=True))


def _braces(names: list[str]) -> str:
    """One text for several names: run_{a,b} for run_a and run_b."""
    if len(names) == 1:
        return names[0]
    start = common_length(names)
    rest = [name[start:] for name in names]
    end = common_length([name[::-1] for name in rest])
    middles = ",".join(name[: len(name) - end] for name in rest)
    return f"{names[0][:start]}{{{middles}}}{rest[0][len(rest[0]) - end :]}"


def common_length(texts: list[str]) -> int:
    """The length of the longest common prefix of the texts."""
    same = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return sum(1 for _ in same)


def mean_rows(groups: list[Group]) -> list[dict]:
    """One row per group and classifier: run, classifier, seeds, each accuracy's mean, its deviation as NAME_std.

    It is the sample standard deviation (n - 1), None for a single seed.
    """
    rows = []
    for group in groups:
        for record in group.runs[0].records:
            same = [r for run in group.runs for r in run.records if r["classifier"] == record["classifier"]]
            row = {"run": group.name, "classifier": record["classifier"], "seeds": len(group.runs)}
            for name in ACCURACIES:
                values = [r[name] for r in same if r[name] is not None]
                row[name] = mean(values)
                row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
            rows.append(row)
    return rows
