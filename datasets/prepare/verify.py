"""Checks a data set before training: every listed image exists and, with --decode, can be read.

    python -m datasets.verify DIR                        the lists that training on DIR would use
    python -m datasets.verify DIR my_train.txt           only these lists; their names end in train, val or test
    python -m datasets.verify DIR --decode               reads every image, as training does

Exit status: 0; 1 if an image is missing or unreadable, or if two splits share images (val and test may be the same);
2 if nothing could be checked (no such folder, a malformed list).
"""

import filecmp
import os
import posixpath
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from threading import Lock

from PIL import Image
from tqdm import tqdm

from utils.command_line import ArgumentParser, run_command
from utils.errors import UserError
from utils.groups import FEW_BELOW, MANY_ABOVE, shot_groups
from utils.images import load_rgb
from utils.results.plots import require_matplotlib, save_figure

from ..splits import SPLITS, Split, as_listed, by_split, find_splits
from .trees import bar, diagnose, flat

MAX_SHOWN = 20
MAX_PARALLEL_PIXELS = 2**25  # larger images are decoded one at a time, to limit memory
LARGE_IMAGE = Lock()  # held while a large image is decoded
FORMAT_OF_SUFFIX = Image.registered_extensions()
LAYOUT_NAMES = {as_listed: "plain", by_split: "reorganised", flat: "flat"}


@dataclass
class Findings:
    """What examine found: entry numbers, some with a reason or a format, and the number of images of each mode."""

    unreadable: list[tuple[int, str]] = field(default_factory=list)
    renamed: list[tuple[int, str]] = field(default_factory=list)
    outside: list[int] = field(default_factory=list)
    modes: Counter = field(default_factory=Counter)

    def add(self, other: "Findings"):
        self.unreadable += other.unreadable
        self.renamed += other.renamed
        self.outside += other.outside
        self.modes += other.modes


def read_image(file: str) -> tuple[str | None, str | None]:
    """(format, mode) of an image after decoding all of it. Raises as load_rgb does, and UserError if it is empty."""
    if os.path.getsize(file) == 0:
        raise UserError(f"{file}: an empty file, 0 bytes")
    try:
        with Image.open(file) as image:
            found, mode, pixels = image.format, image.mode, image.width * image.height
    except Exception:  # load_rgb says what is wrong
        found, mode, pixels = None, None, 0
    with LARGE_IMAGE if pixels > MAX_PARALLEL_PIXELS else nullcontext():
        load_rgb(file)
    return found, mode


def decode_entry(i: int, file: str, findings: Findings):
    """Decodes the image of entry i, and notes what is wrong with it or good to know."""
    try:
        found, mode = read_image(file)
    except (UserError, OSError) as error:
        findings.unreadable.append((i, str(error).removeprefix(f"{file}: ")))
        return
    except MemoryError:
        findings.unreadable.append((i, "not enough memory to decode it"))
        return
    named = FORMAT_OF_SUFFIX.get(os.path.splitext(file)[1].lower(), found)
    if named != found and {named, found} != {"JPEG", "MPO"}:  # MPO: a JPEG followed by further pictures
        findings.renamed.append((i, found))
    findings.modes[mode] += 1


def examine(split: Split, decode: bool) -> Findings:
    """Finds the images of the split whose links lead out of the root and, if decode, those that cannot be read."""
    root = os.path.realpath(split.root)
    real_folder = lru_cache(maxsize=None)(os.path.realpath)
    missing = set(split.missing)

    def look(chunk):
        found = Findings()
        for i in chunk:
            if i in missing:
                continue
            file = os.path.join(split.root, split.layout(split.images.path(i), split.name))
            folder, name = os.path.split(file)
            real = os.path.realpath(file) if os.path.islink(file) else os.path.join(real_folder(folder), name)
            if os.path.commonpath((root, real)) != root:
                found.outside.append(i)
            if decode:
                decode_entry(i, file, found)
        return found

    size = 64 if decode else 1024
    chunks = [range(start, min(start + size, len(split.images))) for start in range(0, len(split.images), size)]
    findings = Findings()
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(desc=f"{split.name}: reading", total=len(split.images), unit="image", disable=None) as progress,
    ):
        for chunk, found in zip(chunks, pool.map(look, chunks), strict=True):
            findings.add(found)
            progress.update(len(chunk))
    return findings


def table(splits: dict[str, Split], findings: dict[str, Findings], decoded: bool) -> list[str]:
    """The table's lines, one row per split; its many, medium and few follow from the training list's counts."""
    groups = shot_groups(splits["train"].images.counts(0)) if "train" in splits else None
    rows = [("split", "images", "classes", "many", "medium", "few", "imbalance", "missing", "unreadable", "layout")]
    for name, split in splits.items():
        counts = split.images.counts(0)
        present = counts.nonzero().flatten()
        shots = ["-"] * 3
        if groups is not None:
            of_training = groups[present[present < len(groups)]]
            shots = [str(int((of_training == group).sum())) for group in range(3)]
        unreadable = str(len(findings[name].unreadable)) if decoded else "-"
        factor = f"{int(counts.max()) / int(counts[present].min()):.1f}"
        layout = LAYOUT_NAMES[split.layout]
        row = (name, len(split.images), len(present), *shots, factor, len(split.missing), unreadable, layout)
        rows.append(tuple(map(str, row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def shared_images(splits: dict[str, Split]):
    """(problems, information): lines about entries that are in several splits, or several times in one."""
    problems, information, paths = [], [], {}
    for name, split in splits.items():
        paths[name] = {posixpath.normpath(split.images.path(i)) for i in range(len(split.images))}
        if repeated := len(split.images) - len(paths[name]):
            information.append(f"{name}: {repeated} entries are in the list more than once")
    for one, other in combinations(splits, 2):
        both = {path for path in paths[one] & paths[other] if is_same_image(path, splits[one], splits[other])}
        if both and paths[one] == paths[other] and "train" not in (one, other):
            information.append(f"{one} and {other} are the same images")
        elif both:
            problems.append(f"{one} and {other} share {len(both)} images; the first: {min(both)}")
    return problems, information


def is_same_image(path: str, one: Split, other: Split) -> bool:
    """Whether a path that two lists share is one image: with a folder per split, it may be two files."""
    files = [os.path.join(split.root, split.layout(path, split.name)) for split in (one, other)]
    try:
        return files[0] == files[1] or filecmp.cmp(*files, shallow=False)
    except OSError:  # one is missing, which is a problem anyway
        return True


def entry(split: Split, i: int) -> str:
    """An entry for messages: its file below the root, and its line in the list."""
    return split.images.with_line(split.layout(split.images.path(i), split.name), i)


def show(lines: list[str]):
    """Prints the first lines and the number of the others."""
    for line in lines[:MAX_SHOWN]:
        print(f"  {line}")
    if len(lines) > MAX_SHOWN:
        print(f"  and {len(lines) - MAX_SHOWN} more")


def describe(split: Split, found: Findings):
    """Prints what is wrong with a split, then what is good to know."""
    images, name = split.images, split.name
    if split.missing:
        print(f"{name}: {len(split.missing)} of {len(images)} images are missing; it looks like {diagnose(split)}")
        show([entry(split, i) for i in split.missing[:MAX_SHOWN]])
        if len(split.missing) > MAX_SHOWN:
            print(f"  and {len(split.missing) - MAX_SHOWN} more")
    if found.unreadable:
        print(f"{name}: {len(found.unreadable)} images cannot be read")
        show([f"{entry(split, i)}: {reason}" for i, reason in found.unreadable])
    if found.outside:
        first = entry(split, found.outside[0])
        print(f"{name}: information: {len(found.outside)} links lead out of {split.root}; the first: {first}")
    if found.renamed:
        number = len(found.renamed)
        print(f"{name}: information: {number} images have another format than their name says; training reads them all")
        show([f"{entry(split, i)}: {kind}" for i, kind in found.renamed])
    converted = {mode: number for mode, number in found.modes.items() if mode != "RGB"}
    if converted:
        modes = ", ".join(f"{number} {mode}" for mode, number in sorted(converted.items()))
        print(f"{name}: information: images of modes that training converts to RGB: {modes}")


def write_report(file: Path, splits: dict[str, Split], findings: dict[str, Findings]):
    """Writes one line per missing or unreadable image: what, split, path in the list, reason, separated by tabs."""
    with file.open("w", encoding="utf-8", errors="surrogateescape") as report:
        for name, split in splits.items():
            for i in split.missing:
                image = os.path.join(split.root, split.layout(split.images.path(i), name))
                reason = "not a regular file" if os.path.exists(image) else "no such file"
                report.write(f"missing\t{name}\t{split.images.path(i)}\t{reason}\n")
            for i, reason in findings[name].unreadable:
                report.write(f"unreadable\t{name}\t{split.images.path(i)}\t{reason}\n")


def plot(figure_class, file: Path, splits: dict[str, Split]):
    """Draws one curve per split: the number of images per class, largest class first."""
    figure = figure_class(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, split in splits.items():
        counts = split.images.counts(0).sort(descending=True).values
        axes.plot(range(1, len(counts) + 1), counts.tolist(), label=name)
    for bound in (FEW_BELOW, MANY_ABOVE):
        axes.axhline(bound, color="grey", linewidth=0.8, linestyle=":")
    axes.set(yscale="log", xlabel="class, by number of images", ylabel="images")
    axes.legend()
    save_figure(figure, file, "--plot")


def given_lists(args) -> dict[str, str | None]:
    """The list files of the command line, by split."""
    given = {split: getattr(args, f"{split}_list") for split in SPLITS}
    for file in args.lists:
        split = next((split for split in SPLITS if Path(file).stem.lower().endswith(split)), None)
        if split is None:
            raise UserError(f"{file}: its name does not end in train, val or test; give it with --train-list, ...")
        if given[split] is not None:
            raise UserError(f"{file}: a second {split} list, after {given[split]}")
        given[split] = file
    return given


def verify(args) -> int:
    """Prints the report; returns 1 if something is wrong with the data, else 0."""
    figure_class = require_matplotlib("--plot") if args.plot else None
    given = given_lists(args)
    wanted = [split for split in SPLITS if given[split]] or SPLITS
    splits = find_splits(args.data, given, wanted, progress=bar("looking for images"))
    for split in splits.values():
        split.images.check_num_classes()
    findings = {name: examine(split, args.decode) for name, split in splits.items()}
    problems, information = shared_images(splits)

    print("\n".join(table(splits, findings, args.decode)))
    for name, split in splits.items():
        describe(split, findings[name])
    if "train" in splits:
        trained = set(splits["train"].images.labels.unique().tolist())
        if empty := sorted(set(range(max(trained))) - trained):
            information.append(f"train: {len(empty)} classes have no image, such as {empty[0]}")
        for name, split in splits.items():
            if untrained := set(split.images.labels.unique().tolist()) - trained:
                information.append(f"{name}: {len(untrained)} classes have no training image, such as {min(untrained)}")
    for line in problems:
        print(line)
    for line in information:
        print(f"information: {line}")
    if args.report:
        write_report(args.report, splits, findings)
    if args.plot:
        plot(figure_class, args.plot, splits)
    wrong = bool(problems) or any(split.missing or findings[name].unreadable for name, split in splits.items())
    if not wrong:
        print("all images are there" + (" and can be read" if args.decode else ""))
    return int(wrong)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(__doc__, prog="python -m datasets.verify", intermixed=True)
    parser.add_argument("data", metavar="DIR", help="image folder, as the training scripts take it")
    parser.add_argument("lists", nargs="*", metavar="LIST", help="list files whose names end in train, val or test")
    for split in SPLITS:
        parser.add_argument(f"--{split}-list", metavar="FILE", help=f"the {split} list")
    parser.add_argument("--decode", action="store_true", help="decode every image fully")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write all missing and unreadable images there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the images per class (needs matplotlib)")
    return parser


def main(argv=None) -> int:
    """Returns the exit status: 0, 1 if the data have a problem, 2 if nothing could be checked."""
    return run_command(verify, build_parser(), argv)
