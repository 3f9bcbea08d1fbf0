"""The best checkpoint is the one with the best class mean, regardless of the accuracy over all images."""

import pytest
import torch

from tests.helpers import BEST, PREVIOUS, checkpoint, log_of, results_of, run_stage, source, train
from utils import metrics


@pytest.fixture
def unbalanced(plain_tree, tmp_path):
    """A validation list with one image of the first class and four of the others."""
    lines = (plain_tree / "val.txt").read_text().splitlines(keepends=True)
    (tmp_path / "unbalanced.txt").write_text("".join(lines[3:]))
    return ["--val-list", tmp_path / "unbalanced.txt"]


def with_validation(monkeypatch, **accuracies):
    """Replaces (overall, class mean) of each classifier in the validations of a run, epoch by epoch."""
    original = metrics.evaluate

    def evaluate(model, loader, *rest):
        results = original(model, loader, *rest)
        if loader.name == "val":
            for name, values in accuracies.items():
                results[name]["overall"], results[name]["class_mean"] = values.pop(0)
        return results

    monkeypatch.setattr(metrics, "evaluate", evaluate)


def test_the_best_checkpoint_is_of_the_epoch_with_the_best_class_mean(plain_tree, tmp_path, monkeypatch):
    with_validation(monkeypatch, linear=[(0.9, 0.2), (0.5, 0.4), (0.95, 0.3)])
    folder = train("i", plain_tree, tmp_path, "--epochs", 3)
    assert checkpoint(folder, BEST)["epoch"] == 2
    assert checkpoint(folder)["epoch"] == 3 and float(checkpoint(folder)["best_acc1"]) == 0.4
    assert [record["val"]["linear"]["class_mean"] for record in log_of(folder)] == [0.2, 0.4, 0.3]


def test_stage_iii_chooses_the_best_by_the_soft_classifier(trained, plain_tree, tmp_path, monkeypatch):
    soft = [(0.2, 0.2), (0.6, 0.1)]
    with_validation(monkeypatch, hard=[(0.3, 0.3), (0.8, 0.8)], soft=soft)
    folder = train("iii", plain_tree, tmp_path, *source("iii", trained))
    assert checkpoint(folder, BEST)["epoch"] == 1 and float(checkpoint(folder)["best_acc1"]) == 0.2


def test_the_best_of_an_unbalanced_list_is_a_class_mean(plain_tree, unbalanced, tmp_path):
    """Compared with the confusion matrix of the best checkpoint, with the same list as test list."""
    folder = train("i", plain_tree, tmp_path / "run", *unbalanced)
    flags = ["--test-list", unbalanced[1], "--resume", folder / BEST, "--evaluate"]
    (record,) = results_of(train("i", plain_tree, tmp_path / "e", *flags))
    assert record["test_counts"] == [1, 4, 4, 4, 4, 4]
    matrix = torch.tensor(record["confusion"], dtype=torch.float64)
    best = float(checkpoint(folder)["best_acc1"])
    assert best == record["class_mean"] == pytest.approx((matrix.diag() / matrix.sum(1)).mean().item(), rel=1e-12)
    assert best == max(epoch["val"]["linear"]["class_mean"] for epoch in log_of(folder))


def resumed(trained, data, folder, flags, **changes):
    """A run from a checkpoint whose entries are changed, or removed if None; returns (its best, what it printed)."""
    content = checkpoint(trained["i"], PREVIOUS) | changes
    folder.mkdir()
    torch.save({name: value for name, value in content.items() if value is not None}, folder / "old.tar")
    outcome = run_stage("i", data, folder / "run", "--cos", "--resume", folder / "old.tar", *flags)
    assert (outcome.status, outcome.err) == (0, "")
    return float(checkpoint(folder / "run")["best_acc1"]), outcome.out


def test_a_best_accuracy_of_unknown_kind_is_kept_on_a_balanced_list_and_reset_on_another(
    trained, plain_tree, unbalanced, tmp_path
):
    high = torch.tensor(2.0, dtype=torch.float64)  # more than any epoch can reach
    best, out = resumed(trained, plain_tree, tmp_path / "balanced", [], best_acc1=high, best_metric=None)
    assert best == 2 and "starts over" not in out
    for number, metric in enumerate((None, "overall")):
        folder = tmp_path / f"{number}"
        best, out = resumed(trained, plain_tree, folder, unbalanced, best_acc1=high, best_metric=metric)
        (line,) = [line for line in out.splitlines() if "starts over" in line]
        assert str(folder / "old.tar") in line
        assert best == log_of(folder / "run")[-1]["val"]["linear"]["class_mean"] < 1
    best, out = resumed(trained, plain_tree, tmp_path / "ours", unbalanced, best_acc1=high, best_metric="class_mean")
    assert best == 2 and "starts over" not in out
