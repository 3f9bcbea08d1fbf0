r"""Stage I of SSD-LT: self-supervised guided feature learning (paper, section 3.1).

A backbone learns from cross entropy and, beside it, from momentum contrast against the keys of other classes.

    python ssd_stage_i.py --cos --dist-url 'tcp://localhost:10712' --multiprocessing-distributed \
        --world-size 1 --rank 0 DIR                                 one node, one process per GPU
    torchrun --nproc-per-node 8 ssd_stage_i.py --cos DIR            the same under torchrun
    python ssd_stage_i.py --cos DIR                                 one GPU, or the CPU
    python ssd_stage_i.py --cos --con-weight 0 DIR                  the paper's baseline: cross entropy alone
    python ssd_stage_i.py --resume weights/stage_i/last_checkpoint.pth.tar --evaluate DIR

Input: images and lists (data/README.md). Output: weights/stage_i/last_checkpoint.pth.tar, which stage II takes; its
table has one row, of the linear classifier. No figure of stage I alone is published.
"""

import sys

import torch
import torch.nn.functional as F

from datasets.build import build_data
from models import SSFL
from utils import checkpoint
from utils.arguments import settle_defaults, training_parser
from utils.command_line import number, whole_number
from utils.distributed import distribute, get_world_size
from utils.errors import UserError
from utils.evaluation import evaluate
from utils.launch import launch
from utils.memory import check_memory
from utils.numerics import seed_everything
from utils.run_folder import RunFolder
from utils.training import TrainState, prepare_model, set_lr


def get_parser():
    parser = training_parser(__doc__, epochs=135, batch_size=256, lr=0.1, workers=32, output_dir="weights/stage_i/")
    # fmt: off
    group = parser.add_argument_group("stage I")
    group.add_argument("--moco-dim", default=128, type=whole_number(1), metavar="N",
        help="dimension of queries and keys (default: %(default)s)")
    group.add_argument("--moco-k", default=115712, type=whole_number(1), metavar="K",
        help="keys in the queue (default: %(default)s, about ImageNet-LT's size); for a smaller data set take about "
        "its number of training images")
    group.add_argument("--moco-m", default=0.999, type=number(0, 1), metavar="M",
        help="momentum of the key encoder (default: %(default)s); trainings of few steps need less, e.g. 0.99")
    group.add_argument("--moco-t", default=0.2, type=number(above=0), metavar="T",
        help="temperature of InfoNCE (default: %(default)s)")
    group.add_argument("--con-weight", default=1.0, type=number(), metavar="W",
        help="weight of the contrastive loss (default: %(default)s); 0 trains the baseline without a key encoder")
    # fmt: on
    return parser


def train_one_epoch(model, loader, state, args):
    model.train()
    for views, labels in state.batches(loader):  # on the device; goes on within an epoch after --resume
        with state.autocast():
            logits, contrastive_loss = model(*views, labels=labels)
            ce_loss = F.cross_entropy(logits, labels)
            loss = ce_loss + args.con_weight * contrastive_loss
        state.backward(loss)  # a loss that is not finite stops every rank before its weights move
        state.optimizer_step()
        losses = {"loss": loss, "cross_entropy": ce_loss, "contrastive": contrastive_loss}
        state.metrics.update(losses, {"linear": logits}, labels)
        checkpoint.save_if_due(state, args)  # --save-every-steps; after a stop signal it saves and leaves


def main_worker(args, device):
    """Trains, validates after every epoch, and tests; runs on every rank."""
    contrast = args.con_weight > 0
    classifiers = ("linear",)
    resumed = checkpoint.load_resume(args, stage="i")  # None without --resume
    settle_defaults(args)
    views = ("query", "key") if contrast else ("query",)
    with RunFolder(args) as folder, build_data(args, device, views) as data:
        checkpoint.check_compatible(resumed, args.arch, data.num_classes)
        global_batch = data.train.images_per_step * get_world_size()
        if args.moco_k < global_batch and not args.evaluate:
            message = f"--moco-k {args.moco_k}: the queue must hold at least one step's {global_batch} keys"
            raise UserError(message, on_all_ranks=True)

        seed_everything(args.seed)
        model = SSFL(args.arch, data.num_classes, args.moco_dim, args.moco_k, args.moco_m, args.moco_t, contrast)
        model = prepare_model(model, device, args)  # device, channels_last, compile
        check_memory(model, data.train.images_per_step, args, device)  # refuses what cannot fit
        # As published, the optimizer holds the key encoder too, which takes no gradient: its states are exchanged.
        optimizer = torch.optim.SGD(
            model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
            fused=args.amp == "fp16" or None,  # skips an overflowed step without waiting for the device
        )  # fmt: skip
        state = TrainState("i", model, optimizer, folder, device, args)  # epoch, step, best accuracy, scaler, metrics
        checkpoint.restore(resumed, state, data.train.steps)  # all of these, and the weights
        ddp_model = distribute(model, device)  # DistributedDataParallel if there are several ranks
        folder.start(state.epoch)

        for epoch in range(state.epoch, 0 if args.evaluate else args.epochs):
            set_lr(optimizer, epoch, args)
            train_one_epoch(ddp_model, data.train, state, args)
            results = evaluate(model, data.val, classifiers, data.train_counts, state)
            state.end_epoch(results, best="linear")  # log.txt, last and best checkpoint
        folder.write_results(evaluate(model, data.test, classifiers, data.train_counts, state))


def main(argv=None) -> int:
    return launch(main_worker, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
