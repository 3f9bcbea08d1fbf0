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
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import prepare
from datasets.dataset import load_rgb
from tests.helpers import CLASSES, LAST, Outcome, checkpoint, limited_memory, run_shell, run_stage, same
from utils.errors import UserError

LONGEST_LINE = 2000


def assert_refused(outcome, *words, status=2):
    assert outcome.status == status, outcome
    assert re.fullmatch(r"[^\n]+\n", outcome.err), outcome.err
    line = outcome.err[:-1]
    assert line.isprintable() and len(line) < LONGEST_LINE
    assert "Traceback" not in line
    for word in map(str, words):
        assert word in line, (word, line)


# ---- lists

LISTS = {
    "up and out": (b"../../../../etc/passwd 0", "leaves the image root"),
    "down, up and out": (b"train/class0/../../../x.png 0", "leaves the image root"),
    "up at the end": (b"train/.. 0", "leaves the image root"),
    "up in Windows' way": (b"train\\..\\..\\x.png 0", "leaves the image root"),
    "absolute": (b"/etc/passwd 0", "absolute"),
    "absolute after spaces": (b"   /etc/passwd 0", "absolute"),
    "absolute in Windows' way": (b"C:\\windows\\x.png 0", "absolute"),
    "a network share": (b"\\\\server\\share\\x.png 0", "absolute"),
    "NUL": (b"train/class0/train_0.png\0.txt 0", "NUL"),
    "no UTF-8": (b"train/class0/\xff\xfe.png 0", "UTF-8"),
    "UTF-16": ("train/class0/train_0.png 0".encode("utf-16"), "line 1"),
    "gzip": (b"\x1f\x8b\x08\x00" + zlib.compress(b"train/class0/train_0.png 0"), "line 1"),
    "a pickle": (pickle.dumps([("train/class0/train_0.png", 0)]), "line 1"),
    "no label": (b"train/class0/train_0.png", "no label"),
    "a negative label": (b"train/class0/train_0.png -1", "-1"),
    "a label with a sign": (b"train/class0/train_0.png +1", "+1"),
    "a broken label": (b"train/class0/train_0.png 1.0", "1.0"),
    "an exponent": (b"train/class0/train_0.png 1e3", "1e3"),
    "a hexadecimal label": (b"train/class0/train_0.png 0x1", "0x1"),
    "Python's underscore": (b"train/class0/train_0.png 1_0", "1_0"),
    "an Arabic digit": ("train/class0/train_0.png \u0663".encode(), "not a whole number"),
    "a label beyond 32 bits": (b"train/class0/train_0.png 4294967296", "too large"),
    "a label of 100,000 digits": (b"train/class0/train_0.png " + b"9" * 100_000, "too large"),
    "a label that would cost all memory": (b"train/class0/train_0.png 2147483647", "--num-classes"),
    "a name of a megabyte": (b"a" * 2**20 + b".png 0", "1 of 1 files are not in"),
    "a terminal's commands": (b"train/\x1b[2J\x1b]0;owned\x07.png 0", "1 of 1 files are not in"),
    "a carriage return": (b"train/a\rb.png 0", "1 of 1 files are not in"),
    "a folder": (b"train/class0 0", "1 of 1 files are not in"),
    "a device": (b"train/class0/null 0", "1 of 1 files are not in"),
    "a pipe": (b"train/class0/pipe 0", "1 of 1 files are not in"),
    "a link to nothing": (b"train/class0/nothing 0", "1 of 1 files are not in"),
    "a link to itself": (b"train/class0/loop 0", "1 of 1 files are not in"),
    "nothing": (b"", "empty"),
    "blank lines": (b"\n\r\n \t\n", "empty"),
    "a byte order mark alone": (b"\xef\xbb\xbf", "empty"),
}


@pytest.fixture(scope="module")
def tree(plain_tree, tmp_path_factory):
    """The small tree by links, with things in it that are no files."""
    root = tmp_path_factory.mktemp("hostile")
    for name in ("train.txt", "val.txt", "test.txt"):
        (root / name).symlink_to(plain_tree / name)
    (root / "val").symlink_to(plain_tree / "val")
    folder = root / "train" / "class0"
    folder.mkdir(parents=True)
    for there in plain_tree.glob("train/*"):
        if there.name != folder.name:
            (root / "train" / there.name).symlink_to(there)
    for there in plain_tree.glob(f"train/{folder.name}/*"):
        (folder / there.name).symlink_to(there)
    (folder / "null").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe")
    (folder / "nothing").symlink_to(root / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    return root


@pytest.mark.parametrize("case", LISTS)
def test_a_hostile_list_is_refused_in_one_line(tree, tmp_path, case):
    content, told = LISTS[case]
    (tmp_path / "list.txt").write_bytes(content)
    outcome = run_stage("i", tree, tmp_path / "run", "--train-list", tmp_path / "list.txt")
    assert_refused(outcome, tmp_path / "list.txt", told)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_list(tree, tmp_path, kind):
    file = {"folder": tmp_path, "pipe": tree / "train/class0/pipe", "device": Path("/dev/zero")}[kind]
    assert_refused(run_stage("i", tree, tmp_path / "run", "--val-list", file), file, "--val-list")


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
BOMB = "decompression bomb"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/harm) (w) file closefile\nshowpage\n%%EOF\n"

IMAGES = {
    "nothing": (b"", "not an image"),
    "text": (b"no image\n", "not an image"),
    "a page": (b"<!DOCTYPE html><html>quota exceeded</html>", "not an image"),
    "a script": (b"#!/bin/sh\ntouch /tmp/harm\n", "not an image"),
    "a pickle": (pickle.dumps(os.getcwd), "not an image"),
    "an archive": (b"PK\x05\x06" + bytes(18), "not an image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "not an image"),
    "PDF": (b"%PDF-1.4\n1 0 obj<</OpenAction 2 0 R>>endobj\n", "not an image"),
    "PostScript": (POSTSCRIPT, "not an image"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "a JPEG's header": (JPEG[:30], "cannot be decoded"),
    "half a PNG": (PNG[: len(PNG) // 2], "truncated"),
    "a PNG with a flipped bit": (PNG[:100] + bytes([PNG[100] ^ 1]) + PNG[101:], "cannot be decoded"),
    "a PNG's header alone": (PNG[:33], "not an image"),
    "a PNG of no pixels": (png(0, 0, png_chunk(b"IDAT", zlib.compress(b""))), "i"),
    "half a WebP": (encoded(NOISE, "WEBP", lossless=True)[:2000], "cannot be decoded"),
    "half a GIF": (encoded(NOISE, "GIF")[:900], "truncated"),
    "half a BMP": (encoded(NOISE, "BMP")[:900], "truncated"),
    "half a TIFF": (encoded(NOISE, "TIFF")[:900], "i"),
    "a PNG bomb": (encoded(Image.new("1", (20000, 20000)), "PNG"), BOMB),
    "a PNG that claims to be one": (png(100_000, 100_000, png_chunk(b"IDAT", zlib.compress(bytes(9)))), BOMB),
    "a GIF that claims to be one": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + bytes(20), "i"),
    "a BMP that claims to be one": (
        b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, *[0] * 6),
        BOMB,
    ),
    "a PPM that claims to be one": (b"P6 100000 100000 255\n" + bytes(100), BOMB),
    "a text bomb": (
        png(8, 8, *[png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6), 9))] * 70,
            png_chunk(b"IDAT", zlib.compress(bytes(25 * 8)))),
        "cannot be decoded",
    ),
}  # fmt: skip


def test_the_images_would_be_read_if_they_were_sound(tmp_path):
    for name, content in {"jpeg": JPEG, "png": png(8, 8, png_chunk(b"IDAT", zlib.compress(bytes(25 * 8))))}.items():
        (tmp_path / name).write_bytes(content)
        assert load_rgb(tmp_path / name).mode == "RGB"


@pytest.mark.parametrize("case", IMAGES)
def test_a_hostile_image_is_refused_in_one_line(trained, plain_tree, tmp_path, case):
    """As an image of the test list: the run names file and line."""
    content, told = IMAGES[case]
    root = tmp_path / "tree"
    root.mkdir()
    (root / "image.png").write_bytes(content)
    (root / "train.txt").symlink_to(plain_tree / "train.txt")
    (root / "test.txt").write_text("\nimage.png 0\n")
    outcome = run_stage("i", root, tmp_path / "run", "--evaluate", "--resume", trained["i"] / LAST)
    assert_refused(outcome, root / "image.png", "test.txt, line 2", told)
    assert not Path("/tmp/harm").exists()


# ---- checkpoints


class Call:
    """Calls a function with arguments when it is unpickled by a loader that runs code."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Scripted(torch.nn.Module):
    def forward(self, x):
        return x


def saved(file, content, **options):
    torch.save(content, file, **options)


def changed(whole, file, **entries):
    saved(file, whole | entries)


def traversing(whole, file):
    """An archive with an entry whose name leaves any folder that it is unpacked in."""
    saved(file, whole)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../../../../harm", b"harm")


def rewritten(whole, file, name, change):
    """A checkpoint one entry of whose archive is changed."""
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.namelist():
            content = source.read(entry)
            target.writestr(entry, change(content) if entry.endswith(name) else content)


def without(whole, file, *names):
    """A checkpoint that lacks entries of its archive."""
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.namelist():
            if not entry.endswith(names):
                target.writestr(entry, source.read(entry))


def optimizer(whole, **changes):
    return whole["optimizer"] | changes


def with_weights(whole, file, **entries):
    changed(
        whole, file, state_dict=whole["state_dict"] | {f"module.{k.replace('__', '.')}": v for k, v in entries.items()}
    )


def stretched(*shape):
    """A tensor of any size in four bytes."""
    return torch.zeros(1).expand(*shape)


def momenta(whole, value):
    states = {number: state | {"momentum_buffer": value} for number, state in whole["optimizer"]["state"].items()}
    return optimizer(whole, state=states)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        return torch.nested.nested_tensor([torch.ones(2)])


def scaled_momenta(whole, factor):
    states = {
        number: {"momentum_buffer": state["momentum_buffer"] * factor + factor}
        for number, state in whole["optimizer"]["state"].items()
    }
    return optimizer(whole, state=states)


def averages(whole, **changes):
    """Sums of an epoch's five metrics, as a checkpoint within an epoch holds them."""
    names = ["loss", "cross_entropy", "contrastive", "top1_linear", "top5_linear"]
    return {"names": names, "sums": [[1.0] * len(names)], "steps": 2} | changes


def sums(whole, value):
    return averages(whole, sums=[[value] * 5])


def compressed(whole, file):
    """A checkpoint whose archive is compressed."""
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))


CODE = "could run code"
CHECKPOINTS = {
    "os.system": (lambda w, f: changed(w, f, extra=Call(os.system, "touch /tmp/harm")), CODE),
    "eval": (lambda w, f: changed(w, f, extra=Call(eval, "open('/tmp/harm', 'w')")), CODE),
    "exec, old format": (
        lambda w, f: saved(f, w | {"epoch": Call(exec, "1")}, _use_new_zipfile_serialization=False), CODE,
    ),
    "code in the weights": (lambda w, f: with_weights(w, f, extra=Call(os.mkdir, "/tmp/harm")), CODE),
    "code in the optimizer": (lambda w, f: changed(w, f, optimizer={"state": Call(os.mkdir, "/tmp/harm")}), CODE),
    "a bare pickle": (lambda w, f: f.write_bytes(pickle.dumps(Call(os.system, "touch /tmp/harm"))), "not loaded"),
    "an array of objects": (lambda w, f: changed(w, f, extra=np.array([Call(os.getcwd)], dtype=object)), "not loaded"),
    "a whole module": (lambda w, f: saved(f, torch.nn.Linear(2, 2)), CODE),
    "a compiled module": (lambda w, f: torch.jit.script(Scripted()).save(str(f)), "not loaded"),
    "an archive without its pickle": (lambda w, f: without(w, f, "data.pkl"), "not loaded"),
    "an archive without its tensors": (lambda w, f: without(w, f, "/data/0", "/data/1"), "not loaded"),
    "a pickle cut short": (lambda w, f: rewritten(w, f, "data.pkl", lambda c: c[:-9]), "not loaded"),
    "a pickle of noise": (lambda w, f: rewritten(w, f, "data.pkl", lambda c: c[::-1]), "not loaded"),
    "tensors cut short": (lambda w, f: rewritten(w, f, "/data/0", lambda c: c[:2]), "not loaded"),
    "an epoch below 0": (lambda w, f: changed(w, f, epoch=-1), "its epoch"),
    "an epoch that is none": (lambda w, f: changed(w, f, epoch=float("nan")), "its epoch"),
    "an endless epoch": (lambda w, f: changed(w, f, epoch=float("inf")), "its epoch"),
    "half an epoch": (lambda w, f: changed(w, f, epoch=0.5), "its epoch"),
    "two epochs": (lambda w, f: changed(w, f, epoch=torch.tensor([1, 2])), "its epoch"),
    "a huge step": (lambda w, f: changed(w, f, step=10**30), "its step"),
    "a step without its images": (lambda w, f: changed(w, f, epoch=0, step=10), "step 10 after 0 images"),
    "more images than the epoch has": (lambda w, f: changed(w, f, step=10, images=160), "160 images, an epoch has 154"),
    "images of text": (lambda w, f: changed(w, f, images="all"), "its images"),
    "arguments that are none": (lambda w, f: changed(w, f, args=[1]), "its args"),
    "an argument beyond its bounds": (lambda w, f: changed(w, f, args={"lr": 1e300}), "--lr 1e+300"),
    "an argument of another kind": (lambda w, f: changed(w, f, args={"cos": "yes"}), "--cos is on or off"),
    "an argument of many values": (lambda w, f: changed(w, f, args={"schedule": 3}), "--schedule has another number"),
    "a step below 0": (lambda w, f: changed(w, f, epoch=0, step=-3), "its step"),
    "a best that is none": (lambda w, f: changed(w, f, best_acc1=torch.tensor(float("nan"))), "its best_acc1"),
    "a metric that is none": (lambda w, f: changed(w, f, best_metric=1), "its best_metric"),
    "a name that is none": (lambda w, f: changed(w, f, classes=[None] * 6), "its classes"),
    "names that are one text": (lambda w, f: changed(w, f, classes="abcdef"), "its classes"),
    "a name too few": (lambda w, f: changed(w, f, classes=list("abcde")), "names 5 classes, and has 6"),
    "a best of text": (lambda w, f: changed(w, f, best_acc1="all"), "its best_acc1"),
    "a run that is none": (lambda w, f: changed(w, f, run=[1]), "its run"),
    "a seed of text": (lambda w, f: changed(w, f, run={"seed": "x"}), "its run"),
    "averages that are none": (lambda w, f: changed(w, f, averages="none"), "its averages"),
    "averages of other lengths": (
        lambda w, f: changed(w, f, averages={"names": ["a"], "sums": [[1.0, 2.0]], "steps": 1}), "its averages",
    ),
    "averages that are not finite": (lambda w, f: changed(w, f, averages=sums(w, math.nan)), "its averages"),
    "averages of text": (lambda w, f: changed(w, f, averages=sums(w, "high")), "its averages"),
    "averages with numbers as names": (lambda w, f: changed(w, f, averages=averages(w, names=[1] * 5)), "its averages"),
    "averages over 2.0 steps": (lambda w, f: changed(w, f, averages=averages(w, steps=2.0)), "its averages"),
    "averages of other names": (
        lambda w, f: changed(w, f, step=2, images=32, averages=averages(w, names=list("abcde"))), "averages are of a",
    ),
    "an optimizer that is a list": (lambda w, f: changed(w, f, optimizer=[1]), "its optimizer"),
    "an optimizer of no group": (lambda w, f: changed(w, f, optimizer=optimizer(w, param_groups=[])), "its optimizer"),
    "momenta of another shape": (lambda w, f: changed(w, f, optimizer=momenta(w, torch.zeros(3))), "its optimizer"),
    "momenta of text": (lambda w, f: changed(w, f, optimizer=momenta(w, "fast")), "its optimizer"),
    "sparse momenta": (lambda w, f: changed(w, f, optimizer=momenta(w, torch.eye(3).to_sparse())), "its optimizer"),
    "momenta that are not finite": (
        lambda w, f: changed(w, f, optimizer=scaled_momenta(w, math.inf)), "its optimizer",
    ),
    "weights that are not finite": (
        lambda w, f: with_weights(w, f, classifier__bias=torch.full((CLASSES,), math.nan)), "classifier.bias",
    ),
    "a variance below 0": (
        lambda w, f: with_weights(w, f, encoder_q__bn1__running_var=torch.full((16,), -1.0)), "bn1.running_var",
    ),
    "weights of whole numbers": (
        lambda w, f: with_weights(w, f, classifier__bias=torch.ones(CLASSES, dtype=torch.int8)), "int8",
    ),
    "complex weights": (
        lambda w, f: with_weights(w, f, classifier__bias=torch.ones(CLASSES, dtype=torch.complex64)), "complex64",
    ),
    "a nested tensor": (
        lambda w, f: with_weights(w, f, classifier__bias=nested()), "classifier.bias",
    ),
    "a pickle that unpacks to more than the file": (lambda w, f: compressed(w, f), "compressed"),
    "a weight too many": (lambda w, f: with_weights(w, f, extra=torch.zeros(1)), "extra"),
    "a weight of another shape": (lambda w, f: with_weights(w, f, encoder_q__bn1__bias=torch.zeros(3)), "its backbone"),
    "a queue that is stretched": (lambda w, f: with_weights(w, f, queue=stretched(16, 10**9)), "queue"),
    "a classifier that is stretched": (
        lambda w, f: with_weights(w, f, classifier__weight=stretched(10**9, 64)), "at classifier.weight",
    ),
    "a queue of no width": (lambda w, f: with_weights(w, f, queue=torch.zeros(0)), "queue"),
    "a number of weights": (lambda w, f: changed(w, f, state_dict=3), "no state_dict"),
}  # fmt: skip


@pytest.fixture(scope="module")
def midway(trained):
    """A checkpoint that training would go on from."""
    return checkpoint(trained["i"], "previous_checkpoint.pth.tar")


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused_in_one_line(midway, plain_tree, tmp_path, case):
    write, told = CHECKPOINTS[case]
    file = tmp_path / "hostile.tar"
    write(midway, file)
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--resume", file)
    assert_refused(outcome, file, told)
    assert not Path("/tmp/harm").exists() and not list(tmp_path.glob("run/*.tar"))


def settings(whole, **changes):
    """The optimizer's state with other settings; None removes one."""
    groups = []
    for group in whole["optimizer"]["param_groups"]:
        group = group | changes
        groups.append({name: value for name, value in group.items() if value is not None or name == "foreach"})
    return optimizer(whole, param_groups=groups)


@pytest.mark.parametrize(
    "changes",
    [{"maximize": True}, {"nesterov": True}, {"dampening": None}, {"dampening": "much"}, {"lr": 1e9, "momentum": 0.1}],
    ids=str,
)
def test_no_setting_of_a_saved_optimizer_reaches_the_run(midway, trained, plain_tree, tmp_path, changes):
    changed(midway, tmp_path / "other.tar", optimizer=settings(midway, **changes))
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--cos", "--resume", tmp_path / "other.tar")
    assert (outcome.status, outcome.err) == (0, "")
    assert same(checkpoint(tmp_path / "run")["state_dict"], checkpoint(trained["i"])["state_dict"])


@pytest.mark.parametrize("case", ["weights that are not finite", "a variance below 0", "weights of whole numbers"])
def test_weights_that_are_not_sound_are_not_evaluated(midway, plain_tree, tmp_path, case):
    write, told = CHECKPOINTS[case]
    write(midway, tmp_path / "hostile.tar")
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--evaluate", "--resume", tmp_path / "hostile.tar")
    assert_refused(outcome, tmp_path / "hostile.tar", told)
    assert "Overall" not in outcome.out


@pytest.mark.parametrize(("stage", "flag"), [("i", "--resume"), ("ii", "--last_stage_ckpt"), ("iii", "--teacher_ckpt")])
def test_a_pipe_in_place_of_a_checkpoint_is_refused(plain_tree, tmp_path, stage, flag):
    os.mkfifo(tmp_path / "pipe.tar")
    assert_refused(
        run_stage(stage, plain_tree, tmp_path / "run", flag, tmp_path / "pipe.tar"), "not a regular file", flag
    )


def test_a_pipe_in_place_of_the_last_checkpoint_is_passed_over(trained, plain_tree, tmp_path):
    shutil.copytree(trained["i"], tmp_path / "run")
    (tmp_path / "run" / LAST).unlink()
    os.mkfifo(tmp_path / "run" / LAST)
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--cos", "--resume", "auto")
    assert outcome.status == 0 and f"passed over {tmp_path / 'run' / LAST}" in outcome.err
    assert same(checkpoint(tmp_path / "run")["state_dict"], checkpoint(trained["i"])["state_dict"])


def test_an_archive_is_never_unpacked(midway, plain_tree, tmp_path):
    """Entries beside the tensors are not looked at, wherever their names point."""
    file = tmp_path / "a" / "b" / "hostile.tar"
    file.parent.mkdir(parents=True)
    traversing(midway, file)
    before = set(tmp_path.rglob("*"))
    run_stage("i", plain_tree, tmp_path / "run", "--resume", file)
    after = {path for path in tmp_path.rglob("*") if tmp_path / "run" not in (path, *path.parents)}
    assert after == before


# ---- archives


def member(name, **facts) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in facts.items():
        setattr(info, key, value)
    return info


ARCHIVES = {
    "up and out": member("../harm"),
    "up and out, deeper": member("cifar-10-batches-py/../../harm"),
    "a link out": member("cifar-10-batches-py/link", type=tarfile.SYMTYPE, linkname="/etc"),
    "a hard link out": member("cifar-10-batches-py/link", type=tarfile.LNKTYPE, linkname="../../harm"),
    "a device": member("cifar-10-batches-py/device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_hostile_archive_is_refused_in_one_line(tmp_path, monkeypatch, capsys, case):
    """As CIFAR's, given with --source."""
    (tmp_path / "tmp" / "unpacked").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp" / "unpacked"))
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(ARCHIVES[case])
    status = prepare.main(["cifar10-lt", "--out", str(tmp_path / "out"), "--source", str(archive)])
    outcome = Outcome(status, *capsys.readouterr())
    assert_refused(outcome, archive, "cannot be unpacked")
    assert not list(tmp_path.rglob("harm")) and not any((tmp_path / "tmp" / "unpacked").iterdir())


def test_an_absolute_name_in_an_archive_is_taken_as_relative(tmp_path, monkeypatch, capsys):
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(member(str(tmp_path / "harm")))
    assert prepare.main(["cifar10-lt", "--out", str(tmp_path / "out"), "--source", str(archive)]) == 2
    assert not (tmp_path / "harm").exists() and capsys.readouterr().err.count("\n") == 1


# ---- flags

FLAGS = {
    "a huge batch": (["-b", 10**30], "--batch-size"),
    "a huge image": (["--image-size", 10**30], "--image-size"),
    "a huge seed": (["--seed", 10**30], "--seed"),
    "a wait without end": (["--dist-timeout", "inf"], "--dist-timeout"),
    "a wait of ages": (["--dist-timeout", 1e300], "--dist-timeout"),
    "a wait that is none": (["--dist-timeout", "nan"], "--dist-timeout"),
    "a rate beyond all numbers": (["--lr", "1e400"], "--lr 1e400"),
    "a queue beyond all memory": (["--moco-k", 2**31 - 1, "--moco-dim", 4096], "out of memory"),
    "a width beyond all memory": (["--moco-dim", 2**31 - 1], "out of memory"),
    "a width beyond all numbers": (["--moco-dim", 10**12], "--moco-dim"),
    "two lines in a flag's value": (["--amp", "fp8\nERROR: all is lost"], "--amp"),
    "two lines in a folder's name": (["--resume", "x\nERROR: y"], "--resume"),
    "a terminal's commands": (["--resume", "\x1b[2J\x1b[31m"], "--resume"),
    "a name of no text": (["--resume", os.fsdecode(b"\xff\xfe")], "--resume"),
    "a name that is too long": (["--output_dir", "x" * 300], "--output_dir"),
    "a run in a device": (["--output_dir", "/dev/null/run"], "--output_dir"),
    "a flag twice removed": (["--moco--k", 5], "--moco--k"),
    "half a flag": (["--epo", 5], "--epo"),
    "a flag without its value": (["--epochs", "--cos"], "--epochs"),
    "a stray word": (["rm", "-rf"], "unrecognized arguments"),
    "a list in a folder that is a file": (["--val-list", "/etc/passwd/val.txt"], "--val-list"),
    "a node beyond the last": (["--world-size", 2, "--rank", 2, "--dist-url", "tcp://127.0.0.1:1"], "--rank 2"),
    "a port beyond the last": (["--world-size", 2, "--rank", 1, "--dist-url", "tcp://127.0.0.1:65536"], "--dist-url"),
    "a temperature beyond all numbers": (["--moco-t", 1e300], "--moco-t 1e+300"),
    "a weight decay beyond all numbers": (["--wd", 1e300], "--wd 1e+300"),
    "more nodes than there are": (["--world-size", "9" * 30], "--world-size"),
    "a thousand workers": (["-j", 1000], "--workers 1000"),
    "a URL of a file": (["--world-size", 2, "--rank", 1, "--dist-url", "file:///etc/passwd"], "--dist-url"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_hostile_flag_is_refused_in_one_line(plain_tree, tmp_path, case):
    flags, told = FLAGS[case]
    with limited_memory():
        outcome = run_stage("i", plain_tree, tmp_path / "run", *flags)
    assert_refused(outcome, told)


ENVIRONMENTS = {
    "a rank of text": {"TORCHELASTIC_RUN_ID": "x", "RANK": "first", "WORLD_SIZE": "2"},
    "a rank alone": {"TORCHELASTIC_RUN_ID": "x", "RANK": "0"},
    "half of SLURM": {"SLURM_STEP_NUM_TASKS": "2"},
    "tasks of text": {"SLURM_STEP_NUM_TASKS": "two"},
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_a_hostile_environment_is_refused_in_one_line(plain_tree, tmp_path, monkeypatch, case):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in ENVIRONMENTS[case].items():
        monkeypatch.setenv(name, value)
    assert_refused(run_stage("i", plain_tree, tmp_path / "run"), "environment of the launcher")


def test_a_line_is_one_line_whatever_it_quotes():
    assert str(UserError("a\nb\x1b[2J\r\udcff é 漢")) == "a\\nb\\x1b[2J\\r\\udcff é 漢"


# ---- through the shell


SHELL = [
    ("list", "up and out"), ("image", "a PNG bomb"), ("checkpoint", "os.system"),
    ("flags", "two lines in a flag's value"), ("list", "a terminal's commands"), ("list", "NUL"),
    ("image", "PostScript"), ("image", "half a JPEG"), ("checkpoint", "exec, old format"),
    ("checkpoint", "a pickle of noise"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "case"), [case if i < 2 else pytest.param(*case, marks=pytest.mark.full) for i, case in enumerate(SHELL)]
)
def test_the_shell_gets_one_line_of_hostile_input(trained, midway, plain_tree, tree, tmp_path, kind, case):
    data, flags = plain_tree, []
    if kind == "list":
        (tmp_path / "input").write_bytes(LISTS[case][0])
        data, flags = tree, ["--train-list", tmp_path / "input"]
    elif kind == "image":
        data = tmp_path
        (tmp_path / "image.png").write_bytes(IMAGES[case][0])
        (tmp_path / "train.txt").symlink_to(plain_tree / "train.txt")
        (tmp_path / "test.txt").write_text("image.png 0\n")
        flags = ["--evaluate", "--resume", trained["i"] / LAST, "-j", 1]
    elif kind == "checkpoint":
        CHECKPOINTS[case][0](midway, tmp_path / "input")
        flags = ["--resume", tmp_path / "input"]
    else:
        flags = FLAGS[case][0]
    told = {"list": LISTS, "image": IMAGES, "checkpoint": CHECKPOINTS, "flags": FLAGS}[kind][case][1]
    assert_refused(run_shell("i", data, tmp_path / "run", *flags), told)
    assert not Path("/tmp/harm").exists()
