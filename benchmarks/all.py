"""All benchmarks, one after the other, as docs/benchmarks.md has them.

python -m benchmarks.all [--scaling] [--write docs/benchmarks.md]
python -m benchmarks.all --quick                    tiny sizes: tries the machinery, measures nothing
"""

import argparse
import sys

from benchmarks import arithmetic, common, evaluate, loader, loss, step

SMALL_NETWORK = "--arch resnet8 --size 32 --batch 4 --classes 5"
QUICK = {  # options by benchmark
    "loss": "--batch 4 --queue 32 --dim 8 --classes 5 --scaling-queues 16 --scaling-batches 8 --repeats 1",
    "step": f"{SMALL_NETWORK} --queue 16 --product 32 --scaling-batches 2 --repeats 1",
    "drift": f"{SMALL_NETWORK} --queue 16 --steps 12",
    "loader": "--images 8 --size 72 --batch 4 --workers 0 --scaling-workers 1 --repeats 1",
    "arithmetic": "--arch resnet8 --size 32 --classes 5",
    "evaluate": f"{SMALL_NETWORK} --images 8 --scaling-images 64 --repeats 1",
}
MAINS = {
    "loss": loss.main,
    "step": step.main,
    "drift": lambda argv: step.main(["--drift", *argv]),
    "loader": loader.main,
    "evaluate": evaluate.main,
    "arithmetic": lambda argv: arithmetic.main(without_measuring(argv)),
}


def without_measuring(argv) -> list[str]:
    """The options less those that only a measurement has."""
    parser = common.argument_parser("", "arithmetic", repeats=1)
    args, rest = parser.parse_known_args(argv)
    return [*rest, *(["--write", args.write] if args.write else [])]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--only", nargs="+", default=list(MAINS), choices=MAINS, help="some of them")
    args, passed_on = parser.parse_known_args(argv)
    for name in args.only:
        MAINS[name]([*(QUICK[name].split() if args.quick else []), *passed_on])
    return 0


if __name__ == "__main__":
    sys.exit(main())
