"""Makes the lists, and if necessary the images, of the long-tailed data sets.

    python -m datasets.prepare imagenet-lt --root DIR       published lists into data/; checks that the images are there
    python -m datasets.prepare places-lt --root DIR         the same
    python -m datasets.prepare inaturalist18 --root DIR     the same
    python -m datasets.prepare cifar100-lt --out DIR        PNG files and lists; cifar10-lt likewise
    python -m datasets.prepare fashion-mnist-lt --out DIR   the same, small enough for a first try
    python -m datasets.prepare long-tail DIR --out OUT      a long-tailed selection of DIR/{train,test}/<class>/<image>
    python -m datasets.prepare folder DIR                   lists of your own class folders

Every command can be run again: it keeps what is complete and does the rest.
"""

import argparse
import functools
import os
from fractions import Fraction
from pathlib import Path

from utils.command_line import ArgumentParser, number, run_command, whole_number
from utils.errors import UserError

from ..splits import as_listed, by_split
from . import long_tail
from .folders import write_folder_lists
from .list_writer import write_files
from .published import manifest, obtain_lists
from .trees import find_tree, link_tree

PROJECT = Path(__file__).resolve().parents[2]


def ratio(text: str) -> str:
    """An argparse type: an imbalance factor from 1 to a million, kept as text so that it stays exact."""
    try:
        value = Fraction(text) if "/" in text else float(text)  # as a fraction, 1e99999999 would take minutes
        if 1 <= value <= 10**6 and len(text) <= 40:
            return text
    except (ValueError, ZeroDivisionError):
        pass
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 1 to a million")


def share_or_number(text: str) -> float | int:
    """An argparse type: a share below 1 (float), or a number of images from 0 on (int)."""
    if text.isdecimal():
        return whole_number()(text)
    share = number()(text)
    if share >= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]}: must be a share below 1, or a whole number of images")
    return share or 0


def prepare_published(args):
    """ImageNet-LT, Places-LT, iNaturalist18."""
    if args.link and not args.root:
        raise UserError("--link needs --root, the folder of the images")
    if args.link and args.link.resolve() == args.root.resolve():
        raise UserError(f"--link {args.link}: is the image folder itself; choose another folder for the links")
    if args.root and not args.root.is_dir():
        raise UserError(f"--root {args.root}: no such folder")
    about = manifest(args.dataset)
    lists = obtain_lists(args.dataset, args.out, args.url, args.lists_from, args.overwrite)
    files = {split: args.out / facts["file"] for split, facts in about["splits"].items()}
    absent = [str(file) for file in files.values() if not file.is_file()]
    for split, images in lists.items():
        counts = images.counts(about["classes"])
        each = f"{counts.max()}" if counts.max() == counts.min() else f"{counts.max()} to {counts.min()}"
        print(f"{files[split]}: verified, {len(images)} images, {each} in each of {about['classes']} classes")
    if files["test"] == files["val"]:
        print(f"{about['name']} has no test list: its val list is used for test, and for validation as well.")
    if absent:
        message = f"not there yet: {', '.join(absent)}"
        if args.root:
            raise UserError(f"{message}; get them first, without --from or with another folder")
        print(message)
    if args.root:
        splits = find_tree(args.root, files, sort_flat=args.link is not None)
        print(f"{args.root}: all {sum(len(split.images) for split in splits.values())} listed images are there")
        if args.link:
            nested = args.dataset == "places-lt"  # class folders within class folders: <class>/<file> would collide
            made = link_tree(splits, args.link, as_listed if nested else by_split)
            write_files(args.link, {f"{name}.txt": files[name].read_bytes() for name in splits}, args.overwrite)
            total = sum(len(split.images) for split in splits.values())
            print(f"{args.link}: {made} links made, {total - made} there already")
    if args.dataset != "imagenet-lt" and not absent and not args.link:
        print("train with", *(f"--{split}-list {file}" for split, file in files.items()))


def prepare_small(args):
    """Fashion-MNIST-LT and CIFAR-LT."""
    if args.source and (args.source / "train").is_dir():
        found = sum(entry.is_dir() for entry in os.scandir(args.source / "train"))
        if found != args.classes:
            raise UserError(f"--source {args.source}: train/ has {found} class folders, {args.dataset} {args.classes}")
        return prepare_long_tail(args)
    made_here = not args.out.exists()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        data = args.read(args.source, args.out / "download", args.url)
        counts = long_tail.write_long_tail(data, args.out, *selection(args))
    except UserError:
        if made_here and not any(args.out.iterdir()):
            args.out.rmdir()
        raise
    sizes = {"train": sum(counts), "val": args.held_out * len(counts), "test": len(data.test_labels)}
    print_long_tail(args, sizes, counts)


def prepare_long_tail(args):
    """A long-tailed selection of class folders."""
    sizes, counts = long_tail.link_long_tail(args.source, args.out, *selection(args))
    print_long_tail(args, sizes, counts)


def selection(args) -> tuple:
    """What determines a long-tailed selection, in the order of long_tail.choose."""
    return args.max_per_class, args.imbalance, args.held_out, args.seed, args.overwrite


def print_long_tail(args, sizes: dict[str, int], counts: list[int]):
    """Prints a selection's numbers of images, by split; 0 validation images mean that the test images serve as them."""
    own = f"{sizes['val']} validation, " if sizes["val"] else ""
    print(
        f"{args.out}: {sizes['train']} training ({counts[0]} to {counts[-1]} per class), {own}{sizes['test']} test "
        f"images of {len(counts)} classes (seed {args.seed})"
    )
    if not own:
        print("No training images are held out (--held-out), so the test images are used for validation too.")


def prepare_folder(args):
    """The user's own tree of class folders."""
    if sum(wanted for wanted in (args.val, args.test) if isinstance(wanted, float)) >= 1:
        raise UserError(f"--val {args.val} --test {args.test}: leave no images to train on; their sum must be below 1")
    if not args.val and not args.test:
        raise UserError("--val 0 --test 0: leave nothing to test on; give one of them a share or a number of images")
    out = args.out or args.root
    entries, notes = write_folder_lists(args.root, out, args.val, args.test, args.seed, args.overwrite)
    for note in notes:
        print(note)
    classes = len({label for _, label in entries["train"]})
    sizes = ", ".join(f"{split} {len(images)}" for split, images in entries.items())
    print(f"{out}: {classes} classes (names in classes.txt), images: {sizes} (seed {args.seed})")


def build_parser() -> ArgumentParser:
    """The command line: one subcommand per data set."""
    parser = ArgumentParser(__doc__, prog="python -m datasets.prepare")
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")

    replace = ArgumentParser(add_help=False)
    replace.add_argument("--overwrite", action="store_true", help="replace files that have other content")
    seed = ArgumentParser(add_help=False)
    seed.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, help="seed of the selection (default 0)")

    published = ArgumentParser(add_help=False)
    published.add_argument("--out", type=Path, default=PROJECT / "data", help="folder for the lists (default data/)")
    published.add_argument("--from", dest="lists_from", type=Path, metavar="FILE_OR_DIR", help="lists that are on disk")
    published.add_argument("--url", metavar="BASE", help="a mirror of the lists")
    published.add_argument("--root", type=Path, metavar="DIR", help="folder of the images: checks that all are there")
    for name in ("imagenet-lt", "places-lt", "inaturalist18"):
        command = commands.add_parser(name, parents=[published, replace], help=f"the published lists: {name}")
        command.add_argument("--link", type=Path, metavar="OUT", help="make a sorted tree of links to the images here")
        command.set_defaults(run=prepare_published)

    tail = ArgumentParser(add_help=False)
    tail.add_argument("--out", type=Path, required=True, help="folder for the lists and the images, or links to them")
    tail.add_argument("--imbalance", type=ratio, default="100", help="largest class over smallest (default 100)")
    small = ArgumentParser(add_help=False)
    small.add_argument(
        "--source", type=Path, metavar="DIR", help="the original files, or for CIFAR a tree of class folders in train/ "
        "and test/, instead of a download",
    )  # fmt: skip
    small.add_argument("--url", metavar="BASE", help="a mirror of the original files")
    for classes in (100, 10):
        cifar = commands.add_parser(
            f"cifar{classes}-lt", parents=[small, tail, seed, replace], help=f"CIFAR-{classes}-LT"
        )
        read = functools.partial(long_tail.read_cifar, classes)
        cifar.set_defaults(run=prepare_small, held_out=0, max_per_class=None, read=read, classes=classes)
    fashion = commands.add_parser("fashion-mnist-lt", parents=[small, tail, seed, replace], help="Fashion-MNIST-LT")
    fashion.add_argument(
        "--max-per-class", type=whole_number(1), default=500, help="of the largest class (default 500)"
    )
    fashion.set_defaults(run=prepare_small, held_out=50, read=long_tail.read_fashion_mnist, classes=10)

    own_tail = commands.add_parser(
        "long-tail", parents=[tail, seed, replace], help="a long-tailed selection of folders"
    )
    own_tail.add_argument(
        "source", type=Path, metavar="DIR", help="contains class folders in train/, and in test/ or val/"
    )
    own_tail.add_argument(
        "--max-per-class", type=whole_number(1), metavar="N", help="training images of the first class, in the order "
        "of the names (default: those of the smallest class, less --held-out)",
    )  # fmt: skip
    own_tail.add_argument(
        "--held-out", type=whole_number(), default=0, metavar="N", help="images of each class's rest in train/ to "
        "validate on (default: 0, which validates on val/, or on the test images)",
    )  # fmt: skip
    own_tail.set_defaults(run=prepare_long_tail)

    folder = commands.add_parser("folder", parents=[seed, replace], help="lists of your own class folders")
    folder.add_argument("root", type=Path, metavar="DIR", help="contains one folder of images per class")
    folder.add_argument("--out", type=Path, help="folder for the lists (default DIR)")
    rule = (
        "share of each class's images to {}, such as 0.1, or their number, such as 5 (default 0.1); a share takes at "
        "least 5 images, if these are no more than a quarter of the class; 0: the {} images are used for both"
    )
    folder.add_argument(
        "--val", type=share_or_number, default=0.1, metavar="N", help=rule.format("validate on", "test")
    )
    folder.add_argument(
        "--test", type=share_or_number, default=0.1, metavar="N", help=rule.format("test on", "validation")
    )
    folder.set_defaults(run=prepare_folder)
    return parser


def main(argv=None) -> int:
    """Returns the exit status: 0, 2 after a mistake that one line on stderr names, 130 after Ctrl-C."""
    interrupted = "stopped; run the same command again to continue"
    return run_command(lambda args: args.run(args), build_parser(), argv, interrupted)
