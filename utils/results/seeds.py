"""Groups of runs that differ only in their seed."""

import os
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from ..errors import printable
from .records import Group, Run, distinct_names, read_args


class Settings(NamedTuple):
    """What a run's numbers depend on; names of the run that it started from come after the flag: "teacher_ckpt: lr".

    values: of all arguments; defaults: of those that make up the identity; seeds: of all these runs.
    """

    values: dict
    defaults: dict
    seeds: dict


def read_settings(folder: Path, records=(), after: tuple = ()) -> Settings | None:
    """A run's settings; None if its args.json has no identity. after: the folders of the runs that started from it."""
    args = read_args(folder)
    place = os.path.realpath(folder)
    if not isinstance(args.get("identity"), dict) or place in after:
        return None
    images = [
        [record["classifier"], record["train_counts"], record["count"], record["test_checksum"]] for record in records
    ]
    defaults = args["identity"] | {"program": None, "images": None}
    settings = Settings(args | {"images": images}, defaults, {"seed": args.get("seed")})
    for flag in args.get("starts_from", ()):
        checkpoint = args.get(flag) or ""
        source = checkpoint_folder(folder, args.get("output_dir", ""), checkpoint)
        settings.defaults[flag] = ""
        settings.values[flag] = os.path.basename(checkpoint)  # all that is known if the folder is gone
        if checkpoint and (source / "args.json").exists():
            earlier = read_settings(source, after=(*after, place))
            if earlier is None:
                settings.values[flag] = os.path.realpath(source)
                continue
            for own, others in zip(settings, earlier, strict=True):
                own.update({f"{flag}: {name}": value for name, value in others.items()})
    return settings


def checkpoint_folder(folder: Path, output_dir: str, checkpoint: str) -> Path:
    """The folder of the checkpoint that a run started from, even if both folders were moved together."""
    moved = folder / os.path.relpath(os.path.dirname(checkpoint) or ".", output_dir)
    return moved if moved.is_dir() else Path(checkpoint).parent


def differing(one: Settings | None, other: Settings | None) -> list[str]:
    """Names whose values differ; a flag that did not exist yet when a run began has the default of the other run."""
    if one is None or other is None:
        return ["identity"]
    return [
        name
        for name in one.defaults | other.defaults
        if one.values.get(name, other.defaults.get(name)) != other.values.get(name, one.defaults.get(name))
    ]


def group_by_seed(runs: list[Run]) -> tuple[list[Group], list[str]]:
    """Groups of runs that differ only in their seed, in the given order, and notes on what was not averaged."""
    settings = {run.name: read_settings(run.folder, run.records) for run in runs}
    unknown = [name for name, found in settings.items() if found is None]
    notes = [f"{', '.join(unknown)}: no identity recorded in args.json; not averaged"] if unknown else []
    groups = []
    for run in runs:
        own = settings[run.name]
        same = [group for group in groups if not any(differing(own, settings[other.name]) for other in group)]
        if same and any(own.seeds == settings[other.name].seeds for other in same[0]):
            notes.append(f"{run.name}: has the arguments and the seed of another run; not averaged")
            same = []
        if same:
            same[0].append(run)
        else:
            groups.append([run])
    if len(groups) == len(runs) > 1 and not notes:
        pairs = [(a.name, b.name, differing(settings[a.name], settings[b.name])) for a, b in combinations(runs, 2)]
        one, other, names = min(pairs, key=lambda pair: ("program" in pair[2], len(pair[2])))
        if "program" not in names:  # two stages
            notes.append(f"no two runs differ only in their seed; {one} and {other} differ in {', '.join(names)}")
    ends = distinct_names([pattern([run.folder for run in group]) for group in groups])
    names = [group[0].name if len(group) == 1 else printable(end) for group, end in zip(groups, ends, strict=True)]
    return list(map(Group, names, groups)), notes


def pattern(folders: list[Path]) -> tuple[str, ...]:
    """The parts of one path for several folders: what they share, and s{0,1} where there are s0 and s1."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    if len(set(map(len, paths))) > 1:
        return (" + ".join(distinct_names(paths)),)
    parts = []
    for names in zip(*paths, strict=True):
        start = os.path.commonprefix(names)  # noqa: RUF071, by characters
        ends = [name.removeprefix(start) for name in dict.fromkeys(names)]
        parts.append(f"{start}{{{','.join(ends)}}}" if any(ends) else start)
    return tuple(parts)
