r"""Stage I of SSD-LT: self-supervised guided feature learning (paper, section 3.1).

A backbone learns from cross entropy and, beside it, from momentum contrast against the keys of other classes.

    python ssd_stage_i.py --cos --dist-url 'tcp://localhost:10712' --multiprocessing-distributed \
        --world-size 1 --rank 0 DIR                                 one node, a process a GPU
    torchrun --nproc-per-node 8 ssd_stage_i.py --cos DIR            the same under torchrun
    python ssd_stage_i.py --cos DIR                                 one GPU, or the CPU
    python ssd_stage_i.py --cos --con-weight 0 DIR                  the paper's baseline: cross entropy alone
    python ssd_stage_i.py --resume weights/stage_i/last_checkpoint.pth.tar --evaluate DIR

Input: images and lists (data/README.md). Output: weights/stage_i/last_checkpoint.pth.tar, which stage II takes; its
table has one row, of the linear classifier. No figure of stage I alone is published.
"""

import sys

import torch.nn.functional as F

from models import SSFL
from utils.args import stage_parser
from utils.engine import Stage, run


class StageI(Stage):
    name = "i"
    backbones = ("encoder_q", "encoder_k")
    optimize_frozen = True  # as published: checkpoints exchange their optimizer state

    def parser(self):
        parser = stage_parser(__doc__, epochs=135, batch_size=256, lr=0.1, workers=32, output_dir="weights/stage_i/")
        # fmt: off
        group = parser.add_argument_group("stage I")
        group.add_argument("--moco-dim", default=128, type=int, help="width of queries and keys (default: %(default)s)")
        group.add_argument("--moco-k", default=115712, type=int,
            help="keys in the queue (default: %(default)s, about ImageNet-LT's size); for a smaller data set take "
            "about its number of training images")
        group.add_argument("--moco-m", default=0.999, type=float,
            help="momentum of the key encoder (default: %(default)s); runs of few steps want less, e.g. 0.99")
        group.add_argument("--moco-t", default=0.2, type=float, help="temperature of InfoNCE (default: %(default)s)")
        group.add_argument("--con-weight", default=1.0, type=float,
            help="weight of the contrastive loss (default: %(default)s); 0 trains the baseline without key encoder")
        # fmt: on
        return parser

    def classifiers(self, args):
        return ("linear",)

    def views(self, args):
        return ("query", "key") if args.con_weight > 0 else ("query",)

    def build(self, args):
        contrast = args.con_weight > 0
        return SSFL(args.arch, args.num_classes, args.moco_dim, args.moco_k, args.moco_m, args.moco_t, contrast)

    def step(self, model, views, labels, args):
        im_q, im_k = views if args.con_weight > 0 else (views[0], None)
        logits, contrastive = model(im_q, im_k, labels)
        cross_entropy = F.cross_entropy(logits, labels)
        loss = cross_entropy + args.con_weight * contrastive
        return loss, {"cross_entropy": cross_entropy, "contrastive": contrastive}, {"linear": logits}


def main(argv=None) -> int:
    return run(StageI(), argv)


if __name__ == "__main__":
    sys.exit(main())
