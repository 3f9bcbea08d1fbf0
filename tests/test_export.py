"""python -m utils.export: the exported networks compute what the original computes."""

import errno
import json
import pickletools
import sys
import types
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import models
from models.preprocess import EvalTransform
from tests.helpers import LAST, STAGES, assert_mistake, checkpoint, outcome_of, results_of, same, train
from tests.helpers_networks import BUILD, PublishedRun, with_module
from utils import export

SIZE = 32
CLASSIFIERS = [("i", "hard"), ("ii", "hard"), ("iii", "hard"), ("iii", "soft")]


@pytest.fixture
def run(capsys):
    """run(word, ...) -> (status, stdout, stderr) of the command."""
    return partial(outcome_of, export.main, capsys)


def network(stage, arch):
    """A network of a stage whose weights, statistics and scales are not the initial ones."""
    torch.manual_seed(5)
    model = BUILD[stage](arch).eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if "running" in name:
                value.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if name.endswith(("scales", "bn1.weight", "bn1.bias")):
                parameter.uniform_(0.5, 1.5)
    return model


def write(stage, arch, file, **entries):
    """A checkpoint of such a network; returns the network."""
    model = network(stage, arch)
    torch.save({"state_dict": with_module(model.state_dict()), "args": {"image_size": SIZE}, **entries}, file)
    return model


def logits(model, classifier, images):
    with torch.no_grad():
        found = model(images)
    return found[classifier == "soft"] if isinstance(found, tuple) else found


def choice(classifier):
    return [] if classifier == "soft" else ["--classifier", classifier]


@pytest.mark.parametrize(
    ("stage", "classifier", "arch"),
    [*((*of, "resnet18") for of in CLASSIFIERS), ("iii", "soft", "resnext50_32x4d")],
)
def test_torchvisions_network_computes_the_same_logits(tmp_path, run, stage, classifier, arch):
    model = write(stage, arch, tmp_path / "checkpoint")
    status, out, err = run(tmp_path / "checkpoint", tmp_path / "out.pth", *choice(classifier))
    assert (status, err) == (0, "") and arch in out and "5 classes" in out
    plain = torchvision.models.get_model(arch, num_classes=5).eval()
    plain.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    images = torch.randn(3, 3, SIZE, SIZE)
    expected = logits(model, classifier, images)
    torch.testing.assert_close(logits(plain, classifier, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stage", "classifier", "arch"), [("iii", "soft", "resnet8"), ("ii", "hard", "resnet18")])
def test_the_onnx_file_computes_the_same_logits_for_any_batch_size(tmp_path, run, stage, classifier, arch):
    pytest.importorskip("onnxscript", reason="the optional package onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the optional package onnxruntime is not installed")
    names = ["a", "b", "c", "d", "ä"]
    model = write(stage, arch, tmp_path / "checkpoint", classes=["a", "b", "c", "d", "earlier"])
    out = tmp_path / "out.onnx"
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "classes.txt").write_text("\n".join(names))
    flags = ["--format", "onnx", "--classes", tmp_path / "names" / "classes.txt", *choice(classifier)]
    status, _, err = run(tmp_path / "checkpoint", out, *flags)
    assert (status, err) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "names", "out.onnx"]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    for size in (1, 2, 5):
        images = torch.randn(size, 3, SIZE, SIZE)
        (found,) = session.run(None, {"images": images.numpy()})
        expected = logits(model, classifier, images)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    metadata = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["classes"] == names and metadata["image_size"] == SIZE and metadata["mean"][0] == 0.485
    assert metadata["preprocessing"]["resize"] == [SIZE, SIZE]


@pytest.mark.parametrize("size", [32, 224])
def test_the_metadata_suffice_to_prepare_an_image(size):
    """With Pillow and numpy alone, as a program does that runs the ONNX file."""
    steps = json.loads(json.dumps(export.preprocessing(EvalTransform(size, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 257), np.uint8))  # gray
    found = image.convert(steps["color"])
    resize, crop = steps["resize"], steps["center_crop"]
    if isinstance(resize, int):  # of the shorter side
        resize = [int(resize * 301 / 257), resize]
    assert steps["interpolation"] == "bilinear" and steps["antialias"]
    found = found.resize(resize[::-1], Image.Resampling.BILINEAR)  # which Pillow always does with antialiasing
    if crop is not None:
        left, top = (round((side - crop) / 2) for side in found.size)
        found = found.crop((left, top, left + crop, top + crop))
    found = (np.asarray(found) * steps["scale"] - steps["mean"]) / steps["std"]
    expected = EvalTransform(size, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))(image)
    assert steps["layout"] == "NCHW"
    np.testing.assert_allclose(found.transpose(2, 0, 1), expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("package", "error"), [("onnx", "TypeError"), ("onnxscript", "SystemExit")])
def test_a_broken_package_is_named(tmp_path, run, monkeypatch, package, error):
    (tmp_path / f"{package}.py").write_text(f"raise {error}('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", types.ModuleType("onnx"))  # which need not be installed
    monkeypatch.delitem(sys.modules, package, raising=False)
    write("i", "resnet8", tmp_path / "checkpoint")
    outcome = run(tmp_path / "checkpoint", tmp_path / "out.onnx", "--format", "onnx")
    assert_mistake(outcome, "--format onnx", "Descriptors", "pip install onnx onnxscript")
    assert not (tmp_path / "out.onnx").exists()


def test_a_package_that_is_too_old_for_torch_is_named(tmp_path, run, monkeypatch):
    for package in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    write("i", "resnet8", tmp_path / "checkpoint")
    outcome = run(tmp_path / "checkpoint", tmp_path / "out.onnx", "--format", "onnx")
    assert_mistake(outcome, "--format onnx", "onnxscript", "pip install onnx onnxscript")


@pytest.mark.parametrize("stage", STAGES)
def test_the_published_scripts_resume_the_published_format(trained, tmp_path, run, stage):
    file = tmp_path / "published.pth.tar"
    assert run(trained[stage] / LAST, file, "--format", "published")[0] == 0
    content = torch.load(file, weights_only=True)
    assert set(content) == {"epoch", "arch", "state_dict", "best_acc1", "optimizer"}
    assert content["arch"] == "resnet8"
    whole = torch.load(trained[stage] / LAST, weights_only=True)
    ours = whole["state_dict"]
    assert list(content["state_dict"]) == list(ours)
    assert float(content["best_acc1"]) == pytest.approx(float(whole["best_acc1"])) and whole["best_acc1"] > 0
    for name, value in content["state_dict"].items():
        assert torch.equal(value, ours[name].float() if name == "module.label_queue" else ours[name])
        assert name != "module.label_queue" or value.dtype == torch.float32
    theirs = PublishedRun(stage)
    assert theirs.resume(file)[0] == 2
    theirs.step()
    again = models.load(file)  # this code reads it, too
    assert all(torch.equal(v, ours[f"module.{k}"]) for k, v in again.state_dict().items())
    assert_needs_nothing_newer_than_pytorch_1_4(file)


def assert_needs_nothing_newer_than_pytorch_1_4(file):
    """It is not a zip file, and refers only to what that version has."""
    known = {f"torch {kind}Storage" for kind in ("Float", "Double", "Long")}
    known |= {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
    with file.open("rb") as opened:
        assert opened.read(2) == b"\x80\x02"  # a pickle of protocol 2
        opened.seek(0)
        for _ in range(4):  # magic number, protocol version, system, content
            operations = list(pickletools.genops(opened))
            assert {argument for code, argument, _ in operations if code.name == "GLOBAL"} <= known
            assert all(code.proto <= 2 for code, _, _ in operations)


@pytest.mark.parametrize("stage", STAGES)
def test_the_network_format_is_enough_to_evaluate_and_to_start_the_next_stage(
    stage, trained, plain_tree, tmp_path, run
):
    file, whole = tmp_path / "network.pth.tar", checkpoint(trained[stage])
    assert run(trained[stage] / LAST, file, "--format", "network")[0] == 0
    content = torch.load(file, weights_only=True)
    assert whole.keys() - content.keys() == {"optimizer", "scaler", "step", "images", "averages"}
    assert all(same(value, whole[name]) for name, value in content.items())
    assert file.stat().st_size < (trained[stage] / LAST).stat().st_size
    assert repr(models.load(file).transform) == repr(models.load(trained[stage] / LAST).transform)
    evaluated = train(stage, plain_tree, tmp_path / "evaluated", "--resume", file, "--evaluate")
    assert results_of(evaluated) == results_of(trained[stage])
    receiver = {"i": models.SLG, "ii": models.SDL, "iii": models.SLG}[stage]
    models.check_complete(content["state_dict"], 32, receiver)


def test_an_existing_file_is_replaced_only_with_overwrite(tmp_path, run):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out.pth"
    write("ii", "resnet18", checkpoint)
    before = checkpoint.read_bytes()
    out.write_bytes(b"precious")
    assert_mistake(run(checkpoint, out), out, "--overwrite")
    assert out.read_bytes() == b"precious"
    assert run(checkpoint, out, "--overwrite")[0] == 0
    assert "fc.weight" in torch.load(out, weights_only=True)
    assert_mistake(run(checkpoint, checkpoint, "--overwrite"), "the checkpoint itself")
    assert checkpoint.read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path, run, monkeypatch):
    write("ii", "resnet18", tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert_mistake(run(tmp_path / "checkpoint", tmp_path / "out" / "file"), "out/file", "No space left")
    assert not list((tmp_path / "out").iterdir())


def test_mistakes_end_in_one_line(trained, tmp_path, run, monkeypatch):
    of_i, out, bare = trained["i"] / LAST, tmp_path / "out", tmp_path / "bare"
    torch.save({"state_dict": torch.load(of_i, weights_only=True)["state_dict"]}, bare)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    onnx, published, soft = ("--format", "onnx"), ("--format", "published"), ("--classifier", "soft")
    assert_mistake(run(of_i, out), "--format torchvision", "resnet8", "--format onnx")
    assert_mistake(run(of_i, out, *onnx), "--format onnx", "pip install")
    assert_mistake(run(of_i, out, *onnx, *soft), "--classifier soft", "stage I")
    assert_mistake(run(trained["iii"] / LAST, out, *published, *soft), "--classifier")
    assert_mistake(run(of_i, tmp_path / "a.onnx", *published), "a.onnx", "add --format onnx")
    assert_mistake(run(of_i, tmp_path / "no" / "out", *published), "no folder")
    assert_mistake(run(of_i, tmp_path, *published), "is a folder")
    assert_mistake(run(bare, out, *published), bare, "no optimizer")
    assert_mistake(run(of_i, out, *published, "--classes", "classes.txt"), "--classes", "--format published")
    assert_mistake(run(tmp_path / "none", out), tmp_path / "none", "cannot be opened")
    assert not out.exists()
