"""What --resume, --evaluate and the next stage take from a checkpoint if a flag was not given, and what they print."""

import pytest
import torch

from models import SSFL
from tests.helpers import (
    IMAGES,
    LAST,
    PARSERS,
    PREVIOUS,
    args_of,
    assert_mistake,
    call,
    checkpoint,
    results_of,
    run_ranks,
    run_stage,
    same,
    source,
    stage_flags,
    train,
    train_ranks,
)
from utils.checkpoint import load_resume


def evaluate(stage, trained, data, *flags):
    return call(stage, ["--resume", trained[stage] / LAST, "--evaluate", "-j", 0, "--device", "cpu", *flags, data])


# ---- taken from the checkpoint


def test_an_evaluation_takes_backbone_size_and_queue(trained, plain_tree, tmp_path):
    outcome = evaluate("i", trained, plain_tree, "--output_dir", tmp_path)
    assert (outcome.status, outcome.err) == (0, "")
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("as saved: ")]
    for flag in ("--arch resnet8", "--image-size 32", "--moco-k 50", "--moco-dim 16"):
        assert flag in line
    assert "--lr" not in line
    assert results_of(tmp_path) == results_of(trained["i"])


def test_a_resumed_run_needs_no_flag_again(trained, plain_tree, tmp_path):
    kept = "--cos --lr 0.05 --momentum 0.8 --wd 0.001 --moco-t 0.3 --con-weight 0.5 --augment device"
    run = train("i", plain_tree, tmp_path / "run", *kept.split())
    given = ["-j", 0, "--device", "cpu", "--output_dir", tmp_path / "again", "--resume", run / PREVIOUS]
    outcome = call("i", [*given, plain_tree])
    assert (outcome.status, outcome.err) == (0, "")
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("as saved: ")]
    for flag in (*kept.split(" --"), "seed 3", "epochs 2", "batch-size 16"):
        assert flag in line
    assert same(checkpoint(tmp_path / "again"), checkpoint(run))
    ours, theirs = args_of(tmp_path / "again"), args_of(run)
    local = ("resume", "output_dir", "print_freq", "workers", "environment", "program")
    assert {n: v for n, v in ours.items() if n not in local} == {n: v for n, v in theirs.items() if n not in local}


# ---- flags that differ from what was saved


@pytest.mark.parametrize(
    "flag", ["--lr 0.07", "--wd 0.01", "--momentum 0.5", "--epochs 3", "--moco-m 0.5", "--moco-t 0.5", "--no-cos",
             "--con-weight 2.0", "--augment device", "--batch-size 12", "--seed 4", "--schedule 1 2", ""],
)  # fmt: skip
def test_every_given_flag_that_differs_gives_one_warning_and_holds(trained, plain_tree, tmp_path, capsys, flag):
    file, content = tmp_path / LAST, checkpoint(trained["i"], PREVIOUS)
    torch.save(content | {"args": content["args"] | {"a_flag_to_come": 5}}, file)  # which is ignored
    flags = ["--cos", *flag.split(), "--resume", file]
    args = PARSERS["i"]().parse_args(stage_flags("i", plain_tree, tmp_path, flags))
    before = dict(vars(args))
    load_resume(args, PARSERS["i"](), SSFL)
    said = capsys.readouterr().out.splitlines()
    assert vars(args) == before and len(said) == bool(flag)
    for line in said:
        assert line.startswith(f"warning: {flag} is given, {file} was saved with --")


def test_another_backbone_is_refused_and_another_image_size_gives_a_warning(trained, plain_tree, tmp_path):
    assert_mistake(evaluate("iii", trained, plain_tree, "--arch", "resnet20"), "resnet8", "--arch")
    size = "--image-size 24"
    assert f"warning: {size}" in evaluate("iii", trained, plain_tree, *size.split()).out
    outcome = run_stage("ii", plain_tree, tmp_path, *size.split(), "--last_stage_ckpt", trained["i"] / LAST)
    assert outcome.status == 0 and f"warning: {size}" in outcome.out


# ---- within an epoch, with another number of images per step or of processes


def seen(folder):
    """The numbers of training images and steps in a run's previous checkpoint."""
    content = checkpoint(folder, PREVIOUS)
    return content["images"], content["step"]


def continued(stage, data, run, out, batch, world, *more):
    """What rank 0 said of the rest of a run's first epoch, with this batch and number of processes."""
    flags = [*more, "--epochs", 1, "--resume", run / PREVIOUS, "-p", 1, "-b", batch]
    outcomes = run_ranks(stage, data, out, *flags) if world == 2 else [run_stage(stage, data, out, *flags)]
    assert all(outcome.status == 0 for outcome in outcomes), outcomes
    return outcomes[0]


@pytest.mark.parametrize(("stage", "batch", "world"), [("i", 10, 1), ("i", 16, 2), ("iii", 24, 1)])
def test_stages_i_and_iii_continue_after_the_images_seen(trained, plain_tree, tmp_path, stage, batch, world):
    flags = [*source(stage, trained), "--epochs", 1, "--save-every-steps", 5]
    run = train(stage, plain_tree, tmp_path / "run", *flags)
    assert seen(run) == (80, 5)
    shown = continued(stage, plain_tree, run, tmp_path / "again", batch, world)
    assert "warning: epoch 1 continues after its first 80 images" in shown.out
    steps = [line.split()[2] for line in shown.out.splitlines() if line.startswith("epoch 1/1 [")]
    more = (IMAGES - 80) // batch
    assert steps == [f"[{step}/{5 + more}]" for step in range(6, 6 + more)]
    content = checkpoint(tmp_path / "again")
    assert (content["epoch"], content["step"], content["images"]) == (1, 0, 0)
    if stage == "i":
        pointer = (80 + more * batch) % 50
        assert content["state_dict"]["module.queue_ptr"].tolist() == [pointer]


def test_one_process_continues_after_all_images_of_two(plain_tree, tmp_path):
    """Two share 95 images as 48 each, one of them twice."""
    lines = (plain_tree / "train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "train.txt").write_text("".join(lines[-95:]))
    flags = ["--train-list", tmp_path / "train.txt"]
    run = train_ranks("i", plain_tree, tmp_path / "run", *flags, "--epochs", 1, "--save-every-steps", 6)
    assert seen(run) == (96, 6)
    shown = continued("i", plain_tree, run, tmp_path / "again", 16, 1, *flags)
    assert "warning: epoch 1 continues after its first 96 images" in shown.out
    assert same(checkpoint(tmp_path / "again")["state_dict"], checkpoint(run)["state_dict"])


def test_stage_ii_starts_its_epoch_over(trained, plain_tree, tmp_path):
    flags = [*source("ii", trained), "--epochs", 1, "--save-every-steps", 5]
    run = train("ii", plain_tree, tmp_path / "run", *flags)
    outcome = continued("ii", plain_tree, run, tmp_path / "again", 24, 1)
    assert "warning: epoch 1 starts over" in outcome.out
    steps = [line for line in outcome.out.splitlines() if line.startswith("epoch 1/1 [")]
    assert len(steps) == IMAGES // 24 and steps[0].startswith("epoch 1/1 [1/")


# ---- the rest


def test_arguments_in_a_checkpoint_load_with_weights_only(trained):
    args = checkpoint(trained["iii"])["args"]
    assert args["cos"] is True and args["lr"] == 0.1 and args["schedule"] == [120, 160]
    assert not {"data", "workers", "output_dir", "device", "resume", "teacher_ckpt"} & set(args)


def test_a_run_with_a_seed_stays_deterministic_without_the_flag(trained, plain_tree):
    args = PARSERS["i"]().parse_args(["--resume", str(trained["i"] / LAST), str(plain_tree)])
    load_resume(args, PARSERS["i"](), SSFL)
    assert args.deterministic
