"""One step of each stage, by the stage's own loop, on a loader that this project does not ship: batches in memory."""

import contextlib
import itertools
import math
import random
from functools import partial

import numpy as np
import pytest
import torch

from models import STAGES
from tests.helpers import SCRIPTS, stage_flags
from utils import train_state
from utils.checkpoint import check_finite
from utils.errors import UserError
from utils.train_state import TrainState

pytestmark = pytest.mark.method
CLASSES, BATCH, STEPS = 5, 8, 2


class InMemory:
    """All that a loop asks of a loader of training images."""

    images_per_step, images_per_epoch = BATCH, BATCH * STEPS

    def __init__(self, views):
        self.views = views

    def __len__(self):
        return STEPS

    def start_at(self, epoch, position):
        assert (epoch, position) == (0, 0)

    def __iter__(self):
        for _ in range(STEPS):
            yield tuple(torch.randn(self.views, BATCH, 3, 16, 16)), torch.arange(BATCH) % CLASSES, list(range(BATCH))


def step_of(stage, model, tmp_path, *flags):
    """(args, optimizer, state) of a run of the stage with this model."""
    args = SCRIPTS[stage].get_parser().parse_args(stage_flags(stage, tmp_path, tmp_path / "run", flags))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, args.lr, args.momentum, fused=args.amp == "fp16")
    return args, optimizer, TrainState(model, optimizer, torch.device("cpu"), args)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_moves_exactly_the_parameters_that_train(stage, tmp_path):
    torch.manual_seed(0)
    model = STAGES[stage]("resnet8", CLASSES, **({"dim": 4, "queue_size": 20} if stage == "i" else {}))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    follows = {name for name, _ in model.named_parameters() if name.startswith(("encoder_k.", "k_fc."))}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args, optimizer, state = step_of(stage, model, tmp_path)
    SCRIPTS[stage].train_one_epoch(model, InMemory(2 if stage == "i" else 1), optimizer, state, args)
    assert (state.step, state.images_seen) == (STEPS, BATCH * STEPS)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == trained | follows
    means = state.metrics.means()
    assert means["loss"] > 0 and {f"top1_{name}" for name in model.classifiers} <= means.keys()
    if stage == "i":
        assert model.queue_ptr == BATCH * STEPS and (model.label_queue >= 0).sum() == BATCH * STEPS


def test_lines_of_a_step_in_an_order_that_would_train_something_else_are_refused(tmp_path):
    model, labels = STAGES["ii"]("resnet8", CLASSES), torch.arange(CLASSES)
    for order in itertools.permutations(("zero_grad", "backward", "update", "step", "save")):
        _, optimizer, state = step_of("ii", model, tmp_path)
        optimizer.zero_grad()
        state.loader = InMemory(1)
        loss = model.classifier.scales.sum()
        calls = {
            "zero_grad": optimizer.zero_grad,
            "backward": partial(state.backward, loss),
            "update": partial(state.metrics.update, {"loss": loss}, (torch.eye(CLASSES),), labels),
            "step": partial(state.optimizer_step, optimizer),
            "save": state.save_if_due,
        }
        zero_grad, backward, update, step, save = map(order.index, calls)
        right = backward < step and not backward < zero_grad < step and update < step and not update < save < step
        with contextlib.nullcontext() if right else pytest.raises(AssertionError, match=r"\(\) "):
            for name in order:
                calls[name]()


def test_fp16_that_overflows_in_every_step_ends_the_run(tmp_path):
    """20 steps of a finite loss whose gradient is infinite with any loss scale."""
    model = STAGES["ii"]("resnet8", CLASSES)
    _, optimizer, state = step_of("ii", model, tmp_path, "--amp", "fp16")
    state.loader = InMemory(1)
    before = model.classifier.scales.clone()
    for _ in range(20):
        loss = (model.classifier.scales - before).sqrt().sum()
        optimizer.zero_grad()
        state.backward(loss)
        state.metrics.update({"loss": loss}, (), None)
        state.optimizer_step(optimizer)
    assert torch.equal(model.classifier.scales, before)
    with pytest.raises(UserError, match="--amp fp16: the gradients of epoch 1 overflow"):
        state.end_epoch(None, {})


class Resumed(InMemory):
    def start_at(self, epoch, position):
        self.started = epoch, position


def drawn(tmp_path, monkeypatch, seed=3, epoch=0, rank=0):
    """Random numbers of an epoch of one step of two micro-batches, from each generator."""
    monkeypatch.setattr(train_state, "get_rank", lambda: rank)
    model = STAGES["ii"]("resnet8", CLASSES)
    _, _, state = step_of("ii", model, tmp_path, "--seed", seed, "--accum-steps", 2)
    state.epoch = epoch
    for _ in range(2):
        state.metrics.update({"loss": torch.zeros(())}, (), None)
    return [(float(torch.rand(1)), random.random(), np.random.rand()) for _ in state.micro_batches(Resumed(1))]


def test_every_micro_batch_has_random_numbers_of_its_own(tmp_path, monkeypatch):
    """Which depend on seed, epoch, rank and position, and on nothing else."""
    every = [drawn(tmp_path, monkeypatch, **of) for of in ({}, {"seed": 4}, {"epoch": 1}, {"rank": 1})]
    for of_generator in zip(*itertools.chain(*every), strict=True):
        assert len(set(of_generator)) == 2 * len(every)
    assert drawn(tmp_path, monkeypatch) == every[0]


def test_no_image_comes_twice_after_a_change_of_the_number_of_processes(tmp_path, monkeypatch):
    _, _, state = step_of("ii", STAGES["ii"]("resnet8", CLASSES), tmp_path)
    state.images_seen, loader = 80, Resumed(1)
    monkeypatch.setattr(train_state, "get_world_size", lambda: 3)
    next(state.micro_batches(loader))
    assert loader.started == (0, 27)


def test_fp16_does_not_take_a_loss_that_is_not_finite_for_an_overflow(tmp_path):
    """Also in a micro-batch before the last."""
    model = STAGES["ii"]("resnet8", CLASSES)
    _, optimizer, state = step_of("ii", model, tmp_path, "--amp", "fp16", "--accum-steps", 2)
    state.loader = InMemory(1)
    state.loader.locate = lambda: "images"
    for factor in (math.nan, 1.0):
        loss = factor * model.classifier.scales.sum()
        state.backward(loss)
        state.metrics.update({"loss": loss}, (), None)
    with pytest.raises(UserError, match="the loss or another figure is not finite"):
        state.optimizer_step(optimizer)


def test_a_figure_that_is_not_finite_ends_the_run_too(tmp_path):
    """The averages of a checkpoint within the epoch could not hold it."""
    model = STAGES["ii"]("resnet8", CLASSES)
    _, optimizer, state = step_of("ii", model, tmp_path)
    state.loader = InMemory(1)
    state.loader.locate = lambda: "images"
    loss = model.classifier.scales.sum()
    state.backward(loss)
    state.metrics.update({"loss": loss, "confidence": math.nan * loss}, (), None)
    with pytest.raises(UserError, match=r"not finite \(confidence\)"):
        state.optimizer_step(optimizer)
    assert (model.classifier.scales == 1).all()


def test_a_momentum_that_is_not_finite_is_not_saved(tmp_path):
    model = STAGES["ii"]("resnet8", CLASSES)
    _, optimizer, state = step_of("ii", model, tmp_path)
    optimizer.state[model.classifier.scales]["momentum_buffer"] = torch.full((CLASSES,), torch.inf)
    with pytest.raises(UserError, match="momentum_buffer"):
        check_finite(state)
