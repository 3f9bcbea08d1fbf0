"""Accuracies by group of classes equal a naive computation, on any number of ranks."""

import json
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from datasets.samplers import eval_batches
from models import SLG
from tests.helpers import on_ranks
from utils.distributed import broadcast_buffers
from utils.groups import shot_groups
from utils.metrics import ShotAccuracy, evaluate
from utils.train_state import TrainState

CPU = torch.device("cpu")
TRAIN_COUNTS = torch.tensor([500, 101, 100, 50, 20, 19, 5, 1])
CLASSES, IMAGES = len(TRAIN_COUNTS), 101


def buffers_of_two_ranks(rank):
    model = SLG("resnet8", 3)
    for buffer in model.buffers():
        buffer.fill_(rank + 5)
    broadcast_buffers(model)
    return [buffer.flatten()[0].item() for buffer in model.buffers()]


def test_all_ranks_evaluate_with_the_statistics_of_rank_0():
    first, second = on_ranks(2, buffers_of_two_ranks, method="fork")
    assert first == second and set(first) == {5}


def predictions():
    """Logits that are right about half the time, and labels, with no image of the sixth class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES - 1, (IMAGES,), generator=generator)
    labels[labels == 5] = CLASSES - 1
    logits = torch.randn(IMAGES, CLASSES, generator=generator)
    logits[torch.arange(IMAGES), labels] += 1
    return logits, labels


def naive(logits, labels, train_counts):
    """The record of results.json, computed image by image."""
    groups = ["many" if n > 100 else "few" if n < 20 else "medium" for n in train_counts.tolist()]
    names, classes = ["many", "medium", "few"], range(len(groups))
    ranked = [sorted(classes, key=lambda c, row=row: -row[c]) for row in logits.tolist()]
    wanted = labels.tolist()
    right = [[order[0] == label for order, label in zip(ranked, wanted, strict=True) if label == c] for c in classes]
    exact = [Fraction(sum(hits), len(hits)) if hits else None for hits in right]

    def mean(*of):
        values = [a for a, group in zip(exact, groups, strict=True) if group in of and a is not None]
        return float(sum(values) / len(values)) if values else None

    between, confusion = [[0] * 3 for _ in names], [[0] * len(groups) for _ in groups]
    for order, label in zip(ranked, wanted, strict=True):
        between[names.index(groups[label])][names.index(groups[order[0]])] += 1
        confusion[label][order[0]] += 1
    return {
        "overall": sum(map(sum, right)) / len(wanted),
        "class_mean": mean(*names),
        "top5": sum(label in order[:5] for order, label in zip(ranked, wanted, strict=True)) / len(wanted),
        **{name: mean(name) for name in names},
        "per_class": [None if a is None else float(a) for a in exact],
        "train_counts": train_counts.tolist(),
        "test_counts": [wanted.count(c) for c in classes],
        "classes": None,
        "count": len(wanted),
        "confusion_groups": between,
        "confusion": confusion,
    }


def counted(logits, labels, train_counts, batch=16):
    counts = ShotAccuracy(train_counts, CPU)
    for start in range(0, len(labels), batch):
        counts.update(logits[start : start + batch], labels[start : start + batch])
    return counts.results()


def test_results_are_those_of_a_naive_computation():
    results = counted(*predictions(), TRAIN_COUNTS)
    assert results == naive(*predictions(), TRAIN_COUNTS)
    assert results["per_class"][5] is None
    assert json.loads(json.dumps(results)) == results


def counted_per_class(*hits, train_counts=None):
    """The results of predictions that are right (1) or the next class (0), given class by class."""
    num_classes = len(hits)
    labels = torch.tensor([c for c, row in enumerate(hits) for _ in row], dtype=torch.long)
    wrong = torch.tensor([1 - hit for row in hits for hit in row], dtype=torch.long)
    logits = torch.nn.functional.one_hot((labels + wrong) % num_classes, num_classes).float()
    return counted(logits, labels, torch.full((num_classes,), 5) if train_counts is None else train_counts)


def test_the_class_mean_of_an_unbalanced_list_is_the_mean_of_its_class_accuracies():
    """The third class has no image."""
    results = counted_per_class([1, 1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0], [], [0, 1])
    assert results["overall"] == 9 / 14
    assert results["class_mean"] == (7 / 8 + 1 / 4 + 1 / 2) / 3 == 0.5416666666666666
    assert results["test_counts"] == [8, 4, 0, 2] and results["per_class"] == [7 / 8, 1 / 4, None, 1 / 2]
    assert results["confusion"] == [[7, 1, 0, 0], [0, 1, 3, 0], [0, 0, 0, 0], [1, 0, 0, 1]]


def test_class_mean_of_a_balanced_list_is_the_same_float_as_overall():
    differing = 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        hits = torch.randint(0, 2, (7, 3 + seed), generator=generator).tolist()
        results = counted_per_class(*hits)
        assert results["class_mean"] == results["overall"]
        differing += sum(results["per_class"]) / 7 != results["overall"]
    assert differing  # the plain mean of floats differs


def test_equal_class_means_are_ties_whichever_classes_were_right():
    def means(*right):
        results = counted_per_class(*([i < k for i in range(n)] for n, k in zip((10, 10, 10, 3), right, strict=True)))
        return results["class_mean"], sum(results["per_class"]) / 4

    (exact, plain), (other_exact, other_plain) = means(1, 2, 3, 0), means(3, 2, 1, 0)
    assert exact == other_exact and plain != other_plain


def test_the_confusion_matrix_is_full_up_to_1000_classes():
    for num_classes in (1000, 1001):
        train_counts = torch.arange(num_classes) % 150
        labels = torch.arange(num_classes)
        logits = torch.eye(num_classes).roll(1, dims=1)
        results = counted(logits, labels, train_counts)
        assert ("confusion" in results) == (num_classes == 1000)
        groups = shot_groups(train_counts).tolist()
        pairs = [(groups[c], groups[(c + 1) % num_classes]) for c in range(num_classes)]
        assert results["confusion_groups"] == [[pairs.count((i, j)) for j in range(3)] for i in range(3)]
        assert results["overall"] == results["class_mean"] == 0


def test_accuracies_are_null_without_images():
    results = counted(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.long), TRAIN_COUNTS)
    assert results["count"] == 0
    assert {results[name] for name in ("overall", "class_mean", "top5", "many", "medium", "few")} == {None}


@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_top5_of_five_classes_or_fewer_is_always_right(classes):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (20,), generator=generator)
    logits = torch.randn(20, classes, generator=generator)
    train_counts = TRAIN_COUNTS[:classes]
    results = counted(logits, labels, train_counts)
    assert results["top5"] == 1
    assert results == naive(logits, labels, train_counts)


class Batches(list):
    """Replaces a loader: batches (views, labels, indices)."""

    name = "test"


class Model(nn.Module):
    """Replaces a network: applies a function to images, and keeps what it returned last."""

    classes = None

    def __init__(self, function, *classifiers):
        super().__init__()
        self.function, self.classifiers = function, classifiers

    def forward(self, images):
        assert not self.training
        self.returned = self.function(images)
        return self.returned


def evaluated(model, *batches):
    """The results of a model; batches: (images, labels)."""
    args = SimpleNamespace(print_freq=1000, evaluate=True, amp="none", accum_steps=1, start_epoch=0)
    loader = Batches(((images,), labels, []) for images, labels in batches)
    return evaluate(model, loader, TRAIN_COUNTS, TrainState(model, None, CPU, args))


def evaluated_shard(rank, images, world):
    """Two classifiers on this rank's shard of the first images, through the sampler that the loaders use."""
    logits, labels = predictions()
    shard = [torch.tensor([i for _, _, i in batch]) for batch in eval_batches(images, 8, rank, world)]
    model = Model(lambda numbers: (logits[numbers], -logits[numbers]), "hard", "soft")
    return evaluated(model, *((numbers, labels[numbers]) for numbers in shard))


@pytest.mark.parametrize(("images", "world"), [(IMAGES, 1), (IMAGES, 3), (2, 3)])
def test_every_image_counts_once_on_any_number_of_ranks(images, world):
    logits, labels = (values[:images] for values in predictions())
    expected = {"hard": naive(logits, labels, TRAIN_COUNTS), "soft": naive(-logits, labels, TRAIN_COUNTS)}
    assert expected["hard"]["count"] == images
    assert on_ranks(world, evaluated_shard, images, world, method="fork") == [expected] * world


def test_evaluation_computes_no_gradient():
    weights = torch.zeros(CLASSES, requires_grad=True)
    model = Model(lambda images: images + weights, "linear")
    evaluated(model, predictions())
    assert not model.returned.requires_grad


def test_the_evaluation_has_the_precision_of_the_training():
    weights = torch.eye(len(TRAIN_COUNTS))
    model = Model(lambda images: images @ weights, "linear")
    args = SimpleNamespace(print_freq=1000, evaluate=True, amp="bf16", accum_steps=1, start_epoch=0)
    loader = Batches([((weights,), torch.arange(len(TRAIN_COUNTS)), [])])
    evaluate(model, loader, TRAIN_COUNTS, TrainState(model, None, CPU, args))
    assert model.returned.dtype == torch.bfloat16
