"""What a run folder keeps: of a finished run, of a resumed one, and when a run starts over."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import signal
import stat
import sys
from unittest.mock import Mock

import pytest
import torch

from datasets import splits
from tests.helpers import (
    LAST,
    PARSERS,
    PREVIOUS,
    args_of,
    assert_mistake,
    checkpoint,
    copied,
    log_of,
    refusal,
    results_of,
    run_stage,
    same,
    source,
    stage_flags,
    train,
)
from tests.helpers_prepare import everything
from tests.helpers_processes import wait_until
from utils import checkpoint as under_test
from utils import pretrained
from utils.arguments import settle_defaults
from utils.errors import Unavailable, UserError
from utils.files import lock_folder
from utils.log import append_epoch, environment
from utils.results.records import read_runs, run_folders


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of a run of stage I, for a test to change."""
    return copied(trained["i"], tmp_path / "i")


@pytest.mark.parametrize(
    ("run", "stage", "flag", "before"),
    [("iii", "iii", "teacher_ckpt", "ii"), ("tuned", "ii", "last_stage_ckpt", "iii")],
)
def test_a_resumed_run_names_the_checkpoint_it_started_from(trained, plain_tree, tmp_path, run, stage, flag, before):
    folder = copied(trained[run], tmp_path / run)
    outcome = run_stage(stage, plain_tree, folder, "--cos", "--epochs", 3, "--resume", "auto")
    assert outcome.status == 0, outcome.err
    assert args_of(folder)[flag] == args_of(trained[run])[flag] == str(trained[before] / LAST)
    assert (args_of(folder)["epochs"], args_of(trained[run])["epochs"]) == (3, 2)
    if run == "tuned":
        assert "next:\n  python -m utils.report" in outcome.out  # and not stage III, of which it is the end


def test_a_run_that_goes_on_removes_the_earlier_results(folder, plain_tree):
    flags = ["--epochs", 3, "--resume", "auto", "--lr", "1e6"]
    assert_mistake(run_stage("i", plain_tree, folder, *flags), "not finite")
    assert not (folder / "results.json").exists()


# ---- --overwrite: the old run as a whole, or the new one


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr 1e6", "not finite"), ("--test-list none.txt", "--test-list"), ("--num-classes 3", "--num-classes"),
        ("-b 1000", "--batch-size 1000"), ("--arch none", "--arch"), ("--resume none", "--resume"),
        ("--image-size 4096 -b 150 --moco-k 150", "GiB"),  # the check of the memory
    ],
)  # fmt: skip
def test_the_old_run_stays_if_the_new_one_ends_before_its_first_checkpoint(folder, plain_tree, flags, words):
    (folder / "plots").mkdir()
    (folder / "plots" / "losses.png").touch()
    before = everything(folder)
    assert_mistake(run_stage("i", plain_tree, folder, "--overwrite", *flags.split()), words)
    assert everything(folder) == before


@pytest.mark.parametrize("compiler", ["/nowhere/c++", None])
def test_a_missing_compiler_is_named_before_anything_is_written(plain_tree, tmp_path, monkeypatch, compiler):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(*("CXX", compiler) if compiler else ("PATH", str(tmp_path)))
    said = refusal("i", plain_tree, tmp_path / "new", "--overwrite", "--compile")
    assert "--compile" in said and "C++" in said and "CXX" in said


def killed_at(number, work) -> bool:
    """Whether work() is killed, in a fork, when it is about to change a folder for the number-th time."""
    pid = os.fork()
    if pid == 0:
        changes = itertools.count()

        def deadly(change):
            def function(*args, **options):
                if next(changes) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **options)

            return function

        for name in ("mkdir", "rmdir", "unlink", "rename", "replace", "link"):
            setattr(os, name, deadly(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("ends", ["with a checkpoint", "without", "without, twice"])
def test_a_kill_at_any_moment_leaves_the_old_run_or_the_new_one(trained, tmp_path, ends):
    """Never files of both; a kill while the old run is brought back is one of these moments, too."""
    old, saved = everything(trained["i"]), checkpoint(trained["i"])
    new = {LAST, "best_checkpoint.pth.tar", "args.json", "log.txt", ".lock"}

    def start_over(folder):
        under_test.set_aside(folder)
        for name in ("args.json", "log.txt"):
            (folder / name).write_bytes(b"new")
        if ends == "with a checkpoint":
            under_test.write(folder, saved | {"epoch": 7}, is_best=True)
        under_test.settle(folder)

    for number in itertools.count():
        folder = copied(trained["i"], tmp_path / str(number))
        killed = killed_at(number, lambda folder=folder: start_over(folder))
        if ends == "without, twice":
            killed_at(2, lambda folder=folder: under_test.settle(folder))
        under_test.settle(folder)
        found = everything(folder)
        is_new = found.keys() == new and found["args.json"] == b"new" and checkpoint(folder)["epoch"] == 7
        assert found == old or is_new, (number, sorted(found))
        assert killed or is_new == (ends == "with a checkpoint")
        shutil.rmtree(folder)
        if not killed:
            break
    assert number > 10


@pytest.mark.parametrize(
    "use",
    [
        lambda data, folder: train("i", data, folder, "--cos", "--resume", "auto"),
        lambda data, folder: train("i", data, folder, "--cos", "--resume", folder / LAST),
        lambda data, folder: under_test.read_weights(folder / LAST, "CKPT"),
        lambda data, folder: read_runs([folder]),
    ],
)
def test_the_old_run_is_found_again_after_a_kill(folder, plain_tree, use):
    before = everything(folder)
    under_test.set_aside(folder)
    (folder / "args.json").write_text("{}")
    assert use(plain_tree, folder) and everything(folder) == before


def test_the_old_run_is_there_before_any_rank_reads_its_checkpoint(folder, plain_tree, tmp_path, monkeypatch):
    found = []

    def read(path, *_):
        found.append(os.path.exists(path))
        raise UserError("read")

    monkeypatch.setattr(under_test, "read_stage", read)
    monkeypatch.setattr(pretrained, "read_backbone", read)
    for stage, flag in (("i", "--pretrained"), ("ii", "--last-stage-ckpt")):
        under_test.set_aside(folder)
        assert_mistake(run_stage(stage, plain_tree, tmp_path / "run", flag, folder / LAST), "read")
    assert found == [True, True]


def test_a_second_run_does_not_touch_what_a_running_one_set_aside(folder, plain_tree, tmp_path):
    under_test.set_aside(folder)
    before = everything(folder)
    pid = os.fork()
    if pid == 0:
        lock = (folder / ".lock").open("w")
        fcntl.lockf(lock, fcntl.LOCK_EX)
        (tmp_path / "locked").touch()
        signal.pause()
    try:
        wait_until((tmp_path / "locked").exists, "the lock")
        assert_mistake(run_stage("i", plain_tree, folder, "--resume", "auto"), f"--output_dir {folder}", "another run")
        assert everything(folder) == before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_run_from_another_folder_s_checkpoint_keeps_no_line_of_the_earlier_run(folder, trained, plain_tree):
    train("i", plain_tree, folder, "--cos", "--epochs", 3, "--resume", trained["i"] / LAST, "--overwrite")
    assert [record["epoch"] for record in log_of(folder)] == [2]


def test_a_run_needs_no_git(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert environment()["commit"] is None


def test_an_evaluation_looks_for_no_training_image(trained, plain_tree, tmp_path, monkeypatch):
    find_files = Mock(side_effect=splits.find_files)
    monkeypatch.setattr(splits, "find_files", find_files)
    train("i", plain_tree, tmp_path / "evaluation", "--evaluate", "--resume", trained["i"] / LAST)
    assert [call.args[0].name for call in find_files.call_args_list] == ["test"]


def test_a_damaged_args_json_does_not_keep_a_run_from_being_resumed(trained, plain_tree, tmp_path):
    folder = copied(trained["ii"], tmp_path / "ii")
    (folder / "args.json").write_text("{")
    train("ii", plain_tree, folder, "--cos", "--epochs", 3, "--resume", "auto")
    assert args_of(folder)["epochs"] == 3


def test_an_evaluation_does_not_replace_the_results_of_a_training(folder, trained, plain_tree):
    flags = ["--evaluate", "--resume", trained["i"] / LAST, "--test-list", plain_tree / "val.txt"]
    assert_mistake(run_stage("i", plain_tree, folder, *flags), str(folder), "--overwrite", "another folder")
    assert results_of(folder) == results_of(trained["i"])
    train("i", plain_tree, folder, *flags, "--overwrite")
    assert results_of(folder) != results_of(trained["i"]) and (folder / LAST).exists()


def test_the_untrained_soft_classifier_of_a_run_without_a_teacher_is_refused(trained, plain_tree, tmp_path):
    saved = checkpoint(trained["iii"])
    torch.save(saved | {"args": saved["args"] | {"kd_weight": 0.0}}, tmp_path / "alone")
    flags = ["--last_stage_ckpt", tmp_path / "alone", "--classifier", "soft"]
    assert_mistake(run_stage("ii", plain_tree, tmp_path / "ii", *flags), "--classifier soft", "--kd-weight 0")


def test_results_whose_checkpoints_are_gone_are_kept(folder, plain_tree):
    for file in folder.glob("*.pth.tar"):
        file.unlink()
    results = (folder / "results.json").read_bytes()
    for flags in ([], ["--resume", "auto"]):
        assert_mistake(run_stage("i", plain_tree, folder, *flags), "results.json", "no checkpoint", "--overwrite")
    assert (folder / "results.json").read_bytes() == results
    train("i", plain_tree, folder, "--epochs", 1, "--overwrite")


@pytest.mark.parametrize(
    ("flag", "module", "package"),
    [("--tensorboard", "torch.utils.tensorboard", "tensorboard"), ("--plots", "matplotlib.figure", "matplotlib")],
)
def test_a_missing_package_costs_no_earlier_run(folder, trained, plain_tree, monkeypatch, flag, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    assert_mistake(run_stage("i", plain_tree, folder, "--overwrite", flag), flag, f"pip install {package}")
    assert everything(folder) == everything(trained["i"])


def test_a_file_system_without_locks_gets_a_warning_and_keeps_runs_set_aside(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    assert lock_folder(tmp_path) is None
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and "cannot be locked (No locks available)" in said
    under_test.set_aside(folder)
    before = everything(folder)
    under_test.settle_unless_in_use(folder)
    assert everything(folder) == before
    monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        lock_folder(tmp_path)


def test_more_epochs_continue_a_finished_run_whose_checkpoint_is_a_link(folder, trained, plain_tree, tmp_path):
    (folder / LAST).rename(tmp_path / "elsewhere")
    (folder / LAST).symlink_to(tmp_path / "elsewhere")
    train("i", plain_tree, folder, "--cos", "--epochs", 3, "--resume", "auto")
    assert [record["epoch"] for record in log_of(folder)] == [0, 1, 2]
    assert checkpoint(folder)["epoch"] == 3 and checkpoint(folder, PREVIOUS)["epoch"] == 2
    assert same(checkpoint(folder, PREVIOUS)["state_dict"], checkpoint(trained["i"])["state_dict"])


def test_an_evaluation_has_the_precision_of_the_training(plain_tree, tmp_path):
    run = train("i", plain_tree, tmp_path / "i", "--epochs", 1, "--amp", "bf16")
    outcome = run_stage("i", plain_tree, tmp_path / "evaluation", "--evaluate", "--resume", run / LAST)
    assert "--amp bf16" in outcome.out
    assert results_of(tmp_path / "evaluation") == results_of(run)


def test_a_run_can_start_at_a_later_epoch(plain_tree, tmp_path):
    run = train("i", plain_tree, tmp_path / "i", "--cos", "--start-epoch", 1)
    (record,) = log_of(run)
    assert (record["epoch"], record["lr"]) == (1, pytest.approx(0.05))  # half of a cosine of 2 epochs


def test_a_log_txt_that_is_not_ours_is_kept(plain_tree, tmp_path):
    """Such as the output of the command itself."""
    (tmp_path / "log.txt").write_text("seed 1\n")
    assert_mistake(run_stage("i", plain_tree, tmp_path), str(tmp_path / "log.txt"), "redirect")
    assert (tmp_path / "log.txt").read_text() == "seed 1\n"


def test_a_log_that_is_no_text_ends_in_one_line(folder, plain_tree):
    (folder / "log.txt").write_bytes(b"\xff\xfe")
    outcome = run_stage("i", plain_tree, folder, "--cos", "--epochs", 3, "--resume", "auto")
    assert_mistake(outcome, str(folder / "log.txt"))


@pytest.mark.parametrize(
    ("stage", "flags", "words"),
    [
        ("i", "--cos --schedule 1 --schedule-factor 0.5", "--schedule and --schedule-factor: not used, since --cos"),
        ("i", "--con-weight 0 --moco-t 0.1", "--moco-t: not used, since --con-weight is 0"),
        ("iii", "--kd-weight 0 --kd_t 3 --teacher_ckpt x", "--teacher-ckpt and --kd-t: not used, since"),
        ("i", "--resume x --start-epoch 1", "--start-epoch: not used, since --resume sets the epoch"),
    ],
)
def test_a_flag_without_effect_is_named(plain_tree, tmp_path, capsys, stage, flags, words):
    settle_defaults(PARSERS[stage]().parse_args(stage_flags(stage, plain_tree, tmp_path, flags.split())))
    assert words in capsys.readouterr().out


def test_a_list_that_has_changed_since_the_checkpoint_is_named(folder, trained, plain_tree, tmp_path):
    """Images that were trained on may be test images now."""
    words = "last_checkpoint.pth.tar was trained with another training list"
    shorter = tmp_path / "shorter.txt"
    shorter.write_text((plain_tree / "train.txt").read_text().partition("\n")[2])
    other = ["--train-list", shorter]
    swapped = ["--val-list", plain_tree / "test.txt", "--test-list", plain_tree / "val.txt"]
    assert "was trained with" not in run_stage("i", plain_tree, folder, "--cos", "--resume", "auto").out
    outcome = run_stage("i", plain_tree, folder, "--cos", "--epochs", 3, "--resume", "auto", *other, *swapped)
    assert outcome.status == 0 and f"warning: {folder}/{words}" in outcome.out
    assert "with another validation list" in outcome.out and "with another test list" in outcome.out
    assert args_of(folder)["list_checksums"]["train"] != args_of(trained["i"])["list_checksums"]["train"]
    flags = ["--epochs", 1, *source("ii", trained), *other, *swapped]
    outcome = run_stage("ii", plain_tree, tmp_path / "ii", *flags)
    assert words in outcome.out and outcome.out.count("was trained with") == 1
    flags = ["--evaluate", "--resume", trained["i"] / LAST, *other]
    assert words not in run_stage("i", plain_tree, tmp_path / "e", *flags).out


def test_lists_that_may_not_be_meant_are_named(trained, plain_tree, tmp_path):
    lists = ["--test-list", plain_tree / "train.txt", "--num-classes", 8]
    outcome = run_stage("i", plain_tree, tmp_path / "i", "--epochs", 1, *lists)
    assert outcome.status == 0
    assert f"warning: {plain_tree}/train.txt: 2 of 8 classes have no images, such as class 6\n" in outcome.out
    assert f"warning: {plain_tree}/train.txt: has the images of the training list\n" in outcome.out


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("fsync of folders", "EINVAL"), ("fsync of folders", "EBADF"), ("fsync of folders", "EIO"), ("fsync", "ENOSYS"),
        ("open of folders", "EACCES"),
    ],
)  # fmt: skip
def test_what_a_file_system_need_not_offer_is_done_without(tmp_path, monkeypatch, error, place):
    """A broken disk is another matter."""
    name, number = place.split()[0], getattr(errno, error)
    real = getattr(os, name)

    def refused(what, *args, **options):
        is_folder = stat.S_ISDIR(os.stat(what).st_mode) if isinstance(what, int) else os.path.isdir(what)
        if is_folder or "folders" not in place:
            raise OSError(number, os.strerror(number))
        return real(what, *args, **options)

    monkeypatch.setattr(os, name, refused)
    with pytest.raises(Unavailable, match=r"Input/output error") if error == "EIO" else contextlib.nullcontext():
        for epoch in (1, 2):
            append_epoch(tmp_path, {"epoch": epoch})
            under_test.write(tmp_path, {"epoch": epoch}, is_best=True)
        assert checkpoint(tmp_path)["epoch"] == 2 and len(log_of(tmp_path)) == 2


def test_linked_folders_are_searched_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "results.json").touch()
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "a" / "loop").symlink_to(tmp_path / "runs")
    assert run_folders(tmp_path / "runs") == [tmp_path / "runs" / "a" / "link"]


def test_a_line_of_the_log_is_on_the_disk_before_its_checkpoint_is_written(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append((tmp_path / "log.txt").read_text()) or fsync(file))
    append_epoch(tmp_path, {"epoch": 0})
    assert flushed == ['{"epoch": 0}\n']


def test_what_a_report_compares_is_written(trained, plain_tree, tmp_path):
    run = train("ii", plain_tree, tmp_path / "ii", "--epochs", 1, *source("ii", trained))
    args, (record,) = args_of(run), results_of(run)
    assert args["identity"] == PARSERS["ii"]().parse_args(["."]).marked["identity"]
    assert args["starts_from"] == ["last_stage_ckpt"]
    assert record["test_checksum"] == args["list_checksums"]["test"]
