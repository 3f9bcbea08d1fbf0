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
from utils import arguments, checkpoint, log, metrics, pretrained, run_folder
from utils.command_line import EVALUATION, add_flag, number, whole_number
from utils.distributed import distribute, sync_gradients
from utils.launch import launch
from utils.train_state import TrainState, eval_due, prepare_model, seed_everything, set_lr


def get_parser():
    parser = arguments.training_parser(
        __doc__, epochs=135, batch_size=256, lr=0.1, workers=32, output_dir="weights/stage_i/"
    )
    # fmt: off
    group = parser.add_argument_group("stage I")
    add_flag(group, "--moco-dim", EVALUATION, default=128, type=whole_number(1), metavar="N",
        help="dimension of queries and keys (default: %(default)s)")
    add_flag(group, "--moco-k", EVALUATION, default=115712, type=whole_number(1), metavar="K",
        help="keys in the queue (default: %(default)s, about ImageNet-LT's size); for a smaller data set take about "
        "its number of training images")
    add_flag(group, "--moco-m", default=0.999, type=number(0, 1), metavar="M",
        help="momentum of the key encoder (default: %(default)s); short runs need less, e.g. 0.99")
    add_flag(group, "--moco-t", default=0.2, type=number(above=0), metavar="T",
        help="temperature of InfoNCE (default: %(default)s)")
    add_flag(group, "--con-weight", default=1.0, type=number(), metavar="W",
        help="weight of the contrastive loss (default: %(default)s); 0 trains the baseline without a key encoder")
    pretrained.add_pretrained_flag(group)
    # fmt: on
    return parser


def train_one_epoch(model, loader, optimizer, state, args):
    model.train()
    # --accum-steps micro-batches make a step. Each is seeded, so that a resumed run draws the same random numbers.
    for views, labels, first, last in state.micro_batches(loader):
        if first:
            optimizer.zero_grad(set_to_none=True)
        with sync_gradients(model, last), state.autocast():  # DDP decides here whether backward averages over ranks
            # The key encoder moves before a step's first micro-batch, and the step's keys are enqueued with its last.
            logits, con_loss = model(*views, labels=labels, update=first, enqueue=last)
            ce_loss = F.cross_entropy(logits, labels)
            loss = ce_loss + args.con_weight * con_loss
        state.backward(loss / args.accum_steps)  # fp16: scaled
        figures = {"loss": loss, "cross_entropy": ce_loss, "contrastive": con_loss}
        state.metrics.update(figures, (logits,), labels)
        if last:
            state.optimizer_step(optimizer)  # raises if loss or gradient is not finite on any rank; skips fp16 overflow
            state.save_if_due()  # every --save-every-steps; after a stop signal, saves and ends the run


def main_worker(args, device):
    """Trains, validates after every epoch, and tests; runs on every rank."""
    resumed = checkpoint.load_resume(args, get_parser(), SSFL)  # None without --resume
    backbone = pretrained.load_backbone(args.pretrained, args.arch, args.image_size) if resumed is None else None
    arguments.settle_defaults(args)  # from here on args stays as it is
    contrast = args.con_weight > 0
    views = ("query", "key") if contrast else ("query",)
    with run_folder.RunFolder(args) as folder, build_data(args, device, views) as data:
        checkpoint.check_compatible(resumed, args.arch, data.num_classes)
        arguments.check_queue(args, data.train)
        seed_everything(args.seed)
        moco = args.moco_dim, args.moco_k, args.moco_m, args.moco_t
        model = SSFL(args.arch, data.num_classes, *moco, contrast, args.bn_splits, args.image_size)
        model.classes = checkpoint.class_names(resumed, data.classes)  # None if nothing names them
        if backbone is not None:  # --pretrained
            model.load_backbone(backbone)
        # Applies --channels-last, --sync-bn and --compile; raises UserError if a micro-batch cannot fit into memory.
        model = prepare_model(model, device, args, data.train.images_per_micro_batch)
        # The key encoder gets no gradients; it is included so that optimizer states fit published checkpoints.
        optimizer = torch.optim.SGD(
            model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
            fused=args.amp == "fp16" or None,  # skips an overflowed step without waiting for the device
        )  # fmt: skip
        state = TrainState(model, optimizer, device, args)  # epoch, step, best, gradient scaler, metrics
        checkpoint.restore(resumed, state, data)  # all of these, the weights and the momentum, if --resume is given
        folder.start(state, data)
        if args.evaluate:
            folder.write_results(metrics.evaluate(model, data.test, data.train_counts, state))
            return

        ddp_model = distribute(model, device)  # DistributedDataParallel if there are several ranks
        for epoch in range(state.epoch, args.epochs):
            set_lr(optimizer, epoch, args)
            train_one_epoch(ddp_model, data.train, optimizer, state, args)
            due = eval_due(epoch, args)  # --eval-freq
            results = metrics.evaluate(model, data.val, data.train_counts, state) if due else {}
            state.end_epoch(folder, results)  # log.txt, last and best checkpoint
        results = metrics.evaluate(model, data.test, data.train_counts, state)
        folder.finish(results, log.next_command(args, "ssd_stage_ii.py", "--last_stage_ckpt", "stage_ii"))


def main(argv=None) -> int:
    return launch(main_worker, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
