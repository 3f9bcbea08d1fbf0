"""Every mistake of a user ends in status 2 and one line that names file and line, or the flag, and harms nothing."""

import os
import shutil

import pytest

from tests.helpers import (
    COUNTS,
    LAST,
    PREVIOUS,
    STAGES,
    TWO,
    assert_mistake,
    assert_mistake_of_all_ranks,
    call,
    checkpoint,
    copied,
    limited_memory,
    log_of,
    refusal,
    run_ranks,
    run_shell,
    run_stage,
    same,
    train,
    without_privileges,
    write_tree,
)

# ---- flags

VALUES = {  # stage and flags -> values that they do not take
    "i --accum-steps --eval-freq --print-freq --num-classes --eval-batch-size --nproc": "0",
    "i --start-epoch --schedule --warmup-epochs --con-weight --workers --save-every-steps": "-1",
    "i --batch-size": f"0 -16 1.5 many {10**30}",
    "i --epochs": "0 -1 --cos",
    "i --lr": "-0.1 nan inf fast 1e400",
    "i --wd": "-1 1e300",
    "i --momentum": "nan",
    "i --schedule-factor": "0 2",
    "i --jitter --moco-m": "1.5 nan",
    "i --moco-k": "0 -5",
    "i --moco-dim": f"0 {10**12}",
    "i --moco-t": "0 1e300",
    "i --image-size": f"4 0 {10**30}",
    "i --seed": f"-1 {2**63}",
    "i --arch --amp --device": "resnet9 fp8 tpu",
    "i --world-size": "9" * 30,
    "i --dist-timeout": "inf nan 1e300",
    "ii --num_samples_cls": "0",
    "ii --classifier": "linear",
    "iii --kd_t": "0",
    "iii --kd-weight": "nan",
}
WRONG = [(flags.split()[0], flag, value) for flags, values in VALUES.items()
         for flag in flags.split()[1:] for value in values.split()]  # fmt: skip


@pytest.mark.parametrize(("stage", "flag", "value"), WRONG)
def test_a_value_that_a_flag_does_not_take_is_named_with_the_flag(plain_tree, stage, flag, value):
    message = refusal(stage, plain_tree, "none", flag, value)
    assert flag in message and (value in message or value in ("--cos", "1e400")), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--start-epoch", 2], ["--start-epoch 2", "--epochs 2"]),
        (["--warmup-epochs", 2], ["--warmup-epochs 2", "below --epochs 2"]),
        (["--gpu", 0], ["--gpu 0", "--device cpu"]),
        (["--output_dir", ""], ["--output_dir"]),
        (["--train-list", ""], ["--train-list"]),
        (["--colour", "red"], ["--colour"]),
        (["--moco--k", 5], ["--moco--k"]),
        (["--epo", 5], ["--epo"]),  # no abbreviations
        (["rm", "-rf"], ["unrecognized arguments"]),
        (["--amp", "fp8\nERROR: all is lost"], ["--amp"]),
        (["--evaluate"], ["--evaluate", "--resume"]),
        (["--overwrite", "--resume", "auto"], ["--overwrite", "--resume auto"]),
        (["--mean", 0.5, 0.5, 1.5], ["--mean 1.5", "at most 1"]),
        (["--mean", 0.5, 0.5, -0.1], ["--mean", "-0.1"]),
        (["--std", 0.5, 0.5, 0], ["--std 0", "above 0"]),
        (["--std", 0.5, 0.5, "1e-9"], ["--std 1e-9"]),
        (["--std", 0.5, 0.5, "inf"], ["--std inf"]),
        (["--mean", 0.5], ["--mean"]),
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
        ("i", ["--accum-steps", 4, "-b", 160, "--moco-k", 200], ["--batch-size 160", "154 images", "no full step"]),
        ("i", ["--accum-steps", 4, "--moco-k", 15], ["--moco-k 15", "16 keys", "--batch-size"]),
        ("i", ["--sync-bn"], ["--sync-bn", "CUDA", "--no-sync-bn"]),
        ("i", ["-b", 18, "--bn-splits", 4], ["--bn-splits 4", "18 images", "16 or 20"]),
        ("i", ["-b", 4, "--bn-splits", 4], ["--bn-splits 4", "--batch-size 8"]),
        ("i", ["-b", 24, "--accum-steps", 2, "--bn-splits", 8], ["--bn-splits 8", "12 images", "--batch-size 32"]),
        ("i", ["--bn-splits", 4, "--sync-bn"], ["--bn-splits 4", "--sync-bn"]),
        ("i", ["--resume", "auto", "--epochs", 2, "--warmup-epochs", 2], ["--warmup-epochs 2", "--epochs 2"]),
        ("i", ["--moco-k", 2**31 - 1, "--moco-dim", 4096], ["out of memory"]),
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


def test_more_than_the_machine_has_and_no_data_folder_are_refused(plain_tree, monkeypatch):
    monkeypatch.setattr("utils.arguments.num_cores", lambda: 2)
    assert "--workers 33: at most 32" in refusal("i", plain_tree, "none", "-j", 33)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cuda" in refusal("i", plain_tree, "none", "--device", "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "--gpu 1: this machine has 1 CUDA" in refusal("i", plain_tree, "none", "--device", "auto", "--gpu", 1)
    several = ["--device", "auto", "--gpu", 0, "--multiprocessing-distributed"]
    assert "--gpu: one GPU contradicts" in refusal("i", plain_tree, "none", *several)
    assert_mistake(call("i", []), "DIR")


# ---- data


def test_a_data_folder_or_list_that_does_not_exist_is_named(plain_tree, tmp_path):
    for folder, words in ((tmp_path / "none", []), (plain_tree / "train.txt", ["a file"])):
        assert_mistake(run_stage("i", folder, tmp_path / "run"), folder, "DIR", *words)
    for flag in ("--train-list", "--val-list", "--test-list"):
        outcome = run_stage("i", plain_tree, tmp_path / "run", flag, tmp_path / "none.txt")
        assert_mistake(outcome, tmp_path / "none.txt", flag)


@pytest.fixture
def tree(tmp_path):
    """A tree that the test may damage."""
    return write_tree(tmp_path / "tree", COUNTS | {"train": (20, 4, 4, 4, 4, 4)})


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_wrong_line_list_or_image_is_named(tree, tmp_path, split):
    file, flag = tree / f"{split}.txt", f"--{split}-list"
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)

    def assert_named(text, *words, flags=()):
        file.write_text(text)
        assert_mistake(run_stage("i", tree, tmp_path / "run", *flags), *words)

    for line in ("train/class0/train_0.png", "train/class0/train_0.png zero", "/etc/passwd 0"):
        assert_named("".join([*lines[:2], f"{line}\n", *lines[3:]]), f"{file}, line 3:")
    if split == "train":
        assert_named(whole, f"{file}, line 37:", "--num-classes 6", flags=["--num-classes", 3])
    else:
        line = "train/class0/train_0.png 6\n"
        assert_named("".join([*lines[:2], line, *lines[3:]]), f"{file}, line 3:", "label 6", "--num-classes 7")
    assert_named("\n", file, "empty")
    for line in lines[:2]:
        (tree / line.split()[0]).unlink()
    remedy = f"python -m datasets.verify {tree} {flag} {file} --report FILE"
    assert_named(whole, f"{split}.txt: 2 of {len(lines)} files", tree, lines[0].split()[0], remedy)
    file.unlink()
    assert_mistake(run_stage("i", tree, tmp_path / "run"), file, "no such list, beside", flag)


def spoil_image(tree, split):
    """Truncates the first image of a split; returns the file."""
    file = tree / (tree / f"{split}.txt").read_text().split()[0]
    file.write_bytes(file.read_bytes()[:500])
    return file


@pytest.mark.parametrize(("split", "workers"), [("train", 2), ("val", 0), ("test", 2)])
def test_a_file_that_cannot_be_decoded_is_named_with_its_list_line(tree, tmp_path, split, workers):
    file = spoil_image(tree, split)
    outcome = run_stage("i", tree, tmp_path / "run", "-j", workers, "--epochs", 1, "-b", 8)
    assert_mistake(outcome, file, f"{split}.txt, line 1")


# ---- checkpoints


@pytest.mark.parametrize(
    ("stage", "flag", "given"),
    [("i", "--resume", "i"), ("ii", "--last_stage_ckpt", "i"), ("iii", "--teacher_ckpt", "ii")],
)
def test_a_checkpoint_that_is_missing_or_of_another_network_is_named(trained, plain_tree, tmp_path, stage, flag, given):
    file = trained[given] / LAST
    for path, more, words in (
        (tmp_path / "none.tar", [], []),
        (tmp_path, [], ["a folder; name a file in it, such as last_checkpoint.pth.tar"]),
        (file, ["--arch", "resnet20"], ["resnet8", "resnet20", "--arch"]),
        (file, ["--num-classes", 9], ["6 classes", "9", "--num-classes"]),
    ):
        assert_mistake(run_stage(stage, plain_tree, tmp_path / "run", flag, path, *more), path, flag, *words)


@pytest.mark.parametrize(
    ("stage", "flags", "given"),
    [
        *((stage, "--resume", other) for stage in STAGES for other in STAGES if other != stage),
        ("ii", "--last_stage_ckpt", "ii"), ("ii", "--classifier soft --last_stage_ckpt", "i"),
        ("iii", "--teacher_ckpt", "i"), ("iii", "--teacher_ckpt", "iii"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_stage_is_refused(trained, plain_tree, tmp_path, stage, flags, given):
    file = trained[given] / LAST
    outcome = run_stage(stage, plain_tree, tmp_path / "run", *flags.split(), file)
    assert_mistake(outcome, file, f"stage {given.upper()};", flags.split()[-1])


def test_a_queue_of_another_size_is_refused(trained, plain_tree, tmp_path):
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--resume", trained["i"] / LAST, "--moco-k", 64)
    assert_mistake(outcome, trained["i"] / LAST, "--moco-k 50 --moco-dim 16")


# ---- the output folder


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


def test_overwrite_starts_from_scratch(trained, plain_tree, tmp_path):
    finished = copied(trained["i"], tmp_path / "finished")
    train("i", plain_tree, finished, "--cos", "--overwrite", "--epochs", 1)
    assert [record["epoch"] for record in log_of(finished)] == [0]
    assert checkpoint(finished)["epoch"] == 1 and not (finished / PREVIOUS).exists()
    assert same(checkpoint(finished)["state_dict"], checkpoint(trained["i"], PREVIOUS)["state_dict"])


def test_an_output_folder_that_is_a_file_or_cannot_be_written_is_named(plain_tree, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "read-only").mkdir(mode=0o500)
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "read-only"):
        with without_privileges():
            assert_mistake(run_stage("i", plain_tree, folder), f"--output_dir {folder}")


# ---- through the shell, where stderr may contain nothing else


@pytest.mark.parametrize("flags", [[], pytest.param(TWO, marks=pytest.mark.full)])
def test_shell_a_truncated_image_in_a_worker_ends_in_one_line(tree, tmp_path, flags):
    file = spoil_image(tree, "train")
    outcome = run_shell("i", tree, tmp_path / "run", *flags, "-j", 2, "--epochs", 1, "-b", 8)
    assert_mistake(outcome, file, "train.txt, line 1")


@pytest.mark.parametrize(
    ("flags", "world", "nodes", "words"),
    [
        (["-b", 3], 2, 1, ["--batch-size 3", "2 processes", "--batch-size 4"]),
        (["-b", 16, "--accum-steps", 5], 2, 1, ["--accum-steps 5", "2 processes", "--batch-size 20"]),
        (["-b", 156, "--moco-k", 200], 4, 1, ["--batch-size 156", "154 images", "no full step"]),  # 4 x 39, padded
        (["-b", 80, "--moco-k", 200], 2, 2, ["--batch-size 80 on each of 2 nodes", "154 images", "no full step"]),
        (["-b", 26, "--moco-k", 50], 2, 2, ["--moco-k 50", "52 keys", "--batch-size"]),
    ],
)
def test_a_step_that_the_processes_cannot_take_ends_in_one_line(plain_tree, tmp_path, flags, world, nodes, words):
    outcomes = run_ranks("i", plain_tree, tmp_path / "run", *flags, world=world, nodes=nodes)
    assert_mistake_of_all_ranks(outcomes, *words)
