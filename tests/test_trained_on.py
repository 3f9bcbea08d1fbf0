"""After a redraw, evaluations, later stages and the report say how many test images were trained on."""

import shutil

import pytest
import torch

from tests.helpers import LAST, args_of, checkpoint, results_of, run_stage, source
from utils import checkpoint as checkpoints
from utils import report
from utils.errors import UserError

FEW = ["--epochs", 1]


@pytest.fixture(scope="module")
def redrawn(plain_tree, tmp_path_factory):
    """Flags of lists of which 3 former training images are test images, and 2 are validation images."""
    folder = tmp_path_factory.mktemp("redrawn")
    train, val, test = ((plain_tree / f"{split}.txt").read_text().splitlines() for split in ("train", "val", "test"))
    moved = train[::30][:5]
    lists = {"train": [line for line in train if line not in moved], "val": val + moved[:2], "test": test + moved[2:]}
    for split, lines in lists.items():
        (folder / f"{split}.txt").write_text("\n".join(lines))
    return [word for split in lists for word in (f"--{split}-list", folder / f"{split}.txt")]


def test_an_evaluation_counts_the_test_images_that_the_checkpoint_was_trained_on(
    trained, plain_tree, redrawn, tmp_path, capsys
):
    moved = shutil.copytree(plain_tree, tmp_path / "moved")  # DIR may have moved since
    for stage in ("i", "iii"):
        out = tmp_path / stage
        flags = ["--evaluate", "--resume", trained[stage] / LAST, *redrawn]
        outcome = run_stage(stage, moved, out, *flags)
        assert outcome.status == 0 and "warning: 3 of 33 test images were trained on" in outcome.out
        assert outcome.out.count("test images were trained on") == 2  # below the table too
        assert {record["test_trained_on"] for record in results_of(out)} == {3}
        assert report.main([str(out), str(trained[stage])]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "trained on" in line]
        assert line.startswith("3 of 33 test images") and tmp_path.name in line and "trained0" not in line
    outcome = run_stage("i", plain_tree, tmp_path / "before", "--evaluate", "--resume", trained["i"] / LAST)
    assert outcome.status == 0 and "trained on" not in outcome.out
    assert results_of(tmp_path / "before")[0]["test_trained_on"] == 0


def test_later_stages_and_pretrained_ones_count_what_the_first_was_trained_on(trained, plain_tree, redrawn, tmp_path):
    said = "warning: 3 of 33 test images were trained on, by this run or one that it came from ("
    validated = "warning: 2 of 26 validation images were trained on"
    folders = {"i": trained["i"]}
    for stage in ("ii", "iii"):
        folders[stage] = tmp_path / stage
        outcome = run_stage(stage, plain_tree, folders[stage], *FEW, *source(stage, folders), *redrawn)
        assert outcome.status == 0 and said in outcome.out and validated in outcome.out
        digests = checkpoint(folders[stage])["trained_on"]
        assert digests.dtype == torch.int64 and digests.equal(checkpoint(trained["i"])["trained_on"])
        known = args_of(folders[stage])["trained_on"]
        assert known == args_of(trained["i"])["trained_on"] | {"test_images": 3} and known["images"] == len(digests)
    outcome = run_stage("i", plain_tree, tmp_path / "i", *FEW, *redrawn, "--pretrained", trained["iii"] / LAST)
    assert outcome.status == 0 and said in outcome.out
    outcome = run_stage("iii", plain_tree, tmp_path / "none", *FEW, *redrawn, *source("iii", folders), "--kd-weight", 0)
    assert outcome.status == 0 and "trained on, by" not in outcome.out


def test_a_resumed_run_keeps_what_it_was_trained_on_before(trained, plain_tree, redrawn, tmp_path):
    folder = shutil.copytree(trained["i"], tmp_path / "i")
    outcome = run_stage("i", plain_tree, folder, "--cos", "--resume", "auto", "--epochs", 3, *redrawn)
    assert outcome.status == 0 and "warning: 3 of 33 test images were trained on" in outcome.out
    assert checkpoint(folder)["trained_on"].equal(checkpoint(trained["i"])["trained_on"])
    assert results_of(folder)[0]["test_trained_on"] == 3


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), torch.zeros(3, dtype=torch.int64).to_sparse(), "x"])
def test_a_checkpoint_with_anything_else_there_is_refused(trained, tmp_path, value):
    """--pretrained, which takes files of other programs, passes over it."""
    torch.save(checkpoint(trained["i"]) | {"trained_on": value}, tmp_path / LAST)
    with pytest.raises(UserError, match=r"last_checkpoint.pth.tar: its fields .* correct --resume"):
        checkpoints.read(tmp_path / LAST, "--resume")
    assert checkpoints.trained_on(tmp_path / LAST) is None


def test_of_a_checkpoint_that_does_not_tell_nothing_is_said(trained, plain_tree, redrawn, tmp_path):
    content = checkpoint(trained["i"])
    del content["trained_on"]
    torch.save(content, tmp_path / LAST)
    flags = ["--evaluate", "--resume", tmp_path / LAST, *redrawn]
    outcome = run_stage("i", plain_tree, tmp_path / "out", *flags)
    assert outcome.status == 0 and "trained on" not in outcome.out
    assert "test_trained_on" not in results_of(tmp_path / "out")[0]
    outcome = run_stage("i", plain_tree, tmp_path / "finished", "--resume", tmp_path / LAST, *redrawn)
    assert outcome.status == 0 and "trained_on" not in args_of(tmp_path / "finished")
