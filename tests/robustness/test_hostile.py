"""Hostile lists, images, checkpoints and flags: each ends in one line that names it, and does no harm."""

import io
import math
import os
import pickle
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import assert_mistake, assert_mistake_of_all_ranks, checkpoint, run_ranks, run_shell, run_stage
from tests.helpers_prepare import fails
from utils.checkpoint import PREVIOUS, read, restore_momentum
from utils.errors import Unavailable, UserError
from utils.images import load_rgb

# ---- lists

LISTS_OF_FILES = {  # lists that are well-formed
    "a label that would use up all memory": (b"train/class0/train_0.png 2147483647", "--num-classes"),
    "a name of a megabyte": (b"a" * 2**20 + b".png 0", "1 of 1 files are not in"),
    "terminal commands in a path": (b"train/\x1b[2J\x1b]0;owned\x07.png 0", "1 of 1 files are not in"),
    "a folder": (b"train/class0 0", "1 of 1 files are not in"),
    "a pipe": (b"train/class0/pipe 0", "1 of 1 files are not in"),
    "a link to itself": (b"train/class0/loop 0", "1 of 1 files are not in"),
}


@pytest.fixture(scope="module")
def tree(plain_tree, tmp_path_factory):
    """The small tree, with some entries that are not regular files."""
    root = shutil.copytree(plain_tree, tmp_path_factory.mktemp("hostile") / "tree")
    os.mkfifo(root / "train" / "class0" / "pipe")
    (root / "train" / "class0" / "loop").symlink_to("loop")
    return root


@pytest.mark.parametrize("case", LISTS_OF_FILES)
def test_a_list_of_hostile_files_is_refused_in_one_line(tree, tmp_path, case):
    content, reason = LISTS_OF_FILES[case]
    (tmp_path / "list.txt").write_bytes(content)
    outcome = run_stage("i", tree, tmp_path / "run", "--train-list", tmp_path / "list.txt")
    assert_mistake(outcome, tmp_path / "list.txt", reason)


# ---- images


def encoded(image, form, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
JPEG, PNG = encoded(NOISE, "JPEG"), encoded(NOISE, "PNG")
BOMB = "decompression bomb, over 178956970 pixels"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/harm) (w) file closefile\nshowpage\n%%EOF\n"

IMAGES = {
    "an empty file": (b"", "not an image, it has 0 bytes"),
    "an HTML page": (b"<!DOCTYPE html><html>quota exceeded</html>", "not an image"),
    "PostScript": (POSTSCRIPT, "not an image"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "only a JPEG's header": (JPEG[:30], "cannot be decoded"),
    "a PNG with a flipped bit": (PNG[:100] + bytes([PNG[100] ^ 1]) + PNG[101:], "cannot be decoded"),
    "only a PNG's header": (PNG[:33], "not an image"),
    "a PNG of no pixels": (png(0, 0, png_chunk(b"IDAT", zlib.compress(b""))), "replace the file"),
    "half a WebP": (encoded(NOISE, "WEBP", lossless=True)[:2000], "cannot be decoded"),
    "half a TIFF": (encoded(NOISE, "TIFF")[:900], "replace the file"),
    "a PNG bomb": (encoded(Image.new("1", (20000, 20000)), "PNG"), BOMB),
    "a PNG that claims to be a bomb": (png(100_000, 100_000, png_chunk(b"IDAT", zlib.compress(bytes(9)))), BOMB),
    "a PPM that claims to be a bomb": (b"P6 100000 100000 255\n" + bytes(100), BOMB),
    "a PNG whose text is a bomb": (
        png(8, 8, *[png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6), 9))] * 70,
            png_chunk(b"IDAT", zlib.compress(bytes(25 * 8)))),
        "cannot be decoded",
    ),
}  # fmt: skip


def test_the_images_that_the_hostile_ones_are_made_from_are_read(tmp_path):
    for name, content in {"jpeg": JPEG, "png": png(8, 8, png_chunk(b"IDAT", zlib.compress(bytes(25 * 8))))}.items():
        (tmp_path / name).write_bytes(content)
        assert load_rgb(tmp_path / name).mode == "RGB"


@pytest.mark.parametrize("case", IMAGES)
def test_a_hostile_image_is_refused_in_one_line(tmp_path, case):
    content, reason = IMAGES[case]
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        load_rgb(tmp_path / "image.png")
    assert str(tmp_path / "image.png") in str(caught.value) and str(caught.value).isprintable()
    assert not Path("/tmp/harm").exists()


# ---- checkpoints


class Call:
    """Calls a function with arguments when it is unpickled by a loader that runs code."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def changed(whole, file, **entries):
    torch.save(whole | entries, file)


def traversing(whole, file):
    """A checkpoint with an entry whose name leads out of the folder that it is unpacked in."""
    torch.save(whole, file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../harm", b"harm")


def cut_in_half(whole, file):
    torch.save(whole, file)
    os.truncate(file, file.stat().st_size // 2)


def without_one_weight(whole, file):
    weight = "module.classifier.weight" if whole["stage"] == "i" else "module.classifier.fc.weight"
    changed(whole, file, state_dict={name: value for name, value in whole["state_dict"].items() if name != weight})


def with_weight(whole, file, name, value):
    changed(whole, file, state_dict=whole["state_dict"] | {f"module.{name}": value})


def with_momenta(whole, file, change):
    states = whole["optimizer"]["state"].items()
    states = {number: {"momentum_buffer": change(state["momentum_buffer"])} for number, state in states}
    changed(whole, file, optimizer=whole["optimizer"] | {"state": states})


def averages(**changes):
    """Sums of an epoch's five metrics, as in a checkpoint within an epoch."""
    names = ["loss", "cross_entropy", "contrastive", "top1_linear", "top5_linear"]
    return {"names": names, "sums": [[1.0] * len(names)], "steps": 2} | changes


def midway_of(whole, file, step=2, images=32, **changes):
    changed(whole, file, step=step, images=images, averages=averages(steps=step, **changes))


CODE = "could run code"
CHECKPOINTS = {
    "os.system": (lambda w, f: changed(w, f, extra=Call(os.system, "touch /tmp/harm")), CODE),
    "a bare pickle": (lambda w, f: f.write_bytes(pickle.dumps(Call(os.system, "touch /tmp/harm"))), "not loaded"),
    "an array of objects": (lambda w, f: changed(w, f, extra=np.array([Call(os.getcwd)], dtype=object)), "not loaded"),
    "a pickled module": (lambda w, f: torch.save(torch.nn.Linear(2, 2), f), CODE),
    "a compiled module": (lambda w, f: torch.jit.script(torch.nn.Identity()).save(str(f)), "not loaded"),
    "steps without images": (lambda w, f: midway_of(w, f, step=10, images=0), "step 10 after 0 images"),
    "more images than an epoch": (lambda w, f: midway_of(w, f, step=10, images=160), "160 images, an epoch has 154"),
    "a mean above 1": (lambda w, f: changed(w, f, args={"mean": [0.5, 0.5, 3.0]}), "--mean"),
    "an argument out of bounds": (lambda w, f: changed(w, f, args={"lr": 1e300}), "--lr 1e+300"),
    "class names that are None": (lambda w, f: changed(w, f, classes=[None] * 6), "its classes"),
    "class names in one string": (lambda w, f: changed(w, f, classes="abcdef"), "its classes"),
    "one class name too few": (lambda w, f: changed(w, f, classes=list("abcde")), "names 5 classes, and has 6"),
    "averages of unknown metrics": (lambda w, f: midway_of(w, f, names=list("abcde")), "averages are of a"),
    "an optimizer that is a list": (lambda w, f: changed(w, f, optimizer=[1]), "its optimizer"),
    "an empty optimizer": (lambda w, f: changed(w, f, optimizer={"state": {}, "param_groups": []}), "its optimizer"),
    "momenta of another shape": (lambda w, f: with_momenta(w, f, lambda _: torch.zeros(3)), "its optimizer"),
    "momenta that are text": (lambda w, f: with_momenta(w, f, str), "its optimizer"),
    "sparse momenta": (lambda w, f: with_momenta(w, f, torch.Tensor.to_sparse), "its optimizer"),
    "momenta that are not finite": (lambda w, f: with_momenta(w, f, lambda x: x + math.inf), "its optimizer"),
    "infinite weights": (lambda w, f: with_weight(w, f, "classifier.bias", torch.ones(6) / 0), "classifier.bias"),
    "one weight too many": (lambda w, f: with_weight(w, f, "extra", torch.zeros(1)), "extra"),
    "a weight of another shape": (lambda w, f: with_weight(w, f, "encoder_q.bn1.bias", torch.zeros(3)), "its backbone"),
    "an empty queue": (lambda w, f: with_weight(w, f, "queue", torch.zeros(0)), "queue"),
    "half a checkpoint": (cut_in_half, "not loaded"),
    "no weights": (lambda w, f: torch.save({"epoch": 1}, f), "no state_dict"),
    "one weight too few": (without_one_weight, "classifier.weight"),
    "weights of something else": (lambda w, f: changed(w, f, state_dict=torch.nn.Linear(2, 2).state_dict()), "belong"),
    "an entry that leads out of the archive": (traversing, "not loaded"),
    "a pipe": (lambda w, f: os.mkfifo(f), "not a regular file"),
}  # fmt: skip


FIELDS = {
    "epoch": [-1, math.nan, math.inf, 0.5, torch.tensor([1, 2]), "one", None],
    "step": [-3, 10**30, 3],
    "images": ["all", -1],
    "best_acc1": [torch.tensor(math.nan), torch.zeros(2), "all"],
    "best_metric": [1],
    "args": [[1], {"lr": torch.zeros(2)}, {"schedule": [{}]}],
    "run": [[1], {"seed": "x"}, {"world_size": -1}],
    "averages": [
        "none", averages(names=["a"]), averages(names=[1] * 5), averages(sums=[[math.nan] * 5]), averages(sums=[]),
        averages(sums=[["high"] * 5]), averages(steps=3), averages(steps=2.0), None,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FIELDS.items() for value in values])
def test_a_field_that_no_save_writes_is_refused_in_one_line(tmp_path, name, value):
    content = {"state_dict": {"w": torch.zeros(1)}, "epoch": 1, "step": 2, "images": 32, "averages": averages()}
    content["run"] = {"seed": 2**63 - 1}
    torch.save(content, tmp_path / "whole.tar")
    assert read(tmp_path / "whole.tar", "--resume")["step"] == 2
    torch.save(content | {name: value}, tmp_path / "hostile.tar")
    with pytest.raises(UserError, match=r"hostile.tar: its fields .* correct --resume"):
        read(tmp_path / "hostile.tar", "--resume")


@pytest.fixture(scope="module")
def midway(trained):
    """A checkpoint from which training would continue."""
    return checkpoint(trained["i"], PREVIOUS)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused_in_one_line(midway, plain_tree, tmp_path, case):
    write, reason = CHECKPOINTS[case]
    file = tmp_path / "hostile.tar"
    write(midway, file)
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--resume", file)
    assert_mistake(outcome, file, reason)
    assert not Path("/tmp/harm").exists() and not [*tmp_path.glob("run/*.tar"), *tmp_path.rglob("harm")]


def test_invalid_weights_are_not_evaluated(midway, plain_tree, tmp_path):
    write, reason = CHECKPOINTS["infinite weights"]
    write(midway, tmp_path / "hostile.tar")
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--evaluate", "--resume", tmp_path / "hostile.tar")
    assert_mistake(outcome, tmp_path / "hostile.tar", reason)
    assert "Overall" not in outcome.out


@pytest.mark.parametrize(
    ("stage", "flag", "made_by"), [("ii", "--last_stage_ckpt", "i"), ("iii", "--teacher_ckpt", "ii")]
)
@pytest.mark.parametrize("case", ["a bare pickle", "a pipe", "weights of something else", "one weight too few"])
def test_a_hostile_checkpoint_of_the_stage_before_is_refused(trained, plain_tree, tmp_path, stage, flag, made_by, case):
    write, reason = CHECKPOINTS[case]
    write(checkpoint(trained[made_by]), tmp_path / "hostile.tar")
    reason = "classifier" if case == "one weight too few" else reason
    outcome = run_stage(stage, plain_tree, tmp_path / "run", flag, tmp_path / "hostile.tar")
    assert_mistake(outcome, tmp_path / "hostile.tar", flag, reason)
    assert not Path("/tmp/harm").exists()


def test_a_pickle_given_to_two_processes_ends_in_one_line(midway, plain_tree, tmp_path):
    file = tmp_path / "hostile.tar"
    CHECKPOINTS["a bare pickle"][0](midway, file)
    outcomes = run_ranks("ii", plain_tree, tmp_path / "run", "--last_stage_ckpt", file)
    assert_mistake_of_all_ranks(outcomes, file, "--last_stage_ckpt")
    assert not Path("/tmp/harm").exists()


@pytest.mark.parametrize(
    "changes",
    [{"maximize": True}, {"nesterov": True}, {"dampening": "much"}, {"lr": 1e9, "momentum": 0.1, "foreach": True}],
    ids=str,
)
def test_no_setting_of_a_saved_optimizer_reaches_the_run(changes):
    parameter = torch.nn.Parameter(torch.ones(3))
    ours = torch.optim.SGD([parameter], 0.1, 0.9)
    before = [dict(group) for group in ours.param_groups]
    theirs = {"state": {0: {"momentum_buffer": torch.full((3,), 2.0)}}, "param_groups": [{"params": [0], **changes}]}
    restore_momentum(ours, theirs)
    assert ours.param_groups == before
    assert ours.state[parameter]["momentum_buffer"].tolist() == [2, 2, 2]


# ---- archives


def test_nothing_of_an_archive_that_is_not_the_published_one_is_opened_or_written(tmp_path, monkeypatch, capsys):
    """It is given as CIFAR's, with --source."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../harm"))
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("opened"))
    said = fails(capsys, "cifar10-lt", "--out", tmp_path / "out", "--source", archive)
    assert all(word in said for word in (str(archive), "is not the published", "get it again")), said
    assert not list(tmp_path.rglob("harm")) and not any((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("kind", [UserError, Unavailable])
def test_a_message_is_one_line_whatever_it_quotes(kind):
    assert str(kind("a\nb\x1b[2J\r\udcff é 漢")) == "a\\nb\\x1b[2J\\r\\udcff é 漢"


# ---- through the shell


def test_a_hostile_checkpoint_through_the_shell_ends_in_one_line(midway, plain_tree, tmp_path):
    write, reason = CHECKPOINTS["os.system"]
    write(midway, tmp_path / "hostile.tar")
    assert_mistake(run_shell("i", plain_tree, tmp_path / "run", "--resume", tmp_path / "hostile.tar"), reason)
    assert not Path("/tmp/harm").exists()
