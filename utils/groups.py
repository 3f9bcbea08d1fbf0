"""The groups of classes that accuracies are reported for, and how an accuracy is written."""

import torch

MANY_ABOVE, FEW_BELOW = 100, 20  # training images per class (Liu et al., 2019)
GROUPS = ("many", "medium", "few")


def shot_groups(train_counts: torch.Tensor) -> torch.Tensor:
    """0 for many-shot classes (> 100 training images), 1 for medium-shot (20 to 100), 2 for few-shot (< 20)."""
    return (train_counts <= MANY_ABOVE).long() + (train_counts < FEW_BELOW).long()


def percent(value: float | None) -> str:
    """An accuracy of [0, 1] in percent, or - for None."""
    return "-" if value is None else f"{100 * value:.1f}"
