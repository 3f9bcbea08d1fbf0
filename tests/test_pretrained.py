"""--pretrained: the weights that stage I's backbone starts from. No test uses the internet."""

import urllib.error
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision

import models
import ssd_stage_i
from models.state_dicts import strip_module, strip_prefix
from tests.helpers import LAST, QUEUE, STAGES, assert_mistake, call, checkpoint, copied, refusal, run_stage, same
from utils import pretrained
from utils.errors import UserError
from utils.pretrained import read_backbone

# These train nothing, so that the checkpoint contains the weights that the run started from.
START = ["--epochs", 1, "--lr", 0, "--wd", 0, "--moco-m", 1]


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Puts torch's cache into a folder of the test, and lets nothing be downloaded; returns the folder of the files."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def torchvision_state(arch="resnet18", seed=7):
    torch.manual_seed(seed)
    return torchvision.models.get_model(arch, weights=None).state_dict()


def assert_backbone(found, state_dict):
    """Checks that these are the entries of a torchvision state dict, without its classifier."""
    assert same(dict(found), {name: value for name, value in state_dict.items() if not name.startswith("fc.")})


def assert_refused(file, *words, arch="resnet18"):
    """Checks that a file's backbone is refused in a message with the words."""
    with pytest.raises(UserError) as caught:
        read_backbone(file, arch, 32)
    assert all(str(word) in str(caught.value) for word in (file, "--pretrained", *words)), caught.value


def resnet18(data, out, *pretrained):
    """The outcome of a run of stage I with --pretrained and these words."""
    own = f"--arch resnet18 --image-size 32 -b 64 -j 0 --seed 3 --device cpu {QUEUE} --moco-k 64 --output_dir {out}"
    return call("i", [*own.split(), *START, "--pretrained", *pretrained, data])


# ---- which words are the value of the flag


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("DIR", None),
        ("--pretrained DIR", "torchvision"),
        ("DIR --pretrained", "torchvision"),
        ("--pretrained --cos DIR", "torchvision"),
        ("--pretrained torchvision DIR", "torchvision"),
        ("--pretrained weights.pth DIR", "weights.pth"),
        ("--pretrained=weights.pth DIR", "weights.pth"),
        ("DIR --pretrained weights.pth", "weights.pth"),
    ],
)
def test_dir_is_never_taken_for_the_weights(tmp_path, words, expected):
    args = ssd_stage_i.get_parser().parse_args(words.replace("DIR", str(tmp_path)).split())
    assert (args.pretrained, args.data) == (expected, str(tmp_path))


# ---- what the backbone starts from


def test_the_backbone_starts_from_torchvisions_weights_in_a_file(plain_tree, tmp_path):
    state_dict = torchvision_state()
    torch.save(state_dict, tmp_path / "weights.pth")
    outcome = resnet18(plain_tree, tmp_path / "run", tmp_path / "weights.pth")
    assert (outcome.status, outcome.err) == (0, "")
    assert f"the backbone starts from {tmp_path / 'weights.pth'}" in outcome.out
    content = strip_module(checkpoint(tmp_path / "run")["state_dict"])  # whose statistics changed in the epoch
    names = [n for n in state_dict if "running" not in n and "num_batches" not in n and not n.startswith("fc.")]
    for encoder in ("encoder_q", "encoder_k"):
        assert all(torch.equal(content[f"{encoder}.{name}"], state_dict[name]) for name in names)


def test_torchvisions_weights_are_downloaded_once(no_network, monkeypatch):
    state_dict, asked = torchvision_state(), []

    def download(url, file, hash_prefix, progress):
        asked.append(url)
        assert hash_prefix and hash_prefix in url
        torch.save(state_dict, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert_backbone(pretrained.load_backbone("torchvision", "resnet18", 32), state_dict)
    assert asked == [torchvision.models.get_model_weights("resnet18").DEFAULT.url]
    assert [file.name for file in no_network.iterdir()] == [Path(asked[0]).name]


@pytest.mark.parametrize("stage", STAGES)
def test_the_backbone_is_read_from_a_checkpoint_of_any_stage(trained, stage):
    content = strip_module(checkpoint(trained[stage])["state_dict"])
    expected = strip_prefix(content, models.STAGES[stage].backbone)
    assert_backbone(read_backbone(trained[stage] / LAST, "resnet8", 32), expected)


def test_statistics_are_taken_and_old_files_have_no_counters(tmp_path):
    state_dict = torchvision_state()
    state_dict["bn1.running_mean"].fill_(0.5)
    old = {name: value for name, value in state_dict.items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": {f"module.{name}": value for name, value in old.items()}}, tmp_path / "old.pth")
    model = models.SSFL("resnet18", 3, dim=8, queue_size=8)
    model.load_backbone(read_backbone(tmp_path / "old.pth", "resnet18"))
    for encoder in (model.encoder_q, model.encoder_k):
        assert (encoder.bn1.running_mean == 0.5).all() and encoder.bn1.num_batches_tracked == 0
        assert torch.equal(encoder.layer4[1].conv2.weight, state_dict["layer4.1.conv2.weight"])


def below(prefix, state_dict):
    return {prefix + name: value for name, value in state_dict.items()}


HEAD = {"model.head.weight": torch.zeros(2, 512)}
FOREIGN = {
    "compiled": lambda own, other: below("_orig_mod.", own),
    "compiled and distributed": lambda own, other: {"state_dict": below("module._orig_mod.", own)},
    "model": lambda own, other: {"model": own, "epoch": 3, "optimizer": {"state": {}}},
    "another key": lambda own, other: {"net": below("module.", own), "epoch": 3},
    "MoCo": lambda own, other: {
        "state_dict": below("module.encoder_q.", own)
        | below("module.encoder_k.", other)
        | {"module.queue": HEAD["model.head.weight"]}
    },
    "SwAV": lambda own, other: {
        "state_dict": below("module.", own)
        | {"module.projection_head.0.weight": torch.zeros(2, 512), "n_averaged": torch.tensor(3)}
    },
    "Lightning": lambda own, other: {"state_dict": below("model.backbone.", own) | HEAD},
}


@pytest.mark.parametrize("form", FOREIGN)
def test_files_of_other_programs_are_read(tmp_path, form):
    own, other = torchvision_state(), torchvision_state(seed=8)
    torch.save(FOREIGN[form](own, other), tmp_path / "foreign.pth")
    assert_backbone(read_backbone(tmp_path / "foreign.pth", "resnet18"), own)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda own: below("student.", own) | below("teacher.", own), "student. and teacher."),
        (lambda own: {"student": own, "teacher": own}, "several networks, student, teacher"),
        (lambda own: {"resnet.embedder.weight": own["conv1.weight"]}, "names are such as resnet.embedder.weight"),
    ],
)
def test_a_prefix_that_is_not_clear_is_named(tmp_path, content, reason):
    torch.save(content(torchvision_state()), tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", reason)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_that_was_saved_in_another_form_starts_the_next_stage(trained, plain_tree, tmp_path, wrapped):
    own = strip_module(checkpoint(trained["i"])["state_dict"])
    inner = {name.replace("encoder_q.", "encoder_q._orig_mod."): value for name, value in own.items()}
    torch.save({"model": inner} if wrapped else below("_orig_mod.", own), tmp_path / "foreign")
    network = models.load(tmp_path / "foreign")
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())
    flags = ["--image-size", 32, "--epochs", 1, "--last_stage_ckpt", tmp_path / "foreign"]
    outcome = run_stage("ii", plain_tree, tmp_path / "run", *flags)
    assert (outcome.status, outcome.err) == (0, "")


def test_a_resumed_run_needs_no_weights(trained, plain_tree, tmp_path, no_network):
    folder = copied(trained["i"], tmp_path / "run")
    words = ["--epochs", 3, "--resume", "auto", "--pretrained", tmp_path / "gone.pth"]
    outcome = run_stage("i", plain_tree, folder, *words)
    assert outcome.status == 0 and "gone.pth" not in outcome.out + outcome.err


# ---- mistakes


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.URLError("Name or service not known"), "Name or service not known"),
        (RuntimeError('invalid hash value (expected "f37072fd", got "00")'), "invalid hash value"),
    ],
)
def test_a_failed_download_ends_in_one_line(plain_tree, tmp_path, no_network, monkeypatch, error, reason):
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=error))
    outcome = resnet18(plain_tree, tmp_path / "run")
    assert_mistake(outcome, "--pretrained", "resnet18-", reason, no_network)


def test_networks_without_torchvision_weights_are_refused(no_network):
    with pytest.raises(UserError, match=r"--pretrained: .* resnet8"):
        pretrained.load_backbone("torchvision", "resnet8", 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, "conv1.weight has the shape (64, 1, 7, 7), not (64, 3, 7, 7)"),
        ({"layer4.2.conv1.weight": torch.zeros(1)}, "layer4.2.conv1.weight is unknown"),
        ({"conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}, "conv1.weight holds values that are not finite"),
        ({"n_averaged": 3}, "n_averaged among its weights is no tensor"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(tmp_path, change, reason):
    torch.save(torchvision_state() | change, tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", reason)


def test_files_that_are_not_weights_and_weights_of_another_backbone_are_refused(trained, tmp_path):
    assert_refused(trained["ii"] / LAST, "resnet8, not resnet20", "--arch", arch="resnet20")
    (tmp_path / "text").write_text("not weights")
    torch.save([1, 2], tmp_path / "list")
    for name, reason in (("none", "cannot be opened"), ("text", "damaged"), ("list", "not a checkpoint")):
        assert_refused(tmp_path / name, reason)


def test_stage_ii_does_not_have_the_flag_and_it_takes_no_empty_name(plain_tree):
    assert "--pretrained" in refusal("ii", plain_tree, "none", "--pretrained")
    assert "empty" in refusal("i", plain_tree, "none", "--pretrained=")


def test_torchvision_has_weights_for_each_of_its_archs():
    for arch in models.backbones.TORCHVISION:
        assert pretrained.download(arch, wanted=False).endswith(".pth")
