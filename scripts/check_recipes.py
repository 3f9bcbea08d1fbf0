"""Checks the command lines of all stages before the first is trained.

    python scripts/check_recipes.py CONFIG DIR OUT [flags]

Of a stage that has results in OUT it also checks that they were trained with these flags and lists. Exit status 2,
after one line, if something is wrong. scripts/train.sh and scripts/slurm/submit.sh call it.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from datasets.splits import find_splits
from utils.checkpoint import as_saved
from utils.command_line import ArgumentParser, option_words, run_command
from utils.errors import UserError
from utils.results.records import read_args, saved_checksums

STAGES = {"stage_i": ssd_stage_i, "stage_ii": ssd_stage_ii, "stage_iii": ssd_stage_iii, "stage_iii_tuned": ssd_stage_ii}


def check(name: str, script, config: str, data: str, out: Path, flags: list[str]):
    """Raises UserError if a stage would refuse its command line, or was trained with other flags or lists."""
    parser, recipe = script.get_parser(), f"{config}/{name}.txt"
    try:
        args = parser.parse_args([f"@{recipe}", data, *flags])
    except UserError as error:
        names = [flag.partition("=")[0] for flag in flags if flag.startswith("--")]
        hint = "; the flags go to every stage, that of one stage belongs in its recipe"
        raise UserError(f"{recipe}: {error}{hint if any(n in str(error) for n in names) else ''}") from None
    if not (out / name / "results.json").exists():
        return
    saved = read_args(out / name)
    for dest, action in parser.saved_actions().items():
        value = as_saved(getattr(args, dest))
        if dest in args.given and dest in saved and saved[dest] != value:
            was, now = option_words(action, saved[dest]), option_words(action, value)
            raise UserError(
                f"{out / name}: was trained with {was}, not {now}; name another OUT, or remove it and the later stages"
            )
    checksums = saved_checksums(out / name)
    lists = tuple((split, getattr(args, f"{split}_list")) for split in checksums)
    for split in read_splits(args.data, lists) if lists else ():
        if split.images.checksum != checksums[split.name]:
            raise UserError(
                f"{out / name}: was trained on other data than {split.images.name} has now; name another OUT, or "
                "remove it and the later stages"
            )


@functools.cache
def read_splits(data: str, lists: tuple) -> list:
    """The splits of (split, list file or None) pairs; the stages usually have the same, which are read once."""
    return list(find_splits(data, dict(lists), dict(lists), check=()).values())


def check_all(args):
    for name, script in STAGES.items():
        check(name, script, args.config, args.data, args.out, args.flags)


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__, prog="check_recipes.py")
    parser.add_argument("config", metavar="CONFIG", help="folder of recipes")
    parser.add_argument("data", metavar="DIR", help="image folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the stages' output folders")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of all stages")
    return parser


def main(argv=None) -> int:
    return run_command(check_all, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
