"""Checkpoints exchanged with the published scripts, in both directions and in every format that PyTorch wrote."""

import io
import zipfile

import numpy as np
import pytest
import torch

import models
from models.loading import read_checkpoint
from tests.helpers import BEST, CLASSES, LAST, STAGES, checkpoint, run_stage, same, train
from tests.helpers_networks import KEYS, Published, PublishedRun


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The contents of the published scripts' checkpoints after one step, by stage."""
    torch.manual_seed(0)
    contents = {}
    for stage in STAGES:
        run = PublishedRun(stage)
        run.step()
        contents[stage] = run.checkpoint()
    return contents


# ---- our checkpoints in the published scripts


@pytest.mark.parametrize("stage", STAGES)
def test_the_published_scripts_resume_our_checkpoints(stage, trained):
    run = PublishedRun(stage)
    epoch, best = run.resume(trained[stage] / LAST)
    assert epoch == 2 and 0 <= best <= 1
    states, (group,) = run.optimizer.state, run.optimizer.param_groups
    assert set(states) == {p for p in run.model.parameters() if p.requires_grad}
    assert all(state["momentum_buffer"].shape == p.shape for p, state in states.items())
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
    run.step()
    if stage == "i":
        ours = checkpoint(trained[stage])["state_dict"]["module.label_queue"]
        assert torch.equal(run.model.module.label_queue, ours.float())


def test_the_published_scripts_find_the_names_of_an_earlier_stage(trained):
    """They search substrings: stage II takes names with encoder_q or classifier, stage III encoder or classifier."""
    of_i, of_ii = (checkpoint(trained[stage])["state_dict"] for stage in ("i", "ii"))

    def renamed(state_dict, part, old, new=""):
        return {name.replace(old, new): value for name, value in state_dict.items() if part in name}

    target = Published("ii")
    target.encoder.load_state_dict(renamed(of_i, "encoder_q", "module.encoder_q."))
    heads = renamed(of_i, "classifier", "module.classifier", "fc")
    assert target.classifier.load_state_dict(heads, strict=False).unexpected_keys == []
    target = Published("iii")
    target.encoder_t.load_state_dict(renamed(of_ii, "encoder", "module.encoder."))
    target.classifier_t.load_state_dict(renamed(of_ii, "classifier", "module.classifier."))


# ---- published checkpoints here


def write(content, path, *, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_a_published_checkpoint_evaluates(stage, published, plain_tree, tmp_path):
    file = write(published[stage], tmp_path / "theirs")
    outcome = run_stage(stage, plain_tree, tmp_path / "out", "--resume", file, "--evaluate")
    assert (outcome.status, outcome.err) == (0, "") and "Overall" in outcome.out


def test_the_next_stage_takes_a_published_checkpoint(published, plain_tree, tmp_path):
    files = {stage: write(published[stage], tmp_path / stage) for stage in STAGES}
    flags = ("--epochs", 1, "-b", 32)
    ii = checkpoint(train("ii", plain_tree, tmp_path / "ii_", *flags, "--last_stage_ckpt", files["i"]))
    tuned = checkpoint(train("ii", plain_tree, tmp_path / "tuned", *flags, "--last_stage_ckpt", files["iii"]))
    iii = checkpoint(train("iii", plain_tree, tmp_path / "iii_", *flags, "--teacher_ckpt", files["ii"]))
    taken = {"encoder_q.conv1.weight": "encoder.conv1.weight", "classifier.weight": "classifier.fc.weight"}
    taught = {"encoder.conv1.weight": "encoder_t.conv1.weight", "classifier.scales": "classifier_t.scales"}
    for source, target, names in (("i", ii, taken), ("iii", tuned, taken), ("ii", iii, taught)):
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


# ---- every file format


def as_old_numpy(path):
    """Renames numpy's module in a file to its name in numpy 1; if numpy 1 is installed, to that in numpy 2."""
    new, old = b"cnumpy._core.multiarray\nscalar", b"cnumpy.core.multiarray\nscalar"
    if np.__version__ < "2":
        new, old = old, new
    content = path.read_bytes()
    if not zipfile.is_zipfile(path):
        assert new in content
        path.write_bytes(content.replace(new, old))
        return
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(path, "w") as target:
        entries = {name: source.read(name) for name in source.namelist()}
        assert any(new in entry for entry in entries.values())
        for name, entry in entries.items():
            target.writestr(name, entry.replace(new, old) if name.endswith("data.pkl") else entry)


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
def test_every_format_of_a_checkpoint_is_read(best, zipped, published, tmp_path):
    file = write(published["ii"] | {"best_acc1": BESTS[best]}, tmp_path / "theirs", zipped=zipped)
    if best == "old numpy":
        as_old_numpy(file)
    content = read_checkpoint(file)
    assert float(content["best_acc1"]) == 0.25
    assert same(dict(content["state_dict"]), dict(published["ii"]["state_dict"]))


@pytest.mark.parametrize(("stage", "zipped"), [("i", True), ("ii", False), ("iii", True)])
def test_a_run_continues_without_prefix_and_without_optimizer(stage, zipped, published, plain_tree, tmp_path):
    content = {
        "epoch": 1,
        "state_dict": {k.removeprefix("module."): v for k, v in published[stage]["state_dict"].items()},
        "best_acc1": np.float64(100.0),  # in percent; no epoch can be better
    }
    file = write(content, tmp_path / "theirs", zipped=zipped)
    outcome, folder = run_stage(stage, plain_tree, tmp_path / "out", "--resume", file), tmp_path / "out"
    assert outcome.status == 0 and f"warning: {file} has no optimizer" in outcome.out
    assert checkpoint(folder)["best_acc1"] == 1 and not (folder / BEST).exists()
