"""Command line of the three stages: what they share, and what no value may be."""

import argparse
import difflib
import math
import sys
from pathlib import Path

import torch

from models import ARCHS

from .errors import UserError

MISSING = object()
MOST_PROCESSES = 1024
LARGEST = 2**31 - 1  # of what counts or sizes anything
LONGEST_WAIT = 31 * 24 * 3600


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with `-` and `_` alike in flag names, errors of one line, and args.given: what the user set."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, argv=None):
        defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        args = super().parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, MISSING)))
        args.given = sorted(name for name, value in vars(args).items() if value is not MISSING)
        for name in set(defaults) - set(args.given):
            setattr(args, name, defaults[name])
        args.program = self.prog
        if hasattr(args, "dist_url"):
            check(args)
        return args

    def parse_known_args(self, args=None, namespace=None):
        known = {option.replace("_", "-"): option for option in self._option_string_actions}
        spelt = []
        for word in args if args is not None else sys.argv[1:]:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = known.get(name.replace("_", "-"), name)
            spelt.append(name + equals + value)
        found, unknown = super().parse_known_args(spelt, namespace)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if flags:  # the words after it are its value, or DIR: only the flag is to blame
            close = difflib.get_close_matches(flags[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {flags[0]}" + (f"; did you mean {close[0]}?" if close else ""))
        return found, unknown

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def stage_parser(doc, *, epochs, batch_size, lr, workers, output_dir) -> ArgumentParser:
    """The flags that all stages have; the keywords are the stage's defaults, those of the published scripts."""
    parser = ArgumentParser(doc)
    add = parser.add_argument
    # fmt: off
    add("data", metavar="DIR", help="image folder that the lists' paths are relative to, or a tree of class folders")
    add("-j", "--workers", default=workers, type=int, metavar="N",
        help="data loading workers of this node, split over its processes "
        f"(default: {workers}, or the number of cores where that is smaller)")
    add("--epochs", default=epochs, type=int, metavar="N", help="epochs to train (default: %(default)s)")
    add("--start-epoch", default=0, type=int, metavar="N", help="epoch to start with; --resume sets it by itself")
    add("-b", "--batch-size", default=batch_size, type=int, metavar="N",
        help="images a step on this node, split over its processes (default: %(default)s); scale --lr along with it")
    add("--lr", "--learning-rate", default=lr, type=float, metavar="LR", dest="lr",
        help="initial learning rate (default: %(default)s)")
    add("--schedule", default=[120, 160], nargs="*", type=int, metavar="EPOCH",
        help="epochs at which the rate falls to a tenth, where --cos is not given (default: 120 160)")
    add("--momentum", default=0.9, type=float, metavar="M", help="momentum of SGD (default: %(default)s)")
    add("--wd", "--weight-decay", default=5e-4, type=float, metavar="W", dest="weight_decay",
        help="weight decay (default: %(default)s)")
    add("-p", "--print-freq", default=10, type=int, metavar="N",
        help="steps between two lines, or updates of the bar (default: %(default)s)")
    add("--resume", default="", metavar="PATH",
        help="checkpoint to continue from, or to evaluate; 'auto' takes the newest of --output_dir, if there is one; "
        "--arch, --image-size and the queue are as saved, unless given")
    add("-e", "--evaluate", action="store_true",
        help="evaluate --resume's checkpoint on the test list, train nothing; results.json is written only where "
        "--output_dir is given")
    add("--cos", action="store_true", help="cosine schedule, by epoch; the paper's choice for every stage")
    add("--output_dir", default=output_dir, metavar="DIR",
        help="where checkpoints, log.txt, args.json and results.json go (default: %(default)s)")
    add("--overwrite", action="store_true", help="start anew in an --output_dir that already holds a checkpoint")
    add("--save-every-steps", default=0, type=int, metavar="N",
        help="write a checkpoint every N steps too, not only after every epoch (default: 0, never)")
    add("--tensorboard", action="store_true",
        help="also write the epochs' figures for TensorBoard to --output_dir (pip install tensorboard)")
    add("--seed", default=None, type=int,
        help="seed of everything random; also asks CUDA for deterministic algorithms (default: drawn and printed)")

    data = parser.add_argument_group("data")
    data.add_argument("--train-list", metavar="FILE", help="training list, '<path below DIR> <label>' a line")
    data.add_argument("--val-list", metavar="FILE", help="validation list")
    data.add_argument("--test-list", metavar="FILE", help="test list")
    data.add_argument("--image-size", default=224, type=int, metavar="S",
        help="side of the square views; up to 64 they are cropped with padding, as on CIFAR (default: %(default)s)")
    data.add_argument("--num-classes", default=None, type=int, metavar="C",
        help="classes (default: the training list's largest label + 1)")
    data.add_argument("--eval-batch-size", default=None, type=int, metavar="N",
        help="images a step in evaluation, on this node (default: --batch-size)")
    data.add_argument("--augment", default="pil", choices=("pil", "device"),
        help="where colours are jittered and views blurred: 'pil' in the workers, 'device' in batches on the "
        "training device, which relieves the workers; the distributions are the same")

    model = parser.add_argument_group("model and numerics")
    model.add_argument("--arch", default="resnext50_32x4d", choices=ARCHS, metavar="ARCH",
        help=f"backbone (default: %(default)s), one of {', '.join(ARCHS)}; resnet8, 20, 32, 44, 56 are CIFAR's")
    model.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"),
        help="mixed precision; bf16 is the fast and safe choice where the hardware has it (default: none)")
    model.add_argument("--channels-last", action="store_true", help="NHWC memory layout: faster convolutions")
    model.add_argument("--compile", action="store_true", help="compile the backbones; costs minutes at the start")
    model.add_argument("--tf32", action="store_true", help="allow TF32 in float32 products, on GPUs that have it")

    launch = parser.add_argument_group("processes")
    launch.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
        help="where to train (default: auto, a GPU if there is one)")
    launch.add_argument("--gpu", default=None, type=int, help="number of the one GPU to use")
    launch.add_argument("--multiprocessing-distributed", action="store_true",
        help="one process a GPU on this node; --nproc processes where there is no GPU")
    launch.add_argument("--nproc", default=1, type=int, metavar="N",
        help="processes of --multiprocessing-distributed (default: one a GPU, without GPUs %(default)s)")
    launch.add_argument("--world-size", default=-1, type=int, metavar="N", help="number of nodes")
    launch.add_argument("--rank", default=-1, type=int, metavar="N", help="number of this node, from 0")
    launch.add_argument("--dist-url", default="tcp://224.66.41.62:23456", metavar="URL",
        help="tcp://HOST:PORT of node 0, where the processes meet, or env:// (default: a free local port)")
    launch.add_argument("--dist-backend", default="nccl", choices=("nccl", "gloo"),
        help="communication (default: nccl, or gloo without GPUs)")
    launch.add_argument("--dist-timeout", default=1800, type=float, metavar="SECONDS",
        help="how long a process waits for the others (default: %(default)s)")
    launch.add_argument("--dist-interface", default=None, metavar="NAME",
        help="network interface between nodes, e.g. eth0 (default: the one of --dist-url's address)")
    # fmt: on
    return parser


def check(args):
    """Raises UserError for a value that makes no sense by itself, naming the flag."""
    positive = ["epochs", "batch_size", "print_freq", "image_size", "nproc", "dist_timeout"]
    positive += [name for name in ("moco_dim", "moco_k", "moco_t", "num_samples_cls", "kd_t") if hasattr(args, name)]
    positive += [name for name in ("num_classes", "eval_batch_size") if getattr(args, name) is not None]
    not_negative = ["workers", "start_epoch", "lr", "momentum", "weight_decay", "save_every_steps"]
    not_negative += [name for name in ("con_weight", "kd_weight") if hasattr(args, name)]
    for name in positive + not_negative:
        value = getattr(args, name)
        if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
            least = "above 0" if name in positive else "0 or more"
            raise UserError(f"{flag(name)} {value}: must be {least}")
        if isinstance(value, int) and value > LARGEST:
            raise UserError(f"{flag(name)} {value}: must be at most {LARGEST}")
    for name in ("workers", "nproc"):
        if getattr(args, name) > MOST_PROCESSES:
            raise UserError(f"{flag(name)} {getattr(args, name)}: at most {MOST_PROCESSES}")
    if args.dist_timeout > LONGEST_WAIT:
        raise UserError(f"--dist-timeout {args.dist_timeout:g}: at most {LONGEST_WAIT} seconds, a month")
    if not 0 <= getattr(args, "moco_m", 0) <= 1:
        raise UserError(f"--moco-m {args.moco_m}: must lie between 0 and 1")
    if any(epoch < 0 for epoch in args.schedule):
        raise UserError(f"--schedule {' '.join(map(str, args.schedule))}: epochs are 0 or more")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: must be from 0 to 2**63 - 1")
    if not 8 <= args.image_size <= 4096:
        raise UserError(f"--image-size {args.image_size}: must be from 8 to 4096")
    if not args.data:
        raise UserError("DIR is empty; name the image folder")
    if not Path(args.data).is_dir():
        raise UserError(f"{args.data}: no such folder; DIR is the folder that the list's paths are relative to")
    if args.nproc > 1 and not args.multiprocessing_distributed:
        raise UserError(f"--nproc {args.nproc}: goes with --multiprocessing-distributed; add it, or leave --nproc out")
    if not args.output_dir:
        raise UserError("--output_dir is empty; name a folder")
    if args.evaluate and not args.resume:
        raise UserError("--evaluate needs a checkpoint: add --resume CHECKPOINT")
    if args.start_epoch >= args.epochs and not args.evaluate:
        raise UserError(f"--start-epoch {args.start_epoch}: must be below --epochs {args.epochs}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
    if args.gpu is not None:
        if args.device == "cpu":
            raise UserError(f"--gpu {args.gpu}: contradicts --device cpu")
        if not 0 <= args.gpu < torch.cuda.device_count():
            raise UserError(f"--gpu {args.gpu}: this machine has {torch.cuda.device_count()} CUDA devices")
        if args.multiprocessing_distributed:
            raise UserError("--gpu: one GPU contradicts --multiprocessing-distributed; leave one of them out")
    for name in ("train_list", "val_list", "test_list"):
        if getattr(args, name) == "":
            raise UserError(f"{flag(name)} is empty; name a list file")


def flag(name: str) -> str:
    """The flag's long name as the help shows it."""
    special = {"weight_decay": "--wd", "output_dir": "--output_dir", "num_samples_cls": "--num_samples_cls",
               "kd_t": "--kd_t"}  # fmt: skip
    return special.get(name, "--" + name.replace("_", "-"))


def resolved(args) -> dict:
    """The arguments as JSON can hold them."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in sorted(vars(args).items()) if name != "given"}
