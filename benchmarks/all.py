"""Runs the benchmarks that have a table in docs/benchmarks.md, one after the other.

python -m benchmarks.all [--scaling] [--write docs/benchmarks.md]
python -m benchmarks.all --quick                    tiny sizes: checks that the benchmarks run, measures nothing
"""

import sys

from benchmarks import arithmetic, common, evaluate, loader, loss, step
from utils.command_line import run_command

SMALL_NETWORK = "--arch resnet8 --size 32 --batch 4 --classes 5"
QUICK = {  # flags of each benchmark
    "loss": "--batch 4 --queue 32 --dim 8 --classes 5 --scaling-queues 16 --scaling-batches 8 --repeats 1",
    "step": f"{SMALL_NETWORK} --queue 16 --product 32 --scaling-batches 2 --repeats 1",
    "drift": f"{SMALL_NETWORK} --queue 16 --steps 12",
    "loader": "--images 8 --size 72 --batch 4 --workers 0 --scaling-workers 1 --repeats 1",
    "evaluate": f"{SMALL_NETWORK} --images 8 --scaling-images 64 --repeats 1",
    "arithmetic": "--arch resnet8 --size 32 --classes 5",
}
MAINS = {
    "loss": loss.main,
    "step": step.main,
    "drift": lambda argv: step.main(["--drift", *argv]),
    "loader": loader.main,
    "evaluate": evaluate.main,
    "arithmetic": arithmetic.main,
}


def shared_flags(name: str, args) -> list[str]:
    """The given flags that the benchmark `name` also has."""
    flags = ["--write", args.write] if args.write else []
    if name == "arithmetic":  # it measures nothing
        return flags
    flags += ["--device", args.device] if "device" in args.given else []
    flags += ["--repeats", str(args.repeats)] if args.repeats else []
    return [*flags, *(["--scaling"] if args.scaling else []), *(["--no-memory"] if args.no_memory else [])]


def work(args) -> int:
    """Runs the benchmarks until one fails; returns its exit status, or 0."""
    for name in args.only:
        status = MAINS[name]([*(QUICK[name].split() if args.quick else []), *shared_flags(name, args)])
        if status:
            return status
    return 0


def main(argv=None) -> int:
    parser = common.argument_parser(__doc__, "all", repeats=None)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that the benchmarks run")
    parser.add_argument("--only", nargs="+", default=list(MAINS), choices=MAINS, help="run only these")
    return run_command(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
