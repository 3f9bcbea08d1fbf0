"""Loaders: batches of a split, fetched by persistent workers and brought to the training device."""

import itertools
import os
import signal
import sys
import traceback
import warnings
from collections import deque
from contextlib import contextmanager
from multiprocessing import active_children, connection
from multiprocessing.queues import Queue

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter

from models.preprocess import MEAN, STD, normalize
from utils.distributed import block_signals, end_processes
from utils.errors import EndOfRun, format_stack

from .device_augment import to_float

warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as the user asked for


def collate(items):
    """Stacks items into (views, labels, indices): a tuple of uint8 (N, 3, S, S), int64 (N,), a list of N numbers.

    Returns an EndOfRun, for the run to raise, if it is given in place of the items.
    """
    try:
        if isinstance(items, EndOfRun):
            raise items
        views, labels, indices = zip(*items, strict=True)
        return tuple(map(default_collate, zip(*views, strict=True))), torch.tensor(labels), list(indices)
    except EndOfRun as error:
        if get_worker_info() is not None:
            error.worker_stack = format_stack(error) + "\n"  # for TRACEBACK=1: sending the error loses its stack
        return error


def init_worker(_):
    """Makes a worker report a batch that it cannot send, and stay silent if the run is gone.

    By default, the thread that sends batches drops such a batch with a traceback, and the run waits for it forever. The
    thread that hands over a batch's memory, the only caller of sys.excepthook in a worker, would print a traceback if
    the run ends or is killed in the meantime.
    """
    Queue._on_queue_feeder_error = send_error
    sys.excepthook = lambda *_: None


def send_error(queue, error, batch):
    """Sends the error in place of a batch that could not be sent; exits if that cannot be sent either."""
    number, content = batch
    if isinstance(content, ExceptionWrapper):
        os._exit(1)
    where = f"in DataLoader worker process {get_worker_info().id}"
    queue.put((number, ExceptionWrapper((type(error), error, error.__traceback__), where)))


def to_device(view, device, channels_last: bool = False, mean=MEAN, std=STD) -> torch.Tensor:
    """A view of a batch as normalized floats (N, 3, S, S) on the device.

    view: uint8 images, or a pair of images and color parameters (--augment device); mean, std: see
    preprocess.normalize.
    """
    images, parameters = view if isinstance(view, list) else (view, None)
    images = images.to(device, non_blocking=True)
    images = normalize(images if parameters is None else to_float(images, parameters), mean, std)
    return images.to(memory_format=torch.channels_last) if channels_last else images


class Loader(DataLoader):
    """A DataLoader of (views, labels, indices): normalized float images and labels on the device, a list of numbers.

    Its workers ignore the signals that ask for a stop, since the run ends them itself: close() must be called.
    Iterating raises UserError or Unavailable for an image that cannot be read, without a worker's traceback, and before
    any batch of the same step.
    name: of the split; batch_sampler: from samplers.py; options: those of to_device (channels_last, mean, std).
    """

    def __init__(self, name: str, dataset, batch_sampler, workers: int, device, **options):
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=init_worker,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # otherwise it would draw from the global one
        )
        self.name = name
        self.device = device
        self.options = options
        self.indices = deque(maxlen=getattr(batch_sampler, "accum_steps", 1))  # of the latest step's batches

    @property
    def steps(self) -> int:
        """Steps per full epoch."""
        return self.batch_sampler.steps

    @property
    def images_per_step(self) -> int:
        """Images of this process per training step."""
        return self.batch_sampler.images_per_step

    @property
    def images_per_micro_batch(self) -> int:
        """Images of this process per training batch; --accum-steps of them make a step."""
        return self.batch_sampler.batch_size

    @property
    def images_per_epoch(self) -> int:
        """Images of this process per training epoch, including those that fill no step."""
        return len(self.batch_sampler.sampler)

    @property
    def depends_on_ranks(self) -> bool:
        """Whether the images that an epoch draws depend on the number of ranks."""
        return self.batch_sampler.sampler.depends_on_ranks

    def start_at(self, epoch: int, position: int):
        """Says which epoch comes next, and how many of this rank's images in it to skip."""
        self.batch_sampler.start_at(epoch, position)

    def locate(self) -> str:
        """The images of the latest step, for messages."""
        return self.dataset.image_list.locate(sorted(itertools.chain(*self.indices)))

    def __iter__(self):
        batches = self._start()
        with report_killed_workers(batches):
            while step := list(itertools.islice(batches, self.indices.maxlen)):  # all micro-batches of a step
                for error in step:
                    if isinstance(error, EndOfRun):
                        raise error
                for views, labels, indices in step:
                    self.indices.append(indices)
                    images = tuple(to_device(view, self.device, **self.options) for view in views)
                    yield images, labels.to(self.device, non_blocking=True), indices

    def _start(self):
        """Starts the workers, all or none; returns the iterator over batches."""
        others = set(active_children())
        try:
            with block_signals():
                return super().__iter__()
        except BaseException as error:
            end_processes(set(active_children()) - others)
            for frame, _ in traceback.walk_tb(error.__traceback__):
                if isinstance(frame.f_locals.get("self"), _BaseDataLoaderIter):
                    frame.f_locals["self"]._shutdown = True  # it is half made: its __del__ would fail
            if isinstance(error, OSError):
                raise OSError(error.errno, f"{error.strerror}: data workers cannot be started") from error
            raise

    def close(self):
        """Ends the workers. They ignore the signals by which an exit would end them."""
        if self._iterator is not None:
            iterator = self._iterator
            self._iterator = None
            try:
                iterator._shutdown_workers()
            finally:
                end_processes(iterator._workers)


@contextmanager
def report_killed_workers(iterator):
    """Replaces the EOFError or OSError of a worker that was killed while it handed over a batch: names the worker."""
    try:
        yield
    except (EOFError, OSError) as error:
        workers = {worker.sentinel: worker for worker in getattr(iterator, "_workers", [])}
        if not workers or "in DataLoader worker process" in str(error):  # of a transform
            raise
        killed = [workers[sentinel] for sentinel in connection.wait(workers, timeout=5)]
        if not killed:
            raise
        killed[0].join()  # its connection closes a moment before its status is known
        cause = signal.strsignal(-killed[0].exitcode) if killed[0].exitcode < 0 else f"status {killed[0].exitcode}"
        raise RuntimeError(f"DataLoader worker (pid {killed[0].pid}) was ended: {cause}") from None
