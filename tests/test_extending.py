"""The guides of docs/extending.md: their changes can be made to this version, and do what the document says."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.helpers import LAST, ROOT, args_of, checkpoint, log_of, results_of, same, stage_flags, train

GUIDES = {  # heading -> (language, text) of its code blocks
    section.splitlines()[0]: re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.M | re.S)
    for section in re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(), flags=re.M)
}


@pytest.fixture
def project(tmp_path):
    """A copy of the project's code."""
    copy = tmp_path / "project"
    for name in ("models", "datasets", "utils", "data", "scripts", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for stage in ("i", "ii", "iii"):
        shutil.copy(ROOT / f"ssd_stage_{stage}.py", copy)
    return copy


def blocks(guide: str, language: str) -> list[str]:
    return [text for found, text in GUIDES[guide] if found == language]


def follow(project, guide: str):
    """Makes the changes of a guide's diffs: each hunk must fit in exactly one place."""
    for diff in blocks(guide, "diff"):
        for name, hunks in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, flags=re.M | re.S):
            file = project / name
            content = file.read_text()
            for hunk in re.split(r"^@@\n", hunks, flags=re.M):
                lines = [line if line.strip() else f" {line}" for line in hunk.splitlines(keepends=True)]
                before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
                assert f"\n{content}".count(f"\n{before}") == 1, f"{guide}, {name}:\n{hunk}"
                content = content.replace(before, after)
            file.write_text(content)


def run(project, *runs, code=""):
    """Runs (stage, command line) one after the other in a process of the changed project, then the code."""
    lines = [f"import ssd_stage_{stage}; assert ssd_stage_{stage}.main({words}) == 0" for stage, words in runs]
    command = [sys.executable, "-c", "\n".join([*lines, code])]
    subprocess.run(command, cwd=project, check=True, stdout=subprocess.DEVNULL)


def test_logit_adjustment_changes_the_loss_by_its_flag_alone(project, plain_tree, tmp_path):
    follow(project, "Your own loss in stage I")
    flags = ["--epochs", 1, "--con-weight", 0]
    before = log_of(train("i", plain_tree, tmp_path / "before", *flags), timed=False)
    off, on = tmp_path / "off", tmp_path / "on"
    adjusted = stage_flags("i", plain_tree, on, [*flags, "--logit-adjustment", 1])
    run(project, ("i", stage_flags("i", plain_tree, off, flags)), ("i", adjusted))
    assert log_of(off, timed=False) == before != log_of(on, timed=False)
    assert checkpoint(on)["args"]["logit_adjustment"] == 1
    assert args_of(on)["identity"]["logit_adjustment"] == 0


def test_a_backbone_a_sampler_a_loss_on_the_queue_and_a_figure(project, plain_tree, tmp_path):
    for guide in ("Your own backbone", "Another sampler", "A loss on features or on the queue", "A figure in the log"):
        follow(project, guide)
    flags = ["--arch", "mobilenet_v3_small", "--epochs", 1]
    first = stage_flags("i", plain_tree, tmp_path / "i", flags)
    second = stage_flags("ii", plain_tree, tmp_path / "ii", ["--last_stage_ckpt", tmp_path / "i" / LAST, *flags])
    code = f"""
import inspect, textwrap
import numpy as np, torch
import models
from datasets.samplers import SquareRootSampler
from models.losses import attraction_loss
from utils.export import plain_network

labels = np.repeat([0, 1], [400, 4])
draws, indices = SquareRootSampler(labels, seed=0).epoch(0)
assert len(indices) == 404 and 20 < (labels[indices] == 1).sum() < 60  # a share of 2 / 22
assert len(set(zip(draws.tolist(), indices.tolist()))) == 404

model, images = models.load({str(tmp_path / "ii" / LAST)!r}), torch.randn(2, 3, 32, 32)
torch.testing.assert_close(plain_network(model, "mobilenet_v3_small", "hard")(images), model(images))  # what ONNX gets

q, queue = torch.randn(3, 4), torch.randn(4, 5)
loss = attraction_loss(q, torch.tensor([1, 2, 0]), queue, torch.tensor([0, 1, -1, 1, 0]))
similarities = (q[0] @ queue[:, 1] + q[0] @ queue[:, 3]) / 2 + (q[2] @ queue[:, 0] + q[2] @ queue[:, 4]) / 2
torch.testing.assert_close(loss, 1 - similarities / 3)

source = textwrap.dedent(inspect.getsource(models.SSFL.forward)).replace("self.queue.clone()", "self.queue")
exec(source, vars(inspect.getmodule(models.SSFL)))
model = models.SSFL("resnet8", 3, 8, 16)
outputs = inspect.getmodule(models.SSFL).forward(model, images, images, torch.tensor([0, 1]))
try:
    sum(outputs[1:]).backward()
    raise SystemExit("no error without the clone")
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error)
"""
    run(project, ("i", first), ("ii", second), code=code)
    assert args_of(tmp_path / "i")["arch"] == "mobilenet_v3_small"
    assert 0 < log_of(tmp_path / "i")[0]["attraction"] < 2
    assert 1 / 6 < log_of(tmp_path / "ii")[0]["confidence"] < 1


def test_a_new_stage(project, plain_tree, trained, tmp_path):
    follow(project, "A new stage")
    (project / "ssd_stage_iv.py").write_text(*blocks("A new stage", "python"))
    (project / "configs" / "cifar100_lt" / "stage_iv.txt").write_text(*blocks("A new stage", "text"))
    out = tmp_path / "iv"
    student = ["--student_ckpt", trained["iii"] / LAST]
    whole = stage_flags("iv", plain_tree, out, [*student, "--cos"])
    again = stage_flags("iv", plain_tree, tmp_path / "evaluated", ["--resume", out / LAST, "--evaluate"])
    half = stage_flags("iv", plain_tree, tmp_path / "half", [*student, "--cos", "--epochs", 1])
    resumed = stage_flags("iv", plain_tree, tmp_path / "half", ["--resume", "auto"])
    wrong = stage_flags("iv", plain_tree, tmp_path / "wrong", ["--student_ckpt", trained["ii"] / LAST])
    code = f"""
import models
from scripts import check_recipes
from utils import export, predict, report

assert ssd_stage_iv.main({wrong}) == 2
assert type(models.load({str(out / LAST)!r})).__name__ == "CosineStage"
assert predict.main([{str(out / LAST)!r}, {str(plain_tree / "val" / "class0")!r}]) == 0
assert report.main([{str(out)!r}, {str(trained["iii"])!r}]) == 0
for form, status in {{"network": 0, "onnx": 2}}.items():
    assert export.main([{str(out / LAST)!r}, {str(tmp_path / "out")!r} + form, "--format", form]) == status
assert check_recipes.main(["configs/cifar100_lt", {str(plain_tree)!r}, {str(tmp_path / "runs")!r}]) == 0
assert "stage_iv" in check_recipes.STAGES
"""
    run(project, ("iv", whole), ("iv", again), ("iv", half), ("iv", resumed), code=code)
    assert [record["classifier"] for record in results_of(out)] == ["cosine"]
    assert results_of(out) == results_of(tmp_path / "evaluated")
    weights, student = (checkpoint(run)["state_dict"] for run in (out, trained["iii"]))
    assert torch.equal(weights["module.encoder_s.conv1.weight"], student["module.encoder_q.conv1.weight"])
    assert torch.equal(weights["module.encoder_s.bn1.running_mean"], student["module.encoder_q.bn1.running_mean"])
    assert not torch.equal(weights["module.classifier.fc.weight"], student["module.classifier.weight"])
    assert same(checkpoint(tmp_path / "half")["state_dict"], weights)  # it was resumed


def test_the_parts_work_from_python(plain_tree, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("From Python", "python")
    exec(code.replace(" DIR", f" {plain_tree}"), scope := {})
    assert scope["loss"].isfinite() and scope["features"].shape == (30, 64)
    assert "accuracy of the probe" in capsys.readouterr().out
