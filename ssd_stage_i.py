r"""Stage I of SSD-LT: self-supervised guided feature learning (paper, section 3.1).

A backbone learns from cross entropy and from momentum contrast against the keys of other classes.

    python ssd_stage_i.py --cos --dist-url 'tcp://localhost:10712' --multiprocessing-distributed \
        --world-size 1 --rank 0 DIR                                 one node, one process per GPU
    torchrun --nproc-per-node 8 ssd_stage_i.py --cos DIR            the same under torchrun
    python ssd_stage_i.py --cos DIR                                 one GPU, or the CPU
    python ssd_stage_i.py --cos --con-weight 0 DIR                  the paper's baseline: cross entropy alone
    python ssd_stage_i.py --cos --pretrained DIR                    starts from torchvision's ImageNet weights
    python ssd_stage_i.py --resume weights/stage_i/last_checkpoint.pth.tar --evaluate DIR

Input: images and lists (data/README.md). Output: weights/stage_i/last_checkpoint.pth.tar, which stage II takes; its
table has one row, for the linear classifier. No accuracy of stage I alone is published.
"""

import sys

import torch
import torch.nn.functional as F

from datasets.build import build_data
from models import SSFL
from utils import checkpoint
from utils.arguments import check_queue, settle_defaults, training_parser
from utils.command_line import number, whole_number
from utils.distributed import distribute, get_world_size
from utils.evaluation import evaluate
from utils.launch import launch
from utils.memory import check_memory
from utils.numerics import seed_everything
from utils.pretrained import add_pretrained_flag, load_backbone
from utils.restore import restore
from utils.run_folder import RunFolder
from utils.train_state import TrainState, eval_due, prepare_model, set_lr


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
    add_pretrained_flag(group)
    # fmt: on
    return parser


def train_one_epoch(model, loader, state, args):
    model.train()
    for views, labels in state.batches(loader):  # on the device; zeroes the gradients as a step begins
        with state.accumulate(model), state.autocast():  # --accum-steps micro-batches make a step
            # The key encoder moves at the beginning of a step; its keys enter the queue at the end.
            logits, contrastive_loss = model(*views, labels=labels, update=state.step_begins, enqueue=state.step_ends)
            ce_loss = F.cross_entropy(logits, labels)
            loss = ce_loss + args.con_weight * contrastive_loss
        state.backward(loss)  # a loss that is not finite stops every rank before its weights move
        state.optimizer_step()  # after a step's last micro-batch
        losses = {"loss": loss, "cross_entropy": ce_loss, "contrastive": contrastive_loss}
        state.metrics.update(losses, {"linear": logits}, labels)
        checkpoint.save_if_due(state, args)  # --save-every-steps; after a stop signal it saves and leaves


def main_worker(args, device):
    """Trains, validates after every epoch, and tests; runs on every rank."""
    classifiers = ("linear",)
    resumed = checkpoint.load_resume(args, get_parser(), stage="i")  # None without --resume
    contrast = args.con_weight > 0  # read after load_resume, which may set it
    backbone = load_backbone(args) if resumed is None else None  # None without --pretrained
    settle_defaults(args)
    views = ("query", "key") if contrast else ("query",)
    with RunFolder(args) as folder, build_data(args, device, views) as data:
        checkpoint.check_compatible(resumed, args.arch, data.num_classes)
        classes = checkpoint.class_names(resumed, data.classes)  # None if nothing names them
        check_queue(args, len(data.train.dataset), data.train.images_per_step * get_world_size())
        seed_everything(args.seed)
        moco = args.moco_dim, args.moco_k, args.moco_m, args.moco_t
        model = SSFL(args.arch, data.num_classes, *moco, contrast, args.bn_splits)
        if backbone is not None:
            model.load_backbone(backbone)
        model = prepare_model(model, device, args)  # device, channels_last, compile
        if args.memory_check and not args.evaluate:  # refuses what cannot fit
            check_memory(
                model, data.train.images_per_micro_batch, args.image_size, accum_steps=args.accum_steps,
                momentum=args.momentum > 0, amp=args.amp, compiled=args.compile, device=device,
            )  # fmt: skip
        # The key encoder is in it too, without gradients, as in published checkpoints, so that they can be exchanged.
        optimizer = torch.optim.SGD(
            model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
            fused=args.amp == "fp16" or None,  # skips an overflowed step without waiting for the device
        )  # fmt: skip
        state = TrainState("i", model, optimizer, folder, device, args, classes)  # epoch, step, best, scaler, metrics
        restore(resumed, state, data)  # all of these, and the weights
        ddp_model = distribute(model, device)  # DistributedDataParallel if there are several ranks
        folder.start(state, data)

        for epoch in range(state.epoch, 0 if args.evaluate else args.epochs):
            set_lr(optimizer, epoch, args)
            train_one_epoch(ddp_model, data.train, state, args)
            due = eval_due(epoch, args)  # --eval-freq
            results = evaluate(model, data.val, classifiers, data.train_counts, state) if due else {}
            state.end_epoch(results, best="linear")  # log.txt, last and best checkpoint
        results = evaluate(model, data.test, classifiers, data.train_counts, state)
        folder.finish(state, results)  # the table, results.json, and what comes next


def main(argv=None) -> int:
    return launch(main_worker, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
