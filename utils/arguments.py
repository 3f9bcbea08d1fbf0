"""The flags that the three stages share, and the checks of their values."""

import argparse
import functools
import os
import secrets
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import torch

from models import ARCHS, STAGES, check_backbone
from models.preprocess import MAX_SIZE, MEAN, MIN_SIZE, MIN_STD, STD

from .command_line import (
    ALIKE,
    END,
    EVALUATION,
    GOES_ON,
    IDENTITY,
    KEPT,
    NETWORK,
    ON_OFF,
    RUN_ONLY,
    STARTS_FROM,
    ArgumentParser,
    add_flag,
    expand_home,
    expand_recipes,
    non_empty,
    number,
    option_words,
    whole_number,
    with_hyphens,
)
from .distributed import gather_objects, get_dist_info, get_world_size, num_cores, print_main
from .errors import UserError
from .files import check_folder, is_dir

SCRIPTS = {f"ssd_stage_{stage}.py" for stage in STAGES}
MAX_PROCESSES = 1024
MAX_TIMEOUT = 31 * 24 * 3600  # seconds
WORKERS_PER_CORE = 8


class IgnoreWord(argparse.Action):
    """The action of words that are accepted and have no effect."""

    def __call__(self, parser, namespace, values, option_string=None):
        pass


class TrainingParser(ArgumentParser):
    """A stage's parser, which also checks that the values fit together.

    Beside the flags, args has: program, the script's name for messages; recipes, the names of the files; given, as in
    ArgumentParser; marked, fact -> {name: default} of the flags with a fact of command_line; following, the words that
    give the next stage the flags marked GOES_ON that were given here.
    """

    def parse_args(self, argv=None):
        words = list(map(expand_home, sys.argv[1:] if argv is None else argv))
        args = super().parse_args(words)
        args.program = self.prog
        args.recipes = [word[1:] for word in words if word.startswith("@")]
        facts = KEPT, IDENTITY, STARTS_FROM, ALIKE
        args.marked = {fact: {name: a.default for name, a in self.marked(fact).items()} for fact in facts}
        args.following = self.following(args, words)
        args.deterministic = args.seed is not None
        check_arguments(args)
        return args

    def following(self, args, words: list[str]) -> list[str]:
        """The words for the next stage, without those from recipes, since it has recipes of its own.

        Its recipes may override the checkpoint, so with recipes the words that describe the network go on too.
        """
        given = args.given
        actions = self.marked(GOES_ON)
        if args.recipes:
            typed = [END if word.startswith("@") else word for word in words]
            if args.data not in typed:  # DIR is in a recipe
                typed.append(args.data)
            given = super().parse_args(typed).given
            actions |= self.marked(NETWORK)
        return [option_words(actions[name], getattr(args, name)) for name in given if name in actions]

    def parse_known_args(self, args=None, namespace=None):
        """As in ArgumentParser, with recipes; a folder after --pretrained is DIR, since weights are a file."""
        words = expand_recipes(list(sys.argv[1:] if args is None else args))
        for i, (word, following) in enumerate(pairwise(words)):
            if word == "--pretrained" and is_dir(following):
                words[i] = "--pretrained=torchvision"
        return super().parse_known_args(words, namespace)


def output_folder(value: str) -> str:
    """An argparse type: a folder, as an absolute path if it ends in no name, since later stages go next to it."""
    return os.path.abspath(value) if Path(non_empty(value)).name in ("", "..") else value


def training_parser(doc, *, epochs, batch_size, lr, workers, output_dir) -> TrainingParser:
    """The flags that all stages have; the keywords are the stage's defaults, those of the published scripts."""
    parser = TrainingParser(
        doc, epilog="@FILE stands for the words in the file FILE, such as those in configs/; later flags win."
    )
    parser.add_argument(END, nargs=0, dest=argparse.SUPPRESS, action=IgnoreWord, help=argparse.SUPPRESS)
    # torch.distributed.launch passes it to every process; the environment has the same number.
    parser.add_argument("--local-rank", dest=argparse.SUPPRESS, action=IgnoreWord, help=argparse.SUPPRESS)
    parser.add_argument(
        "data", metavar="DIR", help="image folder that the lists' paths are relative to, or a tree of class folders"
    )
    add_training_flags(parser, epochs, batch_size, lr)
    add_run_flags(parser, workers, output_dir)
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group("model and numerics"))
    add_process_flags(parser.add_argument_group("processes"))
    return parser


# fmt: off
def add_training_flags(group, epochs, batch_size, lr):
    add = functools.partial(add_flag, group)
    add("--epochs", default=epochs, type=whole_number(1), metavar="N", help="epochs to train (default: %(default)s)")
    add("--start-epoch", RUN_ONLY, IDENTITY, default=0, type=whole_number(), metavar="N",
        help="epoch to start with, from 0; --resume sets it automatically")
    add("-b", "--batch-size", GOES_ON, default=batch_size, type=whole_number(1), metavar="N",
        help="images per step on this node, split over its processes (default: %(default)s); scale --lr with it")
    add("--accum-steps", GOES_ON, default=1, type=whole_number(1), metavar="N",
        help="micro-batches per step, each of --batch-size / N images: the gradients of N add up to one step, which "
        "needs less memory; BatchNorm sees one micro-batch at a time (default: %(default)s)")
    add("--lr", "--learning-rate", default=lr, type=number(), metavar="LR", dest="lr",
        help="initial learning rate (default: %(default)s)")
    add("--schedule", default=[120, 160], nargs="*", type=whole_number(), metavar="EPOCH",
        help="epochs at which the learning rate falls, without --cos (default: 120 160)")
    add("--schedule-factor", default=0.1, type=number(above=0, most=1), metavar="F",
        help="what it is multiplied by at each epoch of --schedule (default: %(default)s)")
    add("--warmup-epochs", default=0, type=whole_number(), metavar="N",
        help="epochs in which the learning rate rises linearly to --lr, by epoch; the cosine then spans the others "
        "(default: 0); 5 are usual for large batches and on CIFAR")
    add("--momentum", default=0.9, type=number(most=1), metavar="M", help="momentum of SGD (default: %(default)s)")
    add("--wd", "--weight-decay", default=5e-4, type=number(), metavar="W", dest="weight_decay",
        help="weight decay (default: %(default)s)")
    add("--cos", GOES_ON, action=ON_OFF, default=False,
        help="cosine schedule, by epoch; the published commands use it in every stage")
    add("--eval-freq", GOES_ON, default=1, type=whole_number(1), metavar="N",
        help="validate every N epochs, and after the last; the best checkpoint is one of those that were validated "
        "(default: 1)")
    add("--seed", RUN_ONLY, KEPT, GOES_ON, default=None, type=whole_number(0, 2**63 - 1), metavar="N",
        help="seed of everything random; also asks CUDA for deterministic algorithms (default: drawn and printed)")


def add_run_flags(group, workers, output_dir):
    add = functools.partial(add_flag, group)
    add("-j", "--workers", RUN_ONLY, GOES_ON, default=workers, type=whole_number(0, MAX_PROCESSES), metavar="N",
        help="data loading workers on this node, split over its processes, in each of three pools: for the "
        "training, validation and test list, from its first use to the end; a GPU that waits for data needs more, up "
        f"to {WORKERS_PER_CORE} per core (default: {workers}, or the number of cores if that is smaller)")
    add("-p", "--print-freq", RUN_ONLY, GOES_ON, default=10, type=whole_number(1), metavar="N",
        help="steps between two lines of output, or between two updates of the bar (default: %(default)s)")
    add("--resume", RUN_ONLY, default="", metavar="PATH",
        help="checkpoint to continue from, or to evaluate; 'auto' takes the newest in --output_dir, if there is one; "
        "flags that are not given are as saved")
    add("-e", "--evaluate", RUN_ONLY, ALIKE, action=ON_OFF, default=False,
        help="evaluate --resume's checkpoint on the test list and train nothing; results.json is written only if "
        "--output_dir is given")
    add("--output_dir", RUN_ONLY, default=output_dir, type=output_folder, metavar="DIR",
        help="where checkpoints, log.txt, args.json and results.json go (default: %(default)s)")
    add("--overwrite", RUN_ONLY, action=ON_OFF, default=False,
        help="start over in an --output_dir that already holds a checkpoint")
    add("--save-every-steps", RUN_ONLY, ALIKE, default=0, type=whole_number(), metavar="N",
        help="write a checkpoint every N steps too, not only after every epoch (default: 0, never)")
    add("--tensorboard", RUN_ONLY, GOES_ON, action=ON_OFF, default=False,
        help="also write each epoch's figures for TensorBoard to --output_dir (pip install tensorboard)")
    add("--plots", RUN_ONLY, GOES_ON, action=ON_OFF, default=False,
        help="at the end, draw losses, accuracies, classes and confusion into the folder plots in --output_dir, as PNG "
        "and PDF (pip install matplotlib); under --evaluate only if --output_dir is given")


def add_data_flags(group):
    add = functools.partial(add_flag, group)
    add("--train-list", RUN_ONLY, GOES_ON, type=non_empty, metavar="FILE",
        help="training list, '<path below DIR> <label>' per line")
    add("--val-list", RUN_ONLY, GOES_ON, type=non_empty, metavar="FILE", help="validation list")
    add("--test-list", RUN_ONLY, GOES_ON, type=non_empty, metavar="FILE", help="test list")
    add("--image-size", NETWORK, default=224, type=whole_number(MIN_SIZE, MAX_SIZE), metavar="S",
        help="side of the square views; up to 64 they are cropped with padding, as is usual on CIFAR "
        "(default: %(default)s)")
    add("--mean", NETWORK, default=list(MEAN), nargs=3, type=number(0, 1), metavar=("R", "G", "B"),
        help="mean of the images' channels in [0, 1], subtracted from them (default: ImageNet's, 0.485 0.456 0.406)")
    add("--std", NETWORK, default=list(STD), nargs=3, type=number(MIN_STD, above=0), metavar=("R", "G", "B"),
        help="standard deviation, by which they are divided (default: ImageNet's, 0.229 0.224 0.225)")
    add("--num-classes", RUN_ONLY, IDENTITY, GOES_ON, default=None, type=whole_number(1), metavar="C",
        help="number of classes (default: the training list's largest label + 1)")
    add("--eval-batch-size", RUN_ONLY, GOES_ON, default=None, type=whole_number(1), metavar="N",
        help="images per evaluation batch on this node (default: --batch-size, divided by --accum-steps)")
    add("--jitter", GOES_ON, default=0.4, type=number(most=1), metavar="J",
        help="strength of the query view's jitter of brightness, contrast and saturation; 0 leaves it out, as is usual "
        "on CIFAR (default: %(default)s)")
    add("--augment", GOES_ON, default="pil", choices=("pil", "device"),
        help="where colors are jittered and views blurred: 'pil' in the workers; 'device' in batches on the training "
        "device, which relieves the workers; the random decisions are the same (default: %(default)s)")


def add_model_flags(group):
    add = functools.partial(add_flag, group)
    add("--arch", NETWORK, default="resnext50_32x4d", choices=ARCHS, metavar="ARCH",
        help=f"backbone (default: %(default)s), one of {', '.join(ARCHS)}; resnet8, 20, 32, 44, 56 are CIFAR's")
    add("--amp", EVALUATION, GOES_ON, default="none", choices=("none", "bf16", "fp16"),
        help="mixed precision; bf16 is the fast and safe choice if the hardware has it (default: %(default)s)")
    add("--channels-last", GOES_ON, action=ON_OFF, default=False, help="NHWC memory layout: faster convolutions")
    add("--compile", RUN_ONLY, IDENTITY, GOES_ON, action=ON_OFF, default=False,
        help="compile the backbones; costs minutes at the start")
    add("--tf32", GOES_ON, action=ON_OFF, default=False,
        help="allow TF32 in float32 products, on GPUs that have it")
    add("--sync-bn", GOES_ON, action=ON_OFF, default=False,
        help="BatchNorm takes its statistics in training from the images of all GPUs, for small batches per GPU; the "
        "momentum encoder keeps its own per GPU (default: off)")
    add("--bn-splits", GOES_ON, default=1, type=whole_number(1), metavar="N",
        help="BatchNorm normalizes N equal pieces of a process's micro-batch apart in training, as N GPUs would, and "
        "stage I shuffles its keys over the pieces; 8 with a batch of 256 are eight GPUs' statistics (default: "
        "%(default)s)")
    add("--memory-check", RUN_ONLY, GOES_ON, action=ON_OFF, default=True,
        help="before the first step, refuse a batch that cannot fit into memory (default: on)")


def add_process_flags(group):
    add = functools.partial(add_flag, group)
    add("--device", RUN_ONLY, GOES_ON, default="auto", choices=("auto", "cpu", "cuda"),
        help="where to train (default: auto, a GPU if there is one)")
    add("--gpu", RUN_ONLY, GOES_ON, default=None, type=whole_number(0, MAX_PROCESSES), metavar="N",
        help="number of the one GPU to use")
    add("--multiprocessing-distributed", RUN_ONLY, IDENTITY, GOES_ON, action=ON_OFF, default=False,
        help="start one process per GPU on this node, without GPUs one, or --nproc processes")
    add("--nproc", RUN_ONLY, IDENTITY, GOES_ON, default=1, type=whole_number(1, MAX_PROCESSES), metavar="N",
        help="processes of --multiprocessing-distributed (default: one per GPU, without GPUs %(default)s)")
    add("--world-size", RUN_ONLY, IDENTITY, GOES_ON, default=-1, type=whole_number(-1, 2**20), metavar="N",
        help="number of nodes")
    add("--rank", RUN_ONLY, GOES_ON, default=-1, type=whole_number(-1, 2**20), metavar="N",
        help="number of this node, from 0")
    add("--dist-url", RUN_ONLY, GOES_ON, default="tcp://224.66.41.62:23456", metavar="URL",
        help="tcp://HOST:PORT of node 0, where the processes meet, or env:// (default: a free local port)")
    add("--dist-backend", RUN_ONLY, GOES_ON, default="nccl", choices=("nccl", "gloo"),
        help="communication (default: nccl, or gloo without GPUs)")
    add("--dist-timeout", RUN_ONLY, GOES_ON, default=1800, type=number(above=0, most=MAX_TIMEOUT),
        metavar="SECONDS", help="how long a process waits for the others (default: %(default)s)")
    add("--dist-interface", RUN_ONLY, GOES_ON, default=None, metavar="NAME",
        help="network interface between nodes, e.g. eth0 (default: that of --dist-url's address)")
# fmt: on


def check_arguments(args):
    """Raises UserError if two values contradict each other, or one cannot be used on this machine."""
    most = max(32, WORKERS_PER_CORE * num_cores())
    gpus = torch.cuda.device_count()
    for name in args.recipes:
        script = f"ssd_{Path(name).stem}.py"
        if {script, args.program} <= SCRIPTS and script != args.program:
            raise UserError(f"@{name}: a recipe for {script}; take that of this stage")
    check_folder(args.data, "DIR is the folder that the lists' paths are relative to")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
    mistakes = {  # message -> whether it applies; the first that does is raised
        f"--workers {args.workers}: at most {most} on this machine, {WORKERS_PER_CORE} per core; lower it":
            args.workers > most,
        f"--nproc {args.nproc}: goes with --multiprocessing-distributed; add it, or leave --nproc out":
            args.nproc > 1 and not args.multiprocessing_distributed,
        "--overwrite: contradicts --resume auto, which would continue; leave one of them out":
            args.overwrite and args.resume == "auto" and not args.evaluate,
        f"--compile: needs a C++ compiler, and there is no {compiler}; install it, name one in CXX, or leave it out":
            args.compile and shutil.which(compiler) is None,
        "--evaluate needs a checkpoint: add --resume CHECKPOINT": args.evaluate and not args.resume,
        "--device cuda: no CUDA device is available here; use --device cpu":
            args.device == "cuda" and not torch.cuda.is_available(),
        f"--gpu {args.gpu}: contradicts --device cpu; leave one of them out":
            args.gpu is not None and args.device == "cpu",
        f"--gpu {args.gpu}: this machine has {gpus} CUDA devices; correct it, or leave it out":
            args.gpu is not None and args.gpu >= gpus,
        "--gpu: one GPU contradicts --multiprocessing-distributed; leave one of them out":
            args.gpu is not None and args.multiprocessing_distributed,
    }  # fmt: skip
    for message, wrong in mistakes.items():
        if wrong:
            raise UserError(message)
    if not args.resume:  # else settle_defaults checks them, once the checkpoint has set some
        check_training(args)


def check_training(args):
    """Raises UserError, the same on all ranks, if flags that a checkpoint may hold contradict each other."""
    if args.evaluate:
        return
    message = None
    if args.start_epoch >= args.epochs:
        message = f"--start-epoch {args.start_epoch}: must be below --epochs {args.epochs}"
    if args.warmup_epochs and args.warmup_epochs >= args.epochs:
        message = f"--warmup-epochs {args.warmup_epochs}: must be below --epochs {args.epochs}; add --warmup-epochs 0"
    if args.sync_bn and args.bn_splits > 1:
        message = f"--bn-splits {args.bn_splits}: contradicts --sync-bn; use --bn-splits 1 or --no-sync-bn"
    try:
        check_backbone(args.arch, args.image_size)
    except ValueError as error:
        message = f"--image-size {args.image_size}: {error}; choose another, or another --arch"
    if message:
        raise UserError(message, on_all_ranks=True)


def settle_defaults(args):
    """Chooses the seed, workers and evaluation batch size that were not given, and prints what it chose.

    All ranks must call it, after the checkpoint of --resume has been read, which contains its seed.
    """
    check_training(args)
    if args.seed is None:
        args.seed = gather_objects(secrets.randbelow(2**31))[0]
        if not args.evaluate:
            print_main(f"seed {args.seed}, drawn; repeat with --seed")
    if "workers" not in args.given and args.workers > num_cores():
        args.workers = num_cores()
        print_main(f"{args.workers} data loading workers, one per core (--workers)")
    args.eval_batch_size = args.eval_batch_size or max(1, args.batch_size // args.accum_steps)
    for reason, names in unused_arguments(args):
        if unused := [name for name in names if name in args.given]:
            flags = " and ".join(with_hyphens(f"--{name}") for name in unused)
            print_main(f"{flags}: not used, since {reason}")


def unused_arguments(args):
    """Yields (reason, names of the arguments that it leaves without effect)."""
    info = get_dist_info()
    if info.launcher in ("torchrun", "srun"):
        reason = f"a launcher started this as one of {info.world_size} processes"
        yield reason, ("multiprocessing_distributed", "nproc", "world_size", "rank")
    if args.evaluate:
        return
    if args.cos:
        yield "--cos is on", ("schedule", "schedule_factor")
    if args.resume:
        yield "--resume sets the epoch", ("start_epoch",)
    if getattr(args, "con_weight", 1) == 0:
        yield "--con-weight is 0", ("moco_m", "moco_t")
    if getattr(args, "kd_weight", 1) == 0:
        yield "--kd-weight is 0", ("teacher_ckpt", "kd_t", "freeze_bn")


def check_queue(args, loader):
    """Raises UserError, the same on all ranks, if stage I's queue is too small; prints a note if it is too large.

    loader: of the training images.
    """
    if args.evaluate or args.con_weight == 0:
        return
    num_images = len(loader.dataset)
    images_per_step = loader.images_per_step * get_world_size()
    if args.moco_k < images_per_step:
        raise UserError(
            f"--moco-k {args.moco_k}: the queue must hold at least one step's {images_per_step} keys; raise it, or "
            "lower --batch-size",
            on_all_ranks=True,
        )
    if args.moco_k > 2 * num_images:
        print_main(
            f"--moco-k {args.moco_k}: far too many keys for {num_images} training images: they grow stale in the "
            f"queue; take about {max(num_images, images_per_step)}"
        )


def resolved(args) -> dict:
    """The arguments as values that JSON can hold, without what the parser notes for itself."""
    own = ("given", "marked", "following", "recipes")
    return {name: str(v) if isinstance(v, Path) else v for name, v in sorted(vars(args).items()) if name not in own}
