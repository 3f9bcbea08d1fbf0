"""A run that was stopped and resumed is bit for bit the same as one that was not stopped."""

import itertools
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from tests.helpers import (
    BEST,
    LAST,
    PREVIOUS,
    STAGES,
    args_of,
    assert_same_run,
    checkpoint,
    copied,
    log_of,
    results_of,
    run_stage,
    same,
    source,
    train,
    train_ranks,
)
from utils.checkpoint import restore_scaler
from utils.train_state import TrainState


def resumed(stage, data, run, to, *flags, start=train):
    """A copy of a run's folder, continued from its previous checkpoint as if everything later had been lost."""
    copied(run, to)
    (to / "results.json").unlink()
    shutil.copy(run / PREVIOUS, to / LAST)
    if checkpoint(run, PREVIOUS)["epoch"] < checkpoint(run, BEST)["epoch"]:
        (to / BEST).unlink()
    return start(stage, data, to, "--cos", *flags, "--resume", to / LAST)


@pytest.mark.parametrize(("stage", "workers"), [("i", 2), ("ii", 0), ("iii", 1)])
def test_resuming_after_an_epoch_changes_nothing(trained, plain_tree, tmp_path, stage, workers):
    """With any number of workers, and without the checkpoint of an earlier stage."""
    assert checkpoint(trained[stage], PREVIOUS)["epoch"] == 1
    assert_same_run(resumed(stage, plain_tree, trained[stage], tmp_path / "again", "-j", workers), trained[stage])


@pytest.fixture(scope="module")
def saved_often(trained, plain_tree, tmp_path_factory):
    """Runs like `trained`, whose previous checkpoint was written within an epoch."""
    root = tmp_path_factory.mktemp("often")
    flags = ["--cos", "--save-every-steps", 5, "-j", 1]
    return {stage: train(stage, plain_tree, root / stage, *flags, *source(stage, trained)) for stage in STAGES}


@pytest.mark.parametrize(("stage", "workers"), [("i", 0), ("i", 2), ("ii", 0), ("iii", 1)])
def test_saving_and_resuming_within_an_epoch_change_nothing(trained, saved_often, plain_tree, tmp_path, stage, workers):
    often = saved_often[stage]
    assert_same_run(often, trained[stage])
    assert (checkpoint(often, PREVIOUS)["epoch"], checkpoint(often, PREVIOUS)["step"]) == (1, 5)
    assert_same_run(resumed(stage, plain_tree, often, tmp_path / "again", "-j", workers), often)


def test_resuming_two_processes_changes_nothing(run_of_two_processes, plain_tree, tmp_path):
    often = train_ranks("i", plain_tree, tmp_path / "often", "--cos", "--save-every-steps", 5)
    for run, step in ((often, 5), (run_of_two_processes, 0)):
        assert (checkpoint(run, PREVIOUS)["epoch"], checkpoint(run, PREVIOUS)["step"]) == (1, step)
        again = resumed("i", plain_tree, run, tmp_path / f"from {step}", start=train_ranks)
        assert_same_run(again, run_of_two_processes)


def test_resuming_a_run_that_validates_every_second_epoch_changes_nothing(plain_tree, tmp_path):
    flags = ["--cos", "--warmup-epochs", 2, "--con-weight", 0, "--epochs", 5]
    whole = train("i", plain_tree, tmp_path / "whole", *flags, "--eval-freq", 2)
    assert_same_run(resumed("i", plain_tree, whole, tmp_path / "again", "--epochs", 5), whole)


# ---- --accum-steps


@pytest.mark.parametrize(("stage", "start"), [("i", train_ranks), ("ii", train), ("iii", train)])
def test_resuming_within_an_epoch_of_micro_batches_changes_nothing(trained, plain_tree, tmp_path, stage, start):
    start_from = ["--kd-weight", 0] if stage == "iii" else source(stage, trained)
    accumulating = ["--accum-steps", 4, "--save-every-steps", 5, *start_from]
    whole = start(stage, plain_tree, tmp_path / "whole", "--cos", *accumulating)
    stopped = checkpoint(whole, PREVIOUS)
    assert (stopped["epoch"], stopped["step"], stopped["images"]) == (1, 5, 5 * 16)
    assert stopped["averages"]["steps"] == 5 and stopped["args"]["accum_steps"] == 4
    assert_same_run(resumed(stage, plain_tree, whole, tmp_path / "again", "--save-every-steps", 5, start=start), whole)
    assert not same(checkpoint(whole)["state_dict"], checkpoint(trained[stage])["state_dict"])  # BatchNorm of 4 images


@pytest.mark.parametrize("number", [5, 8])
def test_a_stop_between_micro_batches_waits_for_the_end_of_the_step(plain_tree, tmp_path, monkeypatch, number):
    """In the first and in the last micro-batch of the second step."""
    flags = ["--cos", "--accum-steps", 4, "--no-memory-check"]
    whole = train("i", plain_tree, tmp_path / "whole", *flags)
    numbers, backward = itertools.count(1), TrainState.backward

    def stopped(state, loss):
        if next(numbers) == number:
            signal.raise_signal(signal.SIGTERM)
        backward(state, loss)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "backward", stopped)
        outcome = run_stage("i", plain_tree, tmp_path / "run", *flags)
    assert outcome.status == 75 and "step 2" in outcome.err
    stopped = checkpoint(tmp_path / "run")
    assert (stopped["epoch"], stopped["step"], stopped["images"]) == (0, 2, 32)
    again = train("i", plain_tree, tmp_path / "run", "--cos", "--resume", "auto", "--no-memory-check")
    assert_same_run(again, whole)


# ---- --resume auto


def test_auto_starts_from_scratch_if_there_is_no_checkpoint(trained, plain_tree, tmp_path):
    assert_same_run(train("i", plain_tree, tmp_path / "new", "--cos", "--resume", "auto"), trained["i"])


def test_auto_skips_a_damaged_checkpoint_and_renames_it(trained, plain_tree, tmp_path):
    folder = copied(trained["i"], tmp_path / "run")
    half = (folder / LAST).read_bytes()[:10_000]
    (folder / LAST).unlink()  # best_checkpoint may be the same file
    (folder / LAST).write_bytes(half)
    with (folder / "log.txt").open("a") as log:
        log.write('{"epoch": 2, "lr"')  # cut short, as by a crash
    outcome = run_stage("i", plain_tree, folder, "--cos", "--resume", "auto")
    assert outcome.status == 0 and outcome.err.count("\n") == 1
    assert outcome.err.startswith(f"skipped {folder / LAST}")
    assert_same_run(folder, trained["i"])
    assert (folder / f"{LAST}.unreadable").read_bytes() == half and checkpoint(folder, PREVIOUS)["epoch"] == 1


def test_auto_only_evaluates_a_finished_run(trained, plain_tree, tmp_path):
    """It keeps its files, its arguments too; what a save that was killed left there goes."""
    folder = copied(trained["i"], tmp_path / "run")
    (folder / "results.json").unlink()
    for name in (f".{LAST}.abcd_123", f".{PREVIOUS}.abcd_123"):
        (folder / name).write_bytes(b"half")
    train("i", plain_tree, folder, "--cos", "--lr", 9, "--moco-m", 0.9, "--resume", "auto")
    assert_same_run(folder, trained["i"])
    assert args_of(folder) == args_of(trained["i"])
    assert set(os.listdir(folder)) == set(os.listdir(trained["i"]))


# ---- checkpoints of the published scripts


@pytest.mark.parametrize(
    ("stage", "prefix", "best"), [("i", "module.", float), ("ii", "", torch.tensor), ("iii", "module.", np.float64)]
)
def test_a_published_checkpoint_resumes(trained, plain_tree, tmp_path, stage, prefix, best):
    """They have no other entries; best_acc1 may have any type, and a tensor rounds it to float32."""
    saved = checkpoint(trained[stage], PREVIOUS)
    published = {name: saved[name] for name in ("epoch", "arch", "optimizer")}
    published["best_acc1"] = best(float(saved["best_acc1"]))
    published["state_dict"] = {prefix + k.removeprefix("module."): v for k, v in saved["state_dict"].items()}
    torch.save(published, tmp_path / "published.tar")
    folder = train(stage, plain_tree, tmp_path / "run", "--cos", "--resume", tmp_path / "published.tar")
    for name in ("state_dict", "optimizer", "epoch"):
        assert same(checkpoint(folder)[name], checkpoint(trained[stage])[name]), name
    second = list(log_of(trained[stage])[-1]["val"].values())[-1]["class_mean"]
    assert float(checkpoint(folder)["best_acc1"]) == max(float(published["best_acc1"]), second)


@pytest.mark.parametrize(("stage", "flag"), [("i", "--con-weight"), ("iii", "--kd-weight")])
def test_a_run_without_contrast_or_teacher_resumes_without_it(plain_tree, tmp_path, stage, flag):
    """The weights of 0 that switch off a part of the method come from the checkpoint, like every flag."""
    whole = train(stage, plain_tree, tmp_path / "whole", "--cos", flag, 0)
    train(stage, plain_tree, tmp_path / "rest", "--resume", whole / PREVIOUS)
    assert log_of(tmp_path / "rest", timed=False) == log_of(whole, timed=False)[-1:]
    assert same(checkpoint(tmp_path / "rest")["state_dict"], checkpoint(whole)["state_dict"])
    assert results_of(tmp_path / "rest") == results_of(whole)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), "8"])
def test_a_loss_scale_that_would_skip_every_step_is_refused(scale):
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="negative or not finite, or a loss scale of 0"):
        restore_scaler(scaler, scaler.state_dict() | {"scale": scale})
