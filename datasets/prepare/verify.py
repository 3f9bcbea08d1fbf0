"""Checks a data set before training: every listed image exists and, with --decode, can be read.

    python -m datasets.verify DIR                        the lists that training on DIR would use
    python -m datasets.verify DIR my_train.txt           only these lists; their names end in train, val or test
    python -m datasets.verify DIR --decode               reads every image, as training does

Exit status: 0; 1 if an image is missing or unreadable, if an image has two labels, or if two splits share images (val
and test may be the same); with --decode, files with the same bytes are one image; 2 if nothing could be checked (no
such folder, a malformed list).
"""

import filecmp
import hashlib
import os
import posixpath
from collections import Counter, defaultdict
from contextlib import nullcontext
from functools import lru_cache
from itertools import combinations
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Lock

from PIL import Image
from tqdm import tqdm

from models.preprocess import to_rgb
from utils.command_line import ArgumentParser, run_command
from utils.errors import UserError, printable, retry
from utils.groups import FEW_BELOW, MANY_ABOVE, numbering_note, shot_groups
from utils.images import load_rgb
from utils.results.plots import new_axes, require_matplotlib, save_figure

from ..lists import ImageList
from ..splits import SPLITS, Split, as_listed, by_split, explain_missing, find_splits, split_named, unlisted_note
from .trees import bar, diagnose, flat

MAX_SHOWN = 20
MAX_PARALLEL_PIXELS = 2**25  # larger images are decoded one at a time, to limit memory
LARGE_IMAGE = Lock()  # held while a large image is decoded
FORMAT_OF_SUFFIX = Image.registered_extensions()
LAYOUT_NAMES = {as_listed: "plain", by_split: "reorganized", flat: "flat"}
FAULTS = ("missing", "unreadable")  # the findings that are problems of an image
INFORMATION = {
    "renamed": "have another format than their name says; training reads them all",
    "flat": "use less than an eighth of the range of brightness, once they are RGB",
    "turned": "have an EXIF orientation, which training does not apply; rotate the files that are stored sideways",
    "transparent": "are transparent in part; training uses the colors that are hidden there",
}


def examine(split: Split, decode: bool) -> dict[str, list]:
    """{kind of finding: [(entry, detail)]} of a split's images.

    missing: why; outside (a link leads out of the root): the file; and, if decode, unreadable: why; renamed (another
    format than the name says): the format; converted (not RGB): the mode; flat: its levels; transparent: the mode;
    turned: its EXIF orientation; digest: of the file's bytes.
    """
    root = os.path.realpath(split.root)
    real_folder = lru_cache(maxsize=None)(os.path.realpath)
    missing = set(split.missing)

    def look(i):
        file = split.file(i)
        if i in missing:
            why = explain_missing(split.root, split.path(i)) or "no such file"
            return [("missing", "not a regular file" if os.path.exists(file) else why)]
        found = decode_image(file) if decode else []
        folder, name = os.path.split(file)
        real = os.path.realpath(file) if os.path.islink(file) else os.path.join(real_folder(folder), name)
        if os.path.commonpath((root, real)) != root:
            found.append(("outside", real))
        return found

    number = len(split.image_list)
    findings = defaultdict(list)
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        looked = pool.imap(look, range(number), chunksize=64)
        for i, found in enumerate(tqdm(looked, f"{split.name}: reading", number, unit="image", disable=None)):
            for kind, detail in found:
                findings[kind].append((i, detail))
    return findings


def decode_image(file: str) -> list[tuple[str, str]]:
    """(kind of finding, detail) of a file after decoding all of it."""

    def look(image):
        kind = image.format
        mode = image.mode
        transparent = image.has_transparency_data
        with LARGE_IMAGE if image.width * image.height > MAX_PARALLEL_PIXELS else nullcontext():
            low, high = zip(*to_rgb(image).getextrema(), strict=True)
            transparent = transparent and image.convert("RGBA").getextrema()[3][0] < 255
        return kind, mode, min(low), max(high), transparent, exif_orientation(image)

    try:
        kind, mode, low, high, transparent, orientation = load_rgb(file, look)
        digest = hashlib.blake2b(retry(Path.read_bytes, Path(file)), digest_size=16).digest()
    except MemoryError:
        return [("unreadable", "not enough memory to decode it")]
    except UserError as error:
        return [("unreadable", str(error).removeprefix(f"{file}: "))]
    found = [("digest", digest)] + ([] if mode == "RGB" else [("converted", mode)])
    if orientation in range(2, 9):
        found.append(("turned", f"orientation {orientation}"))
    if high - low < 256 / 8:
        found.append(("flat", f"levels from {low} to {high} of 255"))
    if transparent:
        found.append(("transparent", mode))
    named = FORMAT_OF_SUFFIX.get(os.path.splitext(file)[1].lower(), kind)
    if named != kind and {named, kind} != {"JPEG", "MPO"}:  # MPO: a JPEG followed by further pictures
        found.append(("renamed", kind))
    return found


def exif_orientation(image: Image.Image) -> int | None:
    """How a decoded image is to be turned or mirrored: 1 is as stored, None if nothing is said, or it is done."""
    try:
        return image.getexif().get(0x0112)
    except Exception:  # damaged EXIF data, which training does not read
        return None


def print_table(splits: dict[str, Split], findings: dict[str, dict], decoded: bool):
    """Prints one row per split; its many, medium and few follow from the training list's counts."""
    row = "{:>5}  {:>6}  {:>7}  {:>4}  {:>6}  {:>4}  {:>9}  {:>7}  {:>10}  {}".format
    columns = "split images classes many medium few imbalance missing unreadable layout"
    print(row(*columns.split()))
    groups = shot_groups(splits["train"].image_list.counts(0)) if "train" in splits else None
    for name, split in splits.items():
        counts = split.image_list.counts(0)
        present = counts.nonzero().flatten()
        shots = "---"
        if groups is not None:
            shots = groups[present[present < len(groups)]].bincount(minlength=3).tolist()
        imbalance = f"{int(counts.max()) / int(counts[present].min()):.1f}"
        faults = len(split.missing), len(findings[name]["unreadable"]) if decoded else "-"
        print(row(name, len(split.image_list), len(present), *shots, imbalance, *faults, LAYOUT_NAMES[split.layout]))


def first_lines(found: list, line, rest: str) -> list[str]:
    """line(*one) of the first MAX_SHOWN that were found, and the number of the others with `rest`."""
    more = len(found) - MAX_SHOWN
    return [line(*one) for one in found[:MAX_SHOWN]] + ([f"and {more} more{rest}"] if more > 0 else [])


def compare(splits: dict[str, Split], findings: dict[str, dict]) -> tuple[list[str], list[str]]:
    """(problems, information): lines about images of several splits, repeated entries, and classes without images."""
    again = set()  # splits with the images of another one
    problems = []
    information = []
    paths = {}
    labeled = {}
    contradictions = []
    for name, split in splits.items():
        paths[name] = set()
        for i, label in enumerate(split.image_list.labels.tolist()):
            path = posixpath.normpath(split.image_list.path(i))
            paths[name].add(path)
            other, j = labeled.setdefault(path, (split, i))
            if label != int(other.image_list.labels[j]) and is_same_image(path, other, split):
                contradictions.append((other.image_list, j, split.image_list, i))
        if repeated := len(split.image_list) - len(paths[name]):
            information.append(f"{name}: {repeated} entries are in the list more than once")
    problems += first_lines(contradictions, two_labels, " paths with two labels")
    for one, other in combinations(splits, 2):
        both = {path for path in paths[one] & paths[other] if is_same_image(path, splits[one], splits[other])}
        if both and paths[one] == paths[other] and "train" not in (one, other):
            information.append(f"{one} and {other} are the same images")
            again.add(other)
        elif both:
            problems.append(f"{one} and {other} share {len(both)} images; the first: {min(both)}")
    copies = find_copies([split for name, split in splits.items() if name not in again], findings)
    problems += first_lines(copies, same_bytes, " images with the same bytes")
    labels = {name: set(split.image_list.labels.unique().tolist()) for name, split in splits.items()}
    hints = {name: split.image_list.label_hint() for name, split in splits.items()}
    if "train" in splits:
        if empty := set(range(max(labels["train"]))) - labels["train"]:
            information.append(f"train: {len(empty)} classes have no image, such as {min(empty)}{hints['train']}")
        for name in splits:
            if untrained := labels[name] - labels["train"]:
                what = f"{len(untrained)} classes have no training image, such as {min(untrained)}"
                information.append(f"{name}: {what}{hints[name]}")
    return problems, information


def two_labels(one: ImageList, j: int, other: ImageList, i: int) -> str:
    labels = (f"label {int(images.labels[k])} in {images.locate([k])}" for images, k in ((one, j), (other, i)))
    return f"{posixpath.normpath(other.path(i))}: {' and '.join(labels)}; correct one of them"


def same_bytes(one: ImageList, j: int, other: ImageList, i: int) -> str:
    labels = int(one.labels[j]), int(other.labels[i])
    what = f"two classes, {labels[0]} and {labels[1]}" if labels[0] != labels[1] else "two splits"
    both = (images.with_line(posixpath.normpath(images.path(k)), k) for images, k in ((one, j), (other, i)))
    return f"{' and '.join(both)}: the same bytes in {what}; keep one of them"


def find_copies(splits: list[Split], findings: dict[str, dict]) -> list[tuple]:
    """(list, entry, list, entry) with the same bytes under different paths, in two classes or two splits."""
    first = {}
    found = []
    for split in splits:
        for i, digest in findings[split.name]["digest"]:
            one, j = first.setdefault(digest, (split.image_list, i))
            other_place = one is not split.image_list or one.labels[j] != split.image_list.labels[i]
            if other_place and posixpath.normpath(one.path(j)) != posixpath.normpath(split.image_list.path(i)):
                found.append((one, j, split.image_list, i))
    return found


def is_same_image(path: str, one: Split, other: Split) -> bool:
    """Whether a path that two lists share is one image: with a folder per split, it may be two files."""
    files = [os.path.join(split.root, split.layout(path, split.name)) for split in (one, other)]
    try:
        return files[0] == files[1] or filecmp.cmp(*files, shallow=False)
    except OSError:  # one is missing, which is a problem anyway
        return True


def describe(split: Split, findings: dict[str, list]):
    """Prints what is wrong with a split, then what is good to know."""

    def show(found, title):
        if found:
            print(f"{split.name}: {title}")
        for line in first_lines(found, lambda i, detail: f"{name_entry(i)}: {detail}", ""):
            print(f"  {printable(line)}")

    def name_entry(i):
        return split.image_list.with_line(split.path(i), i)

    missing, unreadable, outside = (findings[kind] for kind in (*FAULTS, "outside"))
    if missing:
        show(missing, f"{len(missing)} of {len(split.image_list)} images are missing; {diagnose(split)}")
    show(unreadable, f"{len(unreadable)} images cannot be read")
    if outside:
        where = f"links lead out of {split.root}; the first: {name_entry(outside[0][0])}"
        print(f"{split.name}: information: {len(outside)} {where}")
    for kind, what in INFORMATION.items():
        show(findings[kind], f"information: {len(findings[kind])} images {what}")
    if modes := sorted(Counter(mode for _, mode in findings["converted"]).items()):
        numbers = ", ".join(f"{number} {mode}" for mode, number in modes)
        print(f"{split.name}: information: images of modes that training converts to RGB: {numbers}")


def write_report(file: Path, splits: dict[str, Split], findings: dict[str, dict]):
    """Writes one line per missing or unreadable image: what, split, path in the list, reason, separated by tabs."""
    with file.open("w", encoding="utf-8", errors="surrogateescape") as report:
        for name, split in splits.items():
            for fault in FAULTS:
                for i, reason in findings[name][fault]:
                    report.write(f"{fault}\t{name}\t{printable(split.image_list.path(i))}\t{reason}\n")


def plot(file: Path, splits: dict[str, Split]):
    """Draws one curve per split: the number of images per class, largest class first."""
    figure, axes = new_axes(yscale="log", xlabel="class, by number of images", ylabel="images")
    for name, split in splits.items():
        counts = split.image_list.counts(0).sort(descending=True).values
        axes.plot(range(1, len(counts) + 1), counts.tolist(), label=name)
    for bound in (FEW_BELOW, MANY_ABOVE):
        axes.axhline(bound, color="gray", linewidth=0.8, linestyle=":")
    axes.legend()
    save_figure(figure, file, "--plot")


def given_lists(args) -> dict[str, str | None]:
    """The list files of the command line, by split."""
    given = {split: getattr(args, f"{split}_list") for split in SPLITS}
    for file in args.lists:
        split = split_named(file)
        if split is None:
            raise UserError(f"{file}: its name does not end in train, val or test; give it with --train-list, ...")
        if given[split] is not None:
            raise UserError(f"{file}: a second {split} list, after {given[split]}; name one of them")
        given[split] = file
    return given


def verify(args) -> int:
    """Prints the report; returns 1 if something is wrong with the data, else 0."""
    if args.plot:
        require_matplotlib("--plot")
    if args.report and (not args.report.parent.is_dir() or args.report.is_dir()):
        raise UserError(f"--report {args.report}: needs the name of a file in an existing folder")
    given = given_lists(args)
    wanted = [split for split in SPLITS if given[split]] or SPLITS
    splits = find_splits(args.data, given, wanted, progress=bar("looking for images"))
    for split in splits.values():
        split.image_list.check_num_classes()
    findings = {name: examine(split, args.decode) for name, split in splits.items()}
    problems, information = compare(splits, findings)
    print_table(splits, findings, args.decode)
    for name, split in splits.items():
        describe(split, findings[name])
    notes = [note for split in splits.values() for note in split.image_list.notes]
    notes += [note for split in splits.values() if split.name == "train" for note in numbering_note(split.folders)]
    notes += unlisted_note(splits) if len(splits) == len(SPLITS) else []
    for line in [*problems, *(f"information: {line}" for line in [*information, *notes])]:
        print(printable(line))
    if args.report:
        write_report(args.report, splits, findings)
    if args.plot:
        plot(args.plot, splits)
    if problems or any(found[fault] for found in findings.values() for fault in FAULTS):
        return 1
    print("all images are there" + (" and can be read" if args.decode else ""))
    return 0


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
