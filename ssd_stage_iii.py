r"""Stage III of SSD-LT: joint training with self-distillation (paper, section 3.3).

A new student has two classifiers: the hard one learns from the labels, the soft one from stage II's frozen network.

    python ssd_stage_iii.py --cos --dist-url 'tcp://localhost:11712' --multiprocessing-distributed --world-size 1 \
        --teacher_ckpt 'weights/stage_ii/last_checkpoint.pth.tar' --rank 0 DIR
    python ssd_stage_iii.py --dist-url 'tcp://localhost:10712' --multiprocessing-distributed --world-size 1 --rank 0 \
        --resume weights/stage_iii/last_checkpoint.pth.tar --evaluate DIR
    python ssd_stage_iii.py --cos --kd-weight 0 DIR                 the student without a teacher

Input: the checkpoint of stage II. Output: weights/stage_iii/last_checkpoint.pth.tar. Published for ImageNet-LT, top-1
in per cent of many-, medium-, few-shot and all classes: hard 71.1, 46.2, 15.3, 51.6; soft 67.3, 53.1, 30.0, 55.4.
"""

import sys

import torch
import torch.nn.functional as F

from datasets.build import build_data
from models import SDL
from utils import checkpoint
from utils.arguments import ON_OFF, settle_defaults, training_parser
from utils.command_line import number, run_only
from utils.distributed import distribute
from utils.evaluation import evaluate
from utils.launch import launch
from utils.memory import check_memory
from utils.numerics import seed_everything
from utils.pretrained import add_pretrained_flag, load_backbone
from utils.restore import restore
from utils.run_folder import RunFolder
from utils.train_state import TrainState, eval_due, prepare_model, set_lr


def get_parser():
    parser = training_parser(__doc__, epochs=135, batch_size=256, lr=0.1, workers=32, output_dir="weights/stage_iii/")
    # fmt: off
    group = parser.add_argument_group("stage III")
    run_only(group.add_argument("--teacher_ckpt", default=None, metavar="PATH", help="checkpoint of stage II"))
    group.add_argument("--kd_t", default=2.0, type=number(above=0), metavar="T",
        help="temperature of the distillation's softmax (default: %(default)s)")
    group.add_argument("--kd-weight", default=1.0, type=number(), metavar="W",
        help="weight of the distillation loss (default: %(default)s); 0 trains the hard classifier alone")
    add_pretrained_flag(group)
    group.add_argument("--freeze-bn", action=ON_OFF, default=False,
        help="keep the teacher's BatchNorm in eval mode, which small batches need; the published numbers come from "
        "train mode")
    # fmt: on
    return parser


def train_one_epoch(model, loader, state, args):
    model.train()
    for (images,), labels in state.batches(loader):  # on the device; zeroes the gradients as a step begins
        with state.accumulate(model), state.autocast():  # --accum-steps micro-batches make a step
            hard, soft, kd_loss = model(images)
            ce_loss = F.cross_entropy(hard, labels)
            loss = ce_loss + args.kd_weight * kd_loss
        state.backward(loss)  # a loss that is not finite stops every rank before its weights move
        state.optimizer_step()  # after a step's last micro-batch
        losses = {"loss": loss, "cross_entropy": ce_loss, "distillation": kd_loss}
        logits = {"hard": hard, "soft": soft} if args.kd_weight > 0 else {"hard": hard}  # else soft does not train
        state.metrics.update(losses, logits, labels)
        checkpoint.save_if_due(state, args)  # --save-every-steps; after a stop signal it saves and leaves


def main_worker(args, device):
    """Trains, validates after every epoch, and tests; runs on every rank."""
    resumed = checkpoint.load_resume(args, get_parser(), stage="iii")  # None without --resume
    distill = args.kd_weight > 0  # read after load_resume, which may set it
    classifiers = ("hard", "soft") if distill else ("hard",)
    teacher = None
    if distill and resumed is None:
        hint = " (--kd-weight 0 needs none)"
        teacher = checkpoint.load_stage(args, get_parser(), "--teacher_ckpt", SDL, hint=hint)
    backbone = load_backbone(args) if resumed is None else None  # None without --pretrained
    settle_defaults(args)
    with RunFolder(args) as folder, build_data(args, device, ("query",)) as data:
        checkpoint.check_compatible(resumed or teacher, args.arch, data.num_classes)
        classes = checkpoint.class_names(resumed or teacher, data.classes)  # None if nothing names them
        seed_everything(args.seed)
        model = SDL(args.arch, data.num_classes, args.kd_t, args.freeze_bn, distill, args.bn_splits)
        if teacher is not None:
            model.load_teacher(teacher.state_dict)
        if backbone is not None:
            model.load_backbone(backbone)
        model = prepare_model(model, device, args)  # device, channels_last, compile
        if args.memory_check and not args.evaluate:  # refuses what cannot fit
            check_memory(
                model, data.train.images_per_micro_batch, args.image_size, accum_steps=args.accum_steps,
                momentum=args.momentum > 0, amp=args.amp, compiled=args.compile, device=device,
            )  # fmt: skip
        student = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(
            student, args.lr, args.momentum, weight_decay=args.weight_decay,
            fused=args.amp == "fp16" or None,  # skips an overflowed step without waiting for the device
        )  # fmt: skip
        state = TrainState("iii", model, optimizer, folder, device, args, classes)  # epoch, step, best, scaler, metrics
        restore(resumed, state, data)  # all of these, and the weights
        ddp_model = distribute(model, device)  # DistributedDataParallel if there are several ranks
        folder.start(state, data)

        for epoch in range(state.epoch, 0 if args.evaluate else args.epochs):
            set_lr(optimizer, epoch, args)
            train_one_epoch(ddp_model, data.train, state, args)
            due = eval_due(epoch, args)  # --eval-freq
            results = evaluate(model, data.val, classifiers, data.train_counts, state) if due else {}
            state.end_epoch(results, best=classifiers[-1])  # log.txt, last and best checkpoint
        results = evaluate(model, data.test, classifiers, data.train_counts, state)
        folder.finish(state, results)  # the table, results.json, and what comes next


def main(argv=None) -> int:
    return launch(main_worker, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
