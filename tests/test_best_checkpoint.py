"""The best checkpoint is the one with the best class mean, regardless of the accuracy over all images."""

from types import SimpleNamespace

import pytest
import torch

from datasets.build import is_balanced
from datasets.lists import ImageList
from models import SLG
from tests.helpers import BEST, PARSERS, checkpoint, log_of, source, stage_flags, train
from utils import checkpoint as checkpoints
from utils import metrics
from utils.errors import UserError
from utils.train_state import TrainState


def test_the_best_checkpoint_has_the_best_class_mean_of_the_soft_classifier(trained, plain_tree, tmp_path, monkeypatch):
    """Not the best accuracy over all images, nor of the hard classifier."""
    validations = {"hard": [(0.3, 0.3), (0.8, 0.8), (0.9, 0.9)], "soft": [(0.9, 0.2), (0.5, 0.4), (0.95, 0.3)]}
    original = metrics.evaluate

    def evaluate(model, loader, *rest):
        results = original(model, loader, *rest)
        if loader.name == "val":
            for name, values in validations.items():
                results[name]["overall"], results[name]["class_mean"] = values.pop(0)
        return results

    monkeypatch.setattr(metrics, "evaluate", evaluate)
    folder = train("iii", plain_tree, tmp_path, *source("iii", trained), "--epochs", 3)
    assert checkpoint(folder, BEST)["epoch"] == 2
    assert checkpoint(folder)["epoch"] == 3 and float(checkpoint(folder)["best_acc1"]) == 0.4
    assert [record["val"]["soft"]["class_mean"] for record in log_of(folder)] == [0.2, 0.4, 0.3]


def restored(tmp_path, balanced, *flags, **content) -> TrainState:
    """The state of a run that is resumed from a checkpoint after its first epoch, with more content."""
    args = PARSERS["ii"]().parse_args(stage_flags("ii", tmp_path, tmp_path / "run", flags))
    model = SLG("resnet8", 3)
    state = TrainState(model, torch.optim.SGD(model.classifier.parameters(), 0.1), torch.device("cpu"), args)
    content = {"state_dict": model.state_dict(), "epoch": 1, "best_acc1": 2.0} | content
    loaded = checkpoints.LoadedCheckpoint("old.tar", "--resume", content, {})
    train_loader = SimpleNamespace(images_per_step=16, images_per_epoch=144, depends_on_ranks=False)
    checkpoints.restore(loaded, state, SimpleNamespace(train=train_loader, val_balanced=balanced))
    return state


@pytest.mark.parametrize(
    ("metric", "balanced", "best"), [(None, True, 2), (None, False, 0), ("overall", False, 0), ("class_mean", False, 2)]
)
def test_a_best_accuracy_of_unknown_kind_is_kept_on_a_balanced_list_alone(tmp_path, capsys, metric, balanced, best):
    state = restored(tmp_path, balanced, **({"best_metric": metric} if metric else {}))
    assert (state.epoch, state.best) == (1, best)
    assert ("old.tar: its best accuracy" in capsys.readouterr().out) == (best == 0)


@pytest.mark.parametrize(("lines", "balanced"), [(b"a 0\nb 2\n", True), (b"a 0\nb 0\nc 1\n", False)])
def test_a_list_is_balanced_if_its_classes_have_as_many_images(lines, balanced):
    assert is_balanced(ImageList.from_bytes("list", lines)) == balanced


def test_a_resumed_run_keeps_its_loss_scale(tmp_path):
    saved = torch.amp.GradScaler("cpu", init_scale=8.0).state_dict()
    scaler = restored(tmp_path, True, "--amp", "fp16", scaler=saved).scaler
    assert scaler.state_dict() == saved and scaler.get_scale() == 8


def test_a_run_in_a_later_epoch_than_epochs_is_not_taken_for_a_finished_one(tmp_path):
    with pytest.raises(UserError, match="--epochs 2"):
        restored(tmp_path, True, epoch=2, step=5, images=80)
