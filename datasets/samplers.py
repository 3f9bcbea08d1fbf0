"""Batches of (epoch, draw, index) for training, and shards without padding for evaluation.

What a sampler yields depends on seed, epoch, rank, world size and position alone. It contains epoch and draw because
persistent workers keep the data set that they were started with: only what the sampler yields reaches them.
"""

import numpy as np
import torch


class ShuffledSampler:
    """Every image once per epoch in random order; each rank takes its shard.

    Shards are padded to equal length with images from the start of the permutation, as their second draw.
    labels: one per image; only their number is used here.
    """

    depends_on_ranks = False  # the images of a step are the same for any number of ranks

    def __init__(self, labels, seed: int, rank: int = 0, world_size: int = 1):
        self.size = len(labels)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self):
        """Images per rank and epoch."""
        return -(-self.size // self.world_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of all images, padded to a multiple of the world size."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
        return np.resize(order, len(self) * self.world_size)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(draws, indices) of this rank's epoch; an image's first draw is 0, its second 1."""
        indices = self.permutation(epoch)
        draws = np.arange(len(indices)) // self.size  # the permutation repeats after `size` images
        shard = slice(self.rank, None, self.world_size)
        return draws[shard], indices[shard]


class ClassAwareSampler(ShuffledSampler):
    """Class-aware sampling of stage II (paper, section 3.2; Kang et al., 2020).

    Classes take turns in random cyclic order, each with samples_per_class images, and so do the images of a class.
    Each rank draws from its shard of the epoch's permutation, as many images as the shard holds.
    labels: int (images,).
    """

    depends_on_ranks = True

    def __init__(self, labels, samples_per_class: int, seed: int, rank: int = 0, world_size: int = 1):
        super().__init__(labels, seed, rank, world_size)
        self.labels = np.asarray(labels)
        self.samples_per_class = samples_per_class

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shard = self.permutation(epoch)[self.rank :: self.world_size]
        rng = np.random.default_rng((self.seed, epoch, self.rank))
        by_class = shard[np.argsort(self.labels[shard], kind="stable")]
        classes, first = np.unique(self.labels[by_class], return_index=True)
        images_by_class = np.split(by_class, first[1:])

        num_turns = -(-len(shard) // self.samples_per_class)
        _, turns = cycle(rng, np.arange(len(classes)), num_turns)
        turns_per_class = np.bincount(turns, minlength=len(classes))
        picks = []  # per class an iterator over its turns, each of shape (2, samples_per_class)
        for images, count in zip(images_by_class, turns_per_class, strict=True):
            picked = np.stack(cycle(rng, images, count * self.samples_per_class))
            picks.append(iter(picked.reshape(2, count, self.samples_per_class).swapaxes(0, 1)))
        draws, indices = np.concatenate([next(picks[c]) for c in turns], axis=1)[:, : len(shard)]
        return draws, indices


def cycle(rng: np.random.Generator, items: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(rounds, picks) of `length` picks: every item once per round, in a fresh random order each round."""
    rounds = np.arange(length) // len(items)
    orders = [rng.permutation(items) for _ in range(-(-length // len(items)))]
    return rounds, np.concatenate([items[:0], *orders])[:length]  # items[:0]: there may be no round


class BatchSampler:
    """Batches [(epoch, draw, index), ...] of a sampler's epoch, accum_steps per step; an incomplete step is dropped.

    Each iteration yields one epoch, from epoch 0 on; start_at(epoch, position) sets which epoch comes next, and how
    many of its images to skip.
    """

    def __init__(self, sampler, batch_size: int, accum_steps: int = 1):
        self.sampler = sampler
        self.batch_size = batch_size
        self.accum_steps = accum_steps
        self.start_at(0)

    def start_at(self, epoch: int, position: int = 0):
        self.next_epoch = epoch
        self.position = position

    @property
    def images_per_step(self) -> int:
        """Images per step."""
        return self.batch_size * self.accum_steps

    @property
    def steps(self) -> int:
        """Steps per full epoch."""
        return len(self.sampler) // self.images_per_step

    def __len__(self):
        """Batches from the position on."""
        return max(0, len(self.sampler) - self.position) // self.images_per_step * self.accum_steps

    def __iter__(self):
        epoch = self.next_epoch
        first = self.position
        batches = len(self)
        self.start_at(epoch + 1)
        draws, indices = (array.tolist() for array in self.sampler.epoch(epoch))
        for start in range(first, first + batches * self.batch_size, self.batch_size):
            batch = slice(start, start + self.batch_size)
            yield [(epoch, draw, index) for draw, index in zip(draws[batch], indices[batch], strict=True)]


def eval_batches(size: int, batch_size: int, rank: int = 0, world_size: int = 1):
    """Batches of this rank's shard of all images; every image comes exactly once, for any world size."""
    shard = [(0, 0, index) for index in range(rank, size, world_size)]
    return torch.utils.data.BatchSampler(shard, batch_size, drop_last=False)
