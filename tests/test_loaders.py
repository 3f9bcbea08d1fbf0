"""Loaders: the same batches for any number of workers, and an error if a worker fails."""

import multiprocessing
import sys
import time
from contextlib import closing
from functools import partial
from multiprocessing import active_children, current_process, resource_sharer
from multiprocessing.connection import Client
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import _utils

from datasets import loaders
from datasets.dataset import ListFileDataset
from datasets.lists import ImageList
from datasets.loaders import Loader
from datasets.samplers import BatchSampler, ShuffledSampler
from datasets.splits import Split
from datasets.transforms import Views
from tests.helpers import TWO, assert_mistake
from utils.arguments import training_parser
from utils.errors import UserError
from utils.launch import launch
from utils.launch.failures import describe_failure


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
    with pytest.raises(MemoryError) as caught:
        list(loader)
    assert "out of memory" in describe_failure(caught.value)[1]
    loader.close()
    assert capfd.readouterr().err == ""


class Unsendable:
    """A batch that a worker cannot pickle."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize("error", [MemoryError("no memory"), TypeError("cannot pickle")])
def test_a_batch_that_cannot_be_sent_ends_the_run(monkeypatch, capfd, error):
    """Otherwise the run would wait for the batch forever."""
    monkeypatch.setattr(loaders, "collate", lambda items: Unsendable(error))
    loader = build_loader(Items(lambda: ()), 1)
    with pytest.raises(type(error), match=str(error)):
        list(loader)
    loader.close()
    assert capfd.readouterr().err == "" and not active_children()


def test_a_worker_that_cannot_even_send_its_error_exits(monkeypatch, capfd):
    monkeypatch.setattr(loaders, "collate", lambda items: Unsendable(MemoryError()))
    monkeypatch.setattr(ExceptionWrapper, "__reduce__", Unsendable(MemoryError()).__reduce__)
    loader = build_loader(Items(lambda: ()), 1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited"):
        list(loader)
    loader.close()
    assert capfd.readouterr().err == "" and not active_children()


def test_a_worker_says_nothing_of_a_run_that_does_not_take_its_batch(monkeypatch, capfd):
    """As if the run ended, or was interrupted, while the worker hands over the memory of a batch."""

    def leave(handle):
        Client(handle[0], authkey=current_process().authkey).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(resource_sharer._ResourceSharer, "get_connection", staticmethod(leave))
    loader = build_loader(Items(lambda: (torch.zeros(3),)), 1)
    with pytest.raises(KeyboardInterrupt):
        list(loader)
    loader.close()
    assert capfd.readouterr().err == ""


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
    with pytest.raises(RuntimeError) as caught:
        list(loader)
    assert not active_children() and "out of memory" in describe_failure(caught.value)[1]


# ---- a transform of one's own, in the process itself or in workers, in one process or several


def opens_a_missing_file(image, item):
    return open("/nowhere/colors.json")


def has_a_fault(image, item):
    raise RuntimeError("colors do not\nfit")


def makes_a_mistake(image, item):
    raise UserError("--colors: correct them")


def prints(image, item):
    print("colors: 3", file=sys.stderr, flush=True)
    return (torch.zeros(3, 8, 8),)


def load_with(transform, args, device):
    """A main_worker that reads the training images with a transform."""
    images = ImageList.from_file(Path(args.data) / "train.txt")
    dataset = Split("train", args.data, images).dataset(transform)
    with closing(build_loader(dataset, args.workers)) as loader:
        list(loader)


TWO_PROCESSES = [pytest.param((workers, TWO), marks=pytest.mark.full) for workers in (0, 2)]


@pytest.fixture(params=[(0, []), (2, []), *TWO_PROCESSES], ids=str)
def run(request, plain_tree, capfd):
    """Loads with a transform; returns (status, stdout, stderr). run.workers: the number of data workers."""
    workers, flags = request.param

    def run(transform):
        parser = training_parser("", epochs=1, batch_size=2, lr=1, workers=0, output_dir="none")
        argv = ["-j", workers, "--device", "cpu", *flags, plain_tree]
        return launch(partial(load_with, transform), parser, list(map(str, argv))), *capfd.readouterr()

    run.workers = workers
    return run


def test_a_file_that_a_transform_does_not_find_is_named_with_the_line_that_opens_it(run):
    place = f"(in {__file__}, line {opens_a_missing_file.__code__.co_firstlineno + 1})"
    assert_mistake(run(opens_a_missing_file), "No such file or directory: '/nowhere/colors.json'", place)


@pytest.mark.parametrize("run", [(0, []), (2, TWO)], ids=str, indirect=True)
def test_a_fault_in_a_transform_keeps_its_traceback(run):
    """No worker has died, and no other memory or number of workers would help."""
    status, _, err = run(has_a_fault)
    assert status == 1 and err.endswith("RuntimeError: colors do not\nfit\n") and "in has_a_fault" in err
    assert ("Caught RuntimeError in DataLoader worker process" in err) == (run.workers > 0) and " died" not in err


def test_a_mistake_in_a_transform_is_one_line(run):
    assert_mistake(run(makes_a_mistake), "--colors: correct them")


def test_what_a_transform_prints_to_stderr_is_seen(run):
    status, _, err = run(prints)
    assert status == 0 and "colors: 3\n" in err


@pytest.mark.parametrize("transform", [opens_a_missing_file, makes_a_mistake])
def test_traceback_prints_the_stack_before_the_line(run, monkeypatch, transform):
    monkeypatch.setenv("TRACEBACK", "1")
    status, _, err = run(transform)
    stack, line = err[:-1].rsplit("\n", 1)
    assert status == 2 and f"in {transform.__name__}\n" in stack
    assert "colors" in line and "Traceback" not in line


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are spawned")
def test_workers_are_forked_whatever_pythons_default_is(plain_tree, monkeypatch):
    spawn, found = multiprocessing.get_context("spawn"), []
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", spawn)
    parser = training_parser("", epochs=1, batch_size=2, lr=1, workers=0, output_dir="none")
    argv = ["--device", "cpu", str(plain_tree)]
    assert launch(lambda args, device: found.append(multiprocessing.get_start_method()), parser, argv) == 0
    assert found == ["fork"]
