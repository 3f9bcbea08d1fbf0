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

from datasets.build import build_data
from datasets.samplers import ClassAwareSampler
from models import SLG
from utils import checkpoint
from utils.arguments import ON_OFF, settle_defaults, training_parser
from utils.command_line import run_only, whole_number
from utils.distributed import distribute
from utils.evaluation import evaluate
from utils.launch import launch
from utils.memory import check_memory
from utils.numerics import seed_everything
from utils.restore import restore
from utils.run_folder import RunFolder
from utils.train_state import TrainState, eval_due, prepare_model, set_lr


def get_parser():
    parser = training_parser(__doc__, epochs=5, batch_size=512, lr=0.2, workers=12, output_dir="weights/stage_ii/")
    # fmt: off
    group = parser.add_argument_group("stage II")
    run_only(group.add_argument("--last_stage_ckpt", default="", metavar="PATH", help="checkpoint of stage I or III"))
    group.add_argument("--num_samples_cls", default=2, type=whole_number(1), metavar="N",
        help="images per class and turn of class-aware sampling (default: %(default)s)")
    group.add_argument("--classifier", default="hard", choices=("hard", "soft"),
        help="which classifier of a stage III checkpoint to scale (default: %(default)s, as published)")
    group.add_argument("--freeze-bn", action=ON_OFF, default=False,
        help="keep the frozen encoder's BatchNorm in eval mode, which small batches need; the published numbers come "
        "from train mode")
    # fmt: on
    return parser


def train_one_epoch(model, loader, state, args):
    model.train()
    for (images,), labels in state.batches(loader):  # on the device; zeroes the gradients as a step begins
        with state.accumulate(model), state.autocast():  # --accum-steps micro-batches make a step
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        state.backward(loss)  # a loss that is not finite stops every rank before its weights move
        state.optimizer_step()  # after a step's last micro-batch
        state.metrics.update({"loss": loss}, {"lws": logits}, labels)
        checkpoint.save_if_due(state, args)  # --save-every-steps; after a stop signal it saves and leaves


def main_worker(args, device):
    """Trains, validates after every epoch, and tests; runs on every rank."""
    classifiers = ("lws",)
    resumed = checkpoint.load_resume(args, get_parser(), stage="ii")  # None without --resume
    source = None  # the checkpoint of stage I or III
    if resumed is None:
        source = checkpoint.load_stage(args, get_parser(), "--last_stage_ckpt", SLG, args.classifier)
    settle_defaults(args)
    sampling = {"sampler_class": ClassAwareSampler, "samples_per_class": args.num_samples_cls}
    with RunFolder(args) as folder, build_data(args, device, ("query",), **sampling) as data:
        checkpoint.check_compatible(resumed or source, args.arch, data.num_classes)
        classes = checkpoint.class_names(resumed or source, data.classes)  # None if nothing names them
        seed_everything(args.seed)
        model = SLG(args.arch, data.num_classes, args.freeze_bn, args.bn_splits)
        if source is not None:
            model.load_pretrained(source.state_dict, args.classifier)
        model = prepare_model(model, device, args)  # device, channels_last, compile
        if args.memory_check and not args.evaluate:  # refuses what cannot fit
            check_memory(
                model, data.train.images_per_micro_batch, args.image_size, accum_steps=args.accum_steps,
                momentum=args.momentum > 0, amp=args.amp, compiled=args.compile, device=device,
            )  # fmt: skip
        scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(scales) == 1, "one scale per class trains, and nothing else"
        optimizer = torch.optim.SGD(
            scales, args.lr, args.momentum, weight_decay=args.weight_decay,
            fused=args.amp == "fp16" or None,  # skips an overflowed step without waiting for the device
        )  # fmt: skip
        state = TrainState("ii", model, optimizer, folder, device, args, classes)  # epoch, step, best, scaler, metrics
        restore(resumed, state, data)  # all of these, and the weights
        ddp_model = distribute(model, device)  # DistributedDataParallel if there are several ranks
        folder.start(state, data)

        for epoch in range(state.epoch, 0 if args.evaluate else args.epochs):
            set_lr(optimizer, epoch, args)
            train_one_epoch(ddp_model, data.train, state, args)
            due = eval_due(epoch, args)  # --eval-freq
            results = evaluate(model, data.val, classifiers, data.train_counts, state) if due else {}
            state.end_epoch(results, best="lws")  # log.txt, last and best checkpoint
        results = evaluate(model, data.test, classifiers, data.train_counts, state)
        folder.finish(state, results, source)  # the table, results.json, and what comes next


def main(argv=None) -> int:
    return launch(main_worker, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
