"""Lists, and where need be images, of the long-tailed data sets.

    python -m datasets.prepare imagenet-lt --root DIR       published lists into data/; checks that the images are there
    python -m datasets.prepare places-lt --root DIR         the same
    python -m datasets.prepare inaturalist18 --root DIR     the same
    python -m datasets.prepare cifar100-lt --out DIR        PNG files and lists; cifar10-lt likewise
    python -m datasets.prepare fashion-mnist-lt --out DIR   the same, small enough for a first try
    python -m datasets.prepare folder DIR                   lists of your own class folders

Every command can be run again: it keeps what is complete and goes on with the rest.
"""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

from utils.errors import UserError

from . import long_tail
from .folder_lists import write_folder_lists
from .image_tree import find_tree, link_tree
from .list_file import plain_place, reorganised_place
from .list_writer import write_files
from .published import manifest, obtain_lists

PROJECT = Path(__file__).resolve().parent.parent


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as any other mistake of the user's: in one line."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def ratio(text: str) -> str:
    """An argparse type: an imbalance factor, kept as text so that it stays exact."""
    try:
        if Fraction(text) >= 1:
            return text
    except (ValueError, ZeroDivisionError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")


def at_least(smallest: int):
    """An argparse type: whole numbers from smallest on."""

    def whole_number(text):
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {smallest}")
        return int(text)

    return whole_number


def fraction(text: str) -> float:
    """An argparse type: a number between 0 and 1, neither of them."""
    try:
        if 0 < float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")


def prepare_published(args):
    """ImageNet-LT, Places-LT, iNaturalist18."""
    if args.link and not args.root:
        raise UserError("--link needs --root, the folder of the images")
    if args.link and args.link.resolve() == args.root.resolve():
        raise UserError(f"--link {args.link}: is the image folder itself; choose another folder for the links")
    if args.root and not args.root.is_dir():
        raise UserError(f"--root {args.root}: no such folder")
    about = manifest(args.dataset)
    indices = obtain_lists(args.dataset, args.out, args.url, args.given, args.overwrite)
    files = {split: args.out / facts["file"] for split, facts in about["splits"].items()}
    absent = [str(file) for file in files.values() if not file.is_file()]
    for split, index in indices.items():
        counts = index.counts(about["classes"])
        each = f"{counts.max()}" if counts.max() == counts.min() else f"{counts.max()} to {counts.min()}"
        print(f"{files[split]}: verified, {len(index)} images, {each} in each of {about['classes']} classes")
    if files["test"] == files["val"]:
        print(f"{about['name']} has no test list: its val list is used for test, and for validation as well.")
    if absent:
        message = f"not there yet: {', '.join(absent)}"
        if args.root:
            raise UserError(f"{message}; get them first, without --from or with another")
        print(message)
    if args.root:
        splits = find_tree(args.root, files, sort_flat=args.link is not None)
        print(f"{args.root}: all {sum(len(split.index) for split in splits.values())} listed images are there")
        if args.link:
            nested = args.dataset == "places-lt"  # class folders within class folders: <class>/<file> would collide
            made = link_tree(splits, args.link, plain_place if nested else reorganised_place)
            write_files(args.link, {f"{name}.txt": files[name].read_bytes() for name in splits}, args.overwrite)
            total = sum(len(split.index) for split in splits.values())
            print(f"{args.link}: {made} links made, {total - made} there already")
    if args.dataset != "imagenet-lt" and not absent and not args.link:
        print("train with", *(f"--{split}-list {file}" for split, file in files.items()))


def prepare_small(args):
    """Fashion-MNIST-LT and CIFAR-LT."""
    made_here = not args.out.exists()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        data = args.read(args)
        counts = long_tail.write_long_tail(
            data, args.out, args.max_per_class, args.imbalance, args.held_out, args.seed, args.overwrite
        )
    except UserError:
        if made_here and not any(args.out.iterdir()):
            args.out.rmdir()
        raise
    held_out = f"{args.held_out * len(counts)} validation, " if args.held_out else ""
    print(
        f"{args.out}: {sum(counts)} training ({counts[0]} to {counts[-1]} a class), {held_out}"
        f"{len(data.test_labels)} test images of {len(counts)} classes (seed {args.seed})"
    )
    if not args.held_out:
        print("The head classes leave no unused images, so the test list serves as validation list too.")


def prepare_folder(args):
    """A tree of class folders of the user's own."""
    if args.val + args.test >= 1:
        raise UserError(f"--val {args.val} --test {args.test}: leave no images to train on; their sum must be below 1")
    out = args.out or args.root
    entries, notes = write_folder_lists(args.root, out, args.val, args.test, args.seed, args.overwrite)
    for note in notes:
        print(note)
    classes = len({label for _, label in entries["train"]})
    sizes = ", ".join(f"{split} {len(images)}" for split, images in entries.items())
    print(f"{out}: {classes} classes (names in classes.txt), images: {sizes} (seed {args.seed})")


def parser() -> Parser:
    """The command line: a subcommand a data set."""
    parser = Parser(
        prog="python -m datasets.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")

    replace = argparse.ArgumentParser(add_help=False)
    replace.add_argument("--overwrite", action="store_true", help="replace what differs from what would be written")
    seed = argparse.ArgumentParser(add_help=False)
    seed.add_argument("--seed", type=at_least(0), default=0, help="picks the images (default 0)")

    published = argparse.ArgumentParser(add_help=False)
    published.add_argument("--out", type=Path, default=PROJECT / "data", help="folder for the lists (default data/)")
    published.add_argument("--from", dest="given", type=Path, metavar="FILE_OR_DIR", help="lists that are on disk")
    published.add_argument("--url", metavar="BASE", help="a mirror of the lists")
    published.add_argument("--root", type=Path, metavar="DIR", help="folder of the images: checks that all are there")
    for name in ("imagenet-lt", "places-lt", "inaturalist18"):
        command = commands.add_parser(name, parents=[published, replace], help=f"the published lists: {name}")
        command.add_argument("--link", type=Path, metavar="OUT", help="make a sorted tree of links to the images there")
        command.set_defaults(run=prepare_published)

    small = argparse.ArgumentParser(add_help=False)
    small.add_argument("--out", type=Path, required=True, help="folder for the images and lists")
    small.add_argument("--imbalance", type=ratio, default="100", help="largest class over smallest (default 100)")
    small.add_argument("--source", type=Path, metavar="DIR", help="the original files, instead of a download")
    small.add_argument("--url", metavar="BASE", help="a mirror of the original files")
    for classes in (100, 10):
        cifar = commands.add_parser(f"cifar{classes}-lt", parents=[small, seed, replace], help=f"CIFAR-{classes}-LT")
        cifar.set_defaults(
            run=prepare_small,
            held_out=0,
            max_per_class=None,
            read=lambda args, classes=classes: long_tail.read_cifar(
                classes, args.source, args.out / "download", args.url
            ),
        )
    fashion = commands.add_parser("fashion-mnist-lt", parents=[small, seed, replace], help="Fashion-MNIST-LT")
    fashion.add_argument("--max-per-class", type=at_least(1), default=500, help="of the largest class (default 500)")
    fashion.set_defaults(
        run=prepare_small,
        held_out=50,
        read=lambda args: long_tail.read_fashion_mnist(args.source, args.out / "download", args.url),
    )

    folder = commands.add_parser("folder", parents=[seed, replace], help="lists of your own class folders")
    folder.add_argument("root", type=Path, metavar="DIR", help="holds a folder of images for each class")
    folder.add_argument("--out", type=Path, help="folder for the lists (default DIR)")
    folder.add_argument("--val", type=fraction, default=0.1, help="share of the images to validate on (default 0.1)")
    folder.add_argument("--test", type=fraction, default=0.1, help="share of the images to test on (default 0.1)")
    folder.set_defaults(run=prepare_folder)
    return parser


def main(argv=None) -> int:
    """Returns the exit status: 0, or 2 after a mistake that one line on stderr names."""
    try:
        args = parser().parse_args(argv)
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or args.dataset}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
