r"""Stage II of SSD-LT: soft label generation (paper, section 3.2).

Stage I's network is frozen; under class-aware sampling one scale per class is trained (learnable weight scaling), which
balances the classifier that will teach stage III. The script can run once more, on stage III's checkpoint, for the
paper's optional classifier fine-tuning.

    python ssd_stage_ii.py --cos --last_stage_ckpt 'weights/stage_i/last_checkpoint.pth.tar' \
        --dist-url 'tcp://localhost:10003' --multiprocessing-distributed --world-size 1 --rank 0 DIR
    python ssd_stage_ii.py --cos --last_stage_ckpt weights/stage_iii/last_checkpoint.pth.tar \
        --output_dir weights/stage_iii_tuned DIR                    classifier fine-tuning after stage III
    python ssd_stage_ii.py --resume weights/stage_ii/last_checkpoint.pth.tar --evaluate DIR

Input: the checkpoint of stage I or III. Output: weights/stage_ii/last_checkpoint.pth.tar, stage III's teacher; the
table has one row, for the scaled classifier (lws). No accuracy of stage II alone is published.
"""

import sys

import torch
import torch.nn.functional as F

from datasets import build, samplers
from models import SLG
from utils import arguments, checkpoint, log, metrics, run_folder
from utils.command_line import GOES_ON, ON_OFF, RUN_ONLY, STARTS_FROM, add_flag, whole_number
from utils.distributed import distribute, sync_gradients
from utils.launch import launch
from utils.train_state import TrainState, eval_due, prepare_model, seed_everything, set_lr


def get_parser():
    parser = arguments.training_parser(
        __doc__, epochs=5, batch_size=512, lr=0.2, workers=12, output_dir="weights/stage_ii/"
    )
    # fmt: off
    group = parser.add_argument_group("stage II")
    add_flag(group, "--last_stage_ckpt", RUN_ONLY, STARTS_FROM, default="", metavar="PATH",
        help="checkpoint of stage I or III")
    add_flag(group, "--num_samples_cls", default=2, type=whole_number(1), metavar="N",
        help="images per class and turn of class-aware sampling (default: %(default)s)")
    add_flag(group, "--classifier", default="hard", choices=("hard", "soft"),
        help="which classifier of a stage III checkpoint to scale (default: %(default)s, as published)")
    add_flag(group, "--freeze-bn", GOES_ON, action=ON_OFF, default=False,
        help="keep the frozen encoder's BatchNorm in eval mode, which small batches need; the published numbers come "
        "from train mode")
    # fmt: on
    return parser


def train_one_epoch(model, loader, optimizer, state, args):
    model.train()
    # --accum-steps micro-batches make a step. Each is seeded, so that a resumed run draws the same random numbers.
    for (images,), labels, first, last in state.micro_batches(loader):
        if first:
            optimizer.zero_grad(set_to_none=True)
        with sync_gradients(model, last), state.autocast():  # DDP decides here whether backward averages over ranks
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        state.backward(loss / args.accum_steps)  # fp16: scaled
        state.metrics.update({"loss": loss}, (logits,), labels)
        if last:
            state.optimizer_step(optimizer)  # raises if loss or gradient is not finite on any rank; skips fp16 overflow
            state.save_if_due()  # every --save-every-steps; after a stop signal, saves and ends the run


def main_worker(args, device):
    """Trains, validates after every epoch, and tests; runs on every rank."""
    resumed = checkpoint.load_resume(args, get_parser(), SLG)  # None without --resume
    source = None  # the checkpoint of stage I or III
    if resumed is None:
        source = checkpoint.load_stage(args, get_parser(), "--last_stage_ckpt", SLG, args.classifier)
    arguments.settle_defaults(args)  # from here on args stays as it is
    sampling = {"sampler_class": samplers.ClassAwareSampler, "samples_per_class": args.num_samples_cls}
    with run_folder.RunFolder(args) as folder, build.build_data(args, device, ("query",), **sampling) as data:
        checkpoint.check_compatible(resumed or source, args.arch, data.num_classes)
        seed_everything(args.seed)
        model = SLG(args.arch, data.num_classes, args.freeze_bn, args.bn_splits, args.image_size)
        model.classes = checkpoint.class_names(resumed or source, data.classes)  # None if nothing names them
        if source is not None:
            model.load_pretrained(source.state_dict, args.classifier)
        # Applies --channels-last, --sync-bn and --compile; raises UserError if a micro-batch cannot fit into memory.
        model = prepare_model(model, device, args, data.train.images_per_micro_batch)
        scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(scales) == 1, "one scale per class trains, and nothing else"
        optimizer = torch.optim.SGD(
            scales, args.lr, args.momentum, weight_decay=args.weight_decay,
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
        if source is not None and source.inferred["stage"] == "i":
            folder.finish(results, log.next_command(args, "ssd_stage_iii.py", "--teacher_ckpt", "stage_iii"))
        else:  # classifier fine-tuning after stage III, or a resumed run, which may have started from either stage
            folder.finish(results, log.report_command(args))


def main(argv=None) -> int:
    return launch(main_worker, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
