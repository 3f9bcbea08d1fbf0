"""Groups and names of classes, and how an accuracy is written."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch

from .errors import printable

# Training images of a class (Liu et al., 2019).
MANY_ABOVE = 100
FEW_BELOW = 20
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
    """The names of the classes for texts; what does not tell them apart there is followed by the class number.

    That is a name that others have too, but for blanks around it, that is blank, or that ends in a class number.
    """
    stripped = [printable(name).strip() for name in names]
    number = Counter(stripped)
    number |= {name: 2 for name in stripped if not name or re.search(r"\(class \d+\)$", name)}
    return [
        names[label] if number[name] == 1 else f"{name} (class {label})".strip() for label, name in enumerate(stripped)
    ]


def numbering_note(names: list[str] | None) -> list[str]:
    """A warning if neighboring names that first differ in a number, such as 11 and 2, are in the order of text."""
    names = names or []
    parts = [[int(p) if p.isdecimal() else p for p in re.split(r"(\d{1,18})", name.lower())] for name in names]
    what = "names are in the order of text, not of their numbers; lists and checkpoints that count otherwise mean other"
    remedy = "classes (names with leading zeros, such as 02, have one order)"
    for label, (before, own) in enumerate(pairwise(parts), 1):
        first, second = next((pair for pair in zip(before, own, strict=False) if pair[0] != pair[1]), ("", ""))
        if isinstance(first, int) and first > second and names[label - 1] < names[label]:
            return [f"warning: class {label} is {names[label]!r}, after {names[label - 1]!r}: {what} {remedy}"]
    return []
