"""Checkpoints that an earlier version wrote within an epoch resume, with the results of that version.

tests/fixtures contains them, with weights rounded to a few bits so that they are small, and the results of the version
that wrote them (commit f96584c). Losses and norms agree to 1e-3: processors differ in the last bits.
"""

import json
import lzma
from pathlib import Path

import pytest
import torch

from tests.helpers import STAGES, checkpoint, log_of, train

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_an_earlier_version_resumes(plain_tree, tmp_path, stage):
    file = tmp_path / "old.pth.tar"
    file.write_bytes(lzma.decompress((FIXTURES / f"checkpoint_{stage}_before_rebuild.pth.tar.xz").read_bytes()))
    expected = json.loads((FIXTURES / "expected.json").read_text())[stage]
    folder = train(stage, plain_tree, tmp_path / "run", "--cos", "--resume", file)
    content, (record,) = checkpoint(folder), log_of(folder)
    tensors = [value.double() for value in content["state_dict"].values() if value.is_floating_point()]
    found = {
        **record,
        "epoch": content["epoch"],
        "step": content["step"],
        "norm": torch.cat([tensor.flatten() for tensor in tensors]).norm().item(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
