"""Learning rate by epoch."""

import math


def learning_rate(epoch: int, lr: float, epochs: int, cos: bool, schedule=()) -> float:
    """The rate of an epoch, from 0: half a cosine from lr on, or a tenth of it from each epoch in schedule on."""
    if cos:
        return lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return lr * 0.1 ** sum(epoch >= milestone for milestone in schedule)
