"""The flags that the three stages share, and what their values must be, each declared in one place."""

import argparse
import os
import secrets
from pathlib import Path

import torch

from models import ARCHS

from .command_line import ArgumentParser, filled, number, whole_number
from .distributed import gather_objects, print_main
from .errors import UserError

MAX_PROCESSES = 1024
MAX_TIMEOUT = 31 * 24 * 3600  # seconds
WORKERS_PER_CORE = 8


class TrainingParser(ArgumentParser):
    """A stage's parser: checks that the values fit together, too. args.program is the script's name for messages."""

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        args.program = self.prog
        args.deterministic = args.seed is not None
        check_arguments(args)
        return args


def training_parser(doc, *, epochs, batch_size, lr, workers, output_dir) -> TrainingParser:
    """The flags that all stages have; the keywords are the stage's defaults, which are the published scripts'."""
    parser = TrainingParser(doc)
    add = parser.add_argument
    # fmt: off
    add("data", metavar="DIR",
        help="image folder that the lists' paths are relative to, or a tree of class folders")
    add("-j", "--workers", default=workers, type=whole_number(0, MAX_PROCESSES), metavar="N",
        help="data loading workers on this node, split over its processes; a starved GPU wants more, up to "
        f"{WORKERS_PER_CORE} per core (default: {workers}, or the number of cores if that is smaller)")
    add("--epochs", default=epochs, type=whole_number(1), metavar="N", help="epochs to train (default: %(default)s)")
    add("--start-epoch", default=0, type=whole_number(), metavar="N",
        help="epoch to start with, from 0; --resume sets it by itself")
    add("-b", "--batch-size", default=batch_size, type=whole_number(1), metavar="N",
        help="images per step on this node, split over its processes (default: %(default)s); scale --lr with it")
    add("--lr", "--learning-rate", default=lr, type=number(), metavar="LR", dest="lr",
        help="initial learning rate (default: %(default)s)")
    add("--schedule", default=[120, 160], nargs="*", type=whole_number(), metavar="EPOCH",
        help="epochs at which the learning rate falls to a tenth, without --cos (default: 120 160)")
    add("--momentum", default=0.9, type=number(most=1), metavar="M", help="momentum of SGD (default: %(default)s)")
    add("--wd", "--weight-decay", default=5e-4, type=number(), metavar="W", dest="weight_decay",
        help="weight decay (default: %(default)s)")
    add("-p", "--print-freq", default=10, type=whole_number(1), metavar="N",
        help="steps between two lines, or between two updates of the bar (default: %(default)s)")
    add("--resume", default="", metavar="PATH",
        help="checkpoint to continue from, or to evaluate; 'auto' takes the newest in --output_dir, if there is one; "
        "--arch, --image-size and the queue's size are as saved, unless given")
    add("-e", "--evaluate", action="store_true",
        help="evaluate --resume's checkpoint on the test list and train nothing; results.json is written only if "
        "--output_dir is given")
    add("--cos", action="store_true", help="cosine schedule, by epoch; the published commands use it in every stage")
    add("--output_dir", default=output_dir, type=filled, metavar="DIR",
        help="where checkpoints, log.txt, args.json and results.json go (default: %(default)s)")
    add("--overwrite", action="store_true", help="start anew in an --output_dir that already holds a checkpoint")
    add("--save-every-steps", default=0, type=whole_number(), metavar="N",
        help="write a checkpoint every N steps too, not only after every epoch (default: 0, never)")
    add("--tensorboard", action="store_true",
        help="also write each epoch's figures for TensorBoard to --output_dir (pip install tensorboard)")
    add("--seed", default=None, type=whole_number(0, 2**63 - 1), metavar="N",
        help="seed of everything random; also asks CUDA for deterministic algorithms (default: drawn and printed)")

    data = parser.add_argument_group("data")
    data.add_argument("--train-list", type=filled, metavar="FILE",
        help="training list, '<path below DIR> <label>' per line")
    data.add_argument("--val-list", type=filled, metavar="FILE", help="validation list")
    data.add_argument("--test-list", type=filled, metavar="FILE", help="test list")
    data.add_argument("--image-size", default=224, type=whole_number(8, 4096), metavar="S",
        help="side of the square views; up to 64 they are cropped with padding, as is usual on CIFAR "
        "(default: %(default)s)")
    data.add_argument("--num-classes", default=None, type=whole_number(1), metavar="C",
        help="number of classes (default: the training list's largest label + 1)")
    data.add_argument("--eval-batch-size", default=None, type=whole_number(1), metavar="N",
        help="images per evaluation step on this node (default: --batch-size)")
    data.add_argument("--augment", default="pil", choices=("pil", "device"),
        help="where colors are jittered and views blurred: 'pil' in the workers; 'device' in batches on the training "
        "device, which relieves the workers; the distributions are the same (default: %(default)s)")

    model = parser.add_argument_group("model and numerics")
    model.add_argument("--arch", default="resnext50_32x4d", choices=ARCHS, metavar="ARCH",
        help=f"backbone (default: %(default)s), one of {', '.join(ARCHS)}; resnet8, 20, 32, 44, 56 are CIFAR's")
    model.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"),
        help="mixed precision; bf16 is the fast and safe choice if the hardware has it (default: %(default)s)")
    model.add_argument("--channels-last", action="store_true", help="NHWC memory layout: faster convolutions")
    model.add_argument("--compile", action="store_true", help="compile the backbones; costs minutes at the start")
    model.add_argument("--tf32", action="store_true", help="allow TF32 in float32 products, on GPUs that have it")

    model.add_argument("--memory-check", action=argparse.BooleanOptionalAction, default=True,
        help="before the first step, refuse a batch that cannot fit into memory (default: on)")

    processes = parser.add_argument_group("processes")
    processes.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
        help="where to train (default: auto, a GPU if there is one)")
    processes.add_argument("--gpu", default=None, type=whole_number(0, MAX_PROCESSES), metavar="N",
        help="number of the one GPU to use")
    processes.add_argument("--multiprocessing-distributed", action="store_true",
        help="start one process per GPU on this node, or --nproc processes if there is no GPU")
    processes.add_argument("--nproc", default=1, type=whole_number(1, MAX_PROCESSES), metavar="N",
        help="processes of --multiprocessing-distributed (default: one per GPU, without GPUs %(default)s)")
    processes.add_argument("--world-size", default=-1, type=whole_number(-1, 2**20), metavar="N",
        help="number of nodes")
    processes.add_argument("--rank", default=-1, type=whole_number(-1, 2**20), metavar="N",
        help="number of this node, from 0")
    processes.add_argument("--dist-url", default="tcp://224.66.41.62:23456", metavar="URL",
        help="tcp://HOST:PORT of node 0, where the processes meet, or env:// (default: a free local port)")
    processes.add_argument("--dist-backend", default="nccl", choices=("nccl", "gloo"),
        help="communication (default: nccl, or gloo without GPUs)")
    processes.add_argument("--dist-timeout", default=1800, type=number(above=0, most=MAX_TIMEOUT), metavar="SECONDS",
        help="how long a process waits for the others (default: %(default)s)")
    processes.add_argument("--dist-interface", default=None, metavar="NAME",
        help="network interface between nodes, e.g. eth0 (default: that of --dist-url's address)")
    # fmt: on
    return parser


def check_arguments(args):
    """Raises UserError if two values contradict each other, or one cannot serve on this machine."""
    if not os.path.isdir(args.data):
        raise UserError(f"DIR {args.data!r}: no such folder; DIR is the folder that the lists' paths are relative to")
    most = max(32, WORKERS_PER_CORE * num_cores())
    if args.workers > most:
        raise UserError(
            f"--workers {args.workers}: at most {most} on this machine, {WORKERS_PER_CORE} per core; lower it"
        )
    if args.nproc > 1 and not args.multiprocessing_distributed:
        raise UserError(f"--nproc {args.nproc}: goes with --multiprocessing-distributed; add it, or leave --nproc out")
    if args.evaluate and not args.resume:
        raise UserError("--evaluate needs a checkpoint: add --resume CHECKPOINT")
    if args.start_epoch >= args.epochs and not args.evaluate:
        raise UserError(f"--start-epoch {args.start_epoch}: must be below --epochs {args.epochs}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
    if args.gpu is not None:
        if args.device == "cpu":
            raise UserError(f"--gpu {args.gpu}: contradicts --device cpu; leave one of them out")
        if args.gpu >= torch.cuda.device_count():
            raise UserError(f"--gpu {args.gpu}: this machine has {torch.cuda.device_count()} CUDA devices")
        if args.multiprocessing_distributed:
            raise UserError("--gpu: one GPU contradicts --multiprocessing-distributed; leave one of them out")


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def settle_defaults(args):
    """Chooses the seed, workers and evaluation batch that were left open, and says what it chose.

    All ranks must call it, after --resume's checkpoint has been read, which brings its own seed.
    """
    if args.seed is None:
        args.seed = gather_objects(secrets.randbelow(2**31))[0]
        if not args.evaluate:
            print_main(f"seed {args.seed}, drawn; repeat with --seed")
    if "workers" not in args.given and args.workers > num_cores():
        args.workers = num_cores()
        print_main(f"{args.workers} data loading workers, one per core (--workers)")
    args.eval_batch_size = args.eval_batch_size or args.batch_size


def resolved(args) -> dict:
    """The arguments as JSON can hold them."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in sorted(vars(args).items()) if name != "given"}
