"""A step has the same result however its images are split: over 1, 2 or 4 processes, or into micro-batches."""

import copy

import pytest
import torch
from torch import nn

from datasets.build import build_data
from models import SDL, SLG, SSFL
from tests.helpers import COUNTS, SCRIPTS, STAGES, on_ranks, stage_flags
from utils.arguments import settle_defaults
from utils.distributed import DistInfo, distribute, set_dist_info
from utils.memory import step_memory
from utils.train_state import TrainState, convert_sync_batchnorm

CPU, CLASSES = torch.device("cpu"), len(COUNTS["train"])
QUEUE, QUEUE_BUFFERS = 40, ("queue", "label_queue", "queue_ptr")  # wraps around in the second step
IMAGES, BATCH, STEPS = 58, 24, 2  # four processes pad the epoch to 60 images; the last ones fill no step


class Recorder(TrainState):
    """A training state that notes what every step computed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.steps, self.partial, self.given, self.losses = [], [], [], []

    def micro_batches(self, loader):
        for views, labels, first, last in super().micro_batches(loader):
            self.given.append((torch.tensor(loader.indices[-1]), *views))
            yield views, labels, first, last
            if not last:
                self.partial.append(self.gradients())

    def backward(self, loss):
        super().backward(loss)
        self.losses.append(loss.detach())

    def gradients(self):
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.requires_grad])

    def optimizer_step(self, optimizer):
        step = {"loss": torch.stack(self.losses).sum(), "gradients": self.gradients()}
        step |= {f"view {i}": torch.cat(parts) for i, parts in enumerate(zip(*self.given, strict=True))}
        step |= {name: value.clone() for name, value in self.model.named_buffers() if "queue" in name}
        self.steps.append(step)
        self.given, self.losses = [], []
        super().optimizer_step(optimizer)


def build(stage, args):
    """A stage's network from a seed, with all its BatchNorm in eval mode for good."""
    torch.manual_seed(3)
    if stage == "i":
        model = SSFL(args.arch, CLASSES, args.moco_dim, args.moco_k, args.moco_m)
    else:
        model = (SLG if stage == "ii" else SDL)(args.arch, CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().train = lambda mode=True, module=module: module
    model.register_forward_pre_hook(lambda _, inputs: tuple(x.double() if x.is_floating_point() else x for x in inputs))
    return model.double()  # in float32, a rounding could change the sign of a ReLU's input


def train_once(rank, stage, data, world, accum_steps):
    """The steps of an epoch by the stage's own loop, in one of `world` processes."""
    set_dist_info(DistInfo(rank, world, rank, world))
    script = SCRIPTS[stage]
    flags = ["-b", BATCH, "--accum-steps", accum_steps, "--train-list", data / "short.txt", "--lr", 0.05]
    flags += ["--num-classes", CLASSES, *(["--moco-k", QUEUE] if stage == "i" else [])]
    args = script.get_parser().parse_args(stage_flags(stage, data, "unused", flags))
    settle_defaults(args)
    with build_data(args, CPU, ("query", "key") if stage == "i" else ("query",)) as loaders:
        model = build(stage, args)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], args.lr, args.momentum)
        state = Recorder(model, optimizer, CPU, args)
        script.train_one_epoch(distribute(model, CPU), loaders.train, optimizer, state, args)
        means = state.metrics.global_means()
    assert (state.step, state.images_seen, state.metrics.steps) == (STEPS, STEPS * BATCH, STEPS)
    return {"steps": state.steps, "partial": state.partial, "means": means}


@pytest.fixture(scope="module")
def runs(plain_tree, tmp_path_factory):
    """What every rank of a stage's run returns, by (processes, micro-batches)."""
    data = tmp_path_factory.mktemp("data")
    for entry in plain_tree.iterdir():
        (data / entry.name).symlink_to(entry)
    lines = (data / "train.txt").read_text().splitlines(keepends=True)
    (data / "short.txt").write_text("".join(lines[::2][-IMAGES:]))
    found = {}

    def run(stage, world, accum_steps):
        key = stage, world, accum_steps
        if key not in found:
            found[key] = on_ranks(world, train_once, stage, data, world, accum_steps)
        return found[key]

    return run


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world", "accum_steps"), [(4, 1), pytest.param(1, 4, marks=pytest.mark.method), (2, 3)])
def test_steps_are_those_of_one_process_and_one_batch(runs, stage, world, accum_steps):
    (whole,), parts = runs(stage, 1, 1), runs(stage, world, accum_steps)
    for number, expected in enumerate(whole["steps"]):
        steps = [rank["steps"][number] for rank in parts]
        loss = torch.stack([step["loss"] for step in steps]).mean()
        torch.testing.assert_close(loss, expected["loss"], rtol=1e-10, atol=1e-10)
        for step in steps:
            difference = (step["gradients"] - expected["gradients"]).abs().max()
            assert difference <= 1e-10 * expected["gradients"].norm()
            assert torch.equal(step["gradients"], steps[0]["gradients"])
        if stage != "ii":
            assert_same_images(steps, expected, views=3 if stage == "i" else 2)
        if stage == "i":
            assert_same_queue(steps, expected, number)
    for name, mean in whole["means"].items():
        assert all(rank["means"][name] == pytest.approx(mean, rel=1e-6) for rank in parts), name


def assert_same_images(steps, expected, views):
    """Compares the images of a step and their augmentations; the first `view` holds their numbers."""
    names = [name for name in expected if name.startswith("view")]
    given = [torch.cat([step[name] for step in steps]) for name in names]
    assert len(names) == views and len(given[0].unique()) == BATCH
    order, reference = given[0].argsort(), expected[names[0]].argsort()
    for name, values in zip(names, given, strict=True):
        assert torch.equal(values[order], expected[name][reference])


def assert_same_queue(steps, expected, number):
    """Compares the queue, which has the same keys and labels on every rank.

    The keys of a step come in another order: a queue that wraps within a step keeps other keys of an earlier one.
    """
    for step in steps:
        assert all(torch.equal(step[name], steps[0][name]) for name in QUEUE_BUFFERS)
    queue, labels, position = (steps[0][name] for name in QUEUE_BUFFERS)
    newest = (position - BATCH + torch.arange(BATCH)) % QUEUE
    distances = (queue[:, newest, None] - expected["queue"][:, None, newest]).abs().amax(dim=0)
    distance, nearest = distances.min(dim=1)
    assert distance.max() < 1e-10 and len(nearest.unique()) == BATCH
    assert torch.equal(labels[newest], expected["label_queue"][newest][nearest])
    assert position == expected["queue_ptr"] == (number + 1) * BATCH % QUEUE
    assert (labels >= 0).sum() == min(QUEUE, (number + 1) * BATCH)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_average_their_gradients_once_per_step(runs, stage):
    first, second = runs(stage, 2, 3)
    assert len(first["partial"]) == 2 * STEPS
    assert not any(map(torch.equal, first["partial"], second["partial"]))  # before a step's last micro-batch


# ---- --sync-bn


def with_sync_bn(model):
    """A copy of a network, converted."""
    model = copy.deepcopy(model)
    convert_sync_batchnorm(model, torch.device("cuda"))
    return model


def norms_of(model) -> set:
    return {type(module) for module in model.modules() if hasattr(module, "running_mean")}


def test_sync_bn_converts_all_but_the_momentum_encoder_and_keeps_names_and_parameters():
    plain = SSFL("resnet8", CLASSES, dim=16, queue_size=50)
    model = with_sync_bn(plain)
    assert (norms_of(model.encoder_q), norms_of(model.encoder_k)) == ({nn.SyncBatchNorm}, {nn.BatchNorm2d})
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    flags = [[p.requires_grad for p in m.parameters()] for m in (model, plain)]
    assert flags[0] == flags[1]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("network", [SLG, SDL])
def test_sync_bn_converts_the_frozen_networks_too(network):
    assert norms_of(with_sync_bn(network("resnet8", CLASSES))) == {nn.SyncBatchNorm}


def memory_of_both(rank):
    plain = SSFL("resnet8", CLASSES, dim=16, queue_size=50)
    return [step_memory(model, 4, 32, device=CPU) for model in (plain, with_sync_bn(plain))]


def test_the_memory_check_counts_sync_bn_like_batchnorm_without_the_other_ranks():
    assert all(plain == synchronized for plain, synchronized in on_ranks(2, memory_of_both))
