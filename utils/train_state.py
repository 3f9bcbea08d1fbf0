"""The state of a run and the parts of a training step that all stages share: micro-batches, precision, gradients."""

import math
import os
import random
from contextlib import contextmanager

import numpy as np
import torch

from . import checkpoint
from .distributed import (
    Progress,
    all_reduce,
    defer_stop,
    duration,
    gather_objects,
    get_rank,
    get_world_size,
    heartbeat,
    is_main_process,
    print_main,
    raise_on_all_ranks,
    stop_requested,
)
from .errors import Unavailable, UserError
from .groups import percent
from .memory import check_memory
from .metrics import MetricLogger, Stopwatch
from .signals import Stopped

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
LATER_IMAGES = "SSD_LT_LATER_IMAGES"  # set by train.sh: the later stages' work, counted in images of this stage
VALIDATION_COLUMNS = ("overall", "class_mean", "top5", "many", "medium", "few")


def set_numerics(tf32: bool, deterministic: bool):
    """Allows TF32 if asked for. Uses deterministic algorithms if asked for, else those that cuDNN finds fastest."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # filling would launch a kernel per new tensor


def seed_everything(*entropy: int):
    """Seeds torch, numpy and random with a function of these numbers, such as (seed, epoch, step, rank)."""
    words = np.random.SeedSequence(entropy).generate_state(3, np.uint32).tolist()
    torch.manual_seed(words[0])
    np.random.seed(words[1])
    random.seed(words[2])


def prepare_model(model, device, args, batch_size: int | None = None):
    """Brings a model to the device, with the layout, precision, BatchNorm and compilation that the flags ask for.

    batch_size: images per micro-batch. Raises UserError, the same on all ranks, if training on them cannot fit into
    memory.
    """
    set_numerics(args.tf32, args.deterministic)
    if args.sync_bn:
        convert_sync_batchnorm(model, device)
    model.to(device=device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    if args.compile:
        for name, module in model.named_children():
            if name.startswith("encoder"):
                module.compile()  # unlike torch.compile(module), it keeps the names of the state dict
    if batch_size and args.memory_check and not args.evaluate:
        options = {"momentum": args.momentum > 0, "dtype": AUTOCAST.get(args.amp), "compiled": args.compile}
        check_memory(model, batch_size, args.image_size, accum_steps=args.accum_steps, device=device, **options)
    return model


def convert_sync_batchnorm(model, device):
    """Turns a model's BatchNorm into SyncBatchNorm, except the momentum encoder's; names and values stay.

    The momentum encoder has shuffling BN instead: with statistics over all ranks, a key would share its query's.
    Raises UserError, the same on all ranks, without CUDA.
    """
    if device.type != "cuda":
        raise UserError("--sync-bn: SyncBatchNorm needs CUDA; use --no-sync-bn", on_all_ranks=True)
    for name, module in model.named_children():
        if name != "encoder_k":
            setattr(model, name, torch.nn.SyncBatchNorm.convert_sync_batchnorm(module))


def learning_rate(epoch: int, args) -> float:
    """The learning rate of an epoch, from 0.

    It rises linearly to --lr over --warmup-epochs; then with --cos it falls along half a cosine, else by
    --schedule-factor at each epoch in --schedule.
    """
    warmup = args.warmup_epochs
    if epoch < warmup:
        return args.lr * (epoch + 1) / warmup
    if args.cos:
        return args.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup)))
    return args.lr * args.schedule_factor ** sum(epoch >= milestone for milestone in args.schedule)


def set_lr(optimizer, epoch: int, args):
    """Gives the optimizer the learning rate of an epoch."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(epoch, args)


def eval_due(epoch: int, args) -> bool:
    """Whether an epoch, from 0, ends with a validation: every --eval-freq epochs, and the last."""
    return (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs


def init_momentum(optimizer):
    """Sets the momentum buffers of SGD's trained parameters to 0, which leaves the result of a first step unchanged.

    Fused SGD would allocate them in the first step without a value; if that step overflows, as the first ones in fp16
    often do, training would go on with whatever was in that memory.
    """
    for group in optimizer.param_groups:
        if not group["momentum"]:
            continue
        for parameter in group["params"]:
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def is_accuracy(name: str) -> bool:
    """Whether a figure of MetricLogger is an accuracy."""
    return name.startswith(("top1_", "top5_"))


class TrainState:
    """What a run needs to go on: epoch, steps and images in it, best class mean, gradient scaler, the epoch's metrics.

    A step is an optimizer step. It has --accum-steps micro-batches, whose gradients add up to those of their mean loss.
    model: without DistributedDataParallel.
    """

    def __init__(self, model, optimizer, device, args):
        self.model = model
        self.optimizer = optimizer
        self.args = args
        self.epoch = args.start_epoch
        self.step = 0
        self.images_seen = 0  # of all ranks
        self.best = 0.0
        self.metrics = MetricLogger(device, model.classifiers, args.accum_steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        if self.scaler.is_enabled():
            init_momentum(optimizer)
        self.loader = None  # of the current epoch
        self.not_finite = []  # one flag per micro-batch of the current step: is its loss not finite?
        self.stopping = False  # whether any rank was asked to stop, as of the latest step

    def micro_batches(self, loader):
        """Yields (views, labels, first, last), on the device, for the micro-batches of the epoch's remaining steps.

        first, last: whether a micro-batch begins or ends its step. Its random numbers depend on seed, epoch, step, rank
        and its place in the step alone, so a resumed epoch continues as if it had not stopped.
        """
        args = self.args
        defer_stop()
        self.loader = loader
        loader.start_at(self.epoch, -(-self.images_seen // get_world_size()))
        title = f"epoch {self.epoch + 1}/{args.epochs}"
        steps = self.step + len(loader) // args.accum_steps
        with self.progress(title, steps, self.step) as progress:
            self.metrics.clock = clock = Stopwatch()
            for number, (views, labels, _) in enumerate(loader):
                clock.data_arrived()
                part = number % args.accum_steps
                entropy = [args.seed, self.epoch, self.step, get_rank()]
                if part:  # the first micro-batch draws as a step without --accum-steps does
                    entropy.append(part)
                seed_everything(*entropy)
                last = part == args.accum_steps - 1
                yield views, labels, part == 0, last
                clock.trained(loader.images_per_step * get_world_size() if last else 0)
                if last:
                    progress.step(self._bar_text, self._line_text)
                heartbeat()

    @contextmanager
    def progress(self, title: str, total: int, initial: int = 0):
        """Yields a Progress, which shows the progress of an epoch or an evaluation every --print-freq steps.

        If the system cannot read an image now, saves the finished steps first, unless saving needs other ranks.
        """
        with Progress(title, total, self.args.print_freq, initial) as progress:
            try:
                yield progress
            except Unavailable:
                if self.step and get_world_size() == 1 and not self.args.evaluate:
                    checkpoint.save(self)
                raise

    def _bar_text(self) -> str:
        """The text of the bar: the first figure (the loss), rate, speed, time left of all stages, best so far."""
        lr = self.optimizer.param_groups[0]["lr"]
        speed = self.metrics.clock.images_per_second
        name, value = next(iter(self.metrics.means().items()))
        per_epoch = self.loader.images_per_epoch * get_world_size()
        later = float(os.environ.get(LATER_IMAGES) or 0)
        seconds = ((self.args.epochs - self.epoch) * per_epoch - self.images_seen + later) / speed
        best = f", best {100 * self.best:.1f} %" if self.best else ""
        return f"{name} {value:.3g}, lr {lr:.2g}, {speed:.0f} img/s, {duration(seconds)} left{best}"

    def _line_text(self) -> str:
        """The text of a line: means of the epoch so far, accuracies in percent, speed, wait for data per step."""
        clock = self.metrics.clock
        means = [
            f"{name} {100 * mean:.1f} %" if is_accuracy(name) else f"{name} {mean:.4g}"
            for name, mean in self.metrics.means().items()
        ]
        steps = clock.images_seen / (self.loader.images_per_step * get_world_size())
        waits = f"data {clock.data_seconds / steps:.3f} of {clock.seconds / steps:.3f} s per step"
        return ", ".join([*means, f"{clock.images_per_second:.0f} images/s", waits])

    def autocast(self):
        """The context of a forward pass, in mixed precision with --amp."""
        dtype = AUTOCAST.get(self.args.amp)
        return torch.autocast(self.metrics.device.type, dtype, enabled=dtype is not None)

    def backward(self, loss):
        """Adds the gradients of `loss`, a micro-batch's share of the step's mean loss; fp16 scales it first."""
        self.not_finite.append(~loss.detach().isfinite())
        self.scaler.scale(loss).backward()

    def optimizer_step(self, optimizer):
        """Updates the weights and counts the step.

        Raises UserError on all ranks, before any weight moves, if a loss or gradient is not finite on any of them.
        In fp16 the scaler checks the gradients instead: it skips a step whose gradients overflow, and lowers its scale.
        """
        updates = (self.step + 1) * self.args.accum_steps
        assert len(self.not_finite) == self.args.accum_steps, "backward() for every micro-batch, before the step"
        assert self.metrics.updates == updates, "metrics.update() for every micro-batch, before the step"
        self.check_finite(optimizer)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        self.images_seen += self.loader.images_per_step * get_world_size()

    def check_finite(self, optimizer):
        """Checks in one exchange whether any rank has a non-finite loss or gradient, or was asked to stop."""
        # A figure that is not finite could not be saved in the averages of a checkpoint.
        bad_loss = torch.stack(self.not_finite).any() | ~self.metrics.sums.isfinite().all()
        self.not_finite = []
        bad_gradient = torch.zeros_like(bad_loss)
        if not self.scaler.is_enabled():
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            assert gradients, "zero_grad() after backward()"
            bad_gradient = ~torch.nn.utils.get_total_norm(gradients).isfinite()
        flags = torch.stack([bad_loss, bad_gradient, torch.full_like(bad_loss, stop_requested())]).to(torch.int32)
        bad_loss, bad_gradient, self.stopping = map(bool, all_reduce(flags, torch.distributed.ReduceOp.MAX).tolist())
        if not bad_loss and not bad_gradient:
            return
        terms = self.metrics.not_finite()
        reports = gather_objects((terms, self.loader.locate()))
        terms, where = next((report for report in reports if report[0]), reports[0])  # from the first rank with terms
        problem = "gradients are too large, or not finite although the loss is"
        if bad_loss:
            problem = "the loss or another figure is not finite"
        if terms:
            problem += f" ({', '.join(terms)})"
        raise UserError(
            f"{problem}, at epoch {self.epoch + 1}, step {self.step + 1}, learning rate "
            f"{self.optimizer.param_groups[0]['lr']:g}; this step changed no weight and no checkpoint; lower --lr, or "
            f"look at the batch of {where}; torch.autograd.set_detect_anomaly(True) finds the operation",
            on_all_ranks=True,
        )

    def save_if_due(self):
        """Saves every --save-every-steps steps; if a stop was asked for on any rank, saves and raises Stopped."""
        assert self.metrics.steps == self.step, "optimizer_step() before save_if_due()"
        if self.stopping:
            self.stop()
        if self.args.save_every_steps and self.step % self.args.save_every_steps == 0:
            checkpoint.save(self)

    def stop_if_asked(self):
        """If any rank was asked to stop, saves what is not saved yet, and raises Stopped on all ranks."""
        if any(gather_objects(stop_requested())):
            self.stop()

    def stop(self):
        """Saves what is not saved yet, and raises Stopped on all ranks."""
        message = f"stopped on request at epoch {self.epoch + 1}, step {self.step}; continue with --resume auto"
        if self.args.evaluate:
            message = "stopped on request; evaluate again with the same command"
        elif self.epoch == self.args.epochs:
            message = "stopped on request before the test evaluation was done; continue with --resume auto"
        elif self.step:
            checkpoint.save(self)
        raise Stopped(message, on_all_ranks=True)

    def end_epoch(self, folder, results: dict[str, dict]):
        """Logs the epoch and saves a checkpoint, also as best if the last classifier's class mean is its best so far.

        folder: the RunFolder; results: classifier -> its record of the validation list, empty without a validation.
        Raises Stopped if a stop was asked for, UserError on all ranks if fp16 overflows in every step.
        """
        if self.scaler.get_scale() < 1:  # starts at 65,536, and each overflow halves it; always 1 without fp16
            raise UserError(
                f"--amp fp16: the gradients of epoch {self.epoch + 1} overflow in every step, also with a loss scale "
                f"of {self.scaler.get_scale():g}; use --amp bf16 or lower --lr; the last checkpoint is intact",
                on_all_ranks=True,
            )
        means = self.metrics.global_means()
        clock = self.metrics.clock
        lr = self.optimizer.param_groups[0]["lr"]
        val = {name: {key: result[key] for key in VALIDATION_COLUMNS} for name, result in results.items()}
        record = {"epoch": self.epoch, "lr": lr, **means, "val": val}
        record |= {"images_per_second": clock.images_per_second, "seconds": clock.seconds}
        class_mean = val[self.model.classifiers[-1]]["class_mean"] if val else 0.0
        is_best = class_mean > self.best
        self.best = max(class_mean, self.best)
        self.epoch += 1
        self.step = 0
        self.images_seen = 0
        self.metrics.reset()
        with raise_on_all_ranks():
            if is_main_process():
                folder.write_epoch(record)
        parts = [f"{name} {mean:.4f}" for name, mean in means.items() if not is_accuracy(name)]
        parts += [
            f"validation {name} class mean {percent(result['class_mean'])} %, overall {percent(result['overall'])} %"
            for name, result in val.items()
        ]
        print_main(f"epoch {self.epoch}/{self.args.epochs}: {', '.join(parts)}; {record['seconds']:.0f} s")
        checkpoint.save(self, is_best)
        self.stop_if_asked()
