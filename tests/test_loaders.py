"""Loaders: the same batches for any number of workers, and an error if a worker fails."""

import time
from multiprocessing import active_children
from threading import Thread

import pytest
import torch
from torch.utils.data import _utils

from datasets import loaders
from datasets.dataset import ListFileDataset
from datasets.lists import ImageList
from datasets.loaders import Loader
from datasets.samplers import BatchSampler, ShuffledSampler
from datasets.splits import Split
from datasets.transforms import Views
from utils.errors import UserError


def build_loader(dataset, workers: int) -> Loader:
    batch_sampler = BatchSampler(ShuffledSampler(range(len(dataset)), 7), min(32, len(dataset)))
    return Loader("train", dataset, batch_sampler, workers, torch.device("cpu"))


@pytest.fixture(scope="module")
def loaded(plain_tree):
    """Two epochs of batches by number of workers."""

    def epochs(workers):
        images = ImageList.from_file(plain_tree / "train.txt")
        loader = build_loader(Split("train", plain_tree, images).dataset(Views(("query", "key"), 32, 7)), workers)
        given = []
        for epoch in range(2):
            loader.start_at(epoch, 0)
            given.append(list(loader))
        loader.close()
        return given

    return {workers: epochs(workers) for workers in (0, 1, 2)}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(loaded, workers):
    for ours, reference in zip(loaded[workers], loaded[0], strict=True):
        assert len(ours) == len(reference) == 4
        for (images, labels, indices), expected in zip(ours, reference, strict=True):
            assert all(map(torch.equal, images, expected[0]))
            assert torch.equal(labels, expected[1]) and indices == expected[2]


def test_every_epoch_augments_an_image_differently(loaded):
    """Persistent workers notice the new epoch, too."""
    for given in loaded.values():
        first, second = ({i: v for views, _, numbers in epoch for i, v in zip(numbers, views[0], strict=True)}
                         for epoch in given)  # fmt: skip
        common = first.keys() & second.keys()
        assert common and not any(torch.equal(first[i], second[i]) for i in common)


class Items:
    """A data set of 8 items, each made by a function."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 8

    def __getitem__(self, item):
        return self.make(), 0, item[2]

    __getitems__ = ListFileDataset.__getitems__


@pytest.fixture
def quick_joins(monkeypatch):
    """Makes torch wait 0.1 seconds for a worker instead of 5."""
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_without_memory_ends_the_run_in_one_line(workers, capfd):
    def make():
        raise MemoryError

    loader = build_loader(Items(make), workers)
    with pytest.raises(UserError, match="out of memory: lower -j/--workers, --batch-size or --image-size"):
        list(loader)
    loader.close()
    assert capfd.readouterr().err == ""


class Unsendable:
    """A batch that a worker has no memory to pickle."""

    def __reduce__(self):
        raise MemoryError


def test_a_worker_that_cannot_send_a_batch_exits(monkeypatch, capfd):
    """Otherwise the run would wait for the batch forever."""
    monkeypatch.setattr(loaders, "collate", lambda items: Unsendable())
    loader = build_loader(Items(lambda: ()), 1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited"):
        list(loader)
    loader.close()
    assert capfd.readouterr().err == "" and not active_children()


def test_a_worker_that_is_busy_is_ended(quick_joins):
    loader = build_loader(Items(lambda: time.sleep(1000)), 1)
    loader._iterator = loader._start()
    loader.close()
    assert not active_children()


def test_workers_that_cannot_be_asked_for_batches_are_ended(quick_joins, monkeypatch):
    """The thread that sends indices to a worker does not start if its stack cannot be allocated."""
    original = Thread.start

    def start_once_refused(thread):
        monkeypatch.setattr(Thread, "start", original)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", start_once_refused)
    loader = build_loader(Items(lambda: ()), 2)
    with pytest.raises(UserError, match="out of memory"):
        list(loader)
    assert not active_children()
