"""Evaluation of a list: exact counts, every image once, for any number of processes."""

import torch

from .distributed import broadcast_buffers
from .metrics import ShotAccuracy
from .signals import defer_stop, heartbeat, stop_requested


@torch.no_grad()
def evaluate(model, loader, train_counts, state) -> dict[str, dict]:
    """The results of each classifier over a list, by name; see metrics.ShotAccuracy.results.

    model: in eval mode it maps images to the logits (N, C) of a classifier, or to a tuple of those of its classifiers;
    loader: this rank's (views, labels, indices); train_counts: int (C,), training images per class. All ranks take rank
    0's BatchNorm statistics. Raises Stopped if a stop was asked for.
    """
    defer_stop()
    broadcast_buffers(model)
    model.eval()
    counts = {name: ShotAccuracy(train_counts, state.device, model.classes) for name in model.classifiers}
    with state.progress(loader.name, len(loader)) as progress:
        for (images,), labels, _ in loader:
            if stop_requested():
                break
            with state.autocast():
                logits = model(images)
            for count, scores in zip(counts.values(), logits if isinstance(logits, tuple) else (logits,), strict=False):
                count.update(scores, labels)
            progress.step()
            heartbeat()
    state.stop_if_asked()
    return {name: count.results() for name, count in counts.items()}
