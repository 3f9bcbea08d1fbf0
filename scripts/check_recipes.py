"""Checks the command lines of all stages before the first is trained; scripts/train.sh calls it.

    python scripts/check_recipes.py CONFIG DIR OUT [flags]

Of a stage that has results in OUT it also checks that they were trained with these flags and lists. Exit status 2,
after one line, if something is wrong.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from datasets.splits import SPLITS, find_splits
from utils.checkpoint import as_saved
from utils.command_line import KEPT, ArgumentParser, option_words, run_command
from utils.errors import UserError
from utils.results.records import read_args

STAGES = {"stage_i": ssd_stage_i, "stage_ii": ssd_stage_ii, "stage_iii": ssd_stage_iii, "stage_iii_tuned": ssd_stage_ii}


def check_command(parser: ArgumentParser, recipe: Path, data: str, flags: list[str]):
    """The arguments of a stage. Raises UserError if it would refuse its command line."""
    if not recipe.is_file():
        raise UserError(f"{recipe}: no such recipe; CONFIG is a folder such as configs/cifar100_lt")
    try:
        return parser.parse_args([f"@{recipe}", data, *flags])
    except UserError as error:
        names = [flag.partition("=")[0] for flag in flags if flag.startswith("--")]
        hint = "; the flags go to every stage, that of one stage belongs in its recipe"
        raise UserError(f"{recipe}: {error}{hint if any(n in str(error) for n in names) else ''}") from None


def check_finished(parser: ArgumentParser, args, run: Path):
    """Raises UserError if a finished stage was trained with other flags or lists."""
    saved, remedy = read_args(run), "name another OUT, or remove it and the later stages"
    for dest, action in parser.marked(KEPT).items():
        value = as_saved(getattr(args, dest))
        if dest in args.given and saved.get(dest, value) != value:
            was, now = option_words(action, saved[dest]), option_words(action, value)
            raise UserError(f"{run}: was trained with {was}, not {now}; {remedy}")
    checksums = saved.get("list_checksums")
    if isinstance(checksums, dict):
        for split in read_splits(args.data, args.train_list, args.val_list, args.test_list):
            if split.images.checksum != checksums.get(split.name):
                raise UserError(f"{run}: was trained on other data than {split.images.name} has now; {remedy}")


@functools.cache
def read_splits(data: str, *lists: str | None) -> list:
    """The splits of the given or default lists; the stages usually have the same, which are read once."""
    return list(find_splits(data, dict(zip(SPLITS, lists, strict=True)), check=()).values())


def check_all(args):
    for name, script in STAGES.items():
        parser = script.get_parser()
        stage_args = check_command(parser, Path(args.config, f"{name}.txt"), args.data, args.flags)
        if (args.out / name / "results.json").exists():
            check_finished(parser, stage_args, args.out / name)


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
