r"""Stage III of SSD-LT: joint training with self-distillation (paper, section 3.3).

A new student has two classifiers: the hard one learns from the labels, the soft one from stage II's frozen network.

    python ssd_stage_iii.py --cos --dist-url 'tcp://localhost:11712' --multiprocessing-distributed --world-size 1 \
        --teacher_ckpt 'weights/stage_ii/last_checkpoint.pth.tar' --rank 0 DIR
    python ssd_stage_iii.py --dist-url 'tcp://localhost:10712' --multiprocessing-distributed --world-size 1 --rank 0 \
        --resume weights/stage_iii/last_checkpoint.pth.tar --evaluate DIR
    python ssd_stage_iii.py --cos --kd-weight 0 DIR                 the student without a teacher

Input: the checkpoint of stage II. Output: weights/stage_iii/last_checkpoint.pth.tar. Published for ImageNet-LT, top-1
in percent of many-, medium-, few-shot and all classes: hard 71.1, 46.2, 15.3, 51.6; soft 67.3, 53.1, 30.0, 55.4.
"""

import sys

import torch
import torch.nn.functional as F

from datasets.build import build_data
from models import SDL
from utils import arguments, checkpoint, log, metrics, pretrained, run_folder
from utils.command_line import EVALUATION, GOES_ON, ON_OFF, RUN_ONLY, STARTS_FROM, add_flag, number
from utils.distributed import distribute, sync_gradients
from utils.launch import launch
from utils.train_state import TrainState, eval_due, prepare_model, seed_everything, set_lr


def get_parser():
    parser = arguments.training_parser(
        __doc__, epochs=135, batch_size=256, lr=0.1, workers=32, output_dir="weights/stage_iii/"
    )
    # fmt: off
    group = parser.add_argument_group("stage III")
    add_flag(group, "--teacher_ckpt", RUN_ONLY, STARTS_FROM, default=None, metavar="PATH",
        help="checkpoint of stage II")
    add_flag(group, "--kd_t", default=2.0, type=number(above=0), metavar="T",
        help="temperature of the distillation's softmax (default: %(default)s)")
    add_flag(group, "--kd-weight", EVALUATION, default=1.0, type=number(), metavar="W",
        help="weight of the distillation loss (default: %(default)s); 0 trains the hard classifier alone")
    add_flag(group, "--freeze-bn", GOES_ON, action=ON_OFF, default=False,
        help="keep the teacher's BatchNorm in eval mode, which small batches need; the published numbers come from "
        "train mode")
    pretrained.add_pretrained_flag(group)
    # fmt: on
    return parser


def train_one_epoch(model, loader, optimizer, state, args):
    model.train()
    # --accum-steps micro-batches make a step. Each is seeded, so that a resumed run draws the same random numbers.
    for (images,), labels, first, last in state.micro_batches(loader):
        if first:
            optimizer.zero_grad(set_to_none=True)
        with sync_gradients(model, last), state.autocast():  # DDP decides here whether backward averages over ranks
            hard, soft, kd_loss = model(images)
            ce_loss = F.cross_entropy(hard, labels)
            loss = ce_loss + args.kd_weight * kd_loss
        state.backward(loss / args.accum_steps)  # fp16: scaled
        figures = {"loss": loss, "cross_entropy": ce_loss, "distillation": kd_loss}
        state.metrics.update(figures, (hard, soft), labels)
        if last:
            state.optimizer_step(optimizer)  # raises if loss or gradient is not finite on any rank; skips fp16 overflow
            state.save_if_due()  # every --save-every-steps; after a stop signal, saves and ends the run


def main_worker(args, device):
    """Trains, validates after every epoch, and tests; runs on every rank."""
    resumed = checkpoint.load_resume(args, get_parser(), SDL)  # None without --resume
    distill = args.kd_weight > 0
    teacher = None
    if distill and resumed is None:
        hint = " (--kd-weight 0 needs none)"
        teacher = checkpoint.load_stage(args, get_parser(), "--teacher_ckpt", SDL, hint=hint)
    backbone = pretrained.load_backbone(args.pretrained, args.arch, args.image_size) if resumed is None else None
    arguments.settle_defaults(args)  # from here on args stays as it is
    with run_folder.RunFolder(args) as folder, build_data(args, device, ("query",)) as data:
        checkpoint.check_compatible(resumed or teacher, args.arch, data.num_classes)
        seed_everything(args.seed)
        model = SDL(args.arch, data.num_classes, args.kd_t, args.freeze_bn, distill, args.bn_splits, args.image_size)
        model.classes = checkpoint.class_names(resumed or teacher, data.classes)  # None if nothing names them
        if teacher is not None:
            model.load_teacher(teacher.state_dict)
        if backbone is not None:  # --pretrained
            model.load_backbone(backbone)
        # Applies --channels-last, --sync-bn and --compile; raises UserError if a micro-batch cannot fit into memory.
        model = prepare_model(model, device, args, data.train.images_per_micro_batch)
        student = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(
            student, args.lr, args.momentum, weight_decay=args.weight_decay,
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
        tuning = ["--output_dir", f"{folder.path}_tuned"]
        if distill:
            tuning += ["--classifier", "soft"]
        command = log.next_command(args, "ssd_stage_ii.py", "--last_stage_ckpt", "stage_iii_tuned", *tuning)
        folder.finish(results, command, log.report_command(args))


def main(argv=None) -> int:
    return launch(main_worker, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
