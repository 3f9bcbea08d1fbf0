"""The three scripts show their training: they contain all its parts, and few calls lie between them and the loss."""

import re
import traceback
from pathlib import Path

import pytest

import models.ssd
from tests.helpers import MAINS, ROOT, STAGES, train

PARTS = (
    "build_data(", "torch.optim.SGD(", "DistributedDataParallel", "for epoch in range(", "state.batches(loader)",
    "F.cross_entropy(", "state.backward(loss)", "state.optimizer_step()", "evaluate(model, data.val", "data.test",
    " restore(", "state.end_epoch(",
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_script_holds_the_whole_outline_of_its_training(stage):
    text = (ROOT / f"ssd_stage_{stage}.py").read_text()
    assert [part for part in PARTS if part not in text] == []
    assert len(text.splitlines()) <= 180
    assert re.findall(r"^def (\w+)", text, re.M) == ["get_parser", "train_one_epoch", "main_worker", "main"]


def test_the_contrastive_loss_is_at_most_seven_frames_below_the_shell(plain_tree, tmp_path, monkeypatch):
    stacks = []

    def contrastive_loss(*args):
        stacks.append([
            frame.name for frame in traceback.extract_stack()
            if Path(frame.filename).is_relative_to(ROOT) and "tests" not in Path(frame.filename).parts
            and ".venv" not in Path(frame.filename).parts
        ])  # fmt: skip
        return original(*args)

    original = models.ssd.contrastive_loss
    monkeypatch.setattr(models.ssd, "contrastive_loss", contrastive_loss)
    train("i", plain_tree, tmp_path / "run", "--epochs", 1)
    # The shell adds <module> before main; contrastive_loss itself comes after forward.
    assert stacks[-1] == ["main", "launch", "main_worker", "train_one_epoch", "forward"]


def test_every_flag_has_a_help_text():
    for stage in MAINS:
        parser = __import__(f"ssd_stage_{stage}").get_parser()
        assert [action.dest for action in parser._actions if not action.help] == []
