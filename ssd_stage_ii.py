r"""Stage II of SSD-LT: soft label generation (paper, section 3.2).

Stage I's network is frozen; under class-aware sampling one scale a class is trained (learnable weight scaling), which
balances the classifier that will teach stage III. The script runs once more, on stage III's checkpoint, for the
paper's optional classifier fine-tuning.

    python ssd_stage_ii.py --cos --last_stage_ckpt 'weights/stage_i/last_checkpoint.pth.tar' \
        --dist-url 'tcp://localhost:10003' --multiprocessing-distributed --world-size 1 --rank 0 DIR
    python ssd_stage_ii.py --cos --last_stage_ckpt weights/stage_iii/last_checkpoint.pth.tar \
        --output_dir weights/stage_iii_tuned DIR                    classifier fine-tuning after stage III
    python ssd_stage_ii.py --resume weights/stage_ii/last_checkpoint.pth.tar --evaluate DIR

Input: the checkpoint of stage I or III. Output: weights/stage_ii/last_checkpoint.pth.tar, stage III's teacher; the
table has one row, of the scaled classifier (lws). No figure of stage II alone is published.
"""

import functools
import sys

import torch.nn.functional as F

from datasets.samplers import ClassAwareSampler
from models import SLG
from utils import checkpoint
from utils.args import stage_parser
from utils.engine import Stage, run
from utils.errors import UserError


class StageII(Stage):
    name = "ii"
    backbones = ("encoder",)

    def parser(self):
        parser = stage_parser(__doc__, epochs=5, batch_size=512, lr=0.2, workers=12, output_dir="weights/stage_ii/")
        # fmt: off
        group = parser.add_argument_group("stage II")
        group.add_argument("--last_stage_ckpt", default="", metavar="PATH", help="checkpoint of stage I or III")
        group.add_argument("--num_samples_cls", default=2, type=int, metavar="N",
            help="images of a class in its turn of class-aware sampling (default: %(default)s)")
        group.add_argument("--classifier", default="hard", choices=("hard", "soft"),
            help="which classifier of a stage III checkpoint to scale (default: %(default)s, as published)")
        group.add_argument("--freeze-bn", action="store_true",
            help="keep the frozen encoder's BatchNorm in eval mode; the published numbers come from train mode")
        # fmt: on
        return parser

    def classifiers(self, args):
        return ("lws",)

    def sampler(self, labels, args, **where):
        return ClassAwareSampler(labels, args.num_samples_cls, **where)

    def build(self, args):
        model = SLG(args.arch, args.num_classes, args.freeze_bn)
        if not args.resume:
            if not args.last_stage_ckpt:
                raise UserError("--last_stage_ckpt is missing: name the checkpoint of stage I (or III) to start from")
            stages = ("i", "iii") if args.classifier == "hard" else ("iii",)
            load = functools.partial(model.load_pretrained, classifier=args.classifier)
            checkpoint.hand_over(load, args.last_stage_ckpt, "--last_stage_ckpt", stages, args)
        return model

    def step(self, model, views, labels, args):
        (images,) = views
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        return loss, {}, {"lws": logits}


def main(argv=None) -> int:
    return run(StageII(), argv)


if __name__ == "__main__":
    sys.exit(main())
