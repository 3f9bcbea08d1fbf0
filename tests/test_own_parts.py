"""Parts that this project does not ship, as a fork brings them: a loss, a backbone, a loop over a loader."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from datasets.lists import ImageList
from datasets.loaders import Loader
from datasets.samplers import BatchSampler, ClassAwareSampler, ShuffledSampler
from datasets.splits import Split
from datasets.transforms import Views
from tests.helpers import (
    CLASSES,
    IMAGES,
    LAST,
    PREVIOUS,
    assert_mistake,
    checkpoint,
    run_ranks,
    run_stage,
    same,
    source,
    train,
    train_all,
    train_ranks,
)
from utils import metrics
from utils.images import load_rgb

# ---- a loss that is finite, and has no finite gradient

STEPS = IMAGES // 16  # of an epoch
ONE_STEP = ["-b", IMAGES, "--moco-k", 200]  # an epoch of one step


def from_call(number, change, patch, module, name):
    """Replaces a function of a module; from its call with this number on, its value is changed by change(value, *args).

    patch: of monkeypatch, or setattr.
    """
    original, calls = getattr(module, name), []

    def changed(*args, **options):
        calls.append(None)
        value = original(*args, **options)
        return change(value, *args) if len(calls) >= number else value

    patch(module, name, changed)


def add_distance(loss, logits, labels):
    """The gradient of what is added, which is 0, is that of a square root at 0: infinite, times 0."""
    return loss + (logits - logits.detach()).square().sum().sqrt()


def assert_stopped(folder, outcome, *words, **saved):
    """That a run ended in one line with the words, its last checkpoint has these entries, and all are finite."""
    assert_mistake(outcome, *words)
    assert checkpoint(folder).items() >= saved.items()
    for file in folder.glob("*.tar"):
        content = checkpoint(folder, file.name)
        momenta = [state["momentum_buffer"] for state in content["optimizer"]["state"].values()]
        assert all(value.isfinite().all() for value in (*content["state_dict"].values(), *momenta)), file


def test_gradients_that_are_not_finite_end_the_run_before_the_weights_move(trained, plain_tree, tmp_path, monkeypatch):
    """In the second epoch; the last checkpoint stays that of the first."""
    from_call(STEPS + 3, add_distance, monkeypatch.setattr, F, "cross_entropy")
    flags = ["--cos", "--no-memory-check", *source("iii", trained)]
    outcome = run_stage("iii", plain_tree, tmp_path, *flags)
    words = "although the loss is, at epoch 2, step 3", "--lr", "lines", "torch.autograd.set_detect_anomaly"
    assert_stopped(tmp_path, outcome, *words)
    assert same(checkpoint(tmp_path), checkpoint(trained["iii"], PREVIOUS))


def spoil_gradients_on_rank_1():
    if os.environ["RANK"] == "1":
        from_call(STEPS + 1, add_distance, setattr, F, "cross_entropy")


def spoil_loss_on_rank_1():
    if os.environ["RANK"] == "1":
        from_call(STEPS + 1, lambda loss, *_: loss * torch.inf, setattr, models.ssd, "contrastive_loss")


@pytest.mark.parametrize(("setup", "word"), [(spoil_gradients_on_rank_1, "gradients"), (spoil_loss_on_rank_1, "loss")])
def test_what_is_not_finite_on_one_rank_ends_all_of_them(plain_tree, tmp_path, setup, word):
    first, second = run_ranks("i", plain_tree, tmp_path, "--no-memory-check", setup=setup)
    named = ["contrastive"] if word == "loss" else []
    assert_stopped(tmp_path, first, f"{word} ", "not finite", "epoch 2, step 1", *named, epoch=1)
    assert (second.status, second.err) == (2, "")


def test_a_loss_that_is_not_finite_in_a_later_micro_batch_is_named_with_its_images(plain_tree, tmp_path, monkeypatch):
    """In the second micro-batch of the second step."""
    from_call(4, lambda loss, *_: loss * torch.nan, monkeypatch.setattr, models.ssd, "contrastive_loss")
    flags = ["--accum-steps", 2, "--no-memory-check", "--save-every-steps", 1]
    outcome = run_stage("i", plain_tree, tmp_path, *flags)
    assert_stopped(
        tmp_path, outcome, "the loss or another figure is not finite", "contrastive", "epoch 1, step 2", "--lr", step=1
    )
    assert "cross_entropy" not in outcome.err
    assert len(outcome.err.split("train.txt, lines ")[1].split(", ")) == 16  # of the step


def test_weights_that_the_update_itself_makes_infinite_are_not_saved(plain_tree, tmp_path, monkeypatch):
    """Loss and gradients were finite."""

    def step(optimizer, *args):
        original(optimizer, *args)
        steps.append(None)
        if len(steps) == 2:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].mul_(torch.inf)

    steps, original = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    outcome = run_stage("i", plain_tree, tmp_path, *ONE_STEP)
    assert_stopped(tmp_path, outcome, "not saved", "encoder_q.conv1.weight", "not finite", "--lr", epoch=1)


# ---- a backbone with buffers of every kind, and parameters that depend on the size of the images

PATCH = 8


class Patches(nn.Module):
    """Features of a sequence of patches, with a learned position each; ranks above 0 start with an empty mask."""

    num_features = 24

    def __init__(self, image_size):
        super().__init__()
        if image_size % PATCH:
            raise ValueError(f"patches of {PATCH} pixels\ndo not fill the image")
        patches = (image_size // PATCH) ** 2
        self.embedding = nn.Conv2d(3, self.num_features, PATCH, PATCH)
        self.learned = nn.Parameter(torch.zeros(patches, self.num_features))
        self.register_buffer("fixed", torch.linspace(-1, 1, patches)[:, None], persistent=False)
        self.register_buffer("order", torch.randperm(patches))
        self.register_buffer("mask", torch.rand(patches, self.num_features) > 0.3 + int(os.environ.get("RANK", 0)))

    def forward(self, images):
        sequence = self.embedding(images).flatten(2).transpose(1, 2)
        return ((sequence + self.learned + self.fixed)[:, self.order] * self.mask).relu().mean(dim=1)


def forget_backbones():
    for function in (models.backbones.backbone_shapes, models.backbones.check_backbone):
        function.cache_clear()


def use_patches(patch=setattr):
    """Puts Patches into the place of resnet8, wherever a backbone is built."""
    original = models.build_backbone

    def build_backbone(arch, image_size=224):
        return Patches(image_size) if arch == "resnet8" else original(arch, image_size)

    for module in (models, models.backbones, models.ssd):
        patch(module, "build_backbone", build_backbone)
    forget_backbones()


@pytest.fixture
def patches(monkeypatch):
    use_patches(monkeypatch.setattr)
    yield
    forget_backbones()


def test_a_backbone_that_depends_on_the_image_size_trains_hands_on_and_loads(patches, plain_tree, tmp_path):
    """models.load gives the logits of the evaluation to the last bit, with buffers that are kept or are not."""
    files = [plain_tree / line.split()[0] for line in (plain_tree / "test.txt").read_text().splitlines()]
    flags = ["--image-size", 48, "--epochs", 1]
    for run, folder in train_all(plain_tree, tmp_path, *flags).items():
        stage, seen = "ii" if run == "tuned" else run, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics.ShotAccuracy, "update", lambda self, logits, _: seen.append(logits))  # noqa: B023
            words = [*flags, "--resume", folder / LAST, "--evaluate", "--eval-batch-size", len(files)]
            assert run_stage(stage, plain_tree, tmp_path / "evaluation", *words).status == 0
        network = models.load(folder / LAST)
        with torch.no_grad():
            logits = network(torch.stack([network.transform(load_rgb(file)) for file in files]))
        assert network.transform.size == 48 and logits[0].shape[-1] == CLASSES
        assert same(list(logits) if stage == "iii" else [logits], seen)
    for stage, more in (("i", ["--con-weight", 0]), ("iii", ["--kd-weight", 0])):
        train(stage, plain_tree, tmp_path / f"again_{stage}", *flags, *more, "--pretrained", tmp_path / "i" / LAST)


def test_its_buffers_reach_every_rank(patches, plain_tree, tmp_path):
    whole = train_ranks("i", plain_tree, tmp_path / "two", setup=use_patches)
    outcome = run_stage("i", plain_tree, tmp_path / "one", "--resume", whole / LAST, "--evaluate")
    assert outcome.status == 0
    assert (tmp_path / "one" / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_an_image_size_that_it_refuses_is_one_line(patches, trained, plain_tree, tmp_path):
    outcome = run_stage("i", plain_tree, tmp_path / "i", "--image-size", 36)
    assert_mistake(outcome, "--image-size 36", "patches of 8 pixels do not fill the image", "--arch")
    i = train("i", plain_tree, tmp_path / "i", "--epochs", 1)
    outcome = run_stage("ii", plain_tree, tmp_path / "ii", *source("ii", {"i": i}), "--image-size", 36)
    assert_mistake(outcome, "--image-size 36")
    assert_mistake(run_stage("i", plain_tree, tmp_path / "r", "--resume", trained["i"] / LAST), trained["i"] / LAST)


# ---- a loop of one's own over a loader


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", [ShuffledSampler, ClassAwareSampler])
def test_every_pass_over_a_loader_is_the_next_epoch(plain_tree, sampler, workers):
    images = ImageList.from_file(plain_tree / "train.txt")
    options = {} if sampler is ShuffledSampler else {"samples_per_class": 2}
    batches = BatchSampler(sampler(images.labels, seed=3, **options), 32)
    dataset = Split("train", plain_tree, images).dataset(Views(("query",), 32, 3))
    loader = Loader("train", dataset, batches, workers, torch.device("cpu"))

    def numbers():
        return [number for _, _, indices in loader for number in indices]

    passes = [numbers() for _ in range(3)]
    assert len(set(map(tuple, passes))) == 3
    for epoch in (2, 0, 1):
        loader.start_at(epoch, 0)
        assert numbers() == passes[epoch]
    loader.start_at(1, 64)
    assert [numbers(), numbers()] == [passes[1][64:], passes[2]]
    loader.close()
