"""benchmarks/probe.py: accuracies of a linear classifier on frozen features."""

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import probe
from datasets.splits import find_splits
from tests.helpers import LAST, STAGES, assert_mistake, checkpoint, outcome_of, write_tree
from utils import predict

TRAIN_COUNTS = torch.tensor([200, 150, 50, 30, 10, 5])


def test_features_that_separate_the_classes_give_all_others_give_chance():
    labels = torch.arange(600) % 6
    for result in (probe.split_accuracies(torch.eye(6).double()[labels], labels, TRAIN_COUNTS, s) for s in (0, 1)):
        assert [result[name] for name in probe.ACCURACIES] == [1.0] * 4 and result["test_counts"] == [100] * 6
    torch.manual_seed(0)
    noise = torch.randn(600, 8).double()
    found = [probe.split_accuracies(noise, labels, TRAIN_COUNTS, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2] and all(result["overall"] < 0.3 for result in found)


def test_groups_are_those_of_the_training_list():
    labels = torch.arange(600) % 6
    features = torch.eye(6).double()[labels.clamp(max=4)]  # the classes 4 and 5, both few-shot, look the same
    result = probe.split_accuracies(features, labels, TRAIN_COUNTS, 0)
    assert (result["many"], result["medium"], result["overall"]) == (1, 1, 5 / 6) and result["few"] == 0.5


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_any_stage_is_probed_alike_each_time(stage, trained, plain_tree, tmp_path, capsys):
    for name in ("one", "two"):
        assert probe.main([str(trained[stage] / LAST), str(plain_tree), "--json", str(tmp_path / name)]) == 0
    record = json.loads((tmp_path / "one").read_text())
    assert record == json.loads((tmp_path / "two").read_text())
    assert record["images"] == 30 and record["seeds"] == [0, 1, 2]
    assert record["overall"] > 0.7 and 0 <= record["overall_std"] < 0.3  # the images have the color of their class
    assert capsys.readouterr().out.startswith(f"overall {100 * record['overall']:.1f} ± ")


def test_features_are_of_the_evaluation_s_images_and_standardized(trained, plain_tree, tmp_path):
    content = checkpoint(trained["i"])
    torch.save(content | {"args": content["args"] | {"mean": [0.0] * 3, "std": [1.0] * 3}}, tmp_path / LAST)
    model, seen = predict.load_network(tmp_path / LAST)[0], []
    model.encoder_q.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    test_list = find_splits(plain_tree, {}, ("test",))["test"]
    features, _ = probe.extract_features(model, test_list, torch.device("cpu"))
    assert seen[0].min() >= 0 and seen[0].max() <= 1  # as the checkpoint's statistics leave them
    varied = features[:, features.std(dim=0) > 0]
    assert varied.shape[1] > 0
    torch.testing.assert_close(varied.mean(dim=0), torch.zeros(varied.shape[1]).double())
    torch.testing.assert_close(varied.std(dim=0), torch.ones(varied.shape[1]).double())


def test_the_classifier_is_the_minimum_of_cross_entropy_and_half_the_squared_weights_times_a_hundredth():
    torch.manual_seed(0)
    features, labels = torch.randn(60, 4).double(), torch.arange(60) % 3
    classifier = probe.train_classifier(features, labels, 3)
    loss = F.cross_entropy(classifier(features), labels) + 0.01 / 2 * classifier.weight.square().sum()
    gradients = torch.autograd.grad(loss, list(classifier.parameters()))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-5


def test_mistakes_are_one_line(trained, tmp_path, capsys):
    (tmp_path / "other").write_text("")
    data = write_tree(tmp_path / "data", {"train": (2, 2), "val": (2, 2), "test": (2, 1)})
    for words, named in (
        ([tmp_path / "other", data], [tmp_path / "other"]),
        ([trained["i"] / LAST, data], [data / "test.txt", "class 1"]),
    ):
        assert_mistake(outcome_of(probe.main, capsys, *words), *named)
