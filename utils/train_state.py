"""The state of a training and the parts that all stages share: batches, precision, gradients, epochs."""

import contextlib
import math
import time

import torch
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint
from .distributed import (
    gather_objects,
    get_rank,
    get_world_size,
    is_main_process,
    print_main,
    raise_on_all_ranks,
)
from .errors import UserError
from .groups import percent
from .log import Progress, duration
from .metrics import MetricLogger
from .numerics import AUTOCAST, StepFlags, seed_everything, set_numerics
from .signals import defer_stop, heartbeat, stop_requested

VALIDATION_COLUMNS = ("overall", "class_mean", "top5", "many", "medium", "few")


def prepare_model(model, device, args):
    """Brings a model to the device, with the layout, precision, BatchNorm and compilation that the flags ask for."""
    set_numerics(args)
    if args.sync_bn:
        convert_sync_batchnorm(model, device)
    model.to(device=device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    if args.compile:
        for name, module in model.named_children():
            if name.startswith("encoder"):
                module.compile()  # unlike torch.compile(module), it keeps the names of the state dict
    return model


def convert_sync_batchnorm(model, device):
    """Turns a model's BatchNorm into SyncBatchNorm, except the momentum encoder's; names and values stay.

    Shuffling BN is for the momentum encoder: with statistics over all ranks, a key would share those of its query.
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
    """Gives SGD's trained parameters a momentum of 0, with which a first step is the same as without one.

    A fused SGD allocates it in the first step, and if that step overflows, as the first in fp16 often do, it would
    train on with whatever was in that memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


class TrainState:
    """The progress of a training: epoch, step in it, best class mean, gradient scaler, the epoch's metrics.

    A step is an optimizer step. It has --accum-steps micro-batches, whose gradients add up to those of their mean loss.

    stage: "i", "ii" or "iii"; model: without DistributedDataParallel; folder: the RunFolder that epochs are logged to;
    classes: the classes' names, or None.
    """

    def __init__(self, stage: str, model, optimizer, folder, device, args, classes: list[str] | None = None):
        self.stage, self.model, self.optimizer, self.folder, self.args = stage, model, optimizer, folder, args
        self.classes = classes
        self.epoch, self.step, self.best = args.start_epoch, 0, 0.0
        self.micro_batch = 0  # in the current step, from 0
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        if self.scaler.is_enabled():
            init_momentum(optimizer)
        self.metrics = MetricLogger(device, args.accum_steps)
        self.images = 0  # of all ranks, seen in this epoch
        self.flags = None  # what the ranks agree on in the current step
        self.loader = None  # where the images of the current step come from

    @property
    def device(self):
        """The device of the model and the batches."""
        return self.metrics.device

    @property
    def step_begins(self) -> bool:
        """Whether the current micro-batch is the first of its step."""
        return self.micro_batch == 0

    @property
    def step_ends(self) -> bool:
        """Whether the current micro-batch is the last of its step."""
        return self.micro_batch == self.args.accum_steps - 1

    def batches(self, loader):
        """(views, labels) of the micro-batches in the epoch's remaining steps, on the device.

        Each has its own random numbers, which depend on seed, epoch, step, micro-batch and rank alone: a resumed epoch
        continues as if it had not stopped.
        """
        args, images_before = self.args, self.images
        started = waiting = time.perf_counter()
        defer_stop()
        self.loader = loader
        loader.start_at(self.epoch, -(-self.images // get_world_size()))
        title, total = f"epoch {self.epoch + 1}/{args.epochs}", self.step + len(loader) // args.accum_steps
        with Progress(title, total, args.print_freq, self.step) as progress:
            for number, (views, labels, _) in enumerate(loader):
                self.micro_batch = number % args.accum_steps
                entropy = args.seed, self.epoch, self.step, get_rank()
                seed_everything(*entropy if self.step_begins else (*entropy, self.micro_batch))
                if self.step_begins:
                    self.optimizer.zero_grad(set_to_none=True)  # before the forward pass, to lower the peak memory
                self.metrics.data_seconds += time.perf_counter() - waiting
                yield views, labels
                if self.step_ends:
                    self.metrics.seconds = time.perf_counter() - started
                    self.metrics.images = self.images - images_before
                    progress.step(self._bar_text, self._line_text)
                heartbeat()
                waiting = time.perf_counter()

    def _bar_text(self) -> str:
        """The text of the bar: loss, rate, speed, time left of the whole run, best validation so far."""
        metrics, lr = self.metrics, self.optimizer.param_groups[0]["lr"]
        speed = metrics.images / metrics.seconds
        per_epoch = self.loader.images_per_epoch * get_world_size()
        left = ((self.args.epochs - self.epoch) * per_epoch - self.images) / speed
        best = f", best {percent(self.best)} %" if self.best else ""
        return f"loss {metrics.means()['loss']:.3g}, lr {lr:.2g}, {speed:.0f} img/s, {duration(left)} left{best}"

    def _line_text(self) -> str:
        """The text of a line: means of the epoch so far, accuracies in per cent, speed, wait for data per step."""
        metrics = self.metrics
        means = [
            f"{name} {percent(mean)} %" if name.startswith("top") else f"{name} {mean:.4g}"
            for name, mean in metrics.means().items()
        ]
        steps = metrics.images / (self.loader.images_per_step * get_world_size())
        speed = f"{metrics.images / metrics.seconds:.0f} images/s"
        waits = f"data {metrics.data_seconds / steps:.3f} of {metrics.seconds / steps:.3f} s per step"
        return ", ".join([*means, speed, waits])

    def accumulate(self, model):
        """The context of a forward pass: ranks average their gradients only in a step's last backward pass."""
        if self.step_ends or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def autocast(self):
        """The context of a forward pass, in mixed precision with --amp."""
        return torch.autocast(self.device.type, AUTOCAST.get(self.args.amp), enabled=self.args.amp != "none")

    def backward(self, loss):
        """Adds the gradients of a micro-batch's share of the step's mean loss.

        Raises UserError on all ranks, before any weight moves, if a loss is not finite.
        """
        self.flags = StepFlags(loss, stop_requested())
        self.scaler.scale(loss / self.args.accum_steps).backward()
        if not self.flags.loss_is_finite():
            own = None if loss.isfinite() else self.loader.locate()
            where = next(text for text in gather_objects(own) if text)
            raise UserError(
                f"the loss is not finite at epoch {self.epoch + 1}, step {self.step + 1}, learning rate "
                f"{self.optimizer.param_groups[0]['lr']:g}; weights and checkpoints stay as they were; lower --lr, or "
                f"look at the batch of {where}",
                on_all_ranks=True,
            )

    def optimizer_step(self):
        """Updates the weights and counts the step, once its last micro-batch has its gradients."""
        if not self.step_ends:
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.images += self.loader.images_per_step * get_world_size()

    def end_epoch(self, results: dict[str, dict], best: str):
        """Logs the epoch and saves it, also as best if the classifier named `best` has its best class mean.

        results: classifier -> its record of the validation list, empty without a validation. Raises Stopped if a stop
        was asked for.
        """
        means, speed = self.metrics.global_means(), self.metrics
        record = {"epoch": self.epoch, "lr": self.optimizer.param_groups[0]["lr"], **means}
        record["val"] = {name: {key: result[key] for key in VALIDATION_COLUMNS} for name, result in results.items()}
        record |= {"images_per_second": speed.images / max(speed.seconds, 1e-9), "seconds": speed.seconds}
        is_best = bool(results) and results[best]["class_mean"] > self.best
        if is_best:
            self.best = results[best]["class_mean"]
        self.epoch, self.step, self.images, self.metrics = self.epoch + 1, 0, 0, self.metrics.without_values()
        with raise_on_all_ranks():
            if is_main_process():
                self.folder.write_epoch(record)
        losses = [f"{name} {mean:.4f}" for name, mean in means.items() if not name.startswith("top")]
        accuracies = [
            f"validation {name} class mean {percent(result['class_mean'])} %, overall {percent(result['overall'])} %"
            for name, result in results.items()
        ]
        summary = ", ".join(losses + accuracies)
        print_main(f"epoch {self.epoch}/{self.args.epochs}: {summary}; {record['seconds']:.0f} s")
        checkpoint.save(self, is_best)
        checkpoint.stop_if_asked(self)
