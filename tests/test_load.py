"""models.load: the network in a checkpoint file, and files and weights that are refused."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import zipfile
from functools import partial

import pytest
import torch

import models
from models.loading import MAX_LEGACY, MAX_PICKLE
from models.state_dicts import check_weights
from tests.helpers import ROOT, same
from tests.helpers_networks import BUILD, with_module


def write(content, path, **options):
    torch.save(content, path, **options)
    return path


def state_of(stage, **changes):
    """A state dict with `module.`, with entries replaced, or removed if they are None; `__` stands for a dot."""
    state_dict = dict(BUILD[stage]("resnet8").state_dict())
    state_dict |= {name.replace("__", "."): value for name, value in changes.items()}
    return with_module({name: value for name, value in state_dict.items() if value is not None})


def refusal(path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        models.load(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


# ---- valid checkpoints


@pytest.mark.parametrize(
    ("stage", "arch"), [("i", "resnet8"), ("ii", "resnet18"), ("ii", "resnext50_32x4d"), ("iii", "resnet32")]
)
def test_load_builds_the_network_with_its_weights(stage, arch, tmp_path):
    model = BUILD[stage](arch)
    loaded = models.load(write({"state_dict": with_module(model.state_dict())}, tmp_path / "file"))
    assert type(loaded) is type(model) and not loaded.training
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert same(loaded(images), model.eval()(images))


def test_load_leaves_the_file_and_the_random_state_alone(tmp_path):
    file = write({"state_dict": state_of("iii")}, tmp_path / "file")
    content, state = file.read_bytes(), torch.get_rng_state()
    model = models.load(file)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert file.read_bytes() == content


def test_half_precision_and_a_float_label_queue_are_converted(tmp_path):
    state_dict = state_of("i", label_queue=torch.full((32,), 3.0))
    half = {name: value.half() if value.is_floating_point() else value for name, value in state_dict.items()}
    model = models.load(write({"state_dict": half}, tmp_path / "file"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.label_queue.tolist() == [3] * 32 and model.label_queue.dtype == torch.long


# ---- files that are not checkpoints


class Malicious:
    """Makes a folder if a loader that runs code loads it."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


LEGACY = {"_use_new_zipfile_serialization": False}
FORMATS = pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])


@FORMATS
def test_code_in_a_checkpoint_does_not_run(options, tmp_path):
    target = tmp_path / "ran"
    file = write({"state_dict": state_of("ii"), "args": Malicious(target)}, tmp_path / "file", **options)
    assert "mkdir" in refusal(file) and not target.exists()


def half(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("spoil", [half, lambda _: b"", lambda _: b"<html></html>", lambda _: b"\x80\x02}q\x00."])
@FORMATS
def test_garbage_is_refused(spoil, options, tmp_path):
    file = write({"state_dict": state_of("ii")}, tmp_path / "file", **options)
    file.write_bytes(spoil(file.read_bytes()))
    assert "damaged or not a checkpoint" in refusal(file)


@pytest.mark.parametrize("changes, reason", [
    ({"classifier_t__scales": None}, "classifier_t.scales"),
    ({"classifier_kd__weight": torch.zeros(3, 64)}, "classifier_kd.weight"),
    ({"extra": torch.zeros(1)}, "extra"),
    ({"encoder_q__conv1__weight": None}, "known backbone"),
    ({"classifier__bias": None}, "classifier.bias is missing"),
    ({"classifier__bias": torch.tensor(1.0)}, "classifier.bias has the shape ()"),
    ({"encoder_k__conv1__weight": torch.zeros(1)}, "does not fit stage I: classifier_kd.bias is unknown"),
])  # fmt: skip
def test_the_entry_that_does_not_fit_is_named(changes, reason, tmp_path):
    assert reason in refusal(write({"state_dict": state_of("iii", **changes)}, tmp_path / "file"))


@pytest.mark.parametrize("content", [
    [1, 2], {"epoch": 1}, {"state_dict": 3}, {"state_dict": {"a": 1}}, {"state_dict": {1: torch.zeros(1)}},
    {"state_dict": {}}, {"state_dict": {"fc.weight": torch.zeros(2, 2)}}, {"conv1.weight": torch.zeros(2)},
])  # fmt: skip
def test_content_of_no_stage_is_refused(content, tmp_path):
    refusal(write(content, tmp_path / "file"))


# ---- files that are not regular


def test_a_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="nothing"):
        models.load(tmp_path / "nothing")


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path has to be short
    os.mkfifo("FIFO")
    socket.socket(socket.AF_UNIX).bind("socket")
    os.mkdir("folder")
    os.symlink(os.devnull, "link to a device")
    for name in os.listdir():
        reason = "a folder; name a file in it, .*" if name == "folder" else "not a regular file"
        with pytest.raises(OSError, match=f"{reason}: '{name}'"):
            models.load(name)


# ---- files that would unpack to more than their size


def rewritten(file, change=lambda name, content: content, **options):
    """Rewrites a zip file with the members' content changed by change(name, content)."""
    with zipfile.ZipFile(file) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(file, "w", **options) as target:
        for name, content in members.items():
            target.writestr(name, change(name, content))
    return file


def overlapping(file):
    """Adds members to a zip file that take no room in it, since they are those that it has."""
    with zipfile.ZipFile(file, "a") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        archive.filelist += [largest] * 10
        archive.writestr("more", b"")
    return file


@pytest.mark.parametrize("spoil, reason", [
    (partial(rewritten, compression=zipfile.ZIP_DEFLATED), "compressed"),
    (overlapping, "larger than the file"),
    (partial(rewritten, change=lambda name, data: data[:2] if name.endswith("/data/0") else data), "cut short"),
])  # fmt: skip
def test_a_zip_file_that_torch_would_not_write_is_refused(spoil, reason, tmp_path):
    file = write({"state_dict": state_of("ii")}, tmp_path / "file")
    models.load(rewritten(file))
    assert reason in refusal(spoil(file))


def test_what_is_too_large_is_refused(tmp_path):
    content = {"state_dict": state_of("ii"), "text": "x" * MAX_PICKLE}
    assert "not tensors" in refusal(write(content, tmp_path / "file"))
    file = write({"state_dict": state_of("ii")}, tmp_path / "legacy", **LEGACY)
    os.truncate(file, MAX_LEGACY + 1)  # sparse: takes no room on the disk
    assert "before PyTorch 1.6" in refusal(file)


PEAK = """
import sys, models
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
for path in sys.argv[1:]:
    before = peak()
    try:
        models.load(path)
    except ValueError as error:
        print((peak() - before) // 1024, error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures memory as Linux shows it")
def test_a_refused_file_costs_no_memory(tmp_path):
    """One has 1 GiB of zeros in an entry that the network lacks, one has 96 MiB when decompressed."""
    state_dict = state_of("ii", extra=torch.zeros(0))
    with torch.serialization.skip_data():  # a sparse file, which takes no room on the disk
        zeros = write({"state_dict": state_dict | {"module.extra": torch.empty(2**28)}}, tmp_path / "zeros")
    texts = ["x" * 2**20 + str(number) for number in range(96)]
    packed = write({"state_dict": state_of("ii"), "texts": texts}, tmp_path / "packed")
    rewritten(packed, compression=zipfile.ZIP_DEFLATED)
    assert zeros.stat().st_size > 2**30 and packed.stat().st_size < 2**21

    command = [sys.executable, "-c", PEAK, zeros, packed]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, reason in zip(lines, ("extra is unknown", "compressed"), strict=True):
        mib, text = line.split(maxsplit=1)
        assert reason in text and int(mib) < 64


# ---- tensors and values that no network has


@pytest.mark.filterwarnings("ignore")  # torch warns that some of these are prototypes
@pytest.mark.parametrize("make", [
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    lambda: torch.zeros(5, 64).to_sparse(),
    lambda: torch.zeros(5, 64).to_sparse_csr(),
    lambda: torch.quantize_per_tensor(torch.zeros(5, 64), 0.1, 0, torch.qint8),
    lambda: torch.zeros(5, 64, device="meta"),
    lambda: torch.zeros(1).expand(10**6, 64),  # 256 MB in four bytes
], ids=["nested", "jagged", "sparse", "csr", "quantized", "meta", "stretched"])  # fmt: skip
def test_a_tensor_that_is_not_dense_is_named(make, tmp_path):
    content = {"state_dict": state_of("ii", classifier__fc__weight=make())}
    assert "no dense tensor at classifier.fc.weight" in refusal(write(content, tmp_path / "file"))


@pytest.mark.parametrize("stage, changes, reason", [
    ("ii", {"classifier__fc__weight": torch.zeros(5, 64, dtype=torch.int8)}, "int8"),
    ("ii", {"classifier__scales": torch.zeros(5, dtype=torch.complex64)}, "complex64"),
    ("ii", {"classifier__scales": torch.zeros(5, dtype=torch.bool)}, "bool"),
    ("ii", {"classifier__scales": torch.zeros(5, dtype=torch.float8_e5m2)}, "float8_e5m2"),
    ("ii", {"encoder__bn1__running_mean": torch.zeros(16, dtype=torch.long)}, "int64"),
    ("ii", {"encoder__bn1__num_batches_tracked": torch.tensor(1.0)}, "float32"),
    ("i", {"queue_ptr": torch.zeros(1)}, "float32"),
    ("i", {"label_queue": torch.zeros(32, dtype=torch.complex64)}, "complex64"),
    ("i", {"label_queue": torch.full((32,), torch.nan)}, "not finite"),
    ("ii", {"classifier__fc__bias": torch.tensor([0, 0, torch.nan, 0, 0])}, "not finite"),
    ("ii", {"classifier__fc__bias": torch.tensor([0, 0, 0, 0, -torch.inf])}, "not finite"),
    ("ii", {"classifier__fc__bias": torch.full((5,), 1e300, dtype=torch.float64)}, "not finite"),
    ("ii", {"encoder__bn1__running_mean": torch.full((16,), torch.inf)}, "not finite"),
    ("ii", {"encoder__bn1__running_var": torch.tensor([1.0] * 15 + [-1e-9])}, "variance below 0"),
])  # fmt: skip
def test_weights_that_no_network_has_are_named(stage, changes, reason, tmp_path):
    state_dict = state_of(stage, **changes)
    (name,) = (name.replace("__", ".") for name in changes)
    with pytest.raises(ValueError, match=f"^{re.escape(name)} .*{reason}"):
        check_weights(state_dict, BUILD[stage]("resnet8"))
    text = refusal(write({"state_dict": state_dict}, tmp_path / "file"))
    assert name in text and reason in text


# ---- from stage to stage


@pytest.mark.parametrize("stage, classifier, changes, reason", [
    ("i", "hard", {}, None),
    ("i", "hard", {"queue": None, "k_fc__0__weight": None}, None),  # the next stage does not take them
    ("i", "hard", {"classifier__weight": None}, "classifier.weight is missing"),
    ("i", "hard", {"classifier__weight": torch.zeros(5, 63)}, "classifier.weight has the shape (5, 63), not (5, 64)"),
    ("i", "hard", {"classifier__scale": torch.zeros(5)}, "classifier.scale is unknown"),
    ("i", "soft", {}, "classifier_kd.bias is missing"),
    ("iii", "soft", {}, None),
    ("iii", "soft", {"classifier_kd__bias": torch.zeros(4)}, "classifier_kd.bias has the shape (4,), not (5,)"),
    ("ii", "hard", {}, None),
    ("ii", "hard", {"classifier__scales": None}, "classifier.scales is missing"),
])  # fmt: skip
def test_the_next_stage_names_what_is_missing(stage, classifier, changes, reason):
    """Both as it loads the weights, and before that, without allocating memory."""
    state_dict, receiver = state_of(stage, **changes), models.SDL if stage == "ii" else models.SLG
    options = () if stage == "ii" else (classifier,)
    for take in (
        lambda: receiver("resnet8", 5).load_previous(state_dict, *options),
        lambda: models.check_complete(state_dict, 224, receiver, *options),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}$") if reason else contextlib.nullcontext():
            take()


def test_a_backbone_without_all_its_weights_is_refused():
    state_dict = state_of("ii", encoder__bn1__weight=None)
    with pytest.raises(ValueError, match=re.escape("encoder.bn1.weight is missing")):
        models.SDL("resnet8", 5).load_teacher(state_dict)
    with pytest.raises(ValueError, match="known backbone"):
        models.check_complete(state_dict, 224, models.SDL)
