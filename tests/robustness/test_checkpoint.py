"""Saving on a full disk, without permission, or killed halfway: the earlier checkpoints stay intact."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests.helpers import (
    LAST,
    Interruption,
    assert_mistake,
    assert_mistake_of_all_ranks,
    call,
    checkpoint,
    copied,
    results_of,
    run_ranks,
    same,
    stage_flags,
    train,
)
from tests.helpers_prepare import everything
from utils import checkpoint as under_test
from utils.errors import Unavailable, UserError
from utils.log import write_json

PREVIOUS, BEST = under_test.PREVIOUS, under_test.BEST


def state(number) -> dict:
    """The content of a checkpoint, large enough that writing it takes more than one block."""
    return {"epoch": number, "state_dict": {"module.w": torch.full((20000,), float(number))}}


@pytest.fixture
def folder(tmp_path):
    """A folder after three saves, the second of which is the best."""
    for number in (1, 2, 3):
        under_test.write(tmp_path, state(number), is_best=number == 2)
    return tmp_path


def epochs(folder) -> dict:
    return {file.name: checkpoint(folder, file.name)["epoch"] for file in Path(folder).iterdir()}


def test_last_previous_and_best_are_kept(folder):
    assert epochs(folder) == {LAST: 3, PREVIOUS: 2, BEST: 2}
    under_test.write(folder, state(4), is_best=True)
    assert epochs(folder) == {LAST: 4, PREVIOUS: 3, BEST: 4}


def test_copies_are_made_if_the_file_system_has_no_links(folder, monkeypatch):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    under_test.write(folder, state(4), is_best=True)
    assert epochs(folder) == {LAST: 4, PREVIOUS: 3, BEST: 4}


def test_linking_twice_leaves_no_temporary_file(folder):
    """If a save was killed after it linked the last checkpoint as previous, both are the same file."""
    under_test.link(folder / LAST, folder / PREVIOUS)
    under_test.link(folder / LAST, folder / PREVIOUS)
    assert epochs(folder) == {LAST: 3, PREVIOUS: 3, BEST: 2}


def test_file_and_folder_are_flushed_before_and_after_the_name_changes(folder, monkeypatch):
    done = []

    def fsync(descriptor, real=os.fsync):
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real(descriptor)

    def replace(source, target, real=os.replace):
        done.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    under_test.write(folder, state(4))
    assert done == ["file", PREVIOUS, "folder", "file", LAST, "folder"]


# ---- faults in the writer


def failing(number):
    """A function that raises the system's error of this number."""
    return Mock(side_effect=OSError(number, os.strerror(number)))


FAULTS = {
    "read-only": ("builtins.open", errno.EROFS, "Read-only file system"),
    "no permission": ("builtins.open", errno.EACCES, "Permission denied"),
    "full at the flush": ("os.fsync", errno.ENOSPC, "No space left on device"),
    "full at the name": ("os.replace", errno.ENOSPC, "No space left on device"),
    "broken disk": ("os.fsync", errno.EIO, "Input/output error"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_write_that_fails_leaves_every_earlier_checkpoint(folder, monkeypatch, fault):
    place, number, reason = FAULTS[fault]
    before = everything(folder)
    with monkeypatch.context() as patch:
        patch.setattr(place, failing(number))
        kind = Unavailable if number == errno.EIO else UserError
        with pytest.raises(kind, match=reason) as caught:
            under_test.write(folder, state(4), is_best=True)
    assert str(folder / LAST) in str(caught.value)
    assert "\n" not in str(caught.value) and everything(folder) == before


@contextlib.contextmanager
def file_size_limit(size):
    """Limits the size of files that this process writes, like a disk that is full after `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 50_000])
def test_a_write_that_stops_half_way_leaves_every_earlier_checkpoint(folder, size):
    before = everything(folder)
    with pytest.raises(UserError, match="File too large") as caught, file_size_limit(size):
        under_test.write(folder, state(4))
    assert str(folder / LAST) in str(caught.value) and "\n" not in str(caught.value)
    assert everything(folder) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KiB; skips the test if this user may not mount one."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", root]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield root
    subprocess.run(["umount", "-l", root], check=True)


def test_a_full_disk_leaves_every_earlier_checkpoint(small_disk):
    for number in (1, 2):
        under_test.write(small_disk, state(number))
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize  # depends on the size of a page
    (small_disk / "other").write_bytes(b"x" * (free - 40_000))
    before = everything(small_disk)
    with pytest.raises(UserError, match="No space left on device"):
        under_test.write(small_disk, state(3))
    assert everything(small_disk) == before
    (small_disk / "other").unlink()
    under_test.write(small_disk, state(3))
    assert epochs(small_disk) == {LAST: 3, PREVIOUS: 2}


def test_a_read_only_disk_leaves_every_earlier_checkpoint(small_disk):
    under_test.write(small_disk, state(1))
    before = everything(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        under_test.write(small_disk, state(2))
    assert everything(small_disk) == before


@pytest.mark.parametrize("moment", ["os.fsync", "os.link", "os.replace"])
def test_a_kill_during_a_save_loses_nothing_and_its_leftovers_are_removed(folder, monkeypatch, moment):
    """The kills come before the flush, before the link to previous, and before the rename to last."""
    before = everything(folder)
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        under_test.write(folder, state(4))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert set(everything(folder)) - set(before), "the kill must leave a file for this test to mean anything"
    assert {name: everything(folder)[name] for name in before} == before
    under_test.settle(folder)
    assert everything(folder) == before
    assert under_test.find_latest(folder) == folder / LAST


def test_only_temporary_files_are_removed(folder):
    keep = ("log.txt", "args.json", "results.json", ".lock", "notes.tar", ".last_checkpoint.pth.tar", "model.link")
    for name in keep:
        (folder / name).touch()
    before = set(everything(folder))
    for name in (f".{LAST}.abcd_123", f".{BEST}.abcd_123", ".args.json.abcd_123", ".log.txt.abcd_123"):
        (folder / name).touch()
    under_test.settle(folder)
    assert set(everything(folder)) == before


# ---- which checkpoint --resume auto takes


@pytest.mark.parametrize("spoilt", [(LAST,), (LAST, PREVIOUS)])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>", b"\x80\x02c", "a pipe"])
def test_the_newest_readable_checkpoint_is_found(folder, capsys, spoilt, content):
    for name in spoilt:
        (folder / name).unlink()  # it may share its file with another
        os.mkfifo(folder / name) if content == "a pipe" else (folder / name).write_bytes(content)
    assert under_test.find_latest(folder) == folder / (PREVIOUS, BEST)[len(spoilt) - 1]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(spoilt) and all(str(folder / name) in line for name, line in zip(spoilt, said, strict=True))


def test_no_readable_checkpoint_is_an_error(folder, tmp_path):
    for name in (LAST, PREVIOUS, BEST):
        (folder / name).unlink()
        (folder / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="to start over, remove them"):
        under_test.find_latest(folder)
    assert under_test.find_latest(tmp_path / "new") is None


def test_a_damaged_last_checkpoint_never_becomes_the_previous_one(folder):
    whole = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(whole[:1000])
    under_test.quarantine_unreadable(folder, folder / PREVIOUS)
    with pytest.raises(UserError), file_size_limit(1000):
        under_test.write(folder, state(4))
    assert checkpoint(folder, PREVIOUS)["epoch"] == 2 and not (folder / LAST).exists()
    under_test.write(folder, state(3))
    assert checkpoint(folder, LAST)["epoch"] == 3 and checkpoint(folder, PREVIOUS)["epoch"] == 2


def test_a_readable_checkpoint_is_not_renamed(folder):
    before = everything(folder)
    for name in (LAST, PREVIOUS):
        under_test.quarantine_unreadable(folder, folder / name)
    assert everything(folder) == before


# ---- in a run


def test_a_run_whose_disk_fills_stops_and_can_continue(trained, plain_tree, tmp_path):
    """The checkpoint of its second epoch does not fit; that of the first is kept."""
    run = tmp_path / "run"

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = Interruption("epoch 2/2 [1/", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1])))
    try:
        outcome = call("i", stage_flags("i", plain_tree, run, ["--cos", "-p", 1]), out=full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_mistake(outcome, f"{run / LAST}: cannot be written (File too large)")
    assert checkpoint(run)["epoch"] == 1 and not list(run.glob(".*.tar.*"))
    train("i", plain_tree, run, "--cos", "--resume", "auto")
    assert same(checkpoint(run), checkpoint(trained["i"])) and results_of(run) == results_of(trained["i"])


def test_a_log_that_cannot_be_written_is_named_and_costs_no_checkpoint(trained, plain_tree, tmp_path):
    run = copied(trained["i"], tmp_path / "run")
    shutil.copy(run / PREVIOUS, run / LAST)
    before = (run / LAST).read_bytes()

    def make_folder():
        (run / "log.txt").unlink()
        (run / "log.txt").mkdir()

    flags = ["--cos", "-p", 1, "--resume", "auto"]
    out = Interruption("epoch 2/2 [1/", make_folder)
    outcome = call("i", stage_flags("i", plain_tree, run, flags), out=out)
    assert_mistake(outcome, f"{run / 'log.txt'}: cannot be written")
    assert (run / LAST).read_bytes() == before


def test_results_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"results.json: cannot be written"):
        write_json(tmp_path / "results.json", [])


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_two_processes_with_a_full_disk_end_in_one_line(plain_tree, tmp_path):
    flags = ["--save-every-steps", 2]
    outcomes = run_ranks("i", plain_tree, tmp_path / "run", *flags, setup=limit_file_size)
    assert_mistake_of_all_ranks(outcomes, f"{tmp_path / 'run' / LAST}: cannot be written (File too large)")


def test_a_best_checkpoint_that_cannot_be_named_leaves_the_last_one(folder, monkeypatch):
    """The last checkpoint says how good the best is: it must not be ahead of the file."""
    before = everything(folder)

    def link(source, target, real=under_test.link):
        if target.name == BEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(under_test, "link", link)
    with pytest.raises(UserError, match="No space left on device"):
        under_test.write(folder, state(4), is_best=True)
    assert {name: everything(folder)[name] for name in (LAST, BEST)} == {name: before[name] for name in (LAST, BEST)}
