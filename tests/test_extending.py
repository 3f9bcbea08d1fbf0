"""The diffs of docs/extending.md apply to this version, and do what the document says."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.helpers import LAST, ROOT, log_of, stage_flags, train

DIFFS = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "docs" / "extending.md").read_text(), flags=re.M | re.S)


@pytest.fixture
def project(tmp_path):
    """A copy of the project's code; apply(number, ...) changes it."""
    copy = tmp_path / "project"
    for name in ("models", "datasets", "utils", "data"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for stage in ("i", "ii", "iii"):
        shutil.copy(ROOT / f"ssd_stage_{stage}.py", copy)
    return copy


def apply(project, *numbers):
    for number in numbers:
        (project / "change.diff").write_text(DIFFS[number])
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(project.parent)}
        subprocess.run(["git", "apply", "change.diff"], cwd=project, check=True, env=environment)


def run(project, *runs, code=""):
    """Runs (stage, command line) one after the other in a process of the changed project, then the code."""
    lines = [f"import ssd_stage_{stage}; assert ssd_stage_{stage}.main({words}) == 0" for stage, words in runs]
    command = [sys.executable, "-c", "\n".join([*lines, code])]
    subprocess.run(command, cwd=project, check=True, stdout=subprocess.DEVNULL)


def test_logit_adjustment_changes_the_loss_by_its_flag_alone(project, plain_tree, tmp_path):
    apply(project, 0)
    flags = ["--epochs", 1, "--con-weight", 0]
    before = log_of(train("i", plain_tree, tmp_path / "before", *flags), timed=False)
    off, on = tmp_path / "off", tmp_path / "on"
    adjusted = stage_flags("i", plain_tree, on, [*flags, "--logit-adjustment", 1])
    run(project, ("i", stage_flags("i", plain_tree, off, flags)), ("i", adjusted))
    assert log_of(off, timed=False) == before != log_of(on, timed=False)
    assert torch.load(on / LAST, weights_only=True)["args"]["logit_adjustment"] == 1


def test_a_new_backbone_and_a_new_sampler_train(project, plain_tree, tmp_path):
    apply(project, 1, 2)
    flags = ["--arch", "mobilenet_v3_small", "--epochs", 1]
    first = stage_flags("i", plain_tree, tmp_path / "i", flags)
    second = stage_flags("ii", plain_tree, tmp_path / "ii", ["--last_stage_ckpt", tmp_path / "i" / LAST, *flags])
    code = (
        "import numpy as np; from datasets.samplers import SquareRootSampler as S\n"
        "labels = np.repeat([0, 1], [400, 4]); draws, indices = S(labels, seed=0).epoch(0)\n"
        "assert len(indices) == 404 and 20 < (labels[indices] == 1).sum() < 60\n"  # a share of 2 / 22
        "assert len(set(zip(draws.tolist(), indices.tolist()))) == 404\n"
        "import models, torch; from utils.export import plain_network\n"  # what --format onnx writes
        f"model = models.load({str(tmp_path / 'ii' / LAST)!r}); images = torch.randn(2, 3, 32, 32)\n"
        "torch.testing.assert_close(plain_network(model, 'mobilenet_v3_small')(images), model(images))\n"
    )
    run(project, ("i", first), ("ii", second), code=code)
    assert json.loads((tmp_path / "i" / "args.json").read_text())["arch"] == "mobilenet_v3_small"
