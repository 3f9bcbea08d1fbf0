"""The flags that the three stages share, and the checks of their values."""

import argparse
import os
import re
import secrets
import sys
from itertools import pairwise
from pathlib import Path

import torch

from models import ARCHS
from models.preprocess import MAX_SIZE, MEAN, MIN_SIZE, MIN_STD, STD

from . import recipes
from .command_line import ArgumentParser, non_empty, number, option_words, run_only, whole_number, with_hyphens
from .distributed import gather_objects, num_cores, print_main
from .errors import UserError

SCRIPTS = tuple(f"ssd_stage_{stage}.py" for stage in ("i", "ii", "iii"))
ON_OFF = argparse.BooleanOptionalAction  # --flag and --no-flag
STAGE_FLAGS = {  # flags that not all stages have, and the stages that have them
    "--con-weight": "I", "--moco-dim": "I", "--moco-k": "I", "--moco-m": "I", "--moco-t": "I",
    "--pretrained": "I, III", "--freeze-bn": "II, III", "--last-stage-ckpt": "II", "--num-samples-cls": "II",
    "--classifier": "II", "--teacher-ckpt": "III", "--kd-t": "III", "--kd-weight": "III",
}  # fmt: skip
CHECKPOINT_FLAGS = {  # what a flag of stage II is called in stage III, and the other way round
    "--last-stage-ckpt": "--teacher_ckpt", "--teacher-ckpt": "--last_stage_ckpt",
}  # fmt: skip
MAX_PROCESSES = 1024
MAX_TIMEOUT = 31 * 24 * 3600  # seconds
WORKERS_PER_CORE = 8
SHARED_ARGS = {  # flags that the stages of a training have in common; backbone and image size come with the checkpoint
    "cos", "batch_size", "accum_steps", "workers", "print_freq", "train_list", "val_list", "test_list",
    "num_classes", "augment", "amp", "channels_last", "compile", "tf32", "device", "gpu", "multiprocessing_distributed",
    "nproc", "world_size", "rank", "dist_url", "dist_backend", "dist_timeout", "dist_interface", "seed",
    "eval_batch_size", "tensorboard", "plots", "memory_check", "jitter", "eval_freq", "freeze_bn",
    "sync_bn", "bn_splits",
}  # fmt: skip


class IgnoreWord(argparse.Action):
    """The action of a word that only separates others."""

    def __call__(self, parser, namespace, values, option_string=None):
        pass


class TrainingParser(ArgumentParser):
    """A stage's parser, which also checks that the values fit together.

    args.program: the script's name for messages; args.saved: the names of the arguments that a checkpoint keeps.
    """

    def parse_args(self, argv=None):
        words = list(sys.argv[1:] if argv is None else argv)
        names = [word[1:] for word in words if word.startswith("@")]
        check_recipes(self.prog, names)
        try:
            args = super().parse_args(words)
            args.program, args.recipes = self.prog, names
            args.saved = sorted(self.saved_actions())
            args.shared_words = self.shared_words(args, words)
            args.deterministic = args.seed is not None
            check_arguments(args)
        except UserError as error:
            origin = recipes.origin(str(error), words)
            raise UserError(f"{error} (from {origin})" if origin else str(error)) from None
        return args

    def hint(self, flag: str) -> str:
        """As in ArgumentParser; for a flag of another stage, which stage has it."""
        name = with_hyphens(flag).replace("--no-", "--", 1)
        if (meant := CHECKPOINT_FLAGS.get(name)) in self._option_string_actions:
            return f"; did you mean {meant}?"
        stages = STAGE_FLAGS.get(name)
        return f"; a flag of stage {stages}" if stages else super().hint(flag)

    def shared_words(self, args, words: list[str]) -> list[str]:
        """The flags that were given outside of recipes and that the next stage needs too, as words of a command."""
        actions, given = {action.dest: action for action in self._actions}, args.given
        if args.recipes:
            own = [recipes.END if word.startswith("@") else word for word in words]
            given = super().parse_args(own if args.data in own else [*own, args.data]).given  # DIR may be in a recipe
        return [option_words(actions[name], getattr(args, name)) for name in given if name in SHARED_ARGS]

    def parse_known_args(self, args=None, namespace=None):
        """As in ArgumentParser, with recipes; a folder after --pretrained is DIR, since weights are a file."""
        words = recipes.expand(list(sys.argv[1:] if args is None else args))
        for i, (word, following) in enumerate(pairwise(words)):
            if word == "--pretrained" and os.path.isdir(following):
                words[i] = "--pretrained=torchvision"
        return super().parse_known_args(words, namespace)


def training_parser(doc, *, epochs, batch_size, lr, workers, output_dir) -> TrainingParser:
    """The flags that all stages have; the keywords are the stage's defaults, those of the published scripts."""
    parser = TrainingParser(
        doc, epilog="@FILE stands for the words in the file FILE, such as those in configs/; later flags win."
    )
    add = parser.add_argument
    # fmt: off
    run_only(add(recipes.END, nargs=0, dest=argparse.SUPPRESS, action=IgnoreWord, help=argparse.SUPPRESS))
    add("data", metavar="DIR",
        help="image folder that the lists' paths are relative to, or a tree of class folders")
    run_only(add("-j", "--workers", default=workers, type=whole_number(0, MAX_PROCESSES), metavar="N",
        help="data loading workers on this node, split over its processes; a GPU that waits for data needs more, up to "
        f"{WORKERS_PER_CORE} per core (default: {workers}, or the number of cores if that is smaller)"))
    add("--epochs", default=epochs, type=whole_number(1), metavar="N", help="epochs to train (default: %(default)s)")
    run_only(add("--start-epoch", default=0, type=whole_number(), metavar="N",
        help="epoch to start with, from 0; --resume sets it automatically"))
    add("-b", "--batch-size", default=batch_size, type=whole_number(1), metavar="N",
        help="images per step on this node, split over its processes (default: %(default)s); scale --lr with it")
    add("--accum-steps", default=1, type=whole_number(1), metavar="N",
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
    run_only(add("-p", "--print-freq", default=10, type=whole_number(1), metavar="N",
        help="steps between two lines of output, or between two updates of the bar (default: %(default)s)"))
    run_only(add("--resume", default="", metavar="PATH",
        help="checkpoint to continue from, or to evaluate; 'auto' takes the newest in --output_dir, if there is one; "
        "flags that are not given are as saved"))
    run_only(add("-e", "--evaluate", action=ON_OFF, default=False,
        help="evaluate --resume's checkpoint on the test list and train nothing; results.json is written only if "
        "--output_dir is given"))
    add("--cos", action=ON_OFF, default=False,
        help="cosine schedule, by epoch; the published commands use it in every stage")
    run_only(add("--output_dir", default=output_dir, type=non_empty, metavar="DIR",
        help="where checkpoints, log.txt, args.json and results.json go (default: %(default)s)"))
    run_only(add("--overwrite", action=ON_OFF, default=False,
        help="start over in an --output_dir that already holds a checkpoint"))
    add("--eval-freq", default=1, type=whole_number(1), metavar="N",
        help="validate every N epochs, and after the last; the best checkpoint is one of those that were validated "
        "(default: 1)")
    run_only(add("--save-every-steps", default=0, type=whole_number(), metavar="N",
        help="write a checkpoint every N steps too, not only after every epoch (default: 0, never)"))
    run_only(add("--tensorboard", action=ON_OFF, default=False,
        help="also write each epoch's figures for TensorBoard to --output_dir (pip install tensorboard)"))
    run_only(add("--plots", action=ON_OFF, default=False,
        help="at the end, draw losses, accuracies, classes and confusion into the folder plots in --output_dir, as PNG "
        "and PDF (pip install matplotlib); under --evaluate only if --output_dir is given"))
    add("--seed", default=None, type=whole_number(0, 2**63 - 1), metavar="N",
        help="seed of everything random; also asks CUDA for deterministic algorithms (default: drawn and printed)")

    data = parser.add_argument_group("data")
    run_only(data.add_argument("--train-list", type=non_empty, metavar="FILE",
        help="training list, '<path below DIR> <label>' per line"))
    run_only(data.add_argument("--val-list", type=non_empty, metavar="FILE", help="validation list"))
    run_only(data.add_argument("--test-list", type=non_empty, metavar="FILE", help="test list"))
    data.add_argument("--image-size", default=224, type=whole_number(MIN_SIZE, MAX_SIZE), metavar="S",
        help="side of the square views; up to 64 they are cropped with padding, as is usual on CIFAR "
        "(default: %(default)s)")
    data.add_argument("--mean", default=list(MEAN), nargs=3, type=number(0, 1), metavar=("R", "G", "B"),
        help="mean of the images' channels in [0, 1], subtracted from them (default: ImageNet's, 0.485 0.456 0.406)")
    data.add_argument("--std", default=list(STD), nargs=3, type=number(MIN_STD, above=0), metavar=("R", "G", "B"),
        help="standard deviation, by which they are divided (default: ImageNet's, 0.229 0.224 0.225)")
    run_only(data.add_argument("--num-classes", default=None, type=whole_number(1), metavar="C",
        help="number of classes (default: the training list's largest label + 1)"))
    run_only(data.add_argument("--eval-batch-size", default=None, type=whole_number(1), metavar="N",
        help="images per evaluation batch on this node (default: --batch-size, divided by --accum-steps)"))
    data.add_argument("--jitter", default=0.4, type=number(most=1), metavar="J",
        help="strength of the query view's jitter of brightness, contrast and saturation; 0 leaves it out, as is usual "
        "on CIFAR (default: %(default)s)")
    data.add_argument("--augment", default="pil", choices=("pil", "device"),
        help="where colors are jittered and views blurred: 'pil' in the workers; 'device' in batches on the training "
        "device, which relieves the workers; the random decisions are the same (default: %(default)s)")

    model = parser.add_argument_group("model and numerics")
    model.add_argument("--arch", default="resnext50_32x4d", choices=ARCHS, metavar="ARCH",
        help=f"backbone (default: %(default)s), one of {', '.join(ARCHS)}; resnet8, 20, 32, 44, 56 are CIFAR's")
    model.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"),
        help="mixed precision; bf16 is the fast and safe choice if the hardware has it (default: %(default)s)")
    model.add_argument("--channels-last", action=ON_OFF, default=False, help="NHWC memory layout: faster convolutions")
    run_only(model.add_argument("--compile", action=ON_OFF, default=False,
        help="compile the backbones; costs minutes at the start"))
    model.add_argument("--tf32", action=ON_OFF, default=False,
        help="allow TF32 in float32 products, on GPUs that have it")
    model.add_argument("--sync-bn", action=ON_OFF, default=False,
        help="BatchNorm takes its statistics in training from the images of all GPUs, for small batches per GPU; the "
        "momentum encoder keeps its own per GPU (default: off)")
    model.add_argument("--bn-splits", default=1, type=whole_number(1), metavar="N",
        help="BatchNorm normalizes N equal pieces of a process's micro-batch apart in training, as N GPUs would, and "
        "stage I shuffles its keys over the pieces; 8 with a batch of 256 are eight GPUs' statistics (default: "
        "%(default)s)")
    run_only(model.add_argument("--memory-check", action=ON_OFF, default=True,
        help="before the first step, refuse a batch that cannot fit into memory (default: on)"))

    processes = parser.add_argument_group("processes")
    run_only(processes.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
        help="where to train (default: auto, a GPU if there is one)"))
    run_only(processes.add_argument("--gpu", default=None, type=whole_number(0, MAX_PROCESSES), metavar="N",
        help="number of the one GPU to use"))
    run_only(processes.add_argument("--multiprocessing-distributed", action=ON_OFF, default=False,
        help="start one process per GPU on this node, without GPUs one, or --nproc processes"))
    run_only(processes.add_argument("--nproc", default=1, type=whole_number(1, MAX_PROCESSES), metavar="N",
        help="processes of --multiprocessing-distributed (default: one per GPU, without GPUs %(default)s)"))
    run_only(processes.add_argument("--world-size", default=-1, type=whole_number(-1, 2**20), metavar="N",
        help="number of nodes"))
    run_only(processes.add_argument("--rank", default=-1, type=whole_number(-1, 2**20), metavar="N",
        help="number of this node, from 0"))
    run_only(processes.add_argument("--dist-url", default="tcp://224.66.41.62:23456", metavar="URL",
        help="tcp://HOST:PORT of node 0, where the processes meet, or env:// (default: a free local port)"))
    run_only(processes.add_argument("--dist-backend", default="nccl", choices=("nccl", "gloo"),
        help="communication (default: nccl, or gloo without GPUs)"))
    run_only(processes.add_argument("--dist-timeout", default=1800, type=number(above=0, most=MAX_TIMEOUT),
        metavar="SECONDS", help="how long a process waits for the others (default: %(default)s)"))
    run_only(processes.add_argument("--dist-interface", default=None, metavar="NAME",
        help="network interface between nodes, e.g. eth0 (default: that of --dist-url's address)"))
    # fmt: on
    return parser


def check_arguments(args):
    """Raises UserError if two values contradict each other, or one cannot be used on this machine."""
    if not os.path.isdir(args.data):
        kind = "a file" if os.path.exists(args.data) else "no such folder"
        raise UserError(f"DIR {args.data!r}: {kind}; DIR is the folder that the lists' paths are relative to")
    most = max(32, WORKERS_PER_CORE * num_cores())
    if args.workers > most:
        raise UserError(
            f"--workers {args.workers}: at most {most} on this machine, {WORKERS_PER_CORE} per core; lower it"
        )
    if args.nproc > 1 and not args.multiprocessing_distributed:
        raise UserError(f"--nproc {args.nproc}: goes with --multiprocessing-distributed; add it, or leave --nproc out")
    if args.overwrite and args.resume == "auto" and not args.evaluate:
        raise UserError("--overwrite: contradicts --resume auto, which would continue; leave one of them out")
    if args.evaluate and not args.resume:
        raise UserError("--evaluate needs a checkpoint: add --resume CHECKPOINT")
    if not args.resume:  # else a checkpoint may change the values
        check_epochs(args)
        check_batchnorm(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
    if args.gpu is not None:
        if args.device == "cpu":
            raise UserError(f"--gpu {args.gpu}: contradicts --device cpu; leave one of them out")
        if args.gpu >= torch.cuda.device_count():
            raise UserError(f"--gpu {args.gpu}: this machine has {torch.cuda.device_count()} CUDA devices")
        if args.multiprocessing_distributed:
            raise UserError("--gpu: one GPU contradicts --multiprocessing-distributed; leave one of them out")


def check_epochs(args):
    """Raises UserError, the same on all ranks, if flags that count epochs contradict --epochs."""
    for name, value in (("--start-epoch", args.start_epoch), ("--warmup-epochs", args.warmup_epochs)):
        if value and value >= args.epochs and not args.evaluate:
            hint = "; add --warmup-epochs 0" if name == "--warmup-epochs" else ""
            raise UserError(f"{name} {value}: must be below --epochs {args.epochs}{hint}", on_all_ranks=True)


def check_batchnorm(args):
    """Raises UserError, the same on all ranks, if BatchNorm should take more and fewer images at the same time."""
    if args.sync_bn and args.bn_splits > 1 and not args.evaluate:
        raise UserError(
            f"--bn-splits {args.bn_splits}: contradicts --sync-bn; use --bn-splits 1 or --no-sync-bn", on_all_ranks=True
        )


def check_recipes(program: str, names: list[str]):
    """Raises UserError if a recipe is named like one of another stage; program: the name of the stage's script."""
    for name in names:
        stage = re.fullmatch(r"stage_(i+)(_tuned)?", Path(name).stem)
        script = stage and f"ssd_stage_{'ii' if stage[2] else stage[1]}.py"
        if stage and program in SCRIPTS and program != script:
            raise UserError(f"@{name}: a recipe for {script}; take that of this stage")


def settle_defaults(args):
    """Chooses the seed, workers and evaluation batch size that were not given, and prints what it chose.

    All ranks must call it, after the checkpoint of --resume has been read, which contains its seed.
    """
    check_epochs(args)
    check_batchnorm(args)
    if args.seed is None:
        args.seed = gather_objects(secrets.randbelow(2**31))[0]
        if not args.evaluate:
            print_main(f"seed {args.seed}, drawn; repeat with --seed")
    if "workers" not in args.given and args.workers > num_cores():
        args.workers = num_cores()
        print_main(f"{args.workers} data loading workers, one per core (--workers)")
    args.eval_batch_size = args.eval_batch_size or max(1, args.batch_size // args.accum_steps)
    for reason, names in () if args.evaluate else unused_arguments(args):
        if unused := [name for name in names if name in args.given]:
            flags = " and ".join(with_hyphens(f"--{name}") for name in unused)
            print_main(f"{flags}: not used, since {reason}")


def unused_arguments(args):
    """Yields (reason, names of the arguments that it leaves without effect)."""
    if args.cos:
        yield "--cos is on", ("schedule", "schedule_factor")
    if args.resume:
        yield "--resume sets the epoch", ("start_epoch",)
    if getattr(args, "con_weight", 1) == 0:
        yield "--con-weight is 0", ("moco_m", "moco_t")
    if getattr(args, "kd_weight", 1) == 0:
        yield "--kd-weight is 0", ("teacher_ckpt", "kd_t", "freeze_bn")


def check_queue(args, num_images: int, images_per_step: int):
    """Raises UserError, the same on all ranks, if stage I's queue is too small; prints a note if it is too large."""
    if args.evaluate or args.con_weight == 0:
        return
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
    """The arguments as values that JSON can hold."""
    return {
        name: str(v) if isinstance(v, Path) else v
        for name, v in sorted(vars(args).items())
        if name not in ("given", "saved", "shared_words", "recipes")
    }
