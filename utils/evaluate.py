"""Evaluation: exact counts a class, summed over ranks; accuracies by group of classes (Liu et al., 2019)."""

import torch

from .distributed import all_reduce

MANY_ABOVE, FEW_BELOW = 100, 20
GROUPS = ("many", "medium", "few")


def shot_groups(train_counts: torch.Tensor) -> torch.Tensor:
    """0 for many-shot classes (> 100 training images), 1 for medium-shot (20 to 100), 2 for few-shot (< 20)."""
    return (train_counts <= MANY_ABOVE).long() + (train_counts < FEW_BELOW).long()


class Counts:
    """Counts of one classifier's predictions; its memory depends on the number of classes alone.

    train_counts: int (C,), training images a class.
    """

    def __init__(self, train_counts: torch.Tensor, device):
        classes = len(train_counts)
        self.train_counts = train_counts
        self.groups = shot_groups(train_counts).to(device)
        self.top1, self.top5, self.images = torch.zeros(3, classes, dtype=torch.long, device=device)
        self.confusion = torch.zeros(9, dtype=torch.long, device=device)

    def update(self, logits, labels):
        """Adds a batch: logits (N, C), labels (N,)."""
        predicted = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hit = predicted == labels[:, None]
        self.images.index_add_(0, labels, torch.ones_like(labels))
        self.top1.index_add_(0, labels, hit[:, 0].long())
        self.top5.index_add_(0, labels, hit.any(dim=1).long())
        pairs = 3 * self.groups[labels] + self.groups[predicted[:, 0]]
        self.confusion.index_add_(0, pairs, torch.ones_like(pairs))

    def results(self) -> dict:
        """Accuracies in [0, 1] over all ranks; None where there is nothing to average. Ends the counting.

        overall and top5 are over images, many, medium and few the mean of their classes' accuracies, over the
        classes that have test images. confusion_groups[i][j]: images of group i that were taken for group j.
        """
        flat = all_reduce(torch.cat([self.top1, self.top5, self.images, self.confusion])).cpu()
        top1, top5, images = flat[:-9].view(3, -1)
        count = int(images.sum())
        accuracy = [int(c) / int(n) if n else None for c, n in zip(top1, images, strict=True)]
        groups = shot_groups(self.train_counts).tolist()

        def mean(group):
            values = [a for a, g in zip(accuracy, groups, strict=True) if g == group and a is not None]
            return sum(values) / len(values) if values else None

        return {
            "overall": int(top1.sum()) / count if count else None,
            "top5": int(top5.sum()) / count if count else None,
            **{name: mean(number) for number, name in enumerate(GROUPS)},
            "per_class": accuracy,
            "train_counts": self.train_counts.tolist(),
            "count": count,
            "confusion_groups": flat[-9:].view(3, 3).tolist(),
        }


@torch.no_grad()
def evaluate(predict, batches, classifiers, train_counts, device, before_counting=lambda: None) -> dict[str, dict]:
    """Results of each classifier, by name.

    predict(images) -> a tuple of logits (N, C), one a classifier, in their order; batches: this rank's
    (images, labels) on the device, every image on exactly one rank; before_counting is called on every rank between
    its last batch and the sum over ranks.
    """
    counts = {name: Counts(train_counts, device) for name in classifiers}
    for images, labels in batches:
        for count, logits in zip(counts.values(), predict(images), strict=True):
            count.update(logits, labels)
    before_counting()
    return {name: count.results() for name, count in counts.items()}
