"""Losses and accuracies: averaged over an epoch's steps, and counted per class in an evaluation."""

import time
from fractions import Fraction

import torch
import torch.nn.functional as F

from .distributed import (
    all_reduce,
    broadcast_buffers,
    defer_stop,
    gather_objects,
    get_rank,
    get_world_size,
    heartbeat,
    stop_requested,
)
from .errors import UserError
from .groups import GROUPS, shot_groups

MAX_CONFUSION = 1000  # classes up to which the confusion matrix is counted in full


class Stopwatch:
    """Measures images of all ranks, time, and time spent waiting for data, since an epoch began or was resumed."""

    def __init__(self):
        self.images_seen = 0
        self.seconds = 0.0
        self.data_seconds = 0.0
        self.start = self.latest = time.perf_counter()

    def data_arrived(self):
        self.data_seconds += time.perf_counter() - self.latest

    def trained(self, images: int):
        """Ends a micro-batch. images: those of the whole step if it was the step's last micro-batch, else 0."""
        self.latest = time.perf_counter()
        self.seconds = self.latest - self.start
        self.images_seen += images

    @property
    def images_per_second(self) -> float:
        return self.images_seen / max(self.seconds, 1e-9)


class MetricLogger:
    """Means over an epoch's steps, summed on the device, so that only reading them waits for the device.

    classifiers: the names of the logits. accum_steps: updates per step; a step's values are the mean of its updates'.
    The means are right only between steps, not within one.
    """

    def __init__(self, device, classifiers: tuple[str, ...], accum_steps: int = 1):
        self.device = device
        self.classifiers = classifiers
        self.accum_steps = accum_steps
        self.reset()

    def reset(self):
        """Begins an epoch."""
        self.names = ()
        self.sums = None
        self.updates = 0
        self.source = None  # the file that the sums so far were read from
        self.clock = Stopwatch()

    @property
    def steps(self) -> int:
        """Complete steps."""
        return self.updates // self.accum_steps

    def update(self, figures: dict[str, torch.Tensor], logits: tuple[torch.Tensor, ...], labels):
        """Adds a micro-batch: its figures (scalars by name, such as losses), and the accuracies of each classifier.

        logits: (N, C) each, in the order of the classifiers; their accuracies become top1_<name> and top5_<name>.
        """
        values = dict(figures)
        for name, scores in zip(self.classifiers, logits, strict=False):  # stage III without a teacher has one
            _, top1, top5 = topk_hits(scores.detach(), labels)
            values[f"top1_{name}"] = top1.float().mean()
            values[f"top5_{name}"] = top5.float().mean()
        if self.updates and tuple(values) != self.names:
            earlier = ", ".join(self.names)
            current = ", ".join(values)
            problem = f"metrics.update(): the epoch's averages are of {earlier}, this micro-batch has {current}"
            remedy = "log the same figures in every micro-batch"
            if self.source is not None:
                problem = f"{self.source}: its averages are of {earlier}, this stage has {current}"
                remedy = "resume from a checkpoint that was saved after an epoch (previous or best)"
            raise UserError(f"{problem}; {remedy}", on_all_ranks=True)
        stacked = torch.stack([value.detach().double() for value in values.values()]) / self.accum_steps
        self.names = tuple(values)
        self.sums = stacked if self.sums is None else self.sums.add_(stacked)
        self.updates += 1

    def not_finite(self) -> list[str]:
        """The names of the figures that were not finite in any update."""
        return [name for name, good in zip(self.names, self.sums.isfinite().tolist(), strict=True) if not good]

    def means(self) -> dict[str, float]:
        """Means of this process."""
        return dict(zip(self.names, (self.sums / self.steps).tolist(), strict=True)) if self.steps else {}

    def global_means(self) -> dict[str, float]:
        """Means of all processes; all must call it."""
        if not self.steps:
            return {}
        total = all_reduce(self.sums.clone()) / (self.steps * get_world_size())
        return dict(zip(self.names, total.tolist(), strict=True))

    def state_dict(self) -> dict:
        """The sums of all processes, for a checkpoint within an epoch; all must call it."""
        return {"names": list(self.names), "sums": gather_objects(self.sums.tolist()), "steps": self.steps}

    def load_state_dict(self, state: dict, source):
        """Continues from a state_dict; if it has another number of processes, each takes the mean of their sums.

        source: the file that it was read from, for messages.
        """
        sums = torch.tensor(state["sums"], dtype=torch.float64)  # (processes, names)
        own = sums[get_rank()] if len(sums) == get_world_size() else sums.mean(0)
        self.names = tuple(state["names"])
        self.sums = own.to(self.device)
        self.source = source
        self.updates = state["steps"] * self.accum_steps

    @staticmethod
    def fits(state: dict) -> bool:
        """Whether a value from a file is a state_dict: names, their finite sums per process, whole steps above 0."""
        sums = torch.tensor(state["sums"], dtype=torch.float64)
        named = all(isinstance(name, str) and name.isidentifier() for name in state["names"])
        fits = sums.dim() == 2 and len(sums) > 0 and sums.shape[1] == len(state["names"]) > 0
        return bool(named and fits and sums.isfinite().all() and type(state["steps"]) is int and state["steps"] > 0)


def topk_hits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (predicted, top1, top5) of logits (N, C) and labels, int (N,).

    predicted: the class with the largest logit, int (N,); top1, top5: whether the label is that class, or among those
    with the five largest logits, bool (N,).
    """
    predicted = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hit = predicted == labels[:, None]
    return predicted[:, 0], hit[:, 0], hit.any(dim=1)


class ShotAccuracy:
    """Counts of one classifier's predictions, per class and between classes (groups: Liu et al., 2019).

    train_counts: int (C,), training images per class; classes: their names, or None. Memory depends on the number of
    classes alone: C x C counts for up to 1,000 classes, beyond that, counts between the three groups of classes.
    """

    def __init__(self, train_counts: torch.Tensor, device, classes: list[str] | None = None):
        num_classes = len(train_counts)
        self.train_counts = train_counts
        self.classes = classes
        self.top1, self.top5, self.test_counts = torch.zeros(3, num_classes, dtype=torch.long, device=device)
        cells = shot_groups(train_counts) if num_classes > MAX_CONFUSION else torch.arange(num_classes)
        self.cells = cells.to(device)  # class -> its row and column in the confusion matrix
        self.side = len(GROUPS) if num_classes > MAX_CONFUSION else num_classes
        self.confusion = torch.zeros(self.side**2, dtype=torch.long, device=device)

    def update(self, logits, labels):
        """Adds a batch: logits (N, C), labels (N,)."""
        predicted, top1, top5 = topk_hits(logits, labels)
        self.test_counts.index_add_(0, labels, torch.ones_like(labels))
        self.top1.index_add_(0, labels, top1.long())
        self.top5.index_add_(0, labels, top5.long())
        pairs = self.side * self.cells[labels] + self.cells[predicted]
        self.confusion.index_add_(0, pairs, torch.ones_like(pairs))

    def results(self) -> dict:
        """Accuracies in [0, 1] over all ranks, None if there is nothing to average; all ranks must call it, once.

        overall and top5 are over images; class_mean, many, medium and few are means of the accuracies of those classes
        that have test images. confusion_groups[i][j]: images of group i that were predicted as group j; confusion, for
        up to 1,000 classes: the same for classes.
        """
        flat = all_reduce(torch.cat([self.top1, self.top5, self.test_counts, self.confusion])).cpu()
        top1, top5, test_counts = flat[: -(self.side**2)].view(3, -1)
        confusion = flat[-(self.side**2) :].view(self.side, self.side)
        groups = shot_groups(self.train_counts)
        count = int(test_counts.sum())
        is_full = self.side == len(self.train_counts)
        membership = F.one_hot(groups, len(GROUPS))  # (C, 3)
        confusion_groups = membership.T @ confusion @ membership if is_full else confusion
        record = {
            "overall": int(top1.sum()) / count if count else None,
            "class_mean": mean_accuracy(top1, test_counts),
            "top5": int(top5.sum()) / count if count else None,
            **{name: mean_accuracy(top1[groups == i], test_counts[groups == i]) for i, name in enumerate(GROUPS)},
            "per_class": [c / n if n else None for c, n in zip(top1.tolist(), test_counts.tolist(), strict=True)],
            "train_counts": self.train_counts.tolist(),
            "test_counts": test_counts.tolist(),
            "classes": self.classes,
            "count": count,
            "confusion_groups": confusion_groups.tolist(),
        }
        if is_full:
            record["confusion"] = confusion.tolist()
        return record


def mean_accuracy(correct: torch.Tensor, counts: torch.Tensor) -> float | None:
    """Mean of the accuracies of the classes that have images, None if there are none; correct, counts: int (classes,).

    It is computed exactly and rounded once: if all classes have the same number of images, it is exactly the float
    sum(correct) / sum(counts), and equal means never differ by a rounding error.
    """
    accuracies = [Fraction(c, n) for c, n in zip(correct.tolist(), counts.tolist(), strict=True) if n]
    return float(sum(accuracies) / len(accuracies)) if accuracies else None


@torch.no_grad()
def evaluate(model, loader, train_counts, state) -> dict[str, dict]:
    """Evaluates a model on a list; returns the results of each classifier by name (ShotAccuracy.results).

    model: in eval mode it maps images to the logits (N, C) of a classifier, or to a tuple of those of its classifiers;
    loader: this rank's (views, labels, indices); train_counts: int (C,), training images per class. All ranks take rank
    0's BatchNorm statistics. Raises Stopped if a stop was asked for.
    """
    defer_stop()
    broadcast_buffers(model)
    model.eval()
    counts = {name: ShotAccuracy(train_counts, state.metrics.device, model.classes) for name in model.classifiers}
    with state.progress(loader.name, len(loader)) as progress:
        for (images,), labels, _ in loader:
            if stop_requested():
                break
            with state.autocast():
                logits = model(images)
            if not isinstance(logits, tuple):
                logits = (logits,)
            for count, scores in zip(counts.values(), logits, strict=False):
                count.update(scores, labels)
            progress.step()
            heartbeat()
    state.stop_if_asked()
    return {name: count.results() for name, count in counts.items()}
