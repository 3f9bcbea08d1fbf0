"""Makes the lists, and if necessary the images, of the long-tailed data sets.

    python -m datasets.prepare imagenet-lt --root DIR       published lists into data/; checks that the images are there
    python -m datasets.prepare places-lt --root DIR         the same
    python -m datasets.prepare inaturalist18 --root DIR     the same
    python -m datasets.prepare cifar100-lt --out DIR        PNG files and lists; cifar10-lt likewise
    python -m datasets.prepare fashion-mnist-lt --out DIR   the same, small enough for a first try
    python -m datasets.prepare long-tail DIR --out OUT      a long-tailed selection of DIR/{train,test}/<class>/<image>
    python -m datasets.prepare folder DIR                   lists of your own class folders; later, with --overwrite,
                                                            of added photos too: the others keep their splits

Every command can be run again: it keeps what is complete and does the rest.
"""

import argparse
from functools import partial
from pathlib import Path

from utils.command_line import ArgumentParser, number, run_command, whole_number
from utils.errors import UserError, printable, retry
from utils.files import check_folder, is_dir, is_file

from ..splits import as_listed, by_split
from .folders import write_folder_lists
from .list_writer import write_files
from .long_tail import Selection, link_long_tail, read_cifar, read_fashion_mnist, write_long_tail
from .published import manifest, obtain_lists
from .trees import find_tree, link_tree

PROJECT = Path(__file__).resolve().parents[2]
PUBLISHED = ("imagenet-lt", "places-lt", "inaturalist18")
SMALL = {  # name: (reader, classes, --max-per-class or None for all, held-out images per class)
    "cifar100-lt": (partial(read_cifar, 100), 100, None, 0),
    "cifar10-lt": (partial(read_cifar, 10), 10, None, 0),
    "fashion-mnist-lt": (read_fashion_mnist, 10, 500, 50),
}


def ratio(text: str) -> str:
    """An argparse type: an imbalance factor from 1 to a million, kept as text so that it stays exact."""
    number(1)(text)
    return text


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
    if args.root:
        check_folder(args.root, "correct --root")
    about = manifest(args.dataset)
    lists = obtain_lists(args.dataset, args.out, args.url, args.lists_from, args.overwrite)
    files = {split: args.out / facts["file"] for split, facts in about["splits"].items()}
    absent = [str(file) for file in files.values() if not is_file(file)]
    for split, image_list in lists.items():
        counts = image_list.counts(about["classes"])
        each = f"{counts.max()} to {counts.min()} in each of {len(counts)} classes"
        print(f"{files[split]}: verified, {len(image_list)} images, {each}")
    if files["test"] == files["val"]:
        print(f"{about['name']} has no test list: its val list is used for test, and for validation as well.")
    if absent:
        message = f"not there yet: {', '.join(absent)}"
        if args.root:
            raise UserError(f"{message}; get them first, without --from or with another folder")
        print(message)
    if args.root:
        splits = find_tree(args.root, files, sort_flat=args.link is not None)
        total = sum(len(split.image_list) for split in splits.values())
        print(f"{args.root}: all {total} listed images are there")
    if args.link:
        nested = args.dataset == "places-lt"  # class folders within class folders: <class>/<file> would collide
        made = link_tree(splits, args.link, as_listed if nested else by_split)
        write_files(args.link, {f"{name}.txt": retry(Path.read_bytes, files[name]) for name in splits}, args.overwrite)
        print(f"{args.link}: {made} links made, {total - made} there already")
    elif args.dataset != "imagenet-lt" and not absent:
        print("train with", *(f"--{split}-list {file}" for split, file in files.items()))


def prepare_long_tail(args):
    """A long-tailed selection of class folders or, for CIFAR and Fashion-MNIST, of the original files."""
    selection = Selection(args.max_per_class, args.imbalance, args.held_out, args.seed)
    read, num_classes, *_ = SMALL.get(args.dataset, (None, None))
    if read is None or (args.source and is_dir(args.source / "train")):
        lists, counts, notes = link_long_tail(args.source, args.out, selection, args.overwrite, num_classes)
        for note in notes:
            print(printable(note))
    else:
        data = read(args.source, args.out / "download", args.url)
        lists, counts = write_long_tail(data, args.out, selection, args.overwrite)
    own = "" if lists["val"] is lists["test"] else f"{len(lists['val'])} validation, "
    print(
        f"{args.out}: {len(lists['train'])} training ({counts[0]} to {counts[-1]} per class), {own}"
        f"{len(lists['test'])} test images of {len(counts)} classes (seed {args.seed})"
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
    classes, entries, notes = write_folder_lists(args.root, out, args.val, args.test, args.seed, args.overwrite)
    sizes = ", ".join(f"{split} {len(entries[split])}" for split in entries)
    for line in (*notes, f"{out}: {len(classes)} classes (names in classes.txt), images: {sizes} (seed {args.seed})"):
        print(printable(line))


def build_parser() -> ArgumentParser:
    """The command line: one subcommand per data set."""
    parser = ArgumentParser(__doc__, prog="python -m datasets.prepare")
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    for name in PUBLISHED:
        command = commands.add_parser(name, help=f"the published lists: {name}")
        command.set_defaults(run=prepare_published)
        command.add_argument("--out", type=Path, default=PROJECT / "data", help="folder for the lists (default data/)")
        command.add_argument("--from", dest="lists_from", type=Path, metavar="FILE_OR_DIR", help="lists on disk")
        command.add_argument("--url", metavar="BASE", help="a mirror of the lists")
        command.add_argument("--root", type=Path, metavar="DIR", help="folder of the images: checks that all are there")
        command.add_argument("--link", type=Path, metavar="OUT", help="make a sorted tree of links to the images here")
    for name, (_, _, largest, held_out) in SMALL.items():
        command = commands.add_parser(name, help=f"PNG files and lists: {name}")
        command.set_defaults(run=prepare_long_tail, held_out=held_out)
        what = "the original files, or a tree of class folders in train/ and test/, instead of a download"
        command.add_argument("--source", type=Path, metavar="DIR", help=what)
        command.add_argument("--url", metavar="BASE", help="a mirror of the original files")
        add_selection_flags(command, largest)
    command = commands.add_parser("long-tail", help="a long-tailed selection of folders")
    command.set_defaults(run=prepare_long_tail)
    command.add_argument("source", type=Path, metavar="DIR", help="has class folders in train/, and in test/ or val/")
    what = "images of each class's rest in train/ to validate on (default 0: validates on val/, or on the test images)"
    command.add_argument("--held-out", type=whole_number(), default=0, metavar="N", help=what)
    add_selection_flags(command)
    command = commands.add_parser("folder", help="lists of your own class folders")
    command.set_defaults(run=prepare_folder)
    command.add_argument("root", type=Path, metavar="DIR", help="contains one folder of images per class")
    command.add_argument("--out", type=Path, help="folder for the lists (default DIR)")
    for split, other in (("val", "test"), ("test", "val")):
        what = (
            f"share of each class's images for {split}, such as 0.1, or their number, such as 5 (default 0.1); a share "
            f"takes at least 5 images, or a quarter of a class of fewer than 20; 0: {other}'s are used for both"
        )
        command.add_argument(f"--{split}", type=share_or_number, default=0.1, metavar="N", help=what)
    for name, command in commands.choices.items():
        if name not in PUBLISHED:
            command.add_argument(
                "--seed", type=whole_number(0, 2**32 - 1), default=0, help="of the selection (default 0)"
            )
        what = "replace files that have other content"
        what += "; photos keep their splits if the flags are the same" if name == "folder" else ""
        command.add_argument("--overwrite", action="store_true", help=what)
    return parser


def add_selection_flags(command: ArgumentParser, largest: int | None = None):
    """The flags of all long-tailed selections; largest: the default of --max-per-class."""
    command.add_argument(
        "--out", type=Path, required=True, help="folder for the lists and the images, or links to them"
    )
    command.add_argument("--imbalance", type=ratio, default="100", help="largest class over smallest (default 100)")
    default = largest or "those of the smallest class, less the held-out ones"
    what = f"training images of the first class, in the order of the names (default: {default})"
    command.add_argument("--max-per-class", type=whole_number(1), default=largest, metavar="N", help=what)


def main(argv=None) -> int:
    """Returns the exit status: 0, 2 after a mistake that one line on stderr names, 130 after Ctrl-C."""
    interrupted = "stopped; run the same command again to continue"
    return run_command(lambda args: args.run(args), build_parser(), argv, interrupted)
