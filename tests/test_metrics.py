"""The means of an epoch: what they take, and that they continue with any number of processes."""

import pytest
import torch

from utils import metrics
from utils.errors import UserError
from utils.metrics import MetricLogger, Stopwatch


def updated(*losses) -> MetricLogger:
    logger = MetricLogger(torch.device("cpu"), ())
    for loss in losses:
        logger.update({"loss": torch.tensor(float(loss))}, (), torch.zeros(1, dtype=torch.int64))
    return logger


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_means_of_two_processes_continue_in_any_number_of_them(monkeypatch, world_size):
    saved = updated(1, 2).state_dict()
    saved["sums"] += updated(5, 8).state_dict()["sums"]  # of the second process; the mean of all is 4
    monkeypatch.setattr(metrics, "get_world_size", lambda: world_size)
    means = []
    for rank in range(world_size):
        monkeypatch.setattr(metrics, "get_rank", lambda rank=rank: rank)
        logger = updated()
        logger.load_state_dict(saved, "file")
        logger.update({"loss": torch.tensor(10.0)}, (), torch.zeros(1, dtype=torch.int64))
        means.append(logger.means()["loss"])
    assert sum(means) / world_size == pytest.approx((4 * 2 + 10) / 3)


def test_a_figure_of_some_micro_batches_alone_is_named():
    with pytest.raises(UserError, match=r"of loss, .*has extra;.* every micro-batch"):
        updated(1).update({"extra": torch.tensor(1.0)}, (), torch.zeros(1, dtype=torch.int64))


def test_the_stopwatch_tells_waiting_for_data_from_training(monkeypatch):
    times = iter([0.0, 1.0, 5.0, 6.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Stopwatch()
    for images in (0, 16):
        clock.data_arrived()
        clock.trained(images)
    assert (clock.data_seconds, clock.seconds, clock.images_seen) == (2.0, 10.0, 16)
