r"""Stage III of SSD-LT: joint training with self-distillation (paper, section 3.3).

A new student with two classifiers: the hard one learns the labels, the soft one stage II's frozen network.

    python ssd_stage_iii.py --cos --dist-url 'tcp://localhost:11712' --multiprocessing-distributed --world-size 1 \
        --teacher_ckpt 'weights/stage_ii/last_checkpoint.pth.tar' --rank 0 DIR
    python ssd_stage_iii.py --dist-url 'tcp://localhost:10712' --multiprocessing-distributed --world-size 1 --rank 0 \
        --resume weights/stage_iii/last_checkpoint.pth.tar --evaluate DIR
    python ssd_stage_iii.py --cos --kd-weight 0 DIR                 the student without a teacher

Input: the checkpoint of stage II. Output: weights/stage_iii/last_checkpoint.pth.tar. Published for ImageNet-LT, top-1
in per cent of many-, medium-, few-shot and all classes: hard 71.1, 46.2, 15.3, 51.6; soft 67.3, 53.1, 30.0, 55.4.
"""

import sys

import torch.nn.functional as F

from models import SDL
from utils import checkpoint
from utils.args import stage_parser
from utils.engine import Stage, run
from utils.errors import UserError


class StageIII(Stage):
    name = "iii"
    backbones = ("encoder_q", "encoder_t")

    def parser(self):
        parser = stage_parser(__doc__, epochs=135, batch_size=256, lr=0.1, workers=32, output_dir="weights/stage_iii/")
        # fmt: off
        group = parser.add_argument_group("stage III")
        group.add_argument("--teacher_ckpt", default=None, metavar="PATH", help="checkpoint of stage II")
        group.add_argument("--kd_t", default=2.0, type=float, metavar="T",
            help="temperature of the distillation's softmax (default: %(default)s)")
        group.add_argument("--kd-weight", default=1.0, type=float,
            help="weight of the distillation loss (default: %(default)s); 0 trains the hard classifier alone")
        group.add_argument("--freeze-bn", action="store_true",
            help="keep the teacher's BatchNorm in eval mode; the published numbers come from train mode")
        # fmt: on
        return parser

    def classifiers(self, args):
        return ("hard", "soft") if args.kd_weight > 0 else ("hard",)

    def build(self, args):
        distill = args.kd_weight > 0
        model = SDL(args.arch, args.num_classes, args.kd_t, args.freeze_bn, distill)
        if distill and not args.resume:
            if not args.teacher_ckpt:
                raise UserError("--teacher_ckpt is missing: name the checkpoint of stage II (--kd-weight 0 needs none)")
            checkpoint.hand_over(model.load_teacher, args.teacher_ckpt, "--teacher_ckpt", ("ii",), args)
        return model

    def step(self, model, views, labels, args):
        (images,) = views
        hard, soft, distillation = model(images)
        cross_entropy = F.cross_entropy(hard, labels)
        loss = cross_entropy + args.kd_weight * distillation
        logits = {"hard": hard, "soft": soft}
        return loss, {"cross_entropy": cross_entropy, "distillation": distillation}, logits


def main(argv=None) -> int:
    return run(StageIII(), argv)


if __name__ == "__main__":
    sys.exit(main())
