"""Groups and names of classes, and how an accuracy is written."""

import re
from collections import Counter
from pathlib import Path

import torch

MANY_ABOVE, FEW_BELOW = 100, 20  # training images per class (Liu et al., 2019)
GROUPS = ("many", "medium", "few")
MAX_NAMES = 4 * 2**20  # bytes of a file of class names; checkpoints contain the names too


def shot_groups(train_counts: torch.Tensor) -> torch.Tensor:
    """0 for many-shot classes (> 100 training images), 1 for medium-shot (20 to 100), 2 for few-shot (< 20)."""
    return (train_counts <= MANY_ABOVE).long() + (train_counts < FEW_BELOW).long()


def percent(value: float | None) -> str:
    """An accuracy of [0, 1] in percent, or - for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def read_names(file: Path) -> list[str]:
    """The lines of a file of class names. Raises OSError, and ValueError if it is too large."""
    if file.stat().st_size > MAX_NAMES:
        raise ValueError(f"more than {MAX_NAMES:,} bytes")
    text = file.read_bytes().decode("utf-8-sig", errors="replace")
    return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]


def tell_names_apart(names: list[str]) -> list[str]:
    """The names of the classes for texts; those that several classes have are followed by the class number."""
    number = Counter(names)
    return [name if number[name] == 1 else f"{name} (class {label})" for label, name in enumerate(names)]


def numbering_note(names: list[str] | None) -> list[str]:
    """A warning if names that differ by a number, such as 0 to 11 or class1 to class12, are not in its order."""
    parts = [re.fullmatch(r"(\D*)(\d{1,18})(.*)", name, re.DOTALL) for name in names or []]
    if not all(parts) or len({part[1] for part in parts}) > 1:
        return []
    numbers = [int(part[2]) for part in parts]
    label = next((i for i, number in enumerate(sorted(numbers)) if numbers[i] != number), None)
    what = "names are in the order of text, not of their numbers; lists and checkpoints that count otherwise mean other"
    remedy = "classes (names with leading zeros, such as 02, have one order)"
    return [] if label is None else [f"warning: class {label} is {names[label]!r}: {what} {remedy}"]
