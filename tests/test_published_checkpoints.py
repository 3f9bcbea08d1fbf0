"""Checkpoints exchanged with the published scripts, in both directions and as every PyTorch wrote them; models.load."""

import io
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import models
from models.load import read_checkpoint
from tests.helpers import CLASSES, LAST, QUEUE, STAGES, checkpoint, run_stage, same, train

KEYS, DIM = (int(re.search(f"--moco-{name} (\\d+)", QUEUE)[1]) for name in ("k", "dim"))


# ---- a stand-in for the published modules: their names, in the order in which they register them


def mlp(width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, DIM))


class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, CLASSES).requires_grad_(False)
        self.scales = nn.Parameter(torch.ones(CLASSES))


class Published(nn.Module):
    """The networks of the published scripts, at the size of the tests."""

    def __init__(self, stage):
        super().__init__()
        backbone = models.build_backbone("resnet8")
        width = backbone.width
        if stage == "ii":
            self.encoder = backbone.requires_grad_(False)
            self.classifier = Scaled(width)
            return
        self.encoder_q = backbone
        other = models.build_backbone("resnet8").requires_grad_(False)
        if stage == "i":
            self.encoder_k = other
            self.q_fc, self.k_fc = mlp(width), mlp(width).requires_grad_(False)
            self.classifier = nn.Linear(width, CLASSES)
            self.register_buffer("queue", nn.functional.normalize(torch.randn(DIM, KEYS), dim=0))
            self.register_buffer("label_queue", torch.zeros(KEYS))
            self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        else:
            self.encoder_t = other
            self.classifier = nn.Linear(width, CLASSES)
            self.classifier_kd = nn.Linear(width, CLASSES)
            self.classifier_t = Scaled(width).requires_grad_(False)


class PublishedRun:
    """Network, wrapped as DistributedDataParallel does, optimizer and checkpoint of a published script."""

    def __init__(self, stage):
        self.stage = stage
        self.model = nn.Module()
        self.model.module = Published(stage)
        parameters = [p for p in self.model.parameters() if p.requires_grad or stage == "i"]
        self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step(self):
        """A step with gradients for all that trains, whatever the loss."""
        self.optimizer.zero_grad()
        sum(p.square().sum() for p in self.model.parameters() if p.requires_grad).backward()
        self.optimizer.step()

    def checkpoint(self, best_acc1=0.25) -> dict:
        return {
            "epoch": 1,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_acc1": best_acc1,
        }

    def resume(self, path):
        """As the published scripts do, with torch.load's own defaults."""
        content = torch.load(path, map_location="cpu")
        self.model.load_state_dict(content["state_dict"], strict=True)
        self.optimizer.load_state_dict(content["optimizer"])
        return content["epoch"], content["best_acc1"].to("cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The contents of the published scripts' checkpoints after a step, by stage."""
    torch.manual_seed(0)
    contents = {}
    for stage in STAGES:
        run = PublishedRun(stage)
        run.step()
        contents[stage] = run.checkpoint()
    return contents


def momenta_fit(optimizer):
    """Whether every momentum has its parameter's shape, which load_state_dict does not look at."""
    return all(state["momentum_buffer"].shape == parameter.shape for parameter, state in optimizer.state.items())


# ---- ours into theirs


@pytest.mark.parametrize("stage", STAGES)
def test_the_published_scripts_resume_ours(stage, trained):
    run = PublishedRun(stage)
    epoch, best = run.resume(trained[stage] / LAST)
    assert epoch == 2 and 0 <= best <= 1
    assert len(run.optimizer.state) == sum(p.requires_grad for p in run.model.parameters())
    assert momenta_fit(run.optimizer)
    run.step()
    if stage == "i":
        ours = checkpoint(trained[stage])["state_dict"]["module.label_queue"]
        assert torch.equal(run.model.module.label_queue, ours.float())


@pytest.mark.parametrize("stage", STAGES)
def test_plain_torch_reads_ours(stage, trained):
    content = torch.load(trained[stage] / LAST, weights_only=True)
    assert {"epoch", "state_dict", "optimizer", "best_acc1"} <= content.keys()
    assert all(name.startswith("module.") for name in content["state_dict"])
    assert isinstance(content["best_acc1"], torch.Tensor)


def test_the_published_hand_over_finds_its_names(trained):
    """By substring: stage II takes what has encoder_q or classifier in its name, stage III encoder or classifier."""
    of_i, of_ii = (checkpoint(trained[stage])["state_dict"] for stage in ("i", "ii"))
    target = Published("ii")
    target.encoder.load_state_dict(
        {k.replace("module.encoder_q.", ""): v for k, v in of_i.items() if "encoder_q" in k}, strict=True
    )
    heads = {k.replace("module.classifier", "fc"): v for k, v in of_i.items() if "classifier" in k}
    assert target.classifier.load_state_dict(heads, strict=False).unexpected_keys == []
    target = Published("iii")
    target.encoder_t.load_state_dict(
        {k.replace("module.encoder.", ""): v for k, v in of_ii.items() if "encoder" in k}, strict=True
    )
    heads = {k.replace("module.classifier.", ""): v for k, v in of_ii.items() if "classifier" in k}
    target.classifier_t.load_state_dict(heads, strict=True)


# ---- theirs into ours


def write(content, path, *, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_a_published_run_continues(stage, published, plain_tree, tmp_path):
    file = write(published[stage], tmp_path / "theirs")
    folder = train(stage, plain_tree, tmp_path / "out", "--cos", "--resume", file)
    content = checkpoint(folder)
    assert content["epoch"] == 2 and content["best_acc1"] >= 0.25
    theirs, ours = published[stage]["optimizer"], content["optimizer"]
    assert theirs["param_groups"][0]["params"] == ours["param_groups"][0]["params"]
    assert {k: v["momentum_buffer"].shape for k, v in theirs["state"].items()} == {
        k: v["momentum_buffer"].shape for k, v in ours["state"].items()
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_published_checkpoint_evaluates(stage, published, plain_tree, tmp_path):
    file = write(published[stage], tmp_path / "theirs")
    outcome = run_stage(stage, plain_tree, tmp_path / "out", "--resume", file, "--evaluate")
    assert (outcome.status, outcome.err) == (0, "") and "Overall" in outcome.out


def test_published_checkpoints_hand_over(published, plain_tree, tmp_path):
    files = {stage: write(published[stage], tmp_path / stage) for stage in STAGES}
    flags = ("--epochs", 1, "-b", 32)
    ii = checkpoint(train("ii", plain_tree, tmp_path / "ii_", *flags, "--last_stage_ckpt", files["i"]))
    tuned = checkpoint(train("ii", plain_tree, tmp_path / "tuned", *flags, "--last_stage_ckpt", files["iii"]))
    iii = checkpoint(train("iii", plain_tree, tmp_path / "iii_", *flags, "--teacher_ckpt", files["ii"]))
    for source, target, names in (
        ("i", ii, {"encoder_q.conv1.weight": "encoder.conv1.weight", "classifier.weight": "classifier.fc.weight"}),
        ("iii", tuned, {"encoder_q.conv1.weight": "encoder.conv1.weight", "classifier.weight": "classifier.fc.weight"}),
        ("ii", iii, {"encoder.conv1.weight": "encoder_t.conv1.weight", "classifier.scales": "classifier_t.scales"}),
    ):
        for before, after in names.items():
            there = published[source]["state_dict"][f"module.{before}"]
            assert torch.equal(there, target["state_dict"][f"module.{after}"])


def test_a_published_label_queue_is_kept(published, tmp_path):
    content = published["i"] | {"state_dict": dict(published["i"]["state_dict"])}
    labels = torch.arange(KEYS, dtype=torch.float32) % CLASSES
    for queue in (torch.zeros(KEYS), labels):
        content["state_dict"]["module.label_queue"] = queue
        model = models.load(write(content, tmp_path / "theirs"))
        assert torch.equal(model.label_queue, queue.long())


# ---- however it was written


def as_old_numpy(path):
    """Renames numpy's module in a file to what numpy 1 called it."""
    new, old = b"cnumpy._core.multiarray\nscalar", b"cnumpy.core.multiarray\nscalar"
    content = path.read_bytes()
    if not zipfile.is_zipfile(path):
        assert new in content
        path.write_bytes(content.replace(new, old))
        return
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            entry = source.read(name)
            if name.endswith("data.pkl"):
                assert new in entry
                entry = entry.replace(new, old)
            target.writestr(name, entry)


BESTS = {
    "float": 0.25,
    "tensor": torch.tensor(0.25),
    "tensor of one": torch.tensor([0.25]),
    "float64": np.float64(0.25),
    "float32": np.float32(0.25),
    "old numpy": np.float64(0.25),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("best", BESTS)
def test_every_way_of_writing_is_read(best, zipped, published, tmp_path):
    file = write(published["ii"] | {"best_acc1": BESTS[best]}, tmp_path / "theirs", zipped=zipped)
    if best == "old numpy":
        as_old_numpy(file)
    content = read_checkpoint(file)
    assert float(content["best_acc1"]) == 0.25
    assert same(dict(content["state_dict"]), dict(published["ii"]["state_dict"]))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_it_continues_without_prefix_and_without_optimizer(stage, zipped, published, plain_tree, tmp_path):
    content = {
        "epoch": 1,
        "state_dict": {k.removeprefix("module."): v for k, v in published[stage]["state_dict"].items()},
        "best_acc1": np.float64(2.0),  # which no epoch surpasses
    }
    file = write(content, tmp_path / "theirs", zipped=zipped)
    folder = train(stage, plain_tree, tmp_path / "out", "--resume", file)
    assert checkpoint(folder)["best_acc1"] == 2
    assert not (folder / "best_checkpoint.pth.tar").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch", "one"),
        ("epoch", None),
        ("best_acc1", torch.zeros(2)),
        ("optimizer", 3.0),
        ("optimizer", {"state": {}}),
    ],
)
def test_what_cannot_be_resumed_is_named(name, value, published, plain_tree, tmp_path):
    file = write(published["ii"] | {name: value}, tmp_path / "theirs")
    status, _, err = run_stage("ii", plain_tree, tmp_path / "out", "--resume", file)
    assert status == 2 and err.count("\n") == 1
    assert f"{file}: its {name}" in err and "--resume" in err


# ---- models.load


def built(stage, arch):
    return {
        "i": lambda: models.SSFL(arch, 5, dim=8, queue_size=32),
        "ii": lambda: models.SLG(arch, 5),
        "iii": lambda: models.SDL(arch, 5),
    }[stage]()


CASES = [(stage, arch) for stage in STAGES for arch in ("resnet8", "resnet32", "resnet18")]
CASES += [("ii", "resnext50_32x4d")]


@pytest.mark.parametrize(("stage", "arch"), CASES)
def test_load_gives_the_network(stage, arch, tmp_path):
    model = built(stage, arch)
    file = write({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "file")
    loaded = models.load(file)
    assert type(loaded) is type(model) and not loaded.training
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert same(loaded(images), model.eval()(images))


@pytest.mark.parametrize("stage", STAGES)
def test_load_takes_what_a_stage_saved(stage, trained):
    loaded = models.load(str(trained[stage] / LAST))
    saved = checkpoint(trained[stage])["state_dict"]
    assert same({f"module.{k}": v for k, v in loaded.state_dict().items()}, saved)


class Malicious:
    """Makes a folder when it is loaded by a loader that runs code."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def refusal(path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        models.load(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("flag", [None, "--resume", "--last_stage_ckpt"])
def test_code_does_not_run(flag, zipped, published, plain_tree, tmp_path):
    target = tmp_path / "ran"
    file = write(published["i"] | {"args": Malicious(target)}, tmp_path / "theirs", zipped=zipped)
    if flag is None:
        text = refusal(file)
    else:
        outcome = run_stage("ii", plain_tree, tmp_path / "out", flag, file)
        text = outcome.err
        assert outcome.status == 2 and text.count("\n") == 1 and flag in text and str(file) in text
    assert "mkdir" in text and not target.exists()


def half(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("spoil", [half, lambda _: b"", lambda _: b"<html></html>", lambda _: b"\x80\x02}q\x00."])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_load_refuses_garbage(spoil, zipped, published, tmp_path):
    file = write(published["ii"], tmp_path / "theirs", zipped=zipped)
    file.write_bytes(spoil(file.read_bytes()))
    assert "damaged or no checkpoint" in refusal(file)


def changed(state_dict, **changes):
    """The state dict with entries replaced, or without those that are None; `__` stands for a dot."""
    new = dict(state_dict) | {f"module.{name.replace('__', '.')}": value for name, value in changes.items()}
    return {name: value for name, value in new.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classifier_t__scales": None}, "classifier_t.scales"),
        ({"classifier_kd__weight": torch.zeros(3, 64)}, "classifier_kd.weight"),
        ({"extra": torch.zeros(1)}, "extra"),
        ({"encoder_q__conv1__weight": None}, "known backbone"),
        ({"classifier__bias": None}, "of no stage"),
        ({"classifier__bias": torch.tensor(1.0)}, "of no stage"),
        ({"encoder_k__conv1__weight": torch.zeros(1)}, "of stage I, but has no queue"),
    ],
)
def test_load_names_what_does_not_fit(changes, told, published, tmp_path):
    file = write({"state_dict": changed(published["iii"]["state_dict"], **changes)}, tmp_path / "theirs")
    assert told in refusal(file)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"epoch": 1},
        {"state_dict": 3},
        {"state_dict": {"a": 1}},
        {"state_dict": {1: torch.zeros(1)}},
        {"state_dict": {}},
        {"state_dict": {"fc.weight": torch.zeros(2, 2)}},
        {"conv1.weight": torch.zeros(2)},
    ],
)
def test_load_refuses_what_is_of_no_stage(content, tmp_path):
    refusal(write(content, tmp_path / "theirs"))


def test_load_says_that_there_is_no_file(tmp_path):
    with pytest.raises(OSError, match="nothing"):
        models.load(tmp_path / "nothing")
