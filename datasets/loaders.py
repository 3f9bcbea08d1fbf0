"""Loaders: batches (views, labels, indices) of a split, fetched by persistent workers."""

from multiprocessing import connection

import torch
from torch.utils.data import DataLoader, default_collate

from utils.errors import UserError
from utils.launch.signals import block_signals


def collate(items):
    """Stacks items into (views, labels, indices): a tuple of uint8 (N, 3, S, S), int64 (N,), a list of N numbers."""
    if isinstance(items, UserError):
        return items
    views, labels, indices = zip(*items, strict=True)
    return tuple(map(default_collate, zip(*views, strict=True))), torch.tensor(labels), list(indices)


def build_loader(dataset, batch_sampler, workers: int, pin_memory: bool = False) -> DataLoader:
    """A loader over the batch sampler's batches; the training loop takes them through `batches`."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # else it would draw from the global one
    )


def batches(loader):
    """The loader's batches. Raises UserError, without a worker's traceback, for an image that cannot be read.

    The workers never see the signals that ask for a stop: the run ends them itself, after its checkpoint.
    """
    with block_signals():
        iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (EOFError, OSError) as error:  # a worker that is killed while it hands over a batch
        workers = {worker.sentinel: worker.pid for worker in getattr(iterator, "_workers", [])}
        dead = [str(workers[sentinel]) for sentinel in connection.wait(workers, timeout=5)]
        raise RuntimeError(f"DataLoader worker (pid {', '.join(dead)}) died") if dead else error from None


def close(loader):
    """Ends the loader's workers. They ignore the signals by which an exit would end them, so this must be called."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None
