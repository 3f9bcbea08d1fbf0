"""Checks the command lines of all stages before the first is trained.

    python scripts/check_recipes.py CONFIG DIR OUT [flags]

Of a stage that has results in OUT it also checks that they were trained with these flags. Exit status 2, after one
line, if something is wrong. scripts/train.sh and scripts/slurm/submit.sh call it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from utils.checkpoint import as_saved
from utils.command_line import option_words
from utils.errors import UserError
from utils.runs import read_args

STAGES = {"stage_i": ssd_stage_i, "stage_ii": ssd_stage_ii, "stage_iii": ssd_stage_iii, "stage_iii_tuned": ssd_stage_ii}


def check(name: str, script, config: str, data: str, out: Path, flags: list[str]):
    """Raises UserError if a stage would refuse its command line, or was trained with other flags."""
    parser, recipe = script.get_parser(), f"{config}/{name}.txt"
    try:
        args = parser.parse_args([f"@{recipe}", *flags, data])
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


def main(argv) -> int:
    config, data, out, *flags = argv
    try:
        for name, script in STAGES.items():
            check(name, script, config, data, Path(out), flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
