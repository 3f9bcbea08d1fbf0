"""Every mistake of a user ends in status 2 and one line that names file and line, or the flag, and harms nothing."""

import fcntl
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import (
    COUNTS,
    LAST,
    STAGES,
    TWO,
    assert_mistake,
    assert_mistake_of_all_ranks,
    call,
    checkpoint,
    limited_memory,
    log_of,
    refusal,
    run_ranks,
    run_shell,
    run_stage,
    same,
    train,
    write_tree,
)

# ---- flags

VALUES = {  # stage and flag -> values that it does not take
    "i --batch-size": f"0 -16 1.5 many {10**30}",
    "i --accum-steps": "0",
    "i --epochs": "0 -1 --cos",
    "i --start-epoch": "-1",
    "i --lr": "-0.1 nan inf fast 1e400",
    "i --wd": "-1 1e300",
    "i --momentum": "nan",
    "i --schedule": "-1",
    "i --moco-k": "0 -5",
    "i --moco-dim": f"0 {10**12}",
    "i --moco-m": "1.5 nan",
    "i --moco-t": "0 1e300",
    "i --con-weight": "-1",
    "i --workers": "-1",
    "i --print-freq": "0",
    "i --image-size": f"4 0 {10**30}",
    "i --num-classes": "0",
    "i --eval-batch-size": "0",
    "i --save-every-steps": "-1",
    "i --seed": f"-1 {2**63}",
    "i --arch": "resnet9",
    "i --amp": "fp8",
    "i --device": "tpu",
    "i --nproc": "0",
    "i --world-size": "9" * 30,
    "i --dist-timeout": "inf nan 1e300",
    "ii --num_samples_cls": "0",
    "ii --classifier": "linear",
    "iii --kd_t": "0",
    "iii --kd-weight": "nan",
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in VALUES for value in VALUES[name].split()])
def test_a_value_that_a_flag_does_not_take_is_named_with_the_flag(plain_tree, name, value):
    stage, flag = name.split()
    message = refusal(stage, plain_tree, "none", flag, value)
    assert flag in message and (value in message or value in ("--cos", "1e400")), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--start-epoch", 2], ["--start-epoch 2", "--epochs 2"]),
        (["--gpu", 0], ["--gpu 0", "--device cpu"]),
        (["--output_dir", ""], ["--output_dir"]),
        (["--train-list", ""], ["--train-list"]),
        (["--colour", "red"], ["--colour"]),
        (["--moco--k", 5], ["--moco--k"]),
        (["--epo", 5], ["--epo"]),  # no abbreviations
        (["rm", "-rf"], ["unrecognized arguments"]),
        (["--amp", "fp8\nERROR: all is lost"], ["--amp"]),
        (["--evaluate"], ["--evaluate", "--resume"]),
    ],
)
def test_flags_that_cannot_be_parsed_are_named(plain_tree, flags, words):
    message = refusal("i", plain_tree, "none", *flags)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("stage", "flags", "words"),
    [
        ("i", ["-b", 0], ["--batch-size 0"]),  # from the parser
        ("i", ["-b", 1], ["--batch-size 1", "two or more"]),
        ("i", ["-b", 155, "--moco-k", 200], ["--batch-size 155", "154 images", "no full step"]),
        ("i", ["--accum-steps", 9], ["--accum-steps 9", "1 images", "--batch-size 18"]),
        ("i", ["--accum-steps", 17], ["--accum-steps 17", "0 images", "--batch-size 34"]),
        ("i", ["--accum-steps", 4, "-b", 160, "--moco-k", 200], ["--batch-size 160", "154 images", "no full step"]),
        ("i", ["--accum-steps", 4, "--moco-k", 15], ["--moco-k 15", "16 keys", "--batch-size"]),
        ("i", ["--moco-k", 15], ["--moco-k 15", "16 keys"]),
        ("i", ["--sync-bn"], ["--sync-bn", "CUDA", "--no-sync-bn"]),
        ("i", ["--moco-k", 2**31 - 1, "--moco-dim", 4096], ["out of memory"]),
        ("i", ["--moco-dim", 2**31 - 1], ["out of memory"]),
        ("i", ["--resume", "x\nERROR: y"], ["--resume"]),
        ("i", ["--resume", "\x1b[2J\x1b[31m"], ["--resume"]),
        ("i", ["--resume", os.fsdecode(b"\xff\xfe")], ["--resume"]),
        ("i", ["--output_dir", "x" * 300], ["--output_dir"]),
        ("i", ["--output_dir", "/dev/null/run"], ["--output_dir"]),
        ("i", ["--val-list", "/etc/passwd/val.txt"], ["--val-list"]),
        ("ii", [], ["--last_stage_ckpt"]),
        ("iii", [], ["--teacher_ckpt"]),
        *((stage, ["--evaluate", "--resume", "auto"], ["--resume auto"]) for stage in STAGES),
    ],
)
def test_flags_that_do_not_fit_the_run_are_refused_in_one_line(plain_tree, tmp_path, stage, flags, words):
    with limited_memory():
        assert_mistake(run_stage(stage, plain_tree, tmp_path / "run", *flags), *words)
    assert not list(tmp_path.glob("**/*.tar"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_does_not_exist_is_refused(plain_tree):
    assert "--device cuda" in refusal("i", plain_tree, "none", "--device", "cuda")


def test_more_workers_than_a_machine_can_use_are_refused(plain_tree, monkeypatch):
    monkeypatch.setattr("utils.arguments.num_cores", lambda: 2)
    assert "--workers 33: at most 32" in refusal("i", plain_tree, "none", "-j", 33)


def test_a_command_without_a_data_folder_is_refused():
    assert_mistake(call("i", []), "DIR")


def test_a_loss_that_is_not_finite_names_the_learning_rate_and_the_batch(plain_tree, tmp_path):
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--lr", 1e6)
    assert_mistake(outcome, "--lr", "epoch 1, step", "train.txt, lines")


# ---- data


def test_a_data_folder_that_does_not_exist_is_named(tmp_path):
    assert_mistake(run_stage("i", tmp_path / "none", tmp_path / "run"), tmp_path / "none", "DIR")


def test_a_file_in_place_of_the_data_folder_is_named(plain_tree, tmp_path):
    assert_mistake(
        run_stage("i", plain_tree / "train.txt", tmp_path / "run"), plain_tree / "train.txt", "a file", "DIR"
    )


@pytest.mark.parametrize("flag", ["--train-list", "--val-list", "--test-list"])
def test_a_list_that_does_not_exist_is_named(plain_tree, tmp_path, flag):
    outcome = run_stage("i", plain_tree, tmp_path / "run", flag, tmp_path / "none.txt")
    assert_mistake(outcome, tmp_path / "none.txt", flag)


@pytest.fixture
def tree(tmp_path):
    """A tree that the test may damage."""
    return write_tree(tmp_path / "tree", COUNTS | {"train": (20, 4, 4, 4, 4, 4)})


SPLITS = ("train", "val", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_list_of_the_data_folder_is_named(tree, tmp_path, split):
    (tree / f"{split}.txt").unlink()
    assert_mistake(
        run_stage("i", tree, tmp_path / "run"), tree / f"{split}.txt", "no such list, beside", f"--{split}-list"
    )


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("line", ["train/class0/train_0.png", "train/class0/train_0.png zero", "/etc/passwd 0"])
def test_a_malformed_line_is_named(tree, tmp_path, split, line):
    spoil_list(tree / f"{split}.txt", line)
    assert_mistake(run_stage("i", tree, tmp_path / "run"), f"{tree / split}.txt, line 3:")


def spoil_list(file, line, number=3):
    lines = file.read_text().splitlines()
    lines[number - 1] = line
    file.write_text("\n".join(lines))


@pytest.mark.parametrize("split", SPLITS)
def test_an_empty_list_is_named(tree, tmp_path, split):
    (tree / f"{split}.txt").write_text("\n")
    assert_mistake(run_stage("i", tree, tmp_path / "run"), tree / f"{split}.txt", "empty")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_label_that_training_does_not_have_is_named(tree, tmp_path, split):
    spoil_list(tree / f"{split}.txt", "train/class0/train_0.png 6")
    outcome = run_stage("i", tree, tmp_path / "run")
    assert_mistake(outcome, f"{tree / split}.txt, line 3:", "label 6", "--num-classes 7")


def test_a_label_beyond_num_classes_is_named(tree, tmp_path):
    outcome = run_stage("i", tree, tmp_path / "run", "--num-classes", 3)
    assert_mistake(outcome, f"{tree}/train.txt, line 37:", "--num-classes 6")


@pytest.mark.parametrize("split", SPLITS)
def test_missing_images_are_named(tree, tmp_path, split):
    lines = (tree / f"{split}.txt").read_text().splitlines()[:2]
    for line in lines:
        (tree / line.split()[0]).unlink()
    count = {"train": 40, "val": 24, "test": 30}[split]
    outcome = run_stage("i", tree, tmp_path / "run")
    remedy = f"python -m datasets.verify {tree} --{split}-list {tree}/{split}.txt --report FILE"
    assert_mistake(outcome, f"{split}.txt: 2 of {count} files", tree, lines[0].split()[0], remedy)


def spoil_image(tree, split, content=None):
    """Truncates the first image of a split, or replaces its content; returns the file."""
    file = tree / (tree / f"{split}.txt").read_text().split()[0]
    file.write_bytes(file.read_bytes()[:500] if content is None else content)
    return file


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_a_truncated_image_is_named_with_its_list_line(tree, tmp_path, split, workers):
    file = spoil_image(tree, split)
    outcome = run_stage("i", tree, tmp_path / "run", "-j", workers, "--epochs", 1, "-b", 8)
    assert_mistake(outcome, file, f"{split}.txt, line 1")


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_a_file_that_is_not_an_image_is_named_with_its_list_line(tree, tmp_path, content):
    file = spoil_image(tree, "test", content)
    assert_mistake(run_stage("i", tree, tmp_path / "run", "--epochs", 1), file, "test.txt, line 1")


# ---- checkpoints

FLAGS = {"--resume": ("i", "i"), "--last_stage_ckpt": ("ii", "i"), "--teacher_ckpt": ("iii", "ii")}  # run, made by
every_flag = pytest.mark.parametrize("flag", FLAGS)


def start_from(flag, file, data, out, *flags):
    return run_stage(FLAGS[flag][0], data, out, flag, file, *flags)


@every_flag
def test_a_checkpoint_that_does_not_exist_is_named(plain_tree, tmp_path, flag):
    assert_mistake(start_from(flag, tmp_path / "none.tar", plain_tree, tmp_path / "run"), tmp_path / "none.tar", flag)
    words = (tmp_path, "a folder; name a file in it, such as last_checkpoint.pth.tar", flag)
    assert_mistake(start_from(flag, tmp_path, plain_tree, tmp_path / "run"), *words)


@every_flag
def test_a_checkpoint_of_another_arch_is_refused(trained, plain_tree, tmp_path, flag):
    file = trained[FLAGS[flag][1]] / LAST
    outcome = start_from(flag, file, plain_tree, tmp_path / "run", "--arch", "resnet20")
    assert_mistake(outcome, file, "resnet8", "resnet20", "--arch", flag)


@every_flag
def test_a_checkpoint_of_another_number_of_classes_is_refused(trained, plain_tree, tmp_path, flag):
    file = trained[FLAGS[flag][1]] / LAST
    outcome = start_from(flag, file, plain_tree, tmp_path / "run", "--num-classes", 9)
    assert_mistake(outcome, file, "6 classes", "9", "--num-classes", flag)


@pytest.mark.parametrize(
    ("stage", "flag", "given"),
    [
        *((stage, "--resume", other) for stage in STAGES for other in STAGES if other != stage),
        ("ii", "--last_stage_ckpt", "ii"), ("iii", "--teacher_ckpt", "i"), ("iii", "--teacher_ckpt", "iii"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_stage_is_refused(trained, plain_tree, tmp_path, stage, flag, given):
    file = trained[given] / LAST
    outcome = run_stage(stage, plain_tree, tmp_path / "run", flag, file)
    assert_mistake(outcome, file, f"stage {given.upper()};", flag)


def test_the_soft_classifier_of_a_stage_i_checkpoint_is_refused(trained, plain_tree, tmp_path):
    file = trained["i"] / LAST
    outcome = run_stage("ii", plain_tree, tmp_path / "run", "--last_stage_ckpt", file, "--classifier", "soft")
    assert_mistake(outcome, file, "--last_stage_ckpt")


@pytest.mark.parametrize("flags", [["--moco-k", 64], ["--moco-dim", 8]])
def test_a_queue_of_another_size_is_refused(trained, plain_tree, tmp_path, flags):
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--resume", trained["i"] / LAST, "--epochs", 3, *flags)
    assert_mistake(outcome, trained["i"] / LAST, "--moco-k 50 --moco-dim 16")


# ---- the output folder


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of a finished run of stage i."""
    return Path(shutil.copytree(trained["i"], tmp_path / "finished"))


@pytest.mark.parametrize("name", [LAST, "previous_checkpoint.pth.tar", "best_checkpoint.pth.tar"])
def test_a_finished_run_is_not_written_over(trained, plain_tree, tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(trained["i"] / name, folder)
    before = (folder / name).read_bytes()
    for flags in ([], ["--resume", trained["i"] / LAST, "--epochs", 3]):  # nor by resuming another run
        outcome = run_stage("i", plain_tree, folder, *flags)
        assert_mistake(outcome, f"--output_dir {folder}", name, "--overwrite", "--resume")
    assert (folder / name).read_bytes() == before


def test_overwrite_starts_from_scratch(finished, trained, plain_tree):
    train("i", plain_tree, finished, "--cos", "--overwrite", "--epochs", 1)
    assert [record["epoch"] for record in log_of(finished)] == [0]
    assert checkpoint(finished)["epoch"] == 1 and not (finished / "previous_checkpoint.pth.tar").exists()
    assert not same(checkpoint(finished)["state_dict"], checkpoint(trained["i"])["state_dict"])


@pytest.mark.parametrize(
    "flags", [["--test-list", "none.txt"], ["--num-classes", 3], ["-b", 1000], ["--arch", "none"], ["--resume", "none"]]
)
def test_a_mistake_leaves_the_run_that_would_be_overwritten(finished, plain_tree, flags):
    before = {file: file.read_bytes() for file in finished.glob("[!.]*")}
    assert run_stage("i", plain_tree, finished, "--overwrite", *flags).status == 2
    assert {file: file.read_bytes() for file in finished.glob("[!.]*")} == before


def test_a_file_in_place_of_the_output_folder_is_named(plain_tree, tmp_path):
    (tmp_path / "file").touch()
    assert_mistake(run_stage("i", plain_tree, tmp_path / "file"), f"--output_dir {tmp_path / 'file'}")
    assert_mistake(run_stage("i", plain_tree, tmp_path / "file" / "run"), f"--output_dir {tmp_path / 'file' / 'run'}")


def test_an_output_folder_that_cannot_be_written_is_named(plain_tree, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # as root, only /proc cannot be written
        folder = Path("/proc")
    assert_mistake(run_stage("i", plain_tree, folder), f"--output_dir {folder}")


def hold(file, ready, done):
    with open(file, "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        ready.set()
        done.wait(60)


def test_a_second_run_in_the_same_folder_is_refused(plain_tree, tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / ".lock", ready, done))
    other.start()
    assert ready.wait(60)
    assert_mistake(run_stage("i", plain_tree, tmp_path), f"--output_dir {tmp_path}", "another run")
    done.set()
    other.join()


# ---- through the shell, where stderr may contain nothing else


@pytest.mark.full
def test_shell_a_data_folder_that_does_not_exist_ends_in_one_line(tmp_path):
    assert_mistake(run_shell("i", tmp_path / "none", tmp_path / "run"), tmp_path / "none")


def test_shell_a_truncated_image_in_a_worker_ends_in_one_line(tree, tmp_path):
    file = spoil_image(tree, "train")
    outcome = run_shell("i", tree, tmp_path / "run", "-j", 2, "--epochs", 1, "-b", 8)
    assert_mistake(outcome, file, "train.txt, line 1")


def test_shell_a_truncated_image_in_one_of_two_processes_ends_in_one_line(tree, tmp_path):
    file = spoil_image(tree, "val")
    outcome = run_shell("i", tree, tmp_path / "run", *TWO, "-j", 2, "--epochs", 1)
    assert_mistake(outcome, file, "val.txt, line 1")


@pytest.mark.parametrize(
    "flags, world, words",
    [
        (["-b", 3], 2, ["--batch-size 3", "2 processes", "--batch-size 4"]),
        (["-b", 16, "--accum-steps", 5], 2, ["--accum-steps 5", "2 processes", "--batch-size 20"]),
        (["-b", 16, "--accum-steps", 4, "--moco-k", 15], 2, ["--moco-k 15", "16 keys"]),
        (["-b", 156, "--moco-k", 200], 4, ["--batch-size 156", "154 images", "no full step"]),  # 4 x 39, padded
    ],
)
def test_a_step_that_the_processes_data_or_queue_cannot_take_ends_in_one_line(
    plain_tree, tmp_path, flags, world, words
):
    assert_mistake_of_all_ranks(run_ranks("i", plain_tree, tmp_path / "run", *flags, world=world), *words)
