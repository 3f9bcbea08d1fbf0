"""Batches of (epoch, draw, index) for training, and shards without padding for evaluation.

What a sampler yields is a function of (seed, epoch, rank) alone. It carries the epoch and the draw because persistent
workers keep the data set that they were started with: the sampler is the only thing that reaches them.
"""

import numpy as np


def generator(*entropy: int) -> np.random.Generator:
    """A random generator for these numbers (seed, epoch, ...)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def draws(indices: np.ndarray) -> np.ndarray:
    """How many times each index came before at its place: [7, 3, 7, 7] gives [0, 0, 1, 2]."""
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    positions = np.arange(len(indices))
    first = np.maximum.accumulate(np.where(np.r_[True, ordered[1:] != ordered[:-1]], positions, 0))
    counted = np.empty_like(positions)
    counted[order] = positions - first
    return counted


class ShuffledSampler:
    """Every image once an epoch in random order, a rank its shard; the shards are padded to equal length.

    size: images in the data set. The padding repeats images from the permutation's start, as their second draw.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world: int = 1):
        self.size, self.seed, self.rank, self.world = size, seed, rank, world

    def __len__(self):
        """Images a rank and epoch."""
        return -(-self.size // self.world)

    def permutation(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of all images, padded to a multiple of the world size."""
        order = generator(self.seed, epoch).permutation(self.size)
        return np.resize(order, len(self) * self.world)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(draws, indices) of this rank's epoch."""
        order = self.permutation(epoch)
        shard = slice(self.rank, None, self.world)
        return draws(order)[shard], order[shard]


class ClassAwareSampler(ShuffledSampler):
    """Class-aware sampling of stage II (paper, section 3.2; Kang et al., 2020).

    Classes in random cyclic order, each for samples_per_class images; a class's images in random cyclic order. A rank
    draws from its shard of the epoch's permutation, as many images as the shard holds.
    labels: int (images,).
    """

    def __init__(self, labels, samples_per_class: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(len(labels), seed, rank, world)
        self.labels, self.samples_per_class = np.asarray(labels), samples_per_class

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shard = self.permutation(epoch)[self.rank :: self.world]
        rng = generator(self.seed, epoch, self.rank)
        by_class = shard[np.argsort(self.labels[shard], kind="stable")]
        members = np.split(by_class, np.flatnonzero(np.diff(self.labels[by_class])) + 1)
        turns = -(-len(shard) // self.samples_per_class)
        classes = self._cycle(rng, np.arange(len(members)), turns)
        picked = np.empty((turns, self.samples_per_class), dtype=shard.dtype)
        turns_of = np.split(
            np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes, minlength=len(members)))[:-1]
        )
        for own, images in zip(turns_of, members, strict=True):
            cycle = self._cycle(rng, images, len(own) * self.samples_per_class)
            picked[own] = cycle.reshape(len(own), self.samples_per_class)
        picked = picked.reshape(-1)[: len(shard)]
        return draws(picked), picked

    @staticmethod
    def _cycle(rng, items, length):
        """`length` items in random cyclic order: every item once, in a fresh order each time round."""
        rounds = -(-length // len(items))
        return np.concatenate([rng.permutation(items) for _ in range(rounds)] or [items[:0]])[:length]


class BatchSampler:
    """Full batches [(epoch, draw, index), ...] of a sampler's epoch; the incomplete last one is dropped.

    start_at(epoch, step) says which epoch comes next, and the batch in it to begin with.
    """

    def __init__(self, sampler, batch_size: int):
        self.sampler, self.batch_size = sampler, batch_size
        self.start_at(0)

    def start_at(self, epoch: int, step: int = 0):
        self.next_epoch, self.next_step = epoch, step

    @property
    def steps(self) -> int:
        """Batches of a whole epoch."""
        return len(self.sampler) // self.batch_size

    def __len__(self):
        return self.steps - self.next_step

    def __iter__(self):
        epoch, first = self.next_epoch, self.next_step
        draw, index = (array.tolist() for array in self.sampler.epoch(epoch))
        for step in range(first, self.steps):
            span = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield [(epoch, d, i) for d, i in zip(draw[span], index[span], strict=True)]


class EvalBatchSampler:
    """This rank's shard of all images in batches, each image exactly once whatever the world size."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world: int = 1):
        self.indices, self.batch_size = range(rank, size, world), batch_size

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self):
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, 0, i) for i in self.indices[start : start + self.batch_size]]
