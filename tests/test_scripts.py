"""The three scripts show their training: each has the published outline, and few calls lie between it and the loss."""

import traceback
from pathlib import Path

import models.ssd
from tests.helpers import ROOT, train


def test_the_contrastive_loss_is_at_most_seven_frames_below_the_shell(plain_tree, tmp_path, monkeypatch):
    stacks, original = [], models.ssd.contrastive_loss

    def contrastive_loss(*args):
        files = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        own = [(file.relative_to(ROOT).parts[0], name) for file, name in files if file.is_relative_to(ROOT)]
        stacks.append([name for folder, name in own if folder not in ("tests", ".venv")])
        return original(*args)

    monkeypatch.setattr(models.ssd, "contrastive_loss", contrastive_loss)
    train("i", plain_tree, tmp_path / "run", "--epochs", 1)
    # The shell adds <module> before main; contrastive_loss itself comes after forward.
    assert stacks[-1] == ["main", "launch", "main_worker", "train_one_epoch", "forward"]
