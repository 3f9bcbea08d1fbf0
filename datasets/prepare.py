"""Lists, and where need be images, of the long-tailed data sets.

python -m datasets.prepare fashion-mnist-lt --out DIR     Fashion-MNIST-LT: PNG files and lists, in seconds
"""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

from datasets import long_tail
from utils.errors import UserError

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
    print(f"{args.out}: {sum(counts)} training ({counts[0]} to {counts[-1]} a class), {held_out}", end="")
    print(f"{len(data.test_labels)} test images of {len(counts)} classes (seed {args.seed})")
    if not args.held_out:
        print("The head classes leave no unused images, so the test list serves as validation list too.")


def parser() -> Parser:
    parser = Parser(prog="python -m datasets.prepare", description="Prepares the lists of a long-tailed data set.")
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")

    small = argparse.ArgumentParser(add_help=False)
    small.add_argument("--out", type=Path, required=True, help="folder for the images and lists")
    small.add_argument("--imbalance", type=ratio, default="100", help="largest class over smallest (default 100)")
    small.add_argument("--source", type=Path, help="folder of the original files, instead of a download")
    small.add_argument("--url", help="a mirror to download from")
    small.add_argument("--seed", type=at_least(0), default=0, help="picks the images (default 0)")
    small.add_argument("--overwrite", action="store_true", help="replace a different selection in --out")

    fashion = commands.add_parser("fashion-mnist-lt", parents=[small], help="Fashion-MNIST-LT: PNG files and lists")
    fashion.add_argument("--max-per-class", type=at_least(1), default=500, help="of the largest class (default 500)")
    fashion.set_defaults(
        run=prepare_small,
        held_out=50,
        read=lambda args: long_tail.read_fashion_mnist(args.source, args.out / "download", args.url),
    )
    return parser


def main(argv=None) -> int:
    """Returns the exit status: 0, or 2 after a mistake that one line on stderr names."""
    try:
        args = parser().parse_args(argv)
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
