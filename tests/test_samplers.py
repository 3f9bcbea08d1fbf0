"""The order of images: balance, shards, draws, and that it depends on seed, epoch and rank alone."""

from collections import Counter

import numpy as np
import pytest

from datasets.samplers import BatchSampler, ClassAwareSampler, ShuffledSampler, eval_batches

pytestmark = pytest.mark.method

LABELS = np.repeat(np.arange(6), (50, 20, 10, 5, 3, 2))
WORLD_SIZES = (1, 2, 3)


def epochs(sampler, count=3):
    return [sampler.epoch(epoch)[1] for epoch in range(count)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("size", [90, 91, 92])
def test_shards_of_an_epoch_cover_all_images(size, world_size):
    shards = [ShuffledSampler(range(size), 0, rank, world_size) for rank in range(world_size)]
    drawn = [shard.epoch(4) for shard in shards]
    assert {len(indices) for _, indices in drawn} == {len(shards[0])} == {-(-size // world_size)}
    counts = Counter((int(d), int(i)) for draw, index in drawn for d, i in zip(draw, index, strict=True))
    assert set(counts.values()) == {1}  # no two draws of an image are augmented in the same way
    assert {i for _, i in counts} == set(range(size))
    assert sum(d == 0 for d, _ in counts) == size
    assert all(d == 1 for d, _ in counts if d)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_class_aware_shards_are_disjoint(world_size):
    shards = [ClassAwareSampler(LABELS, 2, 0, rank, world_size) for rank in range(world_size)]
    for epoch in range(3):
        permutation = shards[0].permutation(epoch)
        for rank, shard in enumerate(shards):
            assert set(shard.epoch(epoch)[1]) <= set(permutation[rank::world_size])
            assert len(shard.epoch(epoch)[1]) == len(shard)
        if len(LABELS) % world_size == 0:
            seen = [set(permutation[rank::world_size]) for rank in range(world_size)]
            assert sum(map(len, seen)) == len(set.union(*seen)) == len(LABELS)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_classes_take_turns_in_cyclic_order(samples):
    """Every class once, for `samples` images, before any is repeated; the order changes from round to round."""
    sampler = ClassAwareSampler(LABELS, samples, 0)
    for picked in epochs(sampler):
        turns = LABELS[picked][: len(picked) // samples * samples].reshape(-1, samples)
        assert (turns == turns[:, :1]).all()
        rounds = [turns[start : start + 6, 0] for start in range(0, len(turns), 6)]
        assert all(len(set(r)) == len(r) for r in rounds)
        assert len({tuple(r) for r in rounds[:-1]}) > 1


def test_images_of_a_class_take_turns_in_cyclic_order():
    """Every image of a class once before any is repeated, in an order that changes."""
    for picked in epochs(ClassAwareSampler(LABELS, 2, 0)):
        for label, size in enumerate(np.bincount(LABELS)):
            own = picked[LABELS[picked] == label]
            rounds = [tuple(own[start : start + size]) for start in range(0, len(own), size)]
            assert all(len(set(r)) == len(r) for r in rounds)
            if label == 4:
                assert len(set(rounds[:-1])) > 1


def test_a_rank_without_images_of_a_class_draws_from_the_others():
    labels = np.array([0] * 9 + [1])
    for rank in range(2):
        sampler = ClassAwareSampler(labels, 2, 0, rank, 2)
        picked = sampler.epoch(0)[1]
        shard = sampler.permutation(0)[rank::2]
        assert len(picked) == 5 and set(labels[picked]) == set(labels[shard])


@pytest.mark.parametrize(
    "sampler", [lambda *a: ShuffledSampler(LABELS, *a), lambda *a: ClassAwareSampler(LABELS, 2, *a)]
)
def test_order_follows_from_seed_epoch_and_rank(sampler):
    orders = {
        (seed, epoch, rank): tuple(sampler(seed, rank, 2).epoch(epoch)[1])
        for seed in range(2) for epoch in range(2) for rank in range(2)
    }  # fmt: skip
    assert len(set(orders.values())) == len(orders)
    used = sampler(0, 1, 2)
    for epoch in (1, 0, 1):  # what was asked before does not matter
        assert tuple(used.epoch(epoch)[1]) == orders[0, epoch, 1]


@pytest.mark.parametrize("sampler", [ShuffledSampler(LABELS, 0), ClassAwareSampler(LABELS, 2, 0)])
def test_draws_count_up_within_an_epoch(sampler):
    draw, index = sampler.epoch(1)
    assert draw.tolist() == [int((index[:at] == index[at]).sum()) for at in range(len(index))]


def test_batches_are_full_and_carry_the_epoch():
    sampler = ClassAwareSampler(LABELS, 2, 0)
    batches = BatchSampler(sampler, 8)
    batches.start_at(5)
    assert len(batches) == batches.steps == 11  # 90 images, the last two left out
    given = list(batches)
    draw, index = sampler.epoch(5)
    expected = [(5, int(d), int(i)) for d, i in zip(draw, index, strict=True)]
    assert [item for batch in given for item in batch] == expected[:88]
    assert next(iter(batches))[0][0] == 6  # the next pass is the next epoch
    batches.start_at(5)
    assert list(batches) == given


@pytest.mark.parametrize("position", [0, 3, 8, 80, 83, 88, 90])
def test_starting_within_an_epoch_gives_the_rest_of_it(position):
    batches = BatchSampler(ShuffledSampler(LABELS, 0), 8)
    batches.start_at(2)
    whole = [item for batch in batches for item in batch]
    batches.start_at(2, position)
    assert len(batches) == (90 - position) // 8
    rest = list(batches)
    assert [item for batch in rest for item in batch] == whole[position : position + 8 * len(rest)]


@pytest.mark.parametrize("position", [0, 24, 27])
def test_micro_batches_are_the_batches_of_whole_steps(position):
    """90 images in steps of 24: the fourth step would lack images."""
    whole, parts = (BatchSampler(ShuffledSampler(LABELS, 0), size, 24 // size) for size in (24, 6))
    for batches in (whole, parts):
        batches.start_at(2, position)
    assert parts.steps == whole.steps == 3 and parts.images_per_step == 24
    assert len(parts) == 4 * len(whole)
    given = list(parts)
    assert {len(batch) for batch in given} == {6}
    assert [item for batch in given for item in batch] == [item for batch in whole for item in batch]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("size", [1, 2, 16, 101])
def test_evaluation_takes_every_image_once(size, world_size):
    shards = [eval_batches(size, 8, rank, world_size) for rank in range(world_size)]
    for shard in shards:
        given = list(shard)
        assert len(given) == len(shard)
        assert all(len(batch) == 8 for batch in given[:-1])
    items = [item for shard in shards for batch in shard for item in batch]
    assert sorted(items) == [(0, 0, i) for i in range(size)]


def test_ranks_do_not_draw_the_same_classes_at_the_same_time():
    labels = np.repeat(np.arange(6), 20)
    one, other = (labels[ClassAwareSampler(labels, 2, 0, rank, 2).epoch(0)[1]] for rank in range(2))
    assert one.tolist() != other.tolist()
