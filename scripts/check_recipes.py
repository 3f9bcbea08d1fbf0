"""Checks the command lines of all stages before the first is trained, and plans them; scripts/train.sh calls it.

    python scripts/check_recipes.py CONFIG DIR OUT [flags]

Each flag goes to the stages that have it. Of a stage that was trained or begun in OUT it also checks that it was with
these flags and lists, and that the stages before it are there. Prints assignments for the shell: plan, a text; of each
stage flags_NAME, its words of the flags, and later_NAME, the work that comes after it, in images that it could train
instead. Exit status 2, after one line, if something is wrong.
"""

import argparse
import contextlib
import functools
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from datasets.splits import SPLITS, find_splits
from models import STAGES as NETWORKS
from utils.checkpoint import present_in, settle_unless_in_use
from utils.command_line import (
    IDENTITY,
    KEPT,
    NETWORK,
    STARTS_FROM,
    ArgumentParser,
    option_name,
    option_words,
    run_command,
    with_hyphens,
)
from utils.errors import UserError
from utils.results.records import read_args, read_log, saved_checksums

STAGES = {"stage_i": ssd_stage_i, "stage_ii": ssd_stage_ii, "stage_iii": ssd_stage_iii, "stage_iii_tuned": ssd_stage_ii}
OWN = ("--output-dir", "--resume", "--overwrite", "--evaluate", "-e")  # flags of a stage that are train.sh's own


def check_command(parser: ArgumentParser, recipe: Path, data: str, flags: list[str]):
    """The arguments of a stage. Raises UserError if it would refuse its command line."""
    if not recipe.is_file():
        raise UserError(f"{recipe}: no such recipe; CONFIG is a folder such as configs/cifar100_lt")
    try:
        return parser.parse_args([f"@{recipe}", data, *flags])
    except UserError as error:
        names = [flag.partition("=")[0] for flag in flags if flag.startswith("--")]
        hint = "; a flag goes to every stage that has it, that of one stage belongs in its recipe"
        raise UserError(f"{recipe}: {error}{hint if any(n in str(error) for n in names) else ''}") from None


def split_flags(flags: list[str], parsers: dict[str, ArgumentParser]) -> dict[str, list[str]]:
    """name -> the flags, with their values, that its parser has. Raises UserError for a flag that none has."""
    groups = []
    sources = [action for parser in parsers.values() for action in parser.marked(STARTS_FROM).values()]
    for word in flags:
        if not groups or re.match(r"-(?![\d.])|@", word):
            groups.append([])
        groups[-1].append(word)
    for flag in (group[0].partition("=")[0] for group in groups if group[0].startswith("-")):
        if flag in ("-h", "--help", "--version"):
            raise UserError(f"{flag}: goes with a stage's script, such as ssd_stage_i.py")
        if not any(parser.knows(flag) for parser in parsers.values()):
            hint = next(filter(None, (parser.hint(flag) for parser in parsers.values())), "")
            raise UserError(f"{flag}: unrecognized, no stage has this flag{hint}")
        if with_hyphens(flag) in [with_hyphens(option_name(action)) for action in sources]:
            raise UserError(f"{flag}: train.sh names the checkpoint that a stage starts from; leave it out")
        if with_hyphens(flag) in OWN:
            remedy = "leave it out; to start over, remove OUT or name another; to evaluate, call the stage's script"
            raise UserError(f"{flag}: train.sh has every stage continue in its folder of OUT; {remedy}")
    return {
        name: [word for group in groups if parser.knows(group[0]) or not group[0].startswith("-") for word in group]
        for name, parser in parsers.items()
    }


def check_earlier(parser: ArgumentParser, args, run: Path):
    """Raises UserError if a stage was trained or begun with other lists or flags, defaults included."""
    remedy = "give what it had, name another OUT, or remove it and the later stages"
    saved = read_args(run)
    if checksums := saved_checksums(run):
        for split in read_splits(args.data, args.train_list, args.val_list, args.test_list):
            if split.image_list.checksum != checksums.get(split.name):
                raise UserError(f"{run}: was trained on other data than {split.image_list.name} has now; {remedy}")
    actions = parser.marked(KEPT, IDENTITY)
    for dest in [*parser.marked(KEPT), *({"pretrained", "num_classes"} & actions.keys())]:  # others say how it runs
        value = getattr(args, dest)
        action = actions[dest]
        before = saved.get(dest, value)
        drawn = dest == "seed" and value is None and not saved.get("deterministic")
        if before != value and not drawn:
            was = flag_words(action, before)
            now = flag_words(action, value)
            raise UserError(f"{run}: was trained {was}, not {now}; {remedy}")


def flag_words(action, value) -> str:
    """A flag with its value, for messages."""
    return f"without {option_name(action)}" if value is None else f"with {option_words(action, value)}"


@functools.cache
def read_splits(data: str, *lists: str | None) -> list:
    """The splits of the given or default lists; the stages usually have the same, which are read once."""
    return list(find_splits(data, dict(zip(SPLITS, lists, strict=True)), check=()).values())


def checkpoint_bytes(network, args, num_classes: int) -> int:
    """The size of a stage's checkpoint: weights, buffers, and the momentum of what trains."""
    sizes = {"dim": args.moco_dim, "queue_size": args.moco_k} if hasattr(args, "moco_k") else {}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies to the meta device have no effect
        model = network(args.arch, num_classes, image_size=args.image_size, **sizes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(value.nbytes for value in [*model.state_dict().values(), *trained])


def make_plan(args, stages: dict) -> tuple[str, dict[str, int]]:
    """(text, name -> later_NAME); stages: name -> arguments. Raises UserError if lists cannot be read."""
    lines = []
    work = {}
    sizes = []
    for name, own in stages.items():
        splits = read_splits(own.data, own.train_list, own.val_list, own.test_list)
        images = len(splits[0].image_list)
        network = NETWORKS[STAGES[name].__name__.removeprefix("ssd_stage_")]
        done = own.epochs if (args.out / name / "results.json").exists() else len(read_log(args.out / name))
        status = {0: "", own.epochs: "; done"}.get(done, f"; {done} are done")
        lines.append(f"  {name}: {own.epochs} epochs of {images:,} images{status}")
        work[name] = max(0, own.epochs - done) * images, network.passes
        sizes.append(checkpoint_bytes(network, own, own.num_classes))
    place = next(folder for folder in (args.out.absolute(), *args.out.absolute().parents) if folder.exists())
    disk = 3 * sum(sizes) + max(sizes), shutil.disk_usage(place).free  # last, previous, best; one is being written
    disk = "up to {:,.1f} GB in OUT, {:,.1f} GB are free".format(*(size / 1e9 for size in disk))
    counts = ", ".join(f"{len(split.image_list):,} {split.name}" for split in splits)
    later = {}
    names = list(work)
    for i, name in enumerate(names):
        later[name] = sum(count * passes for count, passes in map(work.get, names[i + 1 :])) // work[name][1]
    return "\n".join([f"plan: {counts} images; {disk}", *lines]), later


def find_begun(out: Path) -> list[str]:
    """The stages that have results or a checkpoint. Raises UserError if one that they were made from has none."""
    for name in STAGES:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the shell
            settle_unless_in_use(out / name)
    begun = [name for name in STAGES if (out / name / "results.json").exists() or present_in(out / name)]
    expected = list(STAGES)[: len(begun)]
    if begun != expected:
        lost = next(name for name in expected if name not in begun)
        made = [str(out / name) for name in begun[expected.index(lost) :]]
        why = "has no results and no checkpoint, but later stages that were made from it do"
        raise UserError(f"{out / lost}: {why}; remove {shlex.join(made)}, or name another OUT")
    return begun


def check_all(args):
    parsers = {name: script.get_parser() for name, script in STAGES.items()}
    stages = {}
    network = {}
    flags = split_flags(args.flags, parsers)
    begun = find_begun(args.out)
    for name, parser in parsers.items():
        own = check_command(parser, Path(args.config, f"{name}.txt"), args.data, flags[name])
        if name == "stage_ii" and own.classifier == "soft":
            raise UserError("--classifier soft: stage I has one classifier; the flag belongs in stage_iii_tuned.txt")
        network |= {dest: getattr(own, dest) for dest in parser.marked(NETWORK) if dest in own.given or not stages}
        vars(own).update(network)  # the next stages take it from their checkpoint
        lists = read_splits(own.data, own.train_list, own.val_list, own.test_list)
        own.num_classes = own.num_classes or lists[0].image_list.num_classes
        if name in begun:
            check_earlier(parser, own, args.out / name)
        stages[name] = own
    plan, later = make_plan(args, stages)
    print(f"plan={shlex.quote(plan)}")
    for name in stages:
        print(f"flags_{name}={shlex.quote(shlex.join(flags[name]))}\nlater_{name}={later[name]}")


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
