"""Errors of the system, which are neither a file's nor the user's: tried again, then status 75; the finished steps."""

import builtins
import errno
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets.lists import ImageList
from datasets.prepare.cli import main as prepare
from datasets.verify import main as verify
from models import loading
from tests.helpers import (
    BEST,
    LAST,
    PREVIOUS,
    ROOT,
    assert_mistake,
    assert_one_line,
    assert_same_run,
    checkpoint,
    copied,
    outcome_of,
    results_of,
    run_ranks,
    run_stage,
    same,
    source,
    stage_flags,
    train,
)
from utils import errors
from utils.checkpoint import find_latest, trained_on
from utils.images import load_rgb
from utils.predict import main as predict
from utils.report import main as report

PASSING = ("EIO", "ESTALE", "ETIMEDOUT")
ALWAYS = 10**6


@pytest.fixture
def broken(monkeypatch):
    """broken(owner, name, error, file): owner.name(path) raises for paths that end in file, `times` times."""
    monkeypatch.setattr(errors, "PAUSES", (0.0, 0.0))

    def break_(owner, name, error, file, times=ALWAYS, after=0):
        real, calls = getattr(owner, name), Counter()
        number = getattr(errno, error)

        def function(path, *args, **options):
            if isinstance(path, str | os.PathLike) and os.fspath(path).endswith(file):
                calls[file] += 1
                if after < calls[file] <= after + times:
                    raise OSError(number, os.strerror(number))
            return real(path, *args, **options)

        monkeypatch.setattr(owner, name, function)
        return monkeypatch

    return break_


# ---- images


@pytest.mark.parametrize("error", PASSING)
def test_an_image_that_cannot_be_read_at_first_changes_nothing(plain_tree, broken, error):
    file = plain_tree / "train/class0/train_7.png"
    before = load_rgb(file)
    broken(Image, "open", error, "class0/train_7.png", times=2)
    assert load_rgb(file) == before


@pytest.mark.parametrize(
    ("stage", "file", "after"), [("i", ".png", 60), ("ii", ".png", 60), ("iii", "class3/val_2.png", 0)]
)
def test_the_finished_steps_are_saved_and_continue_exactly(trained, plain_tree, tmp_path, broken, stage, file, after):
    """Validation has no step of its own: all of the epoch's are kept."""
    run, flags = tmp_path / "run", ["--cos", *source(stage, trained)]
    patch = broken(Image, "open", "EIO", file, after=after)
    outcome = run_stage(stage, plain_tree, run, *flags)
    assert_one_line(outcome, 75, f"{plain_tree}/train/class", file, "Input/output error", "--resume auto", ".txt, line")
    assert (checkpoint(run)["epoch"], checkpoint(run)["step"]) == (0, 3 if after else 9)
    patch.undo()
    assert_same_run(train(stage, plain_tree, run, "--cos", "--resume", "auto"), trained[stage])


@pytest.mark.parametrize("flags", [["-j", 2], ["--accum-steps", 4]], ids=str)
def test_a_step_that_has_begun_is_not_saved_in_part(plain_tree, tmp_path, broken, flags):
    whole, run = train("i", plain_tree, tmp_path / "whole", *flags), tmp_path / "run"
    patch = broken(Image, "open", "ESTALE", "class1/train_20.png")
    assert_one_line(run_stage("i", plain_tree, run, *flags), 75, "class1/train_20.png", "Stale file handle")
    assert checkpoint(run)["step"] > 0
    patch.undo()
    assert_same_run(train("i", plain_tree, run, "--resume", "auto"), whole)


def break_images_of_rank_1():
    errors.PAUSES, real = (0.0,), Image.open

    def function(file, *args, **options):
        if os.environ["RANK"] == "1" and str(file).endswith("0.png"):
            raise OSError(errno.EIO, "Input/output error")
        return real(file, *args, **options)

    Image.open = function


def test_of_several_ranks_one_that_cannot_read_ends_alone(plain_tree, tmp_path):
    first, second = run_ranks("i", plain_tree, tmp_path / "run", setup=break_images_of_rank_1)
    assert_one_line(second, 75, "0.png", "Input/output error")
    assert first.status == 1 and "lost contact" in first.err
    assert not (tmp_path / "run" / LAST).exists()


def test_an_error_that_the_decoder_hides_is_not_the_files(plain_tree, broken, monkeypatch):
    """As in the header of a TIFF."""
    file = plain_tree / "train/class0/train_7.png"
    monkeypatch.setattr(Image, "open", lambda file, *_, real=Image.open, **__: real(__file__))  # no image
    broken(builtins, "open", "EIO", file.name)
    with pytest.raises(errors.Unavailable, match="Input/output error"):
        load_rgb(file)


@pytest.mark.parametrize("error", ["EACCES", "ENOENT"])
def test_what_does_not_pass_is_not_tried_again(plain_tree, tmp_path, broken, error):
    broken(Image, "open", error, "class0/train_7.png", times=1)
    assert_mistake(run_stage("i", plain_tree, tmp_path / "run"), "class0/train_7.png")


# ---- lists, folders and the look-up at the start


@pytest.mark.parametrize("file", ["class2/test_1.png", "val.txt", "", LAST])
def test_what_cannot_be_looked_up_now_is_not_missing(trained, plain_tree, tmp_path, broken, file):
    """Neither images, nor lists, nor DIR, nor the checkpoints of a run that goes on."""
    run, place = copied(trained["i"], tmp_path / "run"), file or os.fspath(plain_tree)
    broken(os, "stat", "ESTALE", place, times=1)
    train("i", plain_tree, run, "--cos", "--resume", "auto")
    assert results_of(run) == results_of(trained["i"])
    broken(os, "stat", "ESTALE", place)
    outcome = run_stage("i", plain_tree, run, "--cos", "--resume", "auto")
    assert_one_line(outcome, 75, place, "Stale file handle")
    assert checkpoint(run)["epoch"] == 2


@pytest.mark.parametrize("error", ["EACCES", "ENOTCONN"])
@pytest.mark.parametrize("file", ["", "test.txt", "val/class2/test_1.png"])
def test_what_the_system_does_not_show_is_not_called_missing(plain_tree, tmp_path, broken, capsys, error, file):
    """A folder above it may not be searched, or its file system is gone."""
    place, reason = plain_tree / file, os.strerror(getattr(errno, error))
    broken(os, "stat", error, os.fspath(place))
    for outcome in (run_stage("i", plain_tree, tmp_path / "run"), outcome_of(verify, capsys, plain_tree)):
        said = outcome[1] + outcome[2]
        assert outcome[0] == 2 or file.endswith(".png"), outcome
        where = place if error == "ENOTCONN" or not file.endswith(".png") else place.parent
        assert f"{where}: {reason}" in said and "no such" not in said, said


def test_a_list_that_cannot_be_read_now(plain_tree, tmp_path, broken):
    broken(Path, "read_bytes", "EIO", "test.txt", times=1)
    assert len(ImageList.from_file(plain_tree / "test.txt")) == 30
    broken(Path, "read_bytes", "EIO", "test.txt")
    assert_one_line(run_stage("i", plain_tree, tmp_path / "run"), 75, plain_tree / "test.txt", "Input/output error")


@pytest.mark.parametrize("times", [1, ALWAYS])
@pytest.mark.parametrize("command", ["predict", "verify", "prepare", "report"])
def test_commands_try_again_too(trained, plain_tree, tmp_path, broken, capsys, command, times):
    photos, image = copied(plain_tree / "train", tmp_path / "photos"), "class0/train_7.png"
    main, argv, place = {
        "predict": (predict, [trained["i"] / LAST, photos], (Image, "open", "EIO", image)),
        "verify": (verify, [plain_tree, "--decode"], (Image, "open", "EIO", image)),
        "prepare": (prepare, ["folder", photos], (os, "scandir", "EIO", "class2")),
        "report": (report, [trained["i"]], (Path, "read_bytes", "EIO", "results.json")),
    }[command]
    broken(*place, times)
    outcome = outcome_of(main, capsys, *argv)
    if times == 1:
        assert outcome[0] == 0, outcome
    else:
        assert outcome[0] == 75 and place[3] in outcome[2] and "Input/output error" in outcome[2], outcome
        assert "replace the file" not in outcome[2]


# ---- checkpoints


def test_a_checkpoint_is_read_where_files_are_not_mapped(trained, monkeypatch):
    """As on some FUSE and network file systems: ENODEV."""

    def from_file(*args):
        raise RuntimeError("unable to mmap 84000 bytes from file <last>: No such device (19)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", from_file)
    assert same(loading.read_checkpoint(trained["i"] / LAST), checkpoint(trained["i"]))


@pytest.mark.parametrize("error", PASSING)
@pytest.mark.parametrize("name", ["open_regular", "check_zip"])
def test_no_older_checkpoint_takes_the_place_of_one_that_cannot_be_read_now(trained, monkeypatch, error, name):
    """zipfile makes its own error of the system's."""
    monkeypatch.setattr(errors, "PAUSES", (0.0,))
    last, number, left, real = trained["i"] / LAST, getattr(errno, error), [ALWAYS], getattr(loading, name)

    def function(file):
        if left[0] and str(getattr(file, "name", file)).endswith(LAST):
            left[0] -= 1
            try:
                raise OSError(number, os.strerror(number))
            except OSError:
                if name == "check_zip":
                    raise ValueError("File is not a zip file")  # noqa: B904
                raise
        return real(file)

    monkeypatch.setattr(loading, name, function)
    for look in (find_latest, trained_on):
        with pytest.raises(errors.Unavailable, match=re.escape(f"{last}: the system cannot read it now")):
            look(trained["i"] if look is find_latest else last)
    left[0] = 1
    assert find_latest(trained["i"]) == last


def test_a_checkpoint_that_may_not_be_read_is_left_alone(trained, tmp_path, broken):
    run = copied(trained["i"], tmp_path / "run")
    broken(loading, "open_regular", "EACCES", LAST)
    with pytest.raises(errors.UserError, match="Permission denied"):
        find_latest(run)
    assert {LAST, PREVIOUS, BEST} <= set(os.listdir(run))


def test_a_path_that_the_locale_cannot_encode_is_read(trained, plain_tree, tmp_path):
    run = copied(trained["i"], tmp_path / "実験")
    words = [ROOT / "ssd_stage_i.py", *stage_flags("i", plain_tree, run, ["--cos", "--resume", "auto"])]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, cwd=ROOT, capture_output=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"") and b"2 epochs are done" in done.stdout


# ---- what data workers need of the system


@pytest.mark.parametrize("workers", [2, 5])
def test_too_few_file_descriptors_end_the_run_in_one_line(plain_tree, tmp_path, workers):
    argv = stage_flags("i", plain_tree, tmp_path / "run", ["-j", workers])
    done = subprocess.run(
        [sys.executable, ROOT / "ssd_stage_i.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)), check=False,
    )  # fmt: skip
    assert_mistake((done.returncode, done.stdout, done.stderr), "ulimit -n", "--workers")


@pytest.mark.parametrize("size", ["12k", "200k"])
def test_too_small_a_dev_shm_is_named(plain_tree, tmp_path, size):
    """It has no room for semaphores, or for batches."""
    argv = map(str, stage_flags("i", plain_tree, tmp_path / "run", ["-j", 2, "-b", 64, "--moco-k", 64]))
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "ssd_stage_i.py", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert_mistake((done.returncode, done.stdout, done.stderr), "/dev/shm", "--shm-size", "--workers")
    assert not re.search("memory", done.stderr)
